"""What fairseq sees: the task, its flags, the generator, and the patches of running commands.

``task`` wires the parts together and ``config`` declares the flags. fairseq gives no hook for its
scorer and its printing: ``eval_lm_patch`` and ``print_patch`` reach in at run time, and are undone.
With ``hub`` and ``cli`` the only door to fairseq. Imports from every package but these two.
"""

import logging

from .compat import root_logger_kept

# fairseq's text-to-speech task logs, whenever fairseq is imported, that tensorboardX is missing.
_text_to_speech = logging.getLogger("fairseq.tasks.text_to_speech")
_text_to_speech.disabled = True
with root_logger_kept():
    import fairseq  # noqa: F401

_text_to_speech.disabled = False
