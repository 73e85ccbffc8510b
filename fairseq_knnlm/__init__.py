"""k-nearest-neighbour language models for fairseq (Khandelwal et al., ICLR 2020).

Importing this package, which is what ``--user-dir`` does, registers the task ``knnlm_lm``
and the criterion ``trime_loss``.
"""

from .plugin.compat import root_logger_kept
from .version import __version__  # noqa: F401

with root_logger_kept():
    from .plugin import task as _registers_knnlm_lm  # noqa: F401
