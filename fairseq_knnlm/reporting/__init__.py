"""A report of ``fairseq-knnlm-tune``: tables, figures and one page, in a directory.

``tables`` and ``sizes`` compute, and ``intervals`` says how sure that is; ``text_tables`` puts
numbers into words, which ``report_page`` shows on the page and ``latex`` in papers; ``figures``
draws in the ``look`` of all of them, and ``report`` writes the files. The only door to matplotlib,
which is imported when a report is asked for. Imports from the root, ``probability`` and ``tuning``.
"""

from .report import refuse_impossible, write
from .sizes import SizePoint, log_p_knn_of_part, tune_sizes
from .tables import make_tables, training_counts

__all__ = [
    "SizePoint",
    "log_p_knn_of_part",
    "make_tables",
    "refuse_impossible",
    "training_counts",
    "tune_sizes",
    "write",
]
