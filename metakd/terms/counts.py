"""Class counts: their check, the tensors made from them, and the split into head, medium and tail."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.errors import MetaKDError


def positive_counts(counts: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Return the counts as positive finite numbers, one per class, or raise."""
    try:
        values = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetaKDError(
            f"class counts must be numbers, one per class, got {type(counts).__name__}: {error}; pass a list or tensor"
        ) from error
    if values.ndim != 1 or values.numel() == 0:
        raise MetaKDError(
            f"class counts have shape {tuple(values.shape)}, expected (C,): one number per class, in label order"
        )
    numbers = tuple(values.tolist())
    for label, count in enumerate(numbers):
        if not (count > 0.0 and math.isfinite(count)):
            raise MetaKDError(
                f"class {label} has count {count:g}, but every count must be positive and finite; remove "
                "classes without training samples or give them a small count"
            )
    return numbers


def thirds(counts: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Split the classes into head, medium and tail: 33/34/33 % by count, ties in label order.

    Examples:
        >>> thirds([5, 900, 40, 300])
        ((1,), (3, 2), (0,))
    """
    classes = len(counts)
    if classes < 3:
        raise MetaKDError(
            f"head, medium and tail (many, medium and few) need at least three classes, but there are {classes} "
            "counts; pass one count per class"
        )
    order = sorted(range(classes), key=lambda c: -counts[c])
    third = max(round(0.33 * classes), 1)
    return tuple(order[:third]), tuple(order[third : classes - third]), tuple(order[classes - third :])


class PerClass:
    """One number (or row) per class, moved to the device and dtype of the logits it is used with."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, z: Tensor) -> Tensor:
        """Return the numbers `(C,)` for logits `(B, C)`, or raise if the logits have another number of columns."""
        if len(self.values) != z.shape[1]:
            raise MetaKDError(
                f"there are {len(self.values)} class counts but the student has {z.shape[1]} outputs; pass "
                "one count per class, in label order"
            )
        # Cached per device and dtype, so that no step copies to the GPU or loses digits.
        dtype = z.dtype if self.values.is_floating_point() else self.values.dtype
        key = (z.device, dtype)
        if key not in self._kept:
            self._kept[key] = self.values.to(*key)
        return self._kept[key]


def log_prior(counts: Sequence[float], tau: float) -> PerClass:
    """Return `tau log pi_c` with the class prior `pi_c = n_c / sum_c n_c`, or raise."""
    if not (tau >= 0.0 and math.isfinite(tau)):
        raise MetaKDError(f"tau is {tau}, but must be finite and at least 0; 1 is the usual choice")
    numbers = torch.tensor(counts, dtype=torch.float64)
    return PerClass(tau * (numbers.log() - numbers.sum().log()))
