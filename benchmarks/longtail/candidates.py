"""Candidates for the best method, learned and fixed, that are compared on images which are not the test images."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.longtail.best import at_mixture, best_mixture, by_network, from_below, terms
from benchmarks.longtail.fixed import Fixed, Mixture
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.parts import ByTeacher, LearnedLabel, LearnedTeacher
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer
from metakd.estimators import Adjoint
from metakd.recipes.base import Sum
from metakd.terms import CrossEntropy, DebiasedSoftTarget, LogitAdjusted, SmoothedCrossEntropy
from metakd.weighting import ClassTable


def from_mixture(
    *,
    faster: float = 1.0,
    offsets: bool = False,
    smoothed: bool = False,
    by_teacher: bool = False,
    upper: bool = False,
    **options: Any,
) -> Callable[[Setting], BilevelLossBalancer]:
    """`best` with more that is learned, or otherwise.

    Args:
        faster: factor of the table's learning rate.
        offsets: whether offsets and scales of the label's logits, the teacher's prior and its temperature are learned.
        smoothed: whether a smoothing of each label is learned as well.
        by_teacher: whether the table has other weights where the teacher is wrong.
        upper: whether the meta loss is cross-entropy and divergence from the debiased teacher, in place of
            cross-entropy.
        options: other arguments of the balancer.
    """

    def build(setting: Setting) -> BilevelLossBalancer:
        counts = setting.counts
        known = dict(terms(counts))
        if offsets:
            label = SmoothedCrossEntropy(0.05, classes=len(counts)) if smoothed else CrossEntropy()
            known |= {"label": LearnedLabel(counts, label), "teacher": LearnedTeacher(counts)}
        more = dict(options)
        if upper:
            more["meta_loss"] = Sum([CrossEntropy(), DebiasedSoftTarget(counts, temperature=4.0)])
        model: ByTeacher | ClassTable
        if by_teacher:
            model = ByTeacher(counts, len(known))
            at_mixture(model.table)
        else:
            model = ClassTable(len(counts), len(known), init=1.0, output="softplus")
            at_mixture(model)
        return setting.balancer(known, model, lr=faster * setting.preset.weighting_lr, **more)

    return build


def stronger(counts: tuple[int, ...], *, tau: float = 1.5) -> Mixture:
    """The mixture with another strength of the correction for the prior, of label and teacher."""
    label, teacher = LogitAdjusted(counts, tau=tau), DebiasedSoftTarget(counts, temperature=4.0, tau=tau)
    return {"label": (1.0, label), "teacher": (1.0, teacher)}


def shared(counts: tuple[int, ...], *, label: float, teacher: float) -> Mixture:
    """The mixture with a weight for each of its terms."""
    weights = {"label": label, "teacher": teacher}
    return {name: (weights[name], term) for name, (_, term) in best_mixture(counts).items()}


_THREE = ("label", "teacher", "rebalanced")
_MIXED = "balanced softmax + debiased KD"
FIXED: Mapping[str, Fixed] = {
    "mixture-half": Fixed(f"{_MIXED}, weights 0.5", partial(best_mixture, weight=0.5)),
    "mixture-double": Fixed(f"{_MIXED}, weights 2", partial(best_mixture, weight=2.0)),
    "mixture-3": Fixed(f"{_MIXED} + rebalanced KD", partial(best_mixture, names=_THREE)),
    "mixture-3-half": Fixed(f"{_MIXED} + rebalanced KD, weights 0.5", partial(best_mixture, names=_THREE, weight=0.5)),
    "mixture-t2": Fixed(f"{_MIXED} at T = 2", partial(best_mixture, temperature=2.0)),
    "mixture-t8": Fixed(f"{_MIXED} at T = 8", partial(best_mixture, temperature=8.0)),
    "mixture-tau": Fixed(f"{_MIXED}, prior x 1.5", stronger),
    "mixture-weak": Fixed(f"{_MIXED}, prior x 0.75", partial(stronger, tau=0.75)),
    "mixture-label": Fixed(f"{_MIXED}, weights 2 and 1", partial(shared, label=2.0, teacher=1.0)),
    "mixture-teacher": Fixed(f"{_MIXED}, weights 1 and 2", partial(shared, label=1.0, teacher=2.0)),
}

_BEST = "metakd's best"
LEARNED: Mapping[str, Learned] = {
    "table": Learned(f"{_BEST}, from 0.4, rate x 10", from_below()),
    "table-k5": Learned(f"{_BEST}, from 0.4, rate x 10, k = 5", from_below(accumulate=5)),
    "table-5steps": Learned(
        f"{_BEST}, from 0.4, rate x 10, 5 inner steps", from_below(inner="mirror", estimator=Adjoint()), steps=5
    ),
    "network": Learned(f"{_BEST}, by BiKD's network, more inputs, k = 5", by_network),
    "best-rate3": Learned(f"{_BEST}, rate x 3", from_mixture(faster=3.0)),
    "best-rate10": Learned(f"{_BEST}, rate x 10", from_mixture(faster=10.0)),
    "best-k5": Learned(f"{_BEST}, rate x 5, k = 5", from_mixture(faster=5.0, accumulate=5)),
    "best-mirror": Learned(f"{_BEST}, the step ahead with momentum", from_mixture(inner="mirror")),
    "best-upper": Learned(f"{_BEST}, upper loss CE + debiased KD", from_mixture(upper=True)),
    "best-teacher": Learned(
        f"{_BEST}, rate x 3, other weights where the teacher is wrong", from_mixture(faster=3.0, by_teacher=True)
    ),
    "best-offsets": Learned(f"{_BEST}, learned offsets, scales and temperature", from_mixture(offsets=True)),
    "best-offsets-slow": Learned(
        f"{_BEST}, learned offsets, scales and temperature, these slowly", from_mixture(offsets=True, terms_lr=2e-3)
    ),
    "best-smooth": Learned(
        f"{_BEST}, learned offsets, scales, temperature and smoothing", from_mixture(offsets=True, smoothed=True)
    ),
    "best-all": Learned(
        f"{_BEST}, rate x 3, offsets, scales, temperature, where the teacher is wrong, upper loss CE + debiased KD",
        from_mixture(faster=3.0, offsets=True, by_teacher=True, upper=True),
    ),
}

CANDIDATES: Mapping[str, Fixed | Learned] = {**FIXED, **LEARNED}
"""Among which `mixture` and `best` were chosen, on validation images of a seed of their own, and more since then."""

CHOICE = (
    "best+val", "best-upper+val", "best-offsets+val", "best-all+val", "best-teacher+val", "best-rate3+val",
    "best-smooth+val", "best-rate10+val", "best-k5+val", "best-mirror+val", "best-offsets-slow+val", "network+val",
    "best", "best+half", "mixture+val", *(f"{name}+val" for name in FIXED), "mixture",
)  # fmt: skip
"""What is compared by default: those from which most is hoped for first."""
