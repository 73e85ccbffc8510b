"""Segments of a text put together by the words that they share, for TRIME's external memory.

Zhong, Lei and Chen (EMNLP 2022): from a random segment to the best of its hits by BM25
that is not in any batch yet, else to a random one. The only door to bm25s.
"""

import hashlib
import logging
import os
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..files import atomic_file
from ..progress import track

logger = logging.getLogger(__name__)

HITS = 20
# Raised whenever the hits of the same text become others.
_FORMAT = 1


def order_of_similar(hits: np.ndarray) -> np.ndarray:
    """A path over all segments on which neighbours share words, drawn by numpy's global numbers.

    Args:
        hits (ndarray): shape (M, n), segments similar to each, the most similar first.

    Returns:
        ndarray: shape (M,), int64, each segment once.
    """
    spare = iter(np.random.permutation(len(hits)).tolist())
    is_used = np.zeros(len(hits), dtype=bool)
    order = np.empty(len(hits), dtype=np.int64)
    segment = None
    for place in range(len(hits)):
        if segment is not None:
            unused = hits[segment][~is_used[hits[segment]]]
            segment = int(unused[0]) if len(unused) else None
        if segment is None:
            segment = next(candidate for candidate in spare if not is_used[candidate])
        order[place] = segment
        is_used[segment] = True
    return order


def similar_segments(segments: Sequence[np.ndarray], vocabulary_size: int) -> np.ndarray:
    """The segments that share most with each, by BM25.

    Args:
        segments (sequence of ndarray): M arrays of token ids.
        vocabulary_size (int): V, above every id.

    Returns:
        ndarray: shape (M, n), int32, n = 20, or M - 1 of fewer; the most similar first and none
        similar to itself. The same for the same text and release of bm25s.

    Raises:
        UserError: if bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise UserError(
            "--trime-memory external puts similar segments together with bm25s: "
            "pip install 'fairseq_knnlm[trime]'"
        ) from None
    words = [np.unique(segment) for segment in segments]
    index = bm25s.BM25()
    vocabulary = {token: token for token in range(vocabulary_size)}
    index.index(([segment.tolist() for segment in segments], vocabulary), show_progress=False)
    count = min(HITS, len(segments) - 1)
    hits = np.empty((len(segments), count), dtype=np.int32)
    for number, query in enumerate(track("similar segments", words, len(words))):
        scores = index.get_scores_from_ids(query)
        scores[number] = -np.inf
        best = np.sort(np.argpartition(-scores, max(0, count - 1))[:count])
        hits[number] = best[np.argsort(-scores[best], kind="stable")]
    return hits


def cached_similar_segments(
    segments: Sequence[np.ndarray], vocabulary_size: int, prefix: str
) -> np.ndarray:
    """``similar_segments``, read from a file beside the data where it was found before.

    Args:
        segments, vocabulary_size: see there.
        prefix (str): of the file; what distinguishes texts cut in other segments is added.

    Returns:
        ndarray: see there.
    """
    path = f"{prefix}.similar-{_fingerprint(segments)}.npy"
    if os.path.exists(path):
        hits = np.load(path)
        logger.info(f"similar segments: from {path}")
    else:
        hits = similar_segments(segments, vocabulary_size)
        with atomic_file(path) as file:
            np.save(file, hits)
        logger.info(f"similar segments: {len(hits):,}, kept in {path}")
    return hits


def _fingerprint(segments) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {HITS}".encode())
    for segment in segments:
        digest.update(np.int64(len(segment)).tobytes())
        digest.update(np.ascontiguousarray(segment, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
