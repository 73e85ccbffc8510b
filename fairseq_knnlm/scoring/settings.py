"""What the flags mean: the settings of a search and a mixture, their defaults and their ranges."""

from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional, Union

from ..arguments import refuse
from ..errors import UserError
from ..fields import POSITIVE, Kind, brief, is_number, one_of, whole
from ..options import DEFAULT_DISTANCES, DEFAULT_K, DEFAULT_NPROBE, DISTANCES
from ..probability.continuous_cache import CACHE_METRICS
from ..probability.mixture import ROUNDING

DEFAULT_LAMBDA = 0.25
DEFAULT_CACHE_LAMBDA = 0.1
# No text that is evaluated has more tokens than this.
MOST_CACHED = 2**31 - 1
AUTO = "auto"
# The unit of a temperature is that of a model's squared distances: no number fits all models.
DEFAULT_TEMPERATURE = AUTO
CACHE_RESETS = ["none", "document", "block"]


class Settings(NamedTuple):
    """What is searched with, and how neighbours and cache are mixed in.

    k (int): neighbours per query, >= 1.
    knn_lambda (float): weight of p_knn, in [0, 1].
    temperature (float): T > 0, divides the distances; or ``AUTO``, what the datastore records, see
        ``with_temperature``.
    nprobe (int): inverted lists visited, >= 1.
    distances (str): ``exact``, ``index`` or ``exhaustive``, see ``search.Retriever``.
    cache_size (int): positions that the continuous cache looks back on; 0: no cache.
    cache_lambda (float): weight of p_cache, in [0, 1].
    cache_theta (float): >= 0; None: as ``ContinuousCache`` chooses.
    cache_metric (str): ``ip`` or ``l2``.
    cache_reset (str): ``none``, or ``document``: the cache is emptied where one begins; with
        ``trime_temperature`` also ``block``.
    trime_temperature (float): > 0: the cache is no distribution of its own, but joins the softmax
        of the language model, see ``trime_scorer``; None: it is one.
    skip (float): share of the searches that a gate leaves out, in [0, 1].
    """

    k: int = DEFAULT_K
    knn_lambda: float = DEFAULT_LAMBDA
    temperature: Union[float, str] = DEFAULT_TEMPERATURE
    nprobe: int = DEFAULT_NPROBE
    distances: str = DEFAULT_DISTANCES
    cache_size: int = 0
    cache_lambda: float = DEFAULT_CACHE_LAMBDA
    cache_theta: Optional[float] = None
    cache_metric: str = CACHE_METRICS[0]
    cache_reset: str = CACHE_RESETS[0]
    trime_temperature: Optional[float] = None
    skip: float = 0.0


_WEIGHT = Kind("in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
# What each field of ``Settings`` may be, as a flag and in what ``fairseq-knnlm-tune`` stored.
RANGES = {
    "k": whole(1),
    "knn_lambda": _WEIGHT,
    "temperature": Kind(
        f"{POSITIVE.expected}, or {AUTO}", lambda value: value == AUTO or POSITIVE.holds(value)
    ),
    "nprobe": whole(1),
    "distances": one_of(DISTANCES),
    "cache_size": whole(0, MOST_CACHED),
    "cache_lambda": _WEIGHT,
    "cache_theta": Kind("a finite number >= 0", lambda value: is_number(value) and value >= 0),
    "cache_metric": one_of(CACHE_METRICS),
    "cache_reset": one_of(CACHE_RESETS),
    "trime_temperature": POSITIVE,
    "skip": _WEIGHT,
}


def flag_of(field: str) -> str:
    """The flag of a field of ``Settings`` or of the flags' dataclass: ``--knn-cache-size``."""
    name = field if field.startswith(("knn_", "trime_")) else f"knn_{field}"
    return f"--{name.replace('_', '-')}"


def range_faults(given: dict, name_of: Callable = flag_of) -> list[str]:
    """What is wrong with settings, each by itself.

    Args:
        given (dict): some fields of ``Settings``.
        name_of (callable): the name of a field in the text: by default its flag.

    Returns:
        list of str: for each fault the name, what it may be and what came.
    """
    return [
        f"{name_of(name)} must be {kind.expected}, got {brief(given[name])}"
        for name, kind in RANGES.items()
        if given.get(name) is not None and not kind.holds(given[name])
    ]


def refuse_impossible(owner: str, settings: Settings) -> None:
    """Refuse settings that somebody made from Python and that cannot be.

    Args:
        owner (str): the function or class that takes them.
        settings (Settings): what it was given.

    Raises:
        UserError: naming every field that is wrong, what it may be and what it is.
    """
    refuse(f"{owner}: settings", range_faults(settings._asdict(), name_of=str))


def weight_fault(settings: Settings) -> Optional[str]:
    """What is wrong with the weights of neighbours and cache together; None: nothing."""
    if settings.knn_lambda + settings.cache_lambda <= 1.0 + ROUNDING:
        return None
    return (
        "--knn-lambda and --knn-cache-lambda must be at most 1 together, the weight of the "
        f"language model being the rest, got {settings.knn_lambda} and {settings.cache_lambda}"
    )


def trime_faults(given: dict) -> Iterator[str]:
    """What is wrong with settings of a cache that joins the softmax of the language model.

    Args:
        given (dict): fields of ``Settings`` that were given.

    Yields:
        str: for each fault the flag and what is expected.
    """
    if given.get("trime_temperature") is None:
        if given.get("cache_reset") == "block":
            yield "--knn-cache-reset block is for --trime-temperature, which is missing"
        return
    if not given.get("cache_size"):
        yield "--trime-temperature needs --knn-cache-size: how many tokens are looked back on"
    others = [name for name in ("cache_lambda", "cache_theta") if given.get(name) is not None]
    if others:
        flags = " and ".join(map(flag_of, others))
        yield f"{flags}: with --trime-temperature one softmax weighs words and memories; drop it"
    if given.get("cache_metric") == "l2":
        yield "--knn-cache-metric must be ip with --trime-temperature, got l2"


def with_temperature(settings: Settings, datastore) -> Settings:
    """The same settings, with a number in the place of a temperature that is ``AUTO``.

    Args:
        settings (Settings): of a search.
        datastore (Datastore): that is searched, the first of several.

    Raises:
        UserError: if it records no temperature, and *settings* leave it to it.
    """
    if settings.temperature != AUTO:
        return settings
    recorded = datastore.manifest.get("temperature")
    if recorded is None:
        raise UserError(
            f"the datastore {datastore.path} records no temperature to start with, which "
            f"--knn-temperature {AUTO}, the default, stands for: give --knn-temperature a number > "
            "0, have it tuned by fairseq-knnlm-tune, or build the datastore again with this release"
        )
    return settings._replace(temperature=recorded["value"])
