"""What the weight model sees, where the user does not say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.precision import widened
from metakd.terms import CrossEntropy
from metakd.terms.reading import the_teachers_logits

Features = Callable[[Tensor, Any, Batch], Tensor]

_cross_entropy = CrossEntropy()


def own_losses(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """The sample's losses themselves: (B, M). The default without a teacher.

    Examples:
        >>> own_losses(torch.ones(3, 2), None, Batch(None)).shape
        torch.Size([3, 2])
    """
    return losses


def student_and_teacher(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the student and of the teacher on the label: (B, 2), BiKD's input (arXiv 2605.17839).

    Examples:
        >>> batch = Batch(None, torch.tensor([0]), teacher=torch.zeros(1, 2))
        >>> student_and_teacher(torch.ones(1, 2), torch.zeros(1, 2), batch)
        tensor([[0.6931, 0.6931]])
    """
    try:
        return torch.stack([_cross_entropy(z, batch) for z in (outputs, the_teachers_logits(batch))], dim=1)
    except MetaKDError as error:
        raise MetaKDError(
            f"the default features (cross-entropy of student and teacher on the label) cannot be computed: {error}. "
            "Pass features=lambda losses, outputs, batch: losses to use the losses instead, and where the student is "
            "no classifier a meta_loss= as well"
        ) from error


def evaluate_features(features: Features, losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """Call a feature function without autograd and check what it returns.

    Raises:
        MetaKDError: it raised (chained), or did not return a finite (B, F) tensor of real floating-point numbers.

    Examples:
        >>> evaluate_features(own_losses, torch.ones(3, 2, requires_grad=True), None, Batch(None)).requires_grad
        False
    """
    name = getattr(features, "__name__", type(features).__name__)
    with torch.no_grad():
        try:
            found = features(losses.detach(), outputs, batch)
        except MetaKDError:
            raise
        except Exception as error:
            raise MetaKDError(
                f"features function {name!r} raised {type(error).__name__}: {error}; it is called as "
                "features(losses (B, M), outputs, batch) and returns (B, F)"
            ) from error
    size = losses.shape[0]
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != size or not found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        cure = "; take .abs(), or .real and .imag" if isinstance(found, Tensor) and found.is_complex() else ""
        raise MetaKDError(
            f"features function {name!r} must return real floating-point (B, F) with B = {size}, got {got}{cure}"
        )
    if not bool(found.isfinite().all()):
        bad = (~found.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise MetaKDError(
            f"features function {name!r} returned NaN or infinity for samples {bad[:5]} of the batch; clamp what "
            "it computes, or look at the teacher's outputs for these samples"
        )
    return widened(found.detach())
