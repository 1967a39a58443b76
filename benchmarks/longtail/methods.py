"""Every method of the table by name, and the controls that a suffix makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.longtail.best import best, best_mixture, by_network, from_below
from benchmarks.longtail.bikd import (
    bikd,
    bikd_from,
    bikd_with_more_inputs,
    bikd_with_shares,
    with_teacher_in_train_mode,
)
from benchmarks.longtail.fixed import ClassBalanced, Fixed, Mixture
from benchmarks.longtail.learned import CONTROLS, Learned
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer, MetaKDError, recipes
from metakd.estimators import Adjoint
from metakd.recipes.base import hard_and_soft
from metakd.terms import (
    BalancedSoftmax,
    CrossEntropy,
    GatedSoftTarget,
    GroupTarget,
    NonTargetClass,
    RebalancedSoftTarget,
    ReverseSoftTarget,
    SoftTarget,
    TargetClass,
    WithinGroupTarget,
)
from metakd.weighting import ClassAware, EntropyGate, LossMLP, Normalised, entropies
from metakd.weighting.features import own_losses

Method = Fixed | Learned


def amal(setting: Setting) -> BilevelLossBalancer:
    """AMAL's table of weights, the lookahead of the last layer alone."""
    student, teacher, optimizer, counts, _ = setting
    names = [name for name, _ in student.named_parameters()]
    last = [name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0]]
    return recipes.amal(student, teacher, optimizer=optimizer, samples=sum(counts), last_layer=last)


def meta_weight_net(published: str) -> Callable[[Setting], BilevelLossBalancer]:
    """Meta-Weight-Net as one of its two published codes has it."""
    return lambda setting: recipes.meta_weight_net(setting.student, optimizer=setting.optimizer, setting=published)


def weight_net(setting: Setting, *, rarity: bool = False) -> BilevelLossBalancer:
    """Meta-Weight-Net's network, normalised as in one code, by Adam as in the other; it may see class rarity."""
    network = Normalised(LossMLP(3 if rarity else 1, 1, hidden=(100,), activation=nn.ReLU))
    features = ClassAware(setting.counts) if rarity else own_losses
    alone = {"teacher": None, "features": features}
    return setting.balancer({"hard": CrossEntropy()}, network, lr=1e-3, weight_decay=1e-4, **alone)


def auto_balance(setting: Setting) -> BilevelLossBalancer:
    """Learned offsets and scales of the classes' logits."""
    return recipes.auto_balance(setting.student, optimizer=setting.optimizer, classes=len(setting.counts))


def bd_kd(setting: Setting) -> BilevelLossBalancer:
    """BD-KD's gate between both divergences; the teacher stays as it is."""
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=4.0), "reverse": ReverseSoftTarget(temperature=4.0)}
    student, teacher, optimizer, _, _ = setting
    return BilevelLossBalancer(
        student, terms, optimizer=optimizer, teacher=teacher, weighting=EntropyGate(), features=entropies
    )


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

CANDIDATES: dict[str, Method] = {
    "mixture-half": Fixed("balanced softmax + debiased KD, weights 0.5", partial(best_mixture, weight=0.5)),
    "mixture-3": Fixed(
        "balanced softmax + debiased KD + rebalanced KD",
        partial(best_mixture, names=("label", "teacher", "rebalanced")),
    ),
    "table": Learned("metakd's best, from 0.4, rate x 10", from_below()),
    "table-k5": Learned("metakd's best, from 0.4, rate x 10, k = 5", from_below(accumulate=5)),
    "table-5steps": Learned(
        "metakd's best, from 0.4, rate x 10, 5 inner steps",
        from_below(inner="mirror", estimator=Adjoint()),
        steps=5,
    ),
    "network": Learned("metakd's best, by BiKD's network, more inputs, k = 5", by_network),
}
"""Among which `mixture` and `best` were chosen, on validation images of a seed of their own."""

_CONTROLS = {
    "frozen": "its weights as they start",
    "permuted": "weights permuted in the batch",
    "mean": "weights replaced by their mean",
}
METHODS: dict[str, Method] = FIXED | LEARNED | CANDIDATES
TABLE = (
    *FIXED, *LEARNED, "ce+val", "kd+val", "bskd+val", "mixture+val",
    *(f"{name}+{control}" for name in ("bikd", "bikd-k5-inputs", "best") for control in CONTROLS),
)  # fmt: skip
"""What --methods is by default: every method but the candidates, and the controls."""

_RIVALS = {
    "bikd": ("kd", "kd+val", "bskd"),
    **{name: ("bikd", "kd", "kd+val") for name in METHODS if name.startswith("bikd-")},
    "bikd-k5-inputs": ("bikd", "kd", "kd-classes", "kd-late", "kd+val", "bskd"),
    "best": ("bskd", "bskd+val", "mixture", "mixture+val", "bikd"),
    **{name: ("best", "mixture") for name, method in CANDIDATES.items() if isinstance(method, Learned)},
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
    base, _, suffix = name.partition("+")
    method = METHODS.get(base)
    if isinstance(method, Fixed) and suffix == "val":
        return replace(method, title=f"{method.title} + validation images")
    if isinstance(method, Learned) and suffix in CONTROLS:
        return replace(method, title=f"{method.title}: {_CONTROLS[suffix]}", control=suffix)
    raise MetaKDError(
        f"there is no method {name!r}; there are {', '.join(METHODS)}; a fixed one may have the suffix +val, a learned "
        f"one {', '.join('+' + control for control in CONTROLS)}"
    )


def position(name: str) -> tuple[int, str]:
    """A method's place in the table."""
    known = [*METHODS, *TABLE]
    return (known.index(name) if name in known else len(known), name)
