"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.longtail.fixed import Mixture
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer
from metakd.terms import BalancedSoftmax, DebiasedSoftTarget, RebalancedSoftTarget, Term
from metakd.weighting import ClassAware, ClassTable, GroupTable


def terms(counts: Sequence[int], temperature: float = 4.0) -> Mapping[str, Term]:
    """The label and the teacher without the prior of the long tail, and the teacher in favour of rare classes."""
    return {
        "label": BalancedSoftmax(counts),
        "teacher": DebiasedSoftTarget(counts, temperature=temperature),
        "rebalanced": RebalancedSoftTarget(counts),
    }


def best_mixture(
    counts: tuple[int, ...],
    *,
    names: Sequence[str] = ("label", "teacher"),
    weight: float = 1.0,
    temperature: float = 4.0,
) -> Mixture:
    """Fixed weights of the same terms; by default those that did best on validation images, without the last term."""
    known = terms(counts, temperature)
    return {name: (weight, known[name]) for name in names}


def at_mixture(table: GroupTable) -> GroupTable:
    """The table, its weights those of the best fixed mixture, 1 and 1."""
    with torch.no_grad():
        table.free[:, -1] = -4.0  # a weight of 0.02, from which a gradient can still lift it
    return table


def best(setting: Setting) -> BilevelLossBalancer:
    """One learned weight a class and term, which starts at the best fixed mixture and leaves it slowly."""
    known = terms(setting.counts)
    table = at_mixture(ClassTable(len(setting.counts), len(known), init=1.0, output="softplus"))
    return setting.balancer(known, table, lr=setting.preset.weighting_lr)


def from_below(**options: Any) -> Callable[[Setting], BilevelLossBalancer]:
    """A table, too; its weights are between 0 and 1, start at 0.4 and move ten times as fast."""

    def build(setting: Setting) -> BilevelLossBalancer:
        known = terms(setting.counts)
        table = ClassTable(len(setting.counts), len(known), init=0.4, output="sigmoid")
        return setting.balancer(known, table, lr=10 * setting.preset.weighting_lr, **options)

    return build


def by_network(setting: Setting) -> BilevelLossBalancer:
    """BiKD's weight model, with more inputs and k = 5, over the terms of the best fixed mixture."""
    known = {name: term for name, (_, term) in best_mixture(setting.counts).items()}
    options = {"features": ClassAware(setting.counts), "accumulate": 5}
    return setting.balancer(known, setting.network(5), lr=setting.preset.weighting_lr, weight_decay=1e-4, **options)
