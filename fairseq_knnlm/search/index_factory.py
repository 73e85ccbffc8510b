"""Which FAISS index: chosen from the size, made from a factory string, refused if impossible."""

import math
import re

from ..arguments import check_arguments
from ..errors import UserError
from ..fields import one_of, whole
from ..options import METRICS
from .faiss_import import FAISS_METRICS, faiss, faiss_version
from .ordering import MAX_KEYS

# Below this many keys an exhaustive search costs less than training an index.
FLAT_BELOW = 8192
# The paper's WikiText-103 index has 4096 lists for 103M keys.
MAX_NLIST = 4096
# FAISS warns below 39 training keys a list and ignores more than 256.
TRAINING_KEYS_PER_LIST = 64
# FAISS takes these factory strings, and ends the process when it builds some of them.
_SIZE_OF_ZERO = r"(?:IVF|HNSW|NSG|PQ\d+x)0+(?!\d)"


def default_index_factory(count: int, dimension: int) -> str:
    """A FAISS factory string for *count* keys.

    About 1.7 sqrt(N) lists, up to the paper's 4096, and 64-byte codes: 128
    sub-quantisers of 4 bits, which are scanned in registers, in place of the paper's 64 of 8.

    Args:
        count (int): N.
        dimension (int): D.

    Raises:
        UserError: if a number cannot be.
    """
    check_arguments(
        "default_index_factory", count=(count, whole(0)), dimension=(dimension, whole(1))
    )
    if count < FLAT_BELOW:
        return "Flat"
    nlist = min(MAX_NLIST, 64 * round(1.7 * math.sqrt(count) / 64))
    sub_quantizers = max(m for m in range(1, 129) if dimension % m == 0)
    return f"IVF{nlist},PQ{sub_quantizers}x4fs"


def make_index(index_factory: str, dimension: int, metric: str):
    """An empty, untrained FAISS index.

    Args:
        index_factory (str): FAISS factory string.
        dimension (int): D.
        metric (str): ``l2`` or ``ip``.

    Raises:
        UserError: if FAISS does not know the factory string, or there is no such metric.
    """
    check_arguments("make_index", metric=(metric, one_of(METRICS)))
    # "PQ16" would turn on polysemous training, 30 times slower and not used here
    plain = re.sub(r"(?<![A-Z])(PQ\d+(x\d+)?)(?=$|,)", r"\1np", index_factory)
    try:
        return faiss.index_factory(dimension, plain, FAISS_METRICS[metric])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"{index_factory!r} (--knn-index) is no FAISS index for {dimension} dimensions "
            f"({reason}); see the FAISS wiki, 'The index factory', e.g. IVF4096,PQ64 or Flat"
        ) from None


def refuse_unbuildable(index_factory: str, count: int, dimension: int, metric: str) -> None:
    """Refuse an index that cannot be built of *count* keys, before they are there.

    Args:
        index_factory (str): FAISS factory string.
        count (int): keys that it will hold.
        dimension (int): D.
        metric (str): ``l2`` or ``ip``.

    Raises:
        UserError: naming both numbers.
    """
    index = make_index(index_factory, dimension, metric)
    ivf = inverted_file(index)
    if re.search(_SIZE_OF_ZERO, index_factory):
        raise UserError(
            f"the index {index_factory} (--knn-index) has a size of 0 in it, where lists, links or "
            "bits are counted: expected at least 1"
        )
    kinds = [faiss.downcast_index(index)] + ([ivf] if ivf is not None else [])
    needed = max(
        [kind.pq.ksub for kind in kinds if hasattr(kind, "pq")]
        + [ivf.nlist if ivf is not None else 0]
    )
    if count > MAX_KEYS:
        raise UserError(
            f"a datastore holds {MAX_KEYS:,} keys at most, the split has {count:,}: "
            "build one of each part and name them all, separated by ':', in --knn-datastore"
        )
    if count < needed:
        raise UserError(
            f"the index {index_factory} (--knn-index) needs {needed:,} keys to be trained on, the "
            f"split has {count:,}: use fewer lists, or Flat"
        )


def inverted_file(index):
    """The inverted file within *index*, or None; with its own type, unlike extract_index_ivf."""
    ivf = faiss.try_extract_index_ivf(index)
    return faiss.downcast_index(ivf) if ivf is not None else None


def describe(index, index_factory: str, metric: str) -> dict:
    """What the manifest says of an index.

    Args:
        index: the FAISS index.
        index_factory (str): FAISS factory string that it was made from.
        metric (str): ``l2`` or ``ip``.

    Returns:
        dict: JSON.
    """
    ivf = inverted_file(index)
    return {
        "factory": index_factory,
        "metric": metric,
        "nlist": ivf.nlist if ivf is not None else None,
        "faiss_version": faiss_version(),
    }


def training_rows(index, count: int) -> int:
    """How many of *count* keys an index is trained on.

    Args:
        index: the FAISS index.
        count (int): keys that it will hold.
    """
    ivf = inverted_file(index)
    return min(count, TRAINING_KEYS_PER_LIST * (ivf.nlist if ivf is not None else 1024))
