"""FAISS itself, for the other modules of this package: ``from .faiss_import import faiss``.

It is imported after torch. In the other order, wheels of the two that bring OpenMP libraries of
their own gave users of other kNN packages wrong results.
"""

import logging

import torch  # noqa: F401

from ..errors import UserError

# At level INFO, FAISS logs seven lines about which of its builds it loads.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
try:
    import faiss
except (ImportError, RuntimeError) as error:  # a broken CUDA library raises RuntimeError
    raise UserError(
        f"FAISS cannot be imported ({error}): pip install 'fairseq_knnlm[cpu]', or "
        "'fairseq_knnlm[gpu]' where there is a GPU, never both"
    ) from error

FAISS_METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


def faiss_version() -> str:
    """Version of the FAISS that is running."""
    return faiss.__version__
