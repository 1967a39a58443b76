"""`check_hypergradient`: compares hypergradients with central finite differences in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakd._autodiff import norm
from metakd.balancer import BilevelLossBalancer
from metakd.check.causes import hint
from metakd.check.finite_differences import slope_at_zero
from metakd.check.real_steps import Candidate, double, in_float64
from metakd.errors import MetaKDError
from metakd.estimators import Adjoint, Estimator, Problem
from metakd.estimators.build import Nest, Optimizer, build_problem
from metakd.estimators.estimate import checked_estimator, estimate, solved
from metakd.estimators.memory import Memory
from metakd.inner import Params


class Check(NamedTuple):
    """What `check_hypergradient` found.

    Attributes:
        relative_error: |estimated - finite differences| / |finite differences| for each meta-parameter, with Euclidean
            norms over the directions; differences up to 1e-12 of the outer loss are rounding and do not count.
        estimated: directional derivatives from the estimator's hypergradient, for each meta-parameter.
        finite_differences: the same by central differences.
        tolerance: the largest accepted relative error.

    Examples:
        >>> found = Check({"phi": 2e-9}, {"phi": [0.5]}, {"phi": [0.5]}, 1e-6)
        >>> found.verdict
        'exact: the largest relative error is 2.0e-09 (phi), the tolerance 1e-06'
    """

    relative_error: dict[str, float]
    estimated: dict[str, list[float]]
    finite_differences: dict[str, list[float]]
    tolerance: float

    @property
    def verdict(self) -> str:
        """One line that says whether the two agree, and how well."""
        worst = max(self.relative_error, key=lambda name: _nan_is_largest(self.relative_error[name]))
        error = self.relative_error[worst]
        word = "exact" if error <= self.tolerance else "wrong"
        return f"{word}: the largest relative error is {error:.1e} ({worst}), the tolerance {self.tolerance:.0e}"


def check_hypergradient(
    inner: Callable[[Params, Params, Any], Tensor] | BilevelLossBalancer,
    outer: Any,
    params: Any,
    meta_params: Nest | None = None,
    batches: Sequence[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    optimizer_state: Any = None,
    outer_batches: Sequence[Any] | None = None,
    estimator: Estimator | None = None,
    directions: int = 3,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Check:
    r"""Compare a hypergradient with central finite differences in float64, along random directions.

    For each meta-parameter tensor and each of `directions` random directions $d$ of unit norm it compares
    $\langle \nabla_\phi, d \rangle$ with $\big(F(\phi + h d) - F(\phi - h d)\big) / 2h$, extrapolated to $h \to 0$
    (Ridders, 1982), where $F(\phi)$ runs the K inner steps and the outer loss in float64 with first-order gradients.

    Two ways to call it: `check_hypergradient(inner, outer, params, meta_params, batches, optimizer=...)` takes the
    arguments of `hypergradient`; `check_hypergradient(balancer, batches, meta_batch)` checks a balancer's
    hypergradient through K = len(batches) steps in its weight model's parameters, and leaves the balancer unchanged.

    Args:
        inner: the inner loss, or a balancer.
        outer: the outer loss; with a balancer, the list of training batches.
        params: theta_0; with a balancer, the meta batch.
        meta_params: phi.
        batches: one for each inner step.
        optimizer: a TorchOpt `GradientTransformation`, or a function of the meta-parameters that returns one.
        optimizer_state: the state to start from.
        outer_batches: as in `hypergradient`.
        estimator: the estimator to check; None for `Adjoint()`, or for the balancer's own.
        directions: number of random directions for each tensor.
        tolerance: the largest accepted relative error of a tensor.
        seed: for the directions.

    Returns:
        `Check(relative_error, estimated, finite_differences, tolerance)` if all errors are within the tolerance; its
            `verdict` is a line to print.

    Raises:
        MetaKDError: an error is above the tolerance; the message has the numbers and the likeliest cause for each such
            tensor.

    Examples:
        >>> import torchopt
        >>> found = check_hypergradient(
        ...     lambda p, m, batch: (m["phi"] * p["w"] ** 2).sum(), lambda p, m: (p["w"] ** 3).sum(),
        ...     {"w": torch.tensor([1.0, 2.0])}, {"phi": torch.tensor([0.3, 0.2])}, range(4),
        ...     optimizer=torchopt.adam(lr=0.1))
        >>> found.relative_error["phi"] < 1e-6
        True
    """
    if isinstance(inner, BilevelLossBalancer):
        estimator = checked_estimator(estimator or inner.estimator)
        with in_float64(inner, outer, params, estimator) as candidate:
            return _compare(candidate, estimator, len(outer), directions, tolerance, seed)
    if meta_params is None or batches is None or optimizer is None:
        given = {"meta_params": meta_params, "batches": batches, "optimizer": optimizer}
        raise MetaKDError(
            f"check_hypergradient of two functions lacks {[name for name, value in given.items() if value is None]}; "
            "call it as (inner, outer, params, meta_params, batches, optimizer=...) or (balancer, batches, meta_batch)"
        )
    theta, phi, data, state, outer_data = (
        double(value) for value in (params, meta_params, list(batches), optimizer_state, outer_batches)
    )
    problem = build_problem(inner, outer, theta, phi, data, optimizer, state, outer_batches=outer_data)
    estimator = checked_estimator(estimator or Adjoint())
    with torch.enable_grad():
        gradient = estimate(estimator, replace(problem, memory=Memory(compare=True))).gradient
        whole = solved(estimator, problem)
        candidate = Candidate(gradient, problem.meta_params, lambda phi: _outer_after_inner(whole, phi))
        return _compare(candidate, estimator, len(problem.batches), directions, tolerance, seed)


def _compare(
    candidate: Candidate, estimator: Estimator, steps: int, directions: int, tolerance: float, seed: int
) -> Check:
    generator = torch.Generator().manual_seed(seed)
    check = Check({}, {}, {}, tolerance)
    scale, rounding = norm(candidate.gradient.values()), 1e-12 * abs(candidate.outer_after_inner(candidate.meta_params))
    wrong = []
    for name, g in candidate.gradient.items():
        drawn = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.device) for _ in range(directions)]
        units = [direction / direction.norm().clamp(min=1e-300) for direction in drawn]
        ways = [_along(candidate, name, unit) for unit in units]
        estimated = [float((g * unit).sum()) for unit in units]
        slopes = [slope_at_zero(along) for along in ways]
        error = _relative(estimated, [slope.value for slope in slopes], scale, rounding)
        for step in _SMALLER_STEPS:
            if error <= tolerance:
                break
            # Large steps may cross a kink, small steps have more rounding: take the one that agrees best with itself.
            finer = [slope_at_zero(along, step=step) for along in ways]
            slopes = [min(pair, key=lambda slope: slope.spread) for pair in zip(finer, slopes, strict=True)]
            error = _relative(estimated, [slope.value for slope in slopes], scale, rounding)
        differences = [slope.value for slope in slopes]
        check.relative_error[name] = error
        check.estimated[name], check.finite_differences[name] = estimated, differences
        if not error <= tolerance:
            why = hint(estimated, slopes, ways[0], estimator, steps)
            numbers = f"estimated {_numbers(estimated)}, finite differences {_numbers(differences)}"
            wrong.append(f"  {name}: relative error {error:.1e}; {numbers}\n    {why}")
    if wrong:
        raise MetaKDError(
            f"the hypergradient by {estimator} differs from central finite differences by more than {tolerance:.0e}\n"
            + "\n".join(wrong)
        )
    return check


def _along(candidate: Candidate, name: str, unit: Tensor) -> Callable[[float], float]:
    """The outer loss as a function of h, with one meta-parameter moved by h along a unit direction."""
    value = candidate.meta_params[name]
    return lambda h: candidate.outer_after_inner({**candidate.meta_params, name: value + h * unit})


def _outer_after_inner(problem: Problem, meta_params: Params) -> float:
    """F(phi), the outer loss after the inner steps, with first-order gradients only."""
    params, _ = problem.at(meta_params).sweep()
    with torch.no_grad():
        return float(torch.stack([outer(params, meta_params) for outer in problem.outers]).mean())


def _relative(estimated: list[float], differences: list[float], scale: float, rounding: float) -> float:
    """|e - d| / |d| over a tensor's directions, without the rounding of d.

    |d| is at least 1e-9 of the whole gradient: below that a derivative counts as zero.
    """
    error = max(math.dist(estimated, differences) - rounding, 0.0)
    return error / max(math.hypot(*differences), 1e-9 * scale, 1e-300)


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


_SMALLER_STEPS = (1e-3, 2e-5, 4e-7, 1e-8)


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.6e}" for value in values) + "]"
