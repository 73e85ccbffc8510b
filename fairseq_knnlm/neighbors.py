"""What a search finds: the one type that all packages hand on."""

from typing import NamedTuple

import torch


class Neighbors(NamedTuple):
    """The nearest entries of each query, nearest first.

    distances (Tensor): shape (N, k), float32, squared L2 or minus the inner product; +inf where
        there is no neighbour.
    values (LongTensor): shape (N, k), the token that followed; 0 where there is no neighbour.
    ids (LongTensor): shape (N, k), rows of the datastores, counted through all of them in the
        order they were named; -1 where there is no neighbour.
    """

    distances: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
