"""Running the model: text in blocks, chunks and batches, and the keys and log p of its targets.

Blocks (``blocks``) with their left context are grouped in chunks (``chunks``), which become samples
(``samples``) for ``encode``. A ``KeyExtractor`` catches the keys on their way through the decoder.
Imports from the root only.
"""

from .blocks import Block, BlockDataset, document_starts, refuse_oversized
from .chunks import plan_chunks, shard, split_evenly
from .encode import Encoded, encode, target_log_probs
from .key_extractor import KEY_TYPES, KeyExtractor, extractor_of
from .samples import ChunkCollater, make_samples, only_rows, sample_of, to_device

__all__ = [
    "KEY_TYPES",
    "Block",
    "BlockDataset",
    "ChunkCollater",
    "Encoded",
    "KeyExtractor",
    "document_starts",
    "encode",
    "extractor_of",
    "make_samples",
    "only_rows",
    "plan_chunks",
    "refuse_oversized",
    "sample_of",
    "shard",
    "split_evenly",
    "target_log_probs",
    "to_device",
]
