"""The statistics of a balancer's whole training, in bounded memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metakd._basics.positive_int import positive_int
from metakd.errors import MetaKDError
from metakd.report import Report

_SAMPLES = ("weights", "losses", "influence", "spread")
_CALLS = ("meta_loss", "hypergradient_norm")


class History:
    """Means of a balancer's reports over time, by term and by class, or by any other group of samples.

    Steps are collected in at most `points` windows of equal length. When all windows are full, neighbours are merged
    and windows become twice as long: memory does not grow, and a long training has as many points as a short one. `add`
    computes a few sums on the device of the report, without a host sync; reading copies to the CPU.

    With several processes, each keeps the history of its own samples.

    Args:
        terms: the names of the M terms; `balancer.terms`.
        classes: C, to separate samples by label or another group; 0 for means over all samples only.
        points: the largest number of windows, even.
        by: what the groups are, such as "source"; figures and messages name them so.

    Raises:
        MetaKDError: `points` is odd or below 2; in use, reports or labels do not fit.

    Examples:
        >>> history = History(["hard", "soft"], classes=2)
        >>> for step in range(1000):
        ...     weights = torch.tensor([[step / 1000, 0.25], [step / 1000, 0.75]])
        ...     history.add(Report(losses=torch.ones(2, 2), weights=weights), torch.tensor([0, 1]))
        >>> history.over_time("weights").shape
        torch.Size([250, 2])
        >>> history.by_class("weights", last=0.1)
        tensor([[0.9495, 0.2500],
                [0.9495, 0.7500]], dtype=torch.float64)
    """

    def __init__(self, terms: Iterable[str], classes: int = 0, *, points: int = 256, by: str = "class") -> None:
        self.terms, self.by = tuple(terms), by
        self.classes = classes and positive_int(classes, "classes")
        if positive_int(points, "points") % 2:
            raise MetaKDError(f"points is {points}, but must be even: neighbouring windows are merged in pairs")
        self.steps, self._stride = 0, 1
        # Sums over each window, one row per class and one for other labels. Columns: weights, losses, influence and
        # squared weights of the M terms; the number of samples; the number of samples with an influence.
        self._samples = torch.zeros(points, self.classes + 1, 4 * len(self.terms) + 2)
        self._calls = torch.zeros(points, 3)  # meta loss, norm of the hypergradient, number of hypergradients
        self._learned: dict[str, Tensor] = {}  # sums of the terms' own parameters, (points, *shape)
        self._counted = torch.zeros(points)  # their number of steps

    @torch.no_grad()
    def add(self, report: Report, targets: Tensor | None = None) -> None:
        """Add one step: `history.add(balancer.report, targets)`.

        A skipped step (see `Report`) is counted, but not averaged.

        Args:
            report: of the step.
            targets: (B,) integers, the labels of its samples, or their groups, such as `batch.columns["source"]`;
                numbers outside [0, C), such as an ignored -100, belong to none.
        """
        losses, weights, influence = report.losses, report.weights, report.influence
        if weights.shape[1] != len(self.terms):
            raise MetaKDError(
                f"the report has {weights.shape[1]} terms, the History has {len(self.terms)}: {list(self.terms)}; "
                "build it as History(balancer.terms)"
            )
        rows = self._rows(targets, losses)
        if self._samples.device != losses.device:
            self._samples, self._calls = self._samples.to(losses.device), self._calls.to(losses.device)
            self._counted = self._counted.to(losses.device)
            self._learned = {name: sums.to(losses.device) for name, sums in self._learned.items()}
        if self.steps == len(self._samples) * self._stride:
            self._samples, self._calls, self._counted = map(_merged, (self._samples, self._calls, self._counted))
            self._learned = {name: _merged(sums) for name, sums in self._learned.items()}
            self._stride *= 2
        window = self.steps // self._stride
        self.steps += 1
        if report.skipped is not None:  # its losses may be infinite
            return
        ones = torch.ones_like(losses[:, :1])
        felt = [torch.zeros_like(losses), torch.zeros_like(ones)] if influence is None else [influence, ones]
        row = torch.cat([t.float() for t in (weights, losses, felt[0], weights.float() ** 2, ones, felt[1])], dim=1)
        self._samples[window].index_add_(0, rows, row)
        self._counted[window] += 1
        for name, value in report.term_parameters.items():
            sums = self._learned.setdefault(name, value.new_zeros(len(self._calls), *value.shape, dtype=torch.float32))
            sums[window] += value
        if report.meta_loss is not None and report.hypergradient_norm is not None:
            self._calls[window] += torch.stack([report.meta_loss, report.hypergradient_norm, ones[0, 0]]).float()

    @property
    def at(self) -> Tensor:
        """(P,) the step in the middle of each window; the first step is 1."""
        start = torch.arange(0, self.steps, self._stride, dtype=torch.float64)
        return (start + 1 + (start + self._stride).clamp(max=self.steps)) / 2

    @property
    def learned(self) -> list[str]:
        """The names of the terms' own parameters that the reports had."""
        return list(self._learned)

    def over_time(self, name: str, classes: Sequence[int] | None = None) -> Tensor:
        """(P, M) means of each window by term, (P,) for quantities of a whole call; NaN without data.

        A term's own parameter has its name in `report.term_parameters`, and its shape after P.

        Args:
            name: `"weights"`, `"losses"`, `"influence"`, `"spread"` (the standard deviation of the weights between
                samples), `"meta_loss"`, `"hypergradient_norm"`, or a name of `learned`.
            classes: only samples of these classes.
        """
        windows = len(self.at)
        if name in self._learned:
            sums = self._learned[name][:windows].cpu().double()
            return sums / self._counted[:windows].cpu().double().view(-1, *[1] * (sums.ndim - 1))
        if name in _CALLS:
            calls = self._calls[:windows].cpu().double()
            return calls[:, _CALLS.index(name)] / calls[:, 2]
        samples = self._samples[:windows].cpu().double()
        return self._means(name, samples.sum(1) if classes is None else samples[:, self._known(classes)].sum(1))

    def by_class(self, name: str = "weights", *, last: float = 0.1) -> Tensor:
        """(C, M) means by class and term over the last steps; NaN for a class without samples.

        Args:
            name: `"weights"`, `"losses"`, `"influence"` or `"spread"`.
            last: the share of the steps to use, at least one window.
        """
        windows = len(self.at)
        first = min(round(windows * (1 - last)), windows - 1)
        samples = self._samples[max(first, 0) : windows].cpu().double()
        return self._means(name, samples.sum(0)[self._known(range(self.classes))])

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and numbers; loads with `weights_only=True`."""
        tensors: dict[str, Any] = {"samples": self._samples.clone(), "calls": self._calls.clone()}
        if self._learned:
            learned = {name: sums.clone() for name, sums in self._learned.items()}
            tensors |= {"learned": learned, "counted": self._counted.clone()}
        return {"terms": list(self.terms), "steps": self.steps, "stride": self._stride, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            MetaKDError: the state belongs to a history of other terms, classes or points; nothing changes.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise MetaKDError(
                f"this is no state of a History: it lacks {sorted(missing)}; pass what state_dict() returned"
            )
        for key, here in (("terms", list(self.terms)), ("samples", self._samples.shape), ("calls", self._calls.shape)):
            saved = list(state[key]) if key == "terms" else getattr(state[key], "shape", None)
            if saved != here:
                raise MetaKDError(
                    f"the saved history's {key!r} is {saved}, but here it is {here}; build the History with the same "
                    "terms, classes and points as the saved one"
                )
        self.steps, self._stride = int(state["steps"]), int(state["stride"])
        self._samples, self._calls = state["samples"].detach().clone(), state["calls"].detach().clone()
        self._learned = {name: sums.detach().clone() for name, sums in state.get("learned", {}).items()}
        self._counted = state.get("counted", torch.zeros(len(self._calls))).detach().to(self._calls, copy=True)

    def _rows(self, targets: Tensor | None, like: Tensor) -> Tensor:
        """(B,) the row of each sample."""
        if not self.classes:
            return torch.zeros(len(like), dtype=torch.long, device=like.device)
        if targets is None or targets.shape != like.shape[:1] or targets.is_floating_point():
            got = "None" if targets is None else f"{targets.dtype} of shape {tuple(targets.shape)}"
            raise MetaKDError(
                f"a History by {self.by} ({self.classes} groups) needs the {self.by} of each sample of the step as "
                f"integers of shape ({len(like)},), got {got}; call add(balancer.report, numbers)"
            )
        rows = targets.to(like.device).long()
        return torch.where((rows >= 0) & (rows < self.classes), rows, self.classes)

    def _means(self, name: str, sums: Tensor) -> Tensor:
        """Means of one quantity from sums (..., 4 M + 2)."""
        if name not in _SAMPLES:
            known = (*_SAMPLES, *_CALLS, *self._learned)
            raise MetaKDError(f"a History has no {name!r}; it has {', '.join(known)}")
        *parts, counts = sums.split([len(self.terms)] * 4 + [2], dim=-1)
        if name == "spread":
            mean, square = parts[0] / counts[..., :1], parts[3] / counts[..., :1]
            found: Tensor = (square - mean**2).clamp(min=0).sqrt()
            return found
        part: Tensor = parts[_SAMPLES.index(name)]
        count: Tensor = counts[..., 1:] if name == "influence" else counts[..., :1]
        return part / count

    def _known(self, classes: Iterable[int]) -> list[int]:
        known = list(classes)
        if not self.classes or not all(0 <= c < self.classes for c in known):
            raise MetaKDError(
                f"this History, by {self.by}, knows the numbers {list(range(self.classes))[:10]}, not {known[:10]}; "
                "build it as History(balancer.terms, classes=C) and pass each sample's number to add()"
            )
        return known


def _merged(sums: Tensor) -> Tensor:
    """Neighbouring windows added up, followed by as many empty ones."""
    pairs = sums.unflatten(0, (-1, 2)).sum(1)
    return torch.cat([pairs, torch.zeros_like(pairs)])
