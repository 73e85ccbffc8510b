"""Whether an index is the one that a manifest describes: what FAISS knows once it has read it."""

from collections.abc import Iterator

from ..datastore.datastore import Datastore
from ..errors import UserError
from .faiss_import import FAISS_METRICS, faiss
from .index_build import load
from .index_factory import make_index

_METRIC_NAMES = {number: name for name, number in FAISS_METRICS.items()}
# Sizes that tell indexes of one class apart, and the indexes within an index.
_SIZES = ("d", "nlist", "code_size")
_INNER = ("index", "base_index", "refine_index", "quantizer")


def load_checked(datastore: Datastore):
    """Read the index of a datastore.

    Args:
        datastore (Datastore): whose files are verified as it says.

    Returns:
        a FAISS index.

    Raises:
        UserError: if it is damaged, no index, not the one that the manifest describes, or was
            replaced meanwhile.
    """
    with datastore.reading_index() as path:
        index = load(path)
    differences = list(index_faults(index, datastore.manifest))
    if differences:
        raise UserError(
            f"{datastore.index_path} is not the index of its manifest: {'; '.join(differences)}; "
            "build the datastore again"
        )
    return index


def index_faults(index, manifest: dict) -> Iterator[str]:
    """In what an index differs from what a manifest says of it.

    Args:
        index: a FAISS index.
        manifest (dict): of the datastore that it belongs to.

    Yields:
        str: for each difference the name of the field, what it says and what the index is.
    """
    described = manifest["index"]
    metric = _METRIC_NAMES.get(index.metric_type, str(index.metric_type))
    pairs = [
        ("count", manifest["count"], index.ntotal),
        ("dimension", manifest["dimension"], index.d),
        ("index.metric", described["metric"], metric),
    ]
    different = [
        f"{name} is {said}, of the index {found}" for name, said, found in pairs if said != found
    ]
    yield from different
    if different:
        return
    empty = make_index(described["factory"], index.d, metric)
    expected, found = list(_structure(empty)), list(_structure(index))
    if expected != found:
        yield (
            f"index.factory is {described['factory']}, which is {' '.join(expected)}, the index is "
            f"{' '.join(found)}"
        )


def _structure(index) -> Iterator[str]:
    """The classes and sizes of an index and of those within it, from the outside inwards."""
    index = faiss.downcast_index(index)
    sizes = [f"{name}={getattr(index, name)}" for name in _SIZES if hasattr(index, name)]
    # Read back, a flat index is of another class than the one that was written.
    kind = faiss.IndexFlat if isinstance(index, faiss.IndexFlat) else type(index)
    yield f"{kind.__name__}({', '.join(sizes)})"
    for name in _INNER:
        inner = getattr(index, name, None)
        if inner is not None:
            yield from _structure(inner)
