"""Two networks' logits, and one of every term."""

import torch

from metakd.batch import Batch
from metakd.terms import (
    BalancedSoftmax,
    Bootstrapped,
    CrossEntropy,
    DebiasedSoftTarget,
    ForwardCorrected,
    GatedSoftTarget,
    GeneralisedCrossEntropy,
    GroupTarget,
    LogitAdjusted,
    NonTargetClass,
    RebalancedSoftTarget,
    ReverseSoftTarget,
    SoftTarget,
    TargetClass,
    WithinGroupTarget,
)


def problem(rows, classes, seed, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    teacher = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(classes, (rows,), generator=generator)
    counts = torch.randint(1, 500, (classes,), generator=generator)
    return student, Batch(None, targets, teacher), counts


def transition(classes):
    """Label noise with a zero in every row."""
    noise = torch.eye(classes, dtype=torch.float64)
    return 0.7 * noise + 0.3 * noise.roll(1, 0)


def every_term(counts):
    return [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.1),
        SoftTarget(3.0),
        ReverseSoftTarget(3.0),
        BalancedSoftmax(counts),
        LogitAdjusted(counts, tau=0.5),
        GeneralisedCrossEntropy(),
        Bootstrapped(),
        Bootstrapped(hard=True),
        ForwardCorrected(transition(len(counts))),
        SoftTarget(3.0, power=0.5),
        RebalancedSoftTarget(counts),
        DebiasedSoftTarget(counts, 3.0),
        TargetClass(3.0),
        NonTargetClass(3.0),
        GroupTarget(counts, 3.0),
        WithinGroupTarget(counts, 3.0),
        GatedSoftTarget(3.0),
    ]


SOME = every_term([9, 1, 5, 3])
ALL = range(len(SOME))
TAUGHT = [which for which in ALL if SOME[which].uses_teacher]
WITHOUT_CONSTANTS = ALL[:-1]  # the gate, a constant to differentiation, has its own test
