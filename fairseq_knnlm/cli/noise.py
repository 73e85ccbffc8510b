"""What our commands do not print: other packages' remarks that no user of theirs can act on.

fairseq was written for older releases of hydra and PyTorch, and both say so whenever it runs. Only
what is known to mean nothing is left out; every other warning is shown.
"""

import logging
import sys
import warnings

# Beginnings of the texts of warnings, and the class of each.
_MEANINGLESS = (
    # fairseq reads its defaults with an interface of hydra 1.0
    (r"\s*hydra\.experimental\.\w+\(\) is no longer experimental", UserWarning),
    (r"\s*The version_base parameter is not specified", UserWarning),
    (r"\s*In '.*': Usage of deprecated keyword in package header", UserWarning),
    (r"\s*'config' is validated against ConfigStore schema", UserWarning),
    (r"\s*The strict flag in the compose API is deprecated", UserWarning),
    # fairseq's data loader and attention, on a PyTorch of today
    (r"'pin_memory' argument is set as true but no accelerator is found", UserWarning),
    (r"Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning),
)
# Packages whose deprecated interfaces fairseq uses.
_DEPRECATING = r"(hydra|omegaconf|torch|fairseq|numpy)\b"


def silence() -> None:
    """Leave these warnings out from now on, unless Python was told which warnings to show."""
    if sys.warnoptions:
        return
    for text, category in _MEANINGLESS:
        warnings.filterwarnings("ignore", text, category)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_DEPRECATING)


def without_configuration(logger_name: str) -> None:
    """Leave out the lines of a logger that are fairseq's whole configuration: 5,000 columns each.

    Args:
        logger_name (str): of one of fairseq's commands.
    """
    logging.getLogger(logger_name).addFilter(lambda record: isinstance(record.msg, str))
