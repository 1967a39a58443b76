"""`Diagnosis`: the answer to "is it learning?"."""

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill

from metakd.inner import Params
from metakd.monitor.doctor.numbers import Numbers
from metakd.validation.finding import Finding

CLEAR = 2.0  # a signal of at least this many times the noise counts as one


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`; print it for a summary.

    Attributes:
        numbers: all that was measured.
        parameters: a copy of the weight model's parameters, for comparison by a later diagnosis.
        findings: what the numbers mean, each with its cure, the most important first.

    Examples:
        >>> import torch
        >>> from metakd import BilevelLossBalancer, diagnose, terms
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
        >>> diagnosis = diagnose(balancer, batches, batches)
        >>> diagnosis.numbers.batches
        4
    """

    numbers: Numbers
    parameters: Params
    findings: list[Finding]

    @property
    def learning(self) -> str:
        """Whether the weight model is learning now, in one line."""
        n = self.numbers
        if n.failure is not None:
            return "No: there is no hypergradient"
        if n.frozen:
            return "No: its steps do not move the weights"
        if n.signal is None:
            return "Perhaps: these batches cannot tell the signal in the hypergradients from noise"
        if n.signal < CLEAR:
            return f"Not now: the hypergradients have no direction in common ({n.signal:.1f} times the noise)"
        return f"Yes: the hypergradients have a direction in common ({n.signal:.1f} times the noise)"

    @property
    def learned(self) -> str:
        """What it has learned so far, in one line."""
        n = self.numbers
        mixture = ", ".join(f"{term} {mean:.3g}" for term, mean in zip(n.terms, n.mean, strict=True))
        if n.constant:
            return f"A constant mixture, the same for every sample: {mixture}"
        if n.together:
            return f"How much a sample counts, with the terms in fixed proportions ({mixture})"
        return f"Weights of their own for each sample and term (on average {mixture})"

    def __str__(self) -> str:
        lines = [f"Is it learning? {self.learning}.", f"What has it learned? {self.learned}.", ""]
        lines += [f"{label:<28}{text}" for label, text in self._rows()]
        lines += [""] * bool(self.findings)
        lines += [fill(f"[{finding.level}] {finding}", 110, subsequent_indent="    ") for finding in self.findings]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        n = self.numbers
        if n.failure is None:
            yield "hypergradient", f"norm {n.hypergradient_norm:.2g}, over {n.batches} batches"
        yield "train and meta gradient", f"cosine {n.cosine}"
        change = f"{100 * n.change.value:+.2g} ± {100 * n.change.error:.2g} %"
        yield "the student's step ahead", f"changes the meta loss, {n.before:.3g}, by {change}"
        for k, term in enumerate(n.terms):
            parts = [f"{n.mean[k]:.3g}, spread between samples {n.spread[k]:.2g}"]
            for end, fractions in (("lower", n.at_low), ("upper", n.at_high)):
                parts += [] if fractions is None else [f"{100 * fractions[k]:.0f} % at the {end} end"]
            yield f"weight of {term}", "; ".join(parts)
        if n.failure is None:
            step = f"{100 * n.step:.2g} % of its parameters"
            yield "the weight model's step", f"{step}; it changes a weight by {n.weights_step:.2g}"
        if n.moved is not None:
            yield "since the last diagnosis", f"a sample's weight has changed by {n.moved:.2g}"
