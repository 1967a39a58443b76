"""Every method of the table by name, and the controls that a suffix makes of it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.longtail.best import best, best_mixture
from benchmarks.longtail.bikd import (
    bikd,
    bikd_from,
    bikd_with_more_inputs,
    bikd_with_shares,
    with_teacher_in_train_mode,
)
from benchmarks.longtail.candidates import CANDIDATES
from benchmarks.longtail.fixed import ClassBalanced, Fixed, Mixture
from benchmarks.longtail.learned import CONTROLS, Learned
from benchmarks.longtail.published import amal, auto_balance, bd_kd, meta_weight_net, weight_net
from metakd import MetaKDError, recipes
from metakd.estimators import Adjoint
from metakd.recipes.base import hard_and_soft
from metakd.terms import (
    BalancedSoftmax,
    CrossEntropy,
    GatedSoftTarget,
    GroupTarget,
    NonTargetClass,
    RebalancedSoftTarget,
    SoftTarget,
    TargetClass,
    WithinGroupTarget,
)

Method = Fixed | Learned


def kd(counts: Sequence[int]) -> Mixture:
    """Distillation with equal weights; BiKD's code has T = 3, decay 2e-4 and batches of 128 for its KD baseline."""
    return {name: (0.5, term) for name, term in hard_and_soft(4.0).items()}


def kd_by_class(counts: Sequence[int]) -> Mixture:
    """The same, more of the rare classes."""
    return {name: (weight, ClassBalanced(counts, term)) for name, (weight, term) in kd(counts).items()}


FIXED: dict[str, Method] = {
    "ce": Fixed("CE", lambda n: {"hard": (1.0, CrossEntropy())}),
    "kd": Fixed("KD", kd),
    "kd-classes": Fixed("KD, weights by class count", kd_by_class),
    "kd-late": Fixed("KD, weights by class count from the first decay on", kd, late=kd_by_class),
    "bskd": Fixed(
        "balanced-softmax KD", lambda n: {"hard": (0.5, BalancedSoftmax(n)), "soft": (0.5, SoftTarget(temperature=4.0))}
    ),
    "bkd": Fixed("BKD", lambda n: {"hard": (1.0, CrossEntropy()), "soft": (1.0, RebalancedSoftTarget(n))}),
    "dive": Fixed(
        "DiVE",
        lambda n: {"hard": (0.5, BalancedSoftmax(n)), "soft": (0.5, SoftTarget(temperature=3.0, power=0.5))},
    ),
    "wsl": Fixed("WSL", lambda n: {"hard": (1.0, CrossEntropy()), "soft": (2.25, GatedSoftTarget(temperature=4.0))}),
    "dkd": Fixed(
        "DKD",
        lambda n: {"hard": (1.0, CrossEntropy()), "target": (1.0, TargetClass()), "rest": (8.0, NonTargetClass())},
        warmup=20 / 240,
    ),
    "ltkd": Fixed(
        "LTKD",
        lambda n: {
            "hard": (1.0, CrossEntropy()),
            "groups": (1.0, GroupTarget(n)),
            "within": (1.0, WithinGroupTarget(n)),
        },
    ),
    "bdkd": Learned("BD-KD's gate", bd_kd, control="frozen"),
    "mixture": Fixed("balanced softmax + debiased KD", best_mixture),
}

