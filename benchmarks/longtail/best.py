"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Mapping, Sequence

from benchmarks.longtail.fixed import Mixture
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer, weighting
from metakd.recipes.base import adam, beside
from metakd.terms import BalancedSoftmax, DebiasedSoftTarget, RebalancedSoftTarget, Term


def terms(counts: Sequence[int]) -> Mapping[str, Term]:
    """The label and the teacher without the prior of the long tail, and the teacher in favour of rare classes."""
    return {
        "label": BalancedSoftmax(counts),
        "teacher": DebiasedSoftTarget(counts, temperature=4.0),
        "rebalanced": RebalancedSoftTarget(counts),
    }


def best_mixture(counts: tuple[int, ...]) -> Mixture:
    """Fixed weights of the same terms: those that did best on validation images, without the last term."""
    weights = {"label": 1.0, "teacher": 1.0}
    return {name: (weight, terms(counts)[name]) for name, weight in weights.items()}


def best(setting: Setting) -> BilevelLossBalancer:
    """The same terms by one learned weight a class and term."""
    student, teacher, optimizer, counts, preset = setting
    table = beside(student, weighting.ClassTable(len(counts), 3, init=0.4, output="sigmoid"))
    return BilevelLossBalancer(
        student,
        terms(counts),
        optimizer=optimizer,
        teacher=teacher,
        weighting=table,
        weighting_optimizer=adam(table, 10 * preset.weighting_lr),  # its numbers move by themselves, one a class
    )
