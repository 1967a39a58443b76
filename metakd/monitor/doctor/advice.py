"""The findings of a diagnosis, in plain English, each with its cure."""

from collections.abc import Callable, Iterator

from metakd.balancer import BilevelLossBalancer
from metakd.monitor.doctor.diagnosis import CLEAR
from metakd.monitor.doctor.numbers import Numbers
from metakd.monitor.doctor.ranges import EDGE, unpinned
from metakd.validation.finding import HANDLED, Finding, by_severity
from metakd.weighting import TermScalars

SLOW, PACE = 1e-3, 0.01  # steps of the weights: below the first they hardly move; the second is a good one


def advice(balancer: BilevelLossBalancer, numbers: Numbers) -> list[Finding]:
    """Return the findings, errors first."""
    return by_severity(finding for check in _CHECKS for finding in check(balancer, numbers))


def no_hypergradient(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The estimator raised."""
    if n.failure is not None:
        yield Finding("error", "the hypergradient", "it cannot be taken", n.failure.rstrip(".").capitalize())


def constant(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """All samples have the same weights."""
    if n.constant and not isinstance(unpinned(balancer.weighting), TermScalars):
        yield Finding(
            "warning",
            "the weights",
            "they are the same for all samples, to 2 %: a plain loss with these numbers as fixed weights would train "
            "the same student in a fraction of the time",
            "Early in training, wait. If it persists, train with this mixture, or find features that distinguish "
            "samples",
        )


def together(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The terms have fixed proportions."""
    if n.together and not n.constant:
        yield Finding(
            "note",
            "the terms",
            "they have the same proportions in every sample, to 1 %: the weights distinguish samples, but not terms",
            "If it persists, one weight per sample for the sum of the terms does the same",
        )


def saturated(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """Weights are at the ends of their range."""
    for end, fractions in (("lower", n.at_low), ("upper", n.at_high)):
        for term, fraction in zip(n.terms, fractions or [0.0] * len(n.terms), strict=True):
            if fraction > 0.5:
                yield Finding(
                    "warning",
                    f"the weight of {term}",
                    f"for {100 * fraction:.0f} % of the samples it is within {EDGE} of the {end} end of its range, "
                    "where the hypergradient vanishes and the weight hardly moves",
                    "Restart with a lower learning rate or more weight decay of the weight model. If it saturates "
                    "again, this end is the answer, and the term needs no learned weight",
                )


def pace(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The weights move too slowly or too fast."""
    now = "" if n.rate is None else f", now {n.rate:.3g},"
    if n.frozen:
        problem = "a step does not change the weights at all"
        if n.weights_step > 0:
            problem = f"a step changes a weight by {n.weights_step:.1g}: 0.01 takes {0.01 / n.weights_step:,.0f} steps"
        cure = (
            f"Raise its learning rate{now}; with hypergradients of {n.hypergradient_norm:.1g}, check Adam's eps as well"
        )
        yield Finding("warning", "the weight model's optimizer", problem, cure.replace(",;", ";"))
    elif n.weights_step > 0.1:
        problem = f"a single step changes a weight by {n.weights_step:.2g}: they jump rather than learn"
        yield Finding("warning", "the weight model's optimizer", problem, "Lower its learning rate")
    elif n.failure is None and n.weights_step < SLOW and not n.at_an_end and (n.signal is None or n.signal >= CLEAR):
        times = PACE / n.weights_step
        to = f"to about {times * n.rate:.1g}" if n.rate else f"about {times:.0f}-fold"
        yield Finding(
            "warning",
            "the weight model",
            f"it hardly moves: a step changes a weight by {n.weights_step:.1g}, so 0.1 takes "
            f"{0.1 / n.weights_step:,.0f} steps in one direction",
            f"Raise its learning rate{now} {to}, where a step changes a weight by {PACE:g}; or start the weights near "
            "their goal",
        )


def noise(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The hypergradients have no direction in common."""
    if n.signal is not None and n.signal < CLEAR:
        more = ""
        if n.needed is not None and n.needed > balancer.accumulate:
            more = f"; about accumulate={n.needed:.0f} would lift the signal above the noise"
        yield Finding(
            "note",
            "the hypergradient",
            f"its mean over {n.batches} batches is {n.signal:.1f} times its standard error, and noise alone gives 1: "
            "either the weights have converged, or a batch contains too little signal to move them",
            f"If they should still move, average more hypergradients or use larger meta batches{more}",
        )


def against(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """Training increases the meta loss, or already follows the meta gradient."""
    if n.cosine.value + 2 * n.cosine.error < 0:
        yield Finding(
            "warning",
            "the training gradient",
            f"it points away from the meta gradient (cosine {n.cosine}): with the current weights, training increases "
            "the meta loss",
            "Find the terms and samples responsible in balancer.report.influence; check that meta loss and meta set "
            "are what you intend",
        )
    elif n.cosine.value > 0.95:
        problem = f"it is the meta gradient already (cosine {n.cosine}), so weights can improve almost nothing"
        yield Finding("note", "the training gradient", problem, HANDLED)


def step_ahead(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The student's step is too small to have an effect, or too large."""
    if abs(n.change.value) < 1e-6:
        yield Finding(
            "warning",
            "the student's step ahead",
            f"its relative change of the meta loss is {abs(n.change.value):.0e} (of the parameters {n.length:.0e}), so "
            "there is next to nothing to learn from",
            "Check the student's learning rate; pass meta_batch=None during a warm-up; or look several steps ahead "
            "with balancer.windows and estimators.Adjoint()",
        )
    elif n.change.value - 2 * n.change.error > 0 and n.cosine.value > 0:
        yield Finding(
            "warning",
            "the student's step ahead",
            f"it raises the meta loss, by {100 * n.change.value:.2g} %, although the gradients agree: it is too long",
            "Lower the student's learning rate, or look ahead with the student's own optimizer, inner='mirror'",
        )


def only_scale(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The weights have only changed the length of the student's step."""
    if n.scaled and n.scale is not None and n.scale_spread is not None:
        shorter = "shorter" if n.scale < 1 else "longer"
        bound = "" if n.scale < 1 or n.at_high else ". Nothing bounds them: output='bounded' or 'sigmoid' does"
        yield Finding(
            "warning",
            "the weights",
            f"together they have gone to {n.scale:.2g} times their start, and differ by {n.scale_spread:.2g} of it: "
            f"mostly they have made the student's step {shorter}, which the learning rate does as well",
            "Before you credit them with a gain, train two controls: their mean as fixed weights, and equal weights "
            f"with a tuned step (from {n.scale:.2g} times the learning rate){bound}",
        )


def scale(balancer: BilevelLossBalancer, n: Numbers) -> Iterator[Finding]:
    """The weights change the effective learning rate."""
    if not 0.1 <= sum(n.mean) <= 10 and not n.scaled:
        yield Finding(
            "warning",
            "the weights",
            f"their sum per sample is {sum(n.mean):.2g} on average, so the student trains as if at {sum(n.mean):.2g} "
            "times its learning rate",
            "Normalise them (weighting.Normalised, or output='softmax'), or adjust the learning rate",
        )


_CHECKS: tuple[Callable[[BilevelLossBalancer, Numbers], Iterator[Finding]], ...] = (
    no_hypergradient,
    constant,
    saturated,
    pace,
    step_ahead,
    against,
    only_scale,
    scale,
    noise,
    together,
)
