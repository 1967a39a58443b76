"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.longtail.fixed import Mixture
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer
from metakd.features import Features, student_and_teacher
from metakd.terms import BalancedSoftmax, DebiasedSoftTarget, RebalancedSoftTarget, Term
from metakd.weighting import ClassAware, ClassTable, LossMLP


def terms(counts: Sequence[int]) -> Mapping[str, Term]:
    """The label and the teacher without the prior of the long tail, and the teacher in favour of rare classes."""
    return {
        "label": BalancedSoftmax(counts),
        "teacher": DebiasedSoftTarget(counts, temperature=4.0),
        "rebalanced": RebalancedSoftTarget(counts),
    }


def best_mixture(
    counts: tuple[int, ...], *, names: Sequence[str] = ("label", "teacher"), weight: float = 1.0
) -> Mixture:
    """Fixed weights of the same terms; by default those that did best on validation images, without the last term."""
    known = terms(counts)
    return {name: (weight, known[name]) for name in names}


def best(setting: Setting) -> BilevelLossBalancer:
    """One learned weight a class and term, which starts at the best fixed mixture and leaves it slowly."""
    known = terms(setting.counts)
    table = ClassTable(len(setting.counts), len(known), init=1.0)
    with torch.no_grad():
        table.free[:, -1] = -4.0  # a weight of 0.02, from which a gradient can still lift it
    return _learned(setting, tuple(known), table, faster=1.0)


def from_below(
    *, names: Sequence[str] = ("label", "teacher", "rebalanced"), **options: Any
) -> Callable[[Setting], BilevelLossBalancer]:
    """A table, too; its weights are between 0 and 1, start at 0.4 and move ten times as fast."""

    def build(setting: Setting) -> BilevelLossBalancer:
        table = ClassTable(len(setting.counts), len(names), init=0.4, output="sigmoid")
        return _learned(setting, names, table, faster=10.0, **options)

    return build


def by_network(setting: Setting) -> BilevelLossBalancer:
    """BiKD's weight model in place of the table, over the terms of the best fixed mixture."""
    return _by_network(setting, LossMLP(2, 2, hidden=(64,)), student_and_teacher)


def by_network_with_more_inputs(setting: Setting) -> BilevelLossBalancer:
    """The same, with more inputs and k = 5."""
    return _by_network(setting, LossMLP(5, 2, hidden=(64,)), ClassAware(setting.counts), accumulate=5)


def _by_network(setting: Setting, network: nn.Module, features: Features, **options: Any) -> BilevelLossBalancer:
    names = ("label", "teacher")
    return _learned(setting, names, network, faster=1.0, weight_decay=1e-4, features=features, **options)


def _learned(
    setting: Setting, names: Sequence[str], weighting: nn.Module, *, faster: float, **options: Any
) -> BilevelLossBalancer:
    known = terms(setting.counts)
    lr = faster * setting.preset.weighting_lr
    return setting.balancer({name: known[name] for name in names}, weighting, lr=lr, **options)
