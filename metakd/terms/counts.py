"""Training samples of each class: their check, the numbers made of them, and head, medium and tail."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.errors import MetaKDError


def positive_counts(counts: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Return the counts as positive finite numbers, one a class, or raise."""
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


def thirds(counts: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The 33/34/33 % of the classes with the most, middling and fewest training samples.

    Args:
        counts: training samples of each class; of equal ones, the lower class comes first.

    Returns:
        The classes of head, medium and tail; none is empty.

    Raises:
        MetaKDError: there are fewer than three classes.

    Examples:
        >>> thirds([5, 900, 40, 300])
        ((1,), (3, 2), (0,))
    """
    classes = len(counts)
    if classes < 3:
        raise MetaKDError(
            f"head, medium and tail (many, medium and few) need at least three classes, but there are {classes} "
            "counts; pass one count a class"
        )
    order = sorted(range(classes), key=lambda c: -counts[c])
    third = max(round(0.33 * classes), 1)
    return tuple(order[:third]), tuple(order[third : classes - third]), tuple(order[classes - third :])


class PerClass:
    """One number a class, as a tensor on the device, and in the floating dtype, of the logits that it goes with."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, z: Tensor) -> Tensor:
        """Return the numbers `(C,)` for logits `(B, C)`, or raise where those have other than C columns."""
        if len(self._values) != z.shape[1]:
            raise MetaKDError(
                f"there are {len(self._values)} class counts but the student has {z.shape[1]} outputs; pass "
                "one count a class, in label order"
            )
        # Kept per device and dtype: no copy to the GPU at every step, and no digits lost on the way.
        dtype = z.dtype if self._values.is_floating_point() else self._values.dtype
        key = (z.device, dtype)
        if key not in self._kept:
            self._kept[key] = self._values.to(*key)
        return self._kept[key]


def log_prior(counts: Sequence[float], tau: float) -> PerClass:
    """`tau log pi_c` with `pi_c = n_c / sum_c n_c`, the share of class c in the training set, or raise."""
    if not (tau >= 0.0 and math.isfinite(tau)):
        raise MetaKDError(f"tau is {tau}, it must be finite and at least 0; 1 is the usual choice")
    numbers = torch.tensor(counts, dtype=torch.float64)
    return PerClass(tau * (numbers.log() - numbers.sum().log()))
