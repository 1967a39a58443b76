"""Cross-entropies that account for how frequent each class is in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import class_indices, logits


class LogitAdjusted:
    """Cross-entropy of logits shifted by the class prior.

    `loss_i = CE(z_i + tau log pi, y_i)` with `pi_c = n_c / sum_c n_c`, the share of class c in the
    training set. The shift is for training only: predict with the plain logits.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), the adjusted loss. Ours
    differs in nothing but being per sample.

    Args:
        counts: training samples of each class, C positive numbers.
        tau: strength, finite and at least 0; 0 is plain cross-entropy.

    Raises:
        MetaKDError: counts that are not positive finite numbers, `tau` negative or not finite; when called,
            other than C logits, and all that `CrossEntropy` raises.

    Example:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import LogitAdjusted
        >>> LogitAdjusted([90, 10], tau=1.0)(torch.zeros(2, 2), Batch(None, targets=torch.tensor([0, 1])))
        tensor([0.1054, 2.3026])
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, counts: Sequence[float] | Tensor, tau: float = 1.0) -> None:
        self.counts = _positive(counts)
        if not (tau >= 0.0 and math.isfinite(tau)):
            raise MetaKDError(f"tau is {tau}, it must be finite and at least 0; 1 is the usual choice")
        self.tau = float(tau)
        self._shifts: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = logits(outputs)
        if len(self.counts) != z.shape[1]:
            raise MetaKDError(
                f"there are {len(self.counts)} class counts but the student has {z.shape[1]} outputs; pass "
                "one count a class, in label order"
            )
        return F.cross_entropy(z + self._shift(z), class_indices(z, batch), reduction="none")

    def __repr__(self) -> str:
        """Say how many classes there are, not every count."""
        return f"{type(self).__name__}({len(self.counts)} classes, tau={self.tau:g})"

    def _shift(self, like: Tensor) -> Tensor:
        # Kept per device and dtype: no copy to the GPU at every step, and no digits lost on the way.
        key = (like.device, like.dtype)
        if key not in self._shifts:
            counts = torch.tensor(self.counts, dtype=torch.float64)
            self._shifts[key] = (self.tau * (counts.log() - counts.sum().log())).to(like.device, like.dtype)
        return self._shifts[key]


class BalancedSoftmax(LogitAdjusted):
    """Balanced softmax: cross-entropy of logits shifted by the log class prior.

    `loss_i = CE(z_i + log pi, y_i)` with `pi_c = n_c / sum_c n_c`, which makes the plain logits fit a
    balanced test set. It is `LogitAdjusted` with `tau = 1`, under the name of its own paper.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition" (NeurIPS 2020). Ours is the
    loss alone, without the paper's meta sampler.

    Args:
        counts: training samples of each class, C positive numbers.

    Raises:
        MetaKDError: as `LogitAdjusted`.

    Example:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import BalancedSoftmax
        >>> BalancedSoftmax([90, 10])(torch.zeros(2, 2), Batch(None, targets=torch.tensor([0, 1])))
        tensor([0.1054, 2.3026])
    """

    def __init__(self, counts: Sequence[float] | Tensor) -> None:
        super().__init__(counts, tau=1.0)


def _positive(counts: Sequence[float] | Tensor) -> tuple[float, ...]:
    try:
        values = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetaKDError(
            f"class counts must be numbers, one a class, got {type(counts).__name__}: {error}; pass a list or a tensor"
        ) from error
    if values.ndim != 1 or values.numel() == 0:
        raise MetaKDError(
            f"class counts have shape {tuple(values.shape)}, expected (C,): one number a class, in label order"
        )
    numbers = tuple(values.tolist())
    for label, count in enumerate(numbers):
        if not (count > 0.0 and math.isfinite(count)):
            raise MetaKDError(
                f"class {label} has count {count:g}, every count must be positive and finite; leave out "
                "classes without training samples or give them a small count"
            )
    return numbers
