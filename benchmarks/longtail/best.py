"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

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


def best(*, faster: float = 10.0, **options: Any) -> Callable[[Setting], BilevelLossBalancer]:
    """The same terms by one learned weight a class and term, each of which starts at 0.4.

    A table's numbers move by themselves, one a class and term: hence its learning rate, the preset's times `faster`.
    """

    def build(setting: Setting) -> BilevelLossBalancer:
        table = ClassTable(len(setting.counts), 3, init=0.4, output="sigmoid")
        return _of_table(setting, table, faster, **options)

    return build


def best_from_mixture(setting: Setting) -> BilevelLossBalancer:
    """The table starts at the weights of the best fixed mixture, and leaves them slowly."""
    table = ClassTable(len(setting.counts), 3, init=1.0)
    with torch.no_grad():
        table.free[:, 2] = -4.0  # a weight of 0.02, from which a gradient can still lift it
    return _of_table(setting, table, faster=1.0)


def _of_table(setting: Setting, table: ClassTable, faster: float, **options: Any) -> BilevelLossBalancer:
    return setting.balancer(terms(setting.counts), table, lr=faster * setting.preset.weighting_lr, **options)
