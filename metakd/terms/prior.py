"""Cross-entropies corrected for the class prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from metakd.batch import Batch
from metakd.terms.counts import log_prior, positive_counts
from metakd.terms.reading import class_indices, class_logits


class LogitAdjusted:
    """Cross-entropy of logits shifted by the log class prior.

    `loss_i = CE(z_i + tau log pi, y_i)` with `pi_c = n_c / sum_c n_c`, the share of class c in the
    training set. The shift is for training only: predict with the plain logits.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), the adjusted loss, per sample.

    Args:
        counts: training samples of each class, C positive numbers.
        tau: strength, finite and at least 0; 0 is plain cross-entropy.

    Raises:
        MetaKDError: counts are not positive finite numbers, `tau` is negative or not finite; in a call, there are not
            C logits, or as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import LogitAdjusted
        >>> LogitAdjusted([90, 10], tau=1.0)(torch.zeros(2, 2), Batch(None, targets=torch.tensor([0, 1])))
        tensor([0.1054, 2.3026])
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, counts: Sequence[float] | Tensor, tau: float = 1.0) -> None:
        self.counts = positive_counts(counts)
        self.tau = float(tau)
        self._shift = log_prior(self.counts, self.tau)

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        return F.cross_entropy(z + self._shift.like(z), class_indices(z, batch), reduction="none")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.counts)} classes, tau={self.tau:g})"


class BalancedSoftmax(LogitAdjusted):
    """Balanced softmax: `LogitAdjusted` with `tau = 1`.

    `loss_i = CE(z_i + log pi, y_i)` with `pi_c = n_c / sum_c n_c`, which fits the plain logits to a balanced test set.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition" (NeurIPS 2020), without the paper's
    meta sampler.

    Args:
        counts: training samples of each class, C positive numbers.

    Raises:
        MetaKDError: as `LogitAdjusted`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import BalancedSoftmax
        >>> BalancedSoftmax([90, 10])(torch.zeros(2, 2), Batch(None, targets=torch.tensor([0, 1])))
        tensor([0.1054, 2.3026])
    """

    def __init__(self, counts: Sequence[float] | Tensor) -> None:
        super().__init__(counts, tau=1.0)