LEARNED: dict[str, Learned] = {
    "mwn": Learned("Meta-Weight-Net's network, normalised, by Adam (neither published code)", weight_net),
    "mwn-imbalance": Learned("Meta-Weight-Net as published for imbalance", meta_weight_net("imbalance")),
    "mwn-noise": Learned("Meta-Weight-Net as published for noise", meta_weight_net("noise")),
    "mwn-rarity": Learned(
        "Meta-Weight-Net's network, normalised, by Adam, class rarity as input", partial(weight_net, rarity=True)
    ),
    "autobalance": Learned("AutoBalance's loss, one-step hypergradients", auto_balance),
    "l2rw": Learned("Learning to Reweight", lambda s: recipes.learning_to_reweight(s.student, optimizer=s.optimizer)),
    "amal": Learned("AMAL", amal),
    "bikd": Learned("BiKD, k = 1", bikd(accumulate=1)),
    "bikd-k5": Learned("BiKD, k = 5", bikd(accumulate=5)),
    "bikd-mix": Learned("BiKD as published for CIFAR-10 (k = 1, upper loss CE + KD)", bikd(setting="cifar10")),
    "bikd-mix-train": Learned(
        "BiKD as published for CIFAR-10, teacher in train mode as published", with_teacher_in_train_mode
    ),
    "bikd-5steps": Learned("BiKD, 5 inner steps", bikd(accumulate=1, inner="mirror", estimator=Adjoint()), steps=5),
    "bikd-rate": Learned("BiKD, k = 1, weight model's rate x 10", bikd(accumulate=1, faster=10.0)),
    "bikd-slow": Learned("BiKD, k = 1, weight model's rate / 5", bikd(accumulate=1, faster=0.2)),
    "bikd-start": Learned("BiKD, k = 1, weights from 0.9", bikd_from(0.9)),
    "bikd-inputs": Learned("BiKD, k = 1, more inputs", bikd_with_more_inputs(accumulate=1)),
    "bikd-k5-inputs": Learned("BiKD, k = 5, more inputs", bikd_with_more_inputs(accumulate=5)),
    "bikd-shares": Learned("BiKD, k = 1, weights as shares of the batch", bikd_with_shares),
    "best": Learned("metakd's best, learned", best),
}

_CONTROLS = {
    "frozen": "its weights as they start",
    "permuted": "weights permuted in the batch",
    "mean": "weights replaced by their mean",
}
METHODS: dict[str, Method] = {**FIXED, **LEARNED, **CANDIDATES}
IMAGES = {
    "val": "validation images",
    "half": "half of the validation images, the other half the meta set",
}
"""Suffixes that add training images; under `val` a learned method's meta images are trained on as well."""
TABLE = (
    *FIXED, *LEARNED, "ce+val", "kd+val", "bskd+val", "mixture+val", "best+val",
    *(f"{name}+{control}" for name in ("bikd", "bikd-k5-inputs", "best") for control in CONTROLS),
)  # fmt: skip
"""What --methods is by default: every method but the candidates, and the controls."""

_RIVALS = {
    "bikd": ("kd", "kd+val", "bskd"),
    **{name: ("bikd", "kd", "kd+val") for name in METHODS if name.startswith("bikd-")},
    "bikd-k5-inputs": ("bikd", "kd", "kd-classes", "kd-late", "kd+val", "bskd"),
    "best": ("bskd", "bskd+val", "mixture", "mixture+val", "bikd"),
    "best+val": ("mixture+val",),
    **{
        f"{name}{suffix}": (f"best{suffix}", f"mixture{suffix}")
        for name, method in CANDIDATES.items()
        if isinstance(method, Learned)
        for suffix in ("", "+val")
    },
}
QUESTIONS = {
    name: (*rivals, *(found for found in TABLE if found.startswith(f"{name}+"))) for name, rivals in _RIVALS.items()
}
"""Which learned method is compared with what, seed by seed."""


def find(name: str) -> Method:
    """The method of that name, with its control.

    Raises:
        MetaKDError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    base, *suffixes = name.split("+")
    method = METHODS.get(base)
    images = next((suffix for suffix in suffixes[:1] if suffix in IMAGES), None)
    if method is not None and images is not None and (images == "val" or isinstance(method, Learned)):
        method, suffixes = replace(method, title=f"{method.title} + {IMAGES[images]}"), suffixes[1:]
    if isinstance(method, Learned) and len(suffixes) == 1 and suffixes[0] in CONTROLS:
        control = suffixes.pop()
        method = replace(method, title=f"{method.title}: {_CONTROLS[control]}", control=control)
    if method is not None and not suffixes:
        return method
    raise MetaKDError(
        f"there is no method {name!r}; there are {', '.join(METHODS)}; each may have the suffix +val, a learned one "
        f"+half, and then {', '.join('+' + control for control in CONTROLS)}"
    )


def position(name: str) -> tuple[int, str]:
    """A method's place in the table."""
    known = [*METHODS, *TABLE]
    return (known.index(name) if name in known else len(known), name)
