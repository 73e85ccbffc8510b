"""Several searchers give what one search of all their entries gives."""

import numpy as np
import pytest
import torch
from helpers.searching import values_for

from fairseq_knnlm.neighbors import Neighbors
from fairseq_knnlm.search.several import SeveralSearch

COUNTS = [30, 2, 50]
QUERIES = 3000


class OfMatrix:
    """Searches a matrix of distances, infinite where a query does not see an entry."""

    def __init__(self, distances, values):
        self._distances, self._values = distances, values
        self.asked = []

    def batches(self, queries, k):
        """Two batches, of unequal size."""
        self.asked.append(k)
        distances, ids = self._distances.topk(k, dim=1, largest=False)
        missing = distances.isinf()
        values = self._values[ids].masked_fill(missing, 0)
        every = distances, values, ids.masked_fill(missing, -1)
        for rows in (slice(0, 7), slice(7, len(queries))):
            yield rows, Neighbors(*(part[rows] for part in every))


@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_nearest_of_all_with_ids_through_all(k):
    rng = torch.Generator().manual_seed(5)
    distances = torch.rand(QUERIES, sum(COUNTS), generator=rng) - 0.5
    distances[torch.rand(distances.shape, generator=rng) < 0.6] = torch.inf
    values = torch.from_numpy(values_for(sum(COUNTS)).astype(np.int64))
    parts = zip(distances.split(COUNTS, dim=1), values.split(COUNTS))
    searchers = [OfMatrix(*part) for part in parts]
    batches = list(SeveralSearch(searchers, COUNTS).batches(torch.empty(QUERIES, 1), k))
    assert [row for rows, _ in batches for row in range(rows.start, rows.stop)] == list(
        range(QUERIES)
    )
    assert all(len(part.distances) <= 1024 for _, part in batches), "memory is bounded"
    found = Neighbors(*map(torch.cat, zip(*(part for _, part in batches))))
    expected, ids = distances.topk(k, dim=1, largest=False)
    missing = expected.isinf()
    assert torch.equal(found.distances, expected)
    assert torch.equal(found.ids, ids.masked_fill(missing, -1))
    assert torch.equal(found.values, values[ids].masked_fill(missing, 0))
    assert [searcher.asked for searcher in searchers] == [[min(k, count)] for count in COUNTS]
