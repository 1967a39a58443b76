"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Mapping, Sequence

from benchmarks.longtail.fixed import Mixture
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer
from metakd.terms import BalancedSoftmax, DebiasedSoftTarget, RebalancedSoftTarget, Term
from metakd.weighting import ClassTable


def terms(counts: Sequence[int]) -> Mapping[str, Term]:
    """The label and the teacher without the prior of the long tail, and the teacher in favour of rare classes."""
    return {
        "label": BalancedSoftmax(counts),
        "teacher": DebiasedSoftTarget(counts, temperature=4.0),
        "rebalanced": RebalancedSoftTarget(counts),
    }


def best_mixture(counts: tuple[int, ...]) -> Mixture:
    """Fixed weights of the same terms: those that did best on validation images, without the last term."""
    known = terms(counts)
    return {name: (1.0, known[name]) for name in ("label", "teacher")}


def best(setting: Setting) -> BilevelLossBalancer:
    """The same terms by one learned weight a class and term."""
    table = ClassTable(len(setting.counts), 3, init=0.4, output="sigmoid")
    # A table's numbers move by themselves, one a class and term: hence the rate.
    return setting.balancer(terms(setting.counts), table, lr=10 * setting.preset.weighting_lr)
