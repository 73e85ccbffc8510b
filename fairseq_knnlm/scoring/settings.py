"""What the flags mean: the settings of a search and a mixture, their defaults and their ranges."""

import math
from typing import NamedTuple, Optional, Union

from ..errors import UserError
from ..probability.continuous_cache import METRICS
from ..probability.mixture import ROUNDING

DEFAULT_KEY = "ffn-input"
DEFAULT_METRIC = "l2"
DEFAULT_K = 1024
DEFAULT_LAMBDA = 0.25
AUTO = "auto"
# The unit of a temperature is that of a model's squared distances: no number fits all models.
DEFAULT_TEMPERATURE = AUTO
DEFAULT_NPROBE = 32
DEFAULT_DISTANCES = "exact"
DEFAULT_CACHE_LAMBDA = 0.1
CACHE_RESETS = ["none", "document"]


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
    cache_reset (str): ``none``, or ``document``: the cache is emptied where one begins.
    """

    k: int = DEFAULT_K
    knn_lambda: float = DEFAULT_LAMBDA
    temperature: Union[float, str] = DEFAULT_TEMPERATURE
    nprobe: int = DEFAULT_NPROBE
    distances: str = DEFAULT_DISTANCES
    cache_size: int = 0
    cache_lambda: float = DEFAULT_CACHE_LAMBDA
    cache_theta: Optional[float] = None
    cache_metric: str = METRICS[0]
    cache_reset: str = CACHE_RESETS[0]


def flag_of(field: str) -> str:
    """The flag of a field of ``Settings`` or of the flags' dataclass: ``--knn-cache-size``."""
    name = field[len("knn_") :] if field.startswith("knn_") else field
    return f"--knn-{name.replace('_', '-')}"


def range_faults(given: dict) -> list[str]:
    """What is wrong with settings, each by itself.

    Args:
        given (dict): some fields of ``Settings``.

    Returns:
        list of str: for each fault the flag, what it may be and what came.
    """
    ranges = {
        "k": (lambda k: k >= 1, ">= 1"),
        "knn_lambda": (lambda weight: 0.0 <= weight <= 1.0, "in [0, 1]"),
        "temperature": (_is_temperature, f"a finite number > 0, or {AUTO}"),
        "nprobe": (lambda nprobe: nprobe >= 1, ">= 1"),
        "cache_size": (lambda size: size >= 0, ">= 0"),
        "cache_lambda": (lambda weight: 0.0 <= weight <= 1.0, "in [0, 1]"),
        "cache_theta": (lambda theta: 0.0 <= theta < math.inf, "a finite number >= 0"),
    }
    return [
        f"{flag_of(name)} must be {expected}, got {given[name]}"
        for name, (holds, expected) in ranges.items()
        if given.get(name) is not None and not holds(given[name])
    ]


def _is_temperature(temperature) -> bool:
    return temperature == AUTO or isinstance(temperature, float) and 0.0 < temperature < math.inf


def weight_fault(settings: Settings) -> Optional[str]:
    """What is wrong with the weights of neighbours and cache together; None: nothing."""
    if settings.knn_lambda + settings.cache_lambda <= 1.0 + ROUNDING:
        return None
    return (
        "--knn-lambda and --knn-cache-lambda must be at most 1 together, the weight of the "
        f"language model being the rest, got {settings.knn_lambda} and {settings.cache_lambda}"
    )


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
