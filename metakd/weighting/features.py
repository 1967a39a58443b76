"""The default features of the weight model, and the evaluation of any."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metakd._basics.checks import check_finite
from metakd._basics.nest import version_of
from metakd._virtual.precision import widened
from metakd._virtual.teacher import members
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import CrossEntropy, Term
from metakd.terms.reading import class_logits, every_teachers_logits
from metakd.weighting.entropy_gate import entropy

Features = Callable[[Tensor, Any, Batch], Tensor]

_cross_entropy = CrossEntropy()


def own_losses(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """The sample's losses (B, M): the default without a teacher."""
    return losses


def student_and_teacher(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropies of student and teacher, (B, 2), as in BiKD (arXiv 2605.17839): the default with a teacher.

    With T teachers they are (B, 1 + T). Without labels their entropies take the place of the cross-entropies.
    """
    try:
        every = [class_logits(outputs), *every_teachers_logits(batch)]
        if batch.targets is None:
            return torch.stack([entropy(z) for z in every], dim=1)
        return torch.stack([_cross_entropy(z, batch) for z in every], dim=1)
    except MetaKDError as error:
        raise MetaKDError(
            "the default features (cross-entropy of student and teacher on the label, without labels their entropies) "
            f"cannot be computed: {error}. "
            "Pass features=lambda losses, outputs, batch: losses to use the losses instead, and if the student is "
            "no classifier a meta_loss= as well"
        ) from error


def default_features(terms: Mapping[str, Term], teacher: Any) -> tuple[Features, int | None]:
    """The default features, and their number where it is known before the first batch.

    Terms that use a teacher although the balancer has none mean that the batches bring its outputs.
    """
    if teacher is None:
        brought = any(getattr(term, "uses_teacher", False) is True for term in terms.values())
        return (student_and_teacher, None) if brought else (own_losses, len(terms))
    ensemble = members(teacher)
    return student_and_teacher, 1 + (1 if ensemble is None else len(ensemble))


def evaluate_features(features: Features, losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """Call a feature function without autograd and return its finite real (B, F) tensor, or raise."""
    name = getattr(features, "__name__", type(features).__name__)
    given = losses.detach()
    version = version_of(given)
    with torch.no_grad():
        try:
            found = features(given, outputs, batch)
        except MetaKDError:
            raise
        except Exception as error:
            raise MetaKDError(
                f"features function {name!r} raised {type(error).__name__}: {error}; it is called as "
                "features(losses (B, M), outputs, batch) and must return (B, F)"
            ) from error
    if version_of(given) != version:
        raise MetaKDError(
            f"features function {name!r} wrote to the losses that it was given, which are the training's; let it work "
            "on a copy, such as losses.clone()"
        )
    size = losses.shape[0]
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != size or not found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        cure = "; take .abs(), or .real and .imag" if isinstance(found, Tensor) and found.is_complex() else ""
        raise MetaKDError(
            f"features function {name!r} must return real floating-point (B, F) with B = {size}, got {got}{cure}"
        )

    def say() -> None:
        if bad := (~found.isfinite()).any(dim=1).nonzero().flatten().tolist():
            raise MetaKDError(
                f"features function {name!r} returned NaN or infinity for samples {bad[:5]} of the batch; clamp its "
                "results, or check the teacher's outputs for these samples"
            )

    if found is not given:  # these are checked already
        check_finite(found, say)
    return widened(found.detach())
