"""What a scorer computes of every token, kept for ``--knn-output`` and ``--knn-output-tokens``."""

from typing import Optional

import numpy as np
import torch

# Columns, in the order in which a scorer adds them.
_COLUMNS = ("targets", "log_p_lm", "log_p_knn", "log_p_cache", "log_p", "knn_lambda")


class TokenRecorder:
    """Keeps targets and their log-probabilities in the order of the text, on the CPU."""

    def __init__(self):
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        targets: torch.Tensor,
        log_p_lm: torch.Tensor,
        log_p_knn: Optional[torch.Tensor],
        log_p_cache: Optional[torch.Tensor],
        log_p: torch.Tensor,
        knn_lambda: Optional[torch.Tensor] = None,
    ) -> None:
        """Keep what is known of the next tokens.

        Args:
            targets (LongTensor): shape (N,), token ids.
            log_p_lm, log_p_knn, log_p_cache (Tensor): shape (N,), natural log, of the model, the
                neighbours and the cache; None where there is no such thing.
            log_p (Tensor): shape (N,), natural log, of the mixture.
            knn_lambda (Tensor): shape (N,), the weight of p_knn by a gate; None without one.
        """
        columns = (targets, log_p_lm, log_p_knn, log_p_cache, log_p, knn_lambda)
        for name, column in zip(_COLUMNS, columns):
            if column is not None:
                # A copy: fairseq-eval-lm changes scores in place.
                kept = column.to("cpu", copy=True).numpy()
                self._parts.setdefault(name, []).append(kept)

    def columns(self) -> dict[str, np.ndarray]:
        """All of them by name, each of shape (N,).

        Returns:
            dict: ``targets``, int64, and ``log_p_lm``, ``log_p_knn``, ``log_p_cache`` and
            ``log_p``, float32, natural log: -inf for what is impossible, nan where a memory had
            nothing to say; and ``knn_lambda``, float32. What there was not is not among them; of
            no text, nothing is.
        """
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}
