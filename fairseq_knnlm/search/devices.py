"""Where an index is searched: on the CPU, or on GPUs where FAISS has a version of it for them."""

import logging
import re
from typing import Optional

import torch

from ..errors import UserError
from .faiss_import import faiss

logger = logging.getLogger(__name__)

# Limits of FAISS's GPU indexes.
GPU_MAX_K = 2048
GPU_MAX_NPROBE = 2048
GPU_SUB_QUANTIZERS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)


def gpu_available() -> bool:
    """Whether this FAISS can search on a GPU of this machine."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def choose_device(device: str, index_factory: str, k: int, nprobe: int) -> str:
    """Where an index is searched: *device*, or for ``auto`` a GPU if that is possible.

    Args:
        device (str): ``cpu``, ``cuda`` or ``auto``.
        index_factory (str): FAISS factory string of the index.
        k (int): neighbours per query.
        nprobe (int): inverted lists visited.

    Returns:
        str: ``cpu`` or ``cuda``.

    Raises:
        UserError: if ``cuda`` is asked for and impossible, saying why.
    """
    if device == "cpu":
        return "cpu"
    obstacle = _gpu_obstacle(index_factory, k, nprobe)
    if device == "cuda" and obstacle:
        raise UserError(
            f"device (--knn-device) cuda: {obstacle}; use cpu, or distances (--knn-distances) "
            "exhaustive, which needs no index"
        )
    if obstacle and torch.cuda.is_available():
        logger.info(f"the index is searched on the CPU: {obstacle}")
    return "cpu" if obstacle else "cuda"


def _gpu_obstacle(index_factory: str, k: int, nprobe: int) -> Optional[str]:
    if not gpu_available():
        return "FAISS sees no GPU (is faiss-gpu installed?)"
    if re.search(r"fs|Refine|RaBitQ|HNSW", index_factory):
        return f"FAISS has no GPU version of the index {index_factory}; IVF4096,PQ64 has one"
    quantizer = re.search(r"(?<![A-Z])PQ(\d+)(?:x(\d+))?", index_factory)
    if quantizer and (int(quantizer[1]) not in GPU_SUB_QUANTIZERS or int(quantizer[2] or 8) != 8):
        return (
            f"FAISS's product quantisers on a GPU have 8 bits and one of {GPU_SUB_QUANTIZERS} "
            f"sub-quantisers, the index is {index_factory}"
        )
    if k > GPU_MAX_K:
        return f"FAISS finds at most {GPU_MAX_K} neighbours on a GPU, k (--knn-k) is {k}"
    if nprobe > GPU_MAX_NPROBE:
        return (
            f"FAISS visits at most {GPU_MAX_NPROBE} lists on a GPU, nprobe (--knn-nprobe) is "
            f"{nprobe}"
        )
    return None


def to_gpu(index):
    """A copy of an index on the GPUs of this machine, sharded over all of them."""
    options = faiss.GpuMultipleClonerOptions()
    # 64 sub-quantisers need more shared memory for float32 tables than a block has
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, options)
