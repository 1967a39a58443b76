"""The measurements of a diagnosis over all batches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from metakd._autodiff import norm
from metakd._virtual.swapping import with_parameters
from metakd.balancer import BilevelLossBalancer
from metakd.inner import Params
from metakd.monitor.doctor.examine import Visit
from metakd.monitor.doctor.ranges import at_the_ends, over_start

Twin = tuple[nn.Module, torch.optim.Optimizer | None]


class Mean(NamedTuple):
    """A mean over the batches and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """The mean of at least two values."""
        found = torch.tensor(values, dtype=torch.float64)
        return cls(float(found.mean()), float(found.std() / math.sqrt(len(values))))

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}"


class Numbers(NamedTuple):
    """All that was measured. Numbers of the weights are over all samples of all batches.

    Attributes:
        terms: names of the M terms.
        batches: how many.
        failure: why there is no hypergradient; None if there is one.
        hypergradient_norm: norm of a single hypergradient, averaged.
        signal: norm of the hypergradients' mean over its standard error; noise alone gives 1. None if no parameter had
            a gradient in two of the batches.
        needed: how many hypergradients must be averaged for the signal to equal the noise; None without a signal.
        cosine: between the gradients of the weighted training loss and of the meta loss, before the step ahead.
        before: the meta loss before the step ahead.
        change: of the meta loss by the step ahead, relative.
        length: of the step ahead, relative to the student's parameters.
        mean: (M,) mean weight of each term.
        spread: (M,) standard deviation of each term's weight between samples.
        scale: mean of all weights over what they started at; 1 if they are still there. None if the start is unknown.
        scale_spread: standard deviation, between samples and terms, of a weight over what it started at; None as above.
        share_spread: the largest standard deviation, between samples, of a term's share of the sample's weight.
        at_low: (M,) fraction of each term's weights at the lower end of their range; None without a range.
        at_high: (M,) the same at the upper end.
        step: size of one step of the weight model, relative to its parameters.
        weights_step: how much that step changes a weight, on average.
        rate: the learning rate of the weight model's optimizer; None if its groups differ.
        moved: how much a sample's weight changed since the previous diagnosis, on average; None without one.
    """

    terms: list[str]
    batches: int
    failure: str | None
    hypergradient_norm: float
    signal: float | None
    needed: float | None
    cosine: Mean
    before: float
    change: Mean
    length: float
    mean: list[float]
    spread: list[float]
    scale: float | None
    scale_spread: float | None
    share_spread: float
    at_low: list[float] | None
    at_high: list[float] | None
    step: float
    weights_step: float
    rate: float | None
    moved: float | None

    @property
    def constant(self) -> bool:
        """Whether all samples have the same weights, to 2 %."""
        return all(s <= 0.02 * abs(m) for s, m in zip(self.spread, self.mean, strict=True))

    @property
    def together(self) -> bool:
        """Whether the terms have the same proportions in all samples, to 1 %."""
        return len(self.terms) > 1 and self.share_spread < 0.01

    @property
    def frozen(self) -> bool:
        """Whether a step of the weight model does not change the weights."""
        return self.failure is None and self.weights_step < 1e-6

    @property
    def at_an_end(self) -> bool:
        """Whether most weights of a term are at an end of their range."""
        return any(fraction > 0.5 for fraction in [*(self.at_low or ()), *(self.at_high or ())])

    @property
    def scaled(self) -> bool:
        """Whether the weights have mostly become smaller, or larger, all together."""
        if self.scale is None or self.scale_spread is None or 0.5 <= self.scale <= 2:
            return False
        return abs(self.scale - 1) > 2 * self.scale_spread


def summarised(
    balancer: BilevelLossBalancer,
    visits: Sequence[Visit],
    twin: Twin,
    previous: Params | None,
) -> Numbers:
    """Combine all visits; the twin of weight model and optimizer steps along their mean hypergradient."""
    weights = torch.cat([visit.weights for visit in visits]).double().cpu()
    found = [visit.hypergradient for visit in visits if not isinstance(visit.hypergradient, str)]
    low, high = at_the_ends(balancer.weighting, weights)
    signal, needed = _signal(found) if len(found) > 1 else (None, None)
    step, weights_step = _step(twin, found, visits) if found else (0.0, 0.0)
    scale, scale_spread = over_start(balancer.weighting, weights)
    shares = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    return Numbers(
        terms=list(balancer.terms),
        batches=len(visits),
        failure=next((v.hypergradient for v in visits if isinstance(v.hypergradient, str)), None),
        hypergradient_norm=sum(norm(one.values()) for one in found) / max(len(found), 1),
        signal=signal,
        needed=needed,
        cosine=Mean.of([visit.cosine for visit in visits]),
        before=Mean.of([visit.before for visit in visits]).value,
        change=Mean.of([visit.after / visit.before - 1 if visit.before else 0.0 for visit in visits]),
        length=Mean.of([visit.length for visit in visits]).value,
        mean=weights.mean(0).tolist(),
        spread=weights.std(0).tolist(),
        scale=scale,
        scale_spread=scale_spread,
        share_spread=float(shares.std(0).max()),
        at_low=low,
        at_high=high,
        step=step,
        weights_step=weights_step,
        rate=_rate(twin[1]),
        moved=None if previous is None else _changed(balancer.weighting, previous, visits),
    )


def _signal(found: Sequence[Params]) -> tuple[float | None, float | None]:
    """See `Numbers.signal` and `Numbers.needed`."""
    rows = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in found]).double().cpu()
    rows = rows[:, (rows != 0).sum(0) > 1]  # a table's row with one sample tells nothing about noise
    if rows.shape[1] == 0:
        return None, None
    one = float(rows.var(0).sum())  # the noise of one hypergradient
    of_mean = one / len(rows)
    total = float(rows.mean(0).square().sum())
    signal = total - of_mean
    return math.sqrt(total / of_mean) if of_mean else math.inf, one / signal if signal > 0 else None


def _step(twin: Twin, found: Sequence[Params], visits: Sequence[Visit]) -> tuple[float, float]:
    """See `Numbers.step` and `Numbers.weights_step`."""
    model, optimizer = twin
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert optimizer is not None  # a weight model with parameters has one
    optimizer.zero_grad()
    for name, p in model.named_parameters():
        if name in found[0]:
            p.grad = torch.stack([one[name] for one in found]).mean(0)
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    size = norm(before.values())
    return norm(moved.values()) / size if size else math.inf, _changed(model, before, visits)


@torch.no_grad()
def _changed(model: nn.Module, before: Params, visits: Sequence[Visit]) -> float:
    """How much the samples' weights differ from those under other parameters of the model, on average."""
    after = [model(v.features, v.batch) for v in visits]
    with with_parameters(model, before):
        changes = [(new - model(v.features, v.batch)).abs().flatten() for new, v in zip(after, visits, strict=True)]
    return float(torch.cat(changes).mean())


def _rate(optimizer: torch.optim.Optimizer | None) -> float | None:
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group} if optimizer else set()
    return rates.pop() if len(rates) == 1 else None
