"""Accuracy by class and by group of classes: many, medium and few training images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metakd._virtual.teacher import in_eval_mode
from metakd.errors import MetaKDError
from metakd.longtail._torchvision import import_torchvision
from metakd.terms.counts import thirds

_FIELD_RULE = "many: over 100 training images, medium: 20 to 100, few: under 20"
_THIRDS_RULE = "many, medium, few: the 33/34/33 % of classes with the most, middling and fewest training images"


class Groups(NamedTuple):
    """Classes by their number of training images.

    Attributes:
        rule: how the groups were formed, in words.
        many: classes with many training images.
        medium: classes in between.
        few: classes with few training images.

    Examples:
        >>> groups = group_classes([300, 200, 60, 40, 9, 8])
        >>> groups.rule, groups.medium
        ('many: over 100 training images, medium: 20 to 100, few: under 20', (2, 3))
    """

    rule: str
    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]


def group_classes(counts: Sequence[int]) -> Groups:
    """Group classes into many, medium and few.

    Uses the rule of the field (Liu et al., *OLTR*, 2019; over 100, 20 to 100, under 20 training images) if it
    puts at least two classes into every group. Otherwise it splits the classes 33/34/33 % by count, as LTKD does.

    Args:
        counts: training images per class.

    Returns:
        The groups, and the rule used.

    Raises:
        MetaKDError: there are fewer than three classes.

    Examples:
        >>> group_classes([500, 400, 90, 50, 10, 5]).few
        (4, 5)
        >>> group_classes([4900, 3172, 2053, 1329, 860, 557, 360, 233, 151, 98])[1:]
        ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))
    """
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    many = tuple(c for c in order if counts[c] > 100)
    few = tuple(c for c in order if counts[c] < 20)
    medium = tuple(c for c in order if 20 <= counts[c] <= 100)
    if min(len(many), len(medium), len(few)) >= 2:
        return Groups(_FIELD_RULE, many, medium, few)
    return Groups(_THIRDS_RULE, *thirds(counts))


class Scores(NamedTuple):
    """A network's scores on a test set, in percent except for the loss.

    Attributes:
        overall: share of all images classified correctly.
        many: mean accuracy of the classes with many training images.
        medium: mean accuracy of the classes in between.
        few: mean accuracy of the classes with few training images.
        per_class: accuracy of every class.
        loss: mean cross-entropy.
        ece: expected calibration error of the predicted class over 15 bins of confidence (Guo et al., 2017).

    Examples:
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 0]), torch.arange(3))]
        >>> scores = evaluate(nn.Identity(), batches, Groups("by hand", (0,), (1,), (2,)))
        >>> scores.many, scores.per_class
        (50.0, (50.0, 100.0, 0.0))
    """

    overall: float
    many: float
    medium: float
    few: float
    per_class: tuple[float, ...]
    loss: float
    ece: float


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], groups: Groups) -> Scores:
    """Evaluate a network in eval mode; afterwards its modules have their previous modes.

    Args:
        model: (B, ...) inputs to (B, C) logits.
        batches: (inputs, targets, index) triples; every class should occur.
        groups: from `group_classes`.

    Returns:
        The scores, computed by torchmetrics.

    Raises:
        MetaKDError: torchmetrics is not installed.

    Examples:
        >>> batches = [(torch.eye(3), torch.arange(3), torch.arange(3))]
        >>> evaluate(nn.Identity(), batches, Groups("by hand", (0,), (1,), (2,))).overall
        100.0
    """
    with contextlib.suppress(MetaKDError):
        import_torchvision()  # first, since torchmetrics imports it plainly if it is installed
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
    except ImportError as error:
        raise MetaKDError(
            f"scores need torchmetrics, which could not be imported ({error}); "
            'install it with `pip install "metakd[examples]"`'
        ) from error
    classes = len(groups.many) + len(groups.medium) + len(groups.few)
    overall = MulticlassAccuracy(classes, average="micro", validate_args=False)
    per_class = MulticlassAccuracy(classes, average="none", validate_args=False)
    calibration = MulticlassCalibrationError(classes, n_bins=15, validate_args=False)
    loss, seen = torch.zeros((), dtype=torch.float64), 0
    with in_eval_mode(model):
        for inputs, targets, _ in batches:
            logits = model(inputs)
            loss = loss.to(logits.device) + nn.functional.cross_entropy(logits, targets, reduction="sum")
            seen += len(targets)
            calibration.to(logits.device).update(logits.softmax(1), targets)
            for metric in (overall, per_class):
                metric.to(logits.device).update(logits.argmax(1), targets)
    accuracy = 100 * per_class.compute().double().cpu()
    many, medium, few = (round(float(accuracy[list(group)].mean()), 4) for group in groups[1:])
    rounded = tuple(round(value, 4) for value in accuracy.tolist())  # float32 has no more digits
    top, ece = (round(100 * float(metric.compute()), 4) for metric in (overall, calibration))
    return Scores(top, many, medium, few, rounded, float(loss) / max(seen, 1), ece)
