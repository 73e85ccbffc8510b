"""A temperature to start with, from the keys of a datastore alone: ``--knn-temperature auto``.

The right temperature depends on the scale of a model's keys. Some keys are drawn and looked up as
if they were queries, each without itself; their own values are the targets. The temperature is
the one with the highest likelihood of the mixture, at its best lambda, with the frequencies of the
tokens in place of the language model.

Perplexity on 24,576 held-out tokens with that temperature and with the best one, lambda being the
best for each (k = 1024, exact distances; two models of speeches and one of the Bible):

    text      model         without   T = 1   auto             tuned            more
    speeches  3 layers       88.18    85.27    77.12 (T 16.0)   76.91 (T 13.5)  0.3%
    speeches  2 layers      115.05   109.02   101.81 (T 8.0)   101.55 (T 5.7)   0.3%
    Bible     3 layers      139.45    82.11    33.19 (T 9.5)    32.96 (T 13.5)  0.7%
    Bible     2 layers      158.38    48.79    40.26 (T 3.4)    39.82 (T 5.7)   1.1%
    Bible     its own        33.85    31.15    28.97 (T 8.0)    28.63 (T 5.7)   1.2%

Statistics of the distances alone do worse where the text is new to the model: the median standard
deviation of a key's distances (13.1, 3.8, 7.5, 1.6 and 7.4) costs 0.0, 0.4, 2.9, 9.6 and 0.8%.
Whether keys that equal the drawn one count as its neighbours makes no difference.
"""

import numpy as np
import torch

from ..search.index_build import load, read_rows
from ..search.index_search import IndexSearch
from .grid import best
from .knn_sweep import sweep
from .tuning_data import TuningData

QUERIES = 2048
NEIGHBORS = 1024
# Where neighbours do not help any temperature will do.
_NEUTRAL = 1.0
_SEED = 1234
_ROWS = 1 << 22


def find_temperature(
    keys: np.ndarray, values: np.ndarray, metric: str, index_path: str, nprobe: int
) -> dict:
    """A temperature for a datastore, from a sample of its own keys.

    Args:
        keys (ndarray): shape (N, D), float16.
        values (ndarray): shape (N,), unsigned.
        metric (str): ``l2`` or ``ip``.
        index_path (str): the index over the keys; its distances are good enough, and cost no
            reading of keys.
        nprobe (int): inverted lists visited.

    Returns:
        dict: ``value``, the temperature, and what it is based on, for the manifest.
    """
    rng = np.random.default_rng(_SEED)
    rows = np.sort(rng.choice(len(keys), min(QUERIES, len(keys)), replace=False))
    k = min(NEIGHBORS, len(keys))
    index = IndexSearch(None, values, metric, index=load(index_path), nprobe=nprobe)
    neighbors = index.search(torch.from_numpy(read_rows(keys, rows)), k)
    itself = neighbors.ids == torch.from_numpy(rows).unsqueeze(1)
    targets = torch.from_numpy(values[rows].astype(np.int64))
    matches = (neighbors.values == targets.unsqueeze(1)) & ~itself & (neighbors.ids >= 0)
    distances, order = neighbors.distances.masked_fill(itself, np.inf).sort(dim=1, stable=True)
    data = TuningData(
        torch.from_numpy(_frequencies(values)[values[rows]]).log(),
        distances,
        matches.gather(1, order),
    )
    point = best(sweep(data, [k]))
    value = point.temperature if point.knn_lambda > 0 else _NEUTRAL
    return {"value": value, "queries": len(rows), "k": k, "nprobe": nprobe}


def _frequencies(values: np.ndarray) -> np.ndarray:
    """Share of each token among *values*, float32; read in parts, for they may be many."""
    counts = np.zeros(int(values.max(initial=0)) + 1, dtype=np.int64)
    for start in range(0, len(values), _ROWS):
        counts += np.bincount(values[start : start + _ROWS], minlength=len(counts))
    return (counts / len(values)).astype(np.float32)
