"""Every estimator on one recipe: right, refused by name, or a fault."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakd import Hypergradient, MetaKDError, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, OneStep, Truncated, Unroll
from tests.proof.compose import Composed, Recipe
from tests.proof.reference import DoubleBackward, after_steps, differences, double_backward, optimizer, vector

FAULTS = ("wrong", "raised", "warned", "changed")
SAID = ("reverse mode takes its place",)  # what an estimator may warn of


@dataclass(frozen=True)
class Verdict:
    """What an estimator did: "right", "refused", "undecided" (nothing to compare with), or one of the faults."""

    estimator: str
    kind: str
    words: str = ""


class Unfit(Exception):
    """The recipe's numbers overflow, or it says nothing: no test of anything."""


@dataclass
class Truth:
    """What the estimators are compared with."""

    by_torch: DoubleBackward | None
    direction: dict[str, Tensor]
    slope: float | None
    generator: Tensor
    torch_is_wrong: bool = False

    def error(self, found: Hypergradient, tolerance: float) -> str:
        """What is wrong about a hypergradient; an empty string if nothing is."""
        scale = vector(found.gradient).norm().item() if self.by_torch is None else self.norm
        noise = 1e-10 * (1 + abs(found.outer_loss.item()))
        if self.slope is not None:
            slope = (vector(found.gradient) * vector(self.direction)).sum().item()
            if not abs(slope - self.slope) <= max(tolerance, 1e-5) * scale + noise:
                return f"slope {slope:.6e}, by differences {self.slope:.6e}, norm {scale:.1e}"
        if self.by_torch is None or self.torch_is_wrong:
            return ""
        expected = self.by_torch
        pairs = {"gradient": (found.gradient, expected.gradient), "theta_K": (found.params, expected.params)}
        if getattr(found, "params_gradient", None) is not None:
            pairs["in theta_0"] = (found.params_gradient, expected.in_params)
        for what, (have, want) in pairs.items():
            distance = (vector(have) - vector(want)).norm().item()
            if not distance <= tolerance * vector(want).norm().item() + noise:
                return f"{what} is off by {distance:.1e} of {vector(want).norm().item():.1e}"
        return ""

    @property
    def norm(self) -> float:
        return vector(self.by_torch.gradient).norm().item()


def truth(problem: Composed) -> Truth:
    """Differences and a double backward, as far as the recipe has them."""
    if not after_steps(problem, problem.meta_params) < 1e4:
        raise Unfit
    found = Truth(_double_backward(problem), {}, None, torch.get_rng_state())
    by_torch = found.by_torch
    if by_torch is not None and not found.norm < 1e4:
        raise Unfit
    if not problem.recipe.by_autograd:
        found.direction, slope, doubt = differences(problem)
        scale = abs(slope) if by_torch is None else found.norm
        if doubt <= 1e-6 * scale + 1e-11:
            found.slope = slope
    if found.slope is not None and by_torch is not None:
        found.torch_is_wrong = bool(found.error(_as_answer(by_torch), 1e-5))
    return found


def _double_backward(problem: Composed) -> DoubleBackward | None:
    """None where torch has no second derivative, or a NaN for it."""
    try:
        found = double_backward(problem)
    except RuntimeError:
        return None
    return found if bool(vector(found.gradient).isfinite().all()) else None


def _as_answer(by_torch: DoubleBackward) -> Hypergradient:
    return Hypergradient(by_torch.outer_loss, by_torch.gradient, by_torch.params, None)


def estimators(steps: int) -> Iterator[tuple[Any, float]]:
    """Those that are exact for K steps, and how exact."""
    yield from ((Adjoint(mode), 1e-7) for mode in ("reverse", "forward", "auto"))
    yield from ((Unroll(), 1e-7), (Truncated(steps), 1e-7), (FiniteDifference(), 1e-3))
    if steps == 1:
        yield from ((OneStep(mode), 1e-7) for mode in ("auto", "forward", "reverse"))
        yield IdentityJacobian(), 1e-7


def verdicts(recipe: Recipe) -> list[Verdict]:
    """What each estimator does on a recipe.

    Raises:
        Unfit: the recipe says nothing.
    """
    problem = Composed(recipe)
    with warnings.catch_warnings(record=True) as own:
        warnings.simplefilter("always")
        expected = truth(problem)
    known = {str(warning.message) for warning in own}
    made = [
        _verdict(problem, expected, estimator, tolerance, known) for estimator, tolerance in estimators(recipe.steps)
    ]
    if expected.torch_is_wrong:
        made.append(Verdict("torch", "double backward is wrong", str(expected.slope)))
    return made


def _verdict(problem: Composed, expected: Truth, estimator: Any, tolerance: float, known: set[str]) -> Verdict:
    name, recipe = str(estimator), problem.recipe
    params, meta = ({key: t.clone().requires_grad_() for key, t in values.items()} for values in _values(problem))
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = hypergradient(
                problem.inner,
                problem.outer,
                params,
                meta,
                problem.batches,
                optimizer=optimizer(recipe),
                estimator=estimator,
                verify=True if recipe.seed % 4 == 3 else None,
            )
        except MetaKDError as error:
            return Verdict(name, "refused", str(error))
        except Exception as error:
            return Verdict(
                name, "raised", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    for warning in said:
        text = str(warning.message)
        if (
            text not in known
            and not issubclass(warning.category, DeprecationWarning)
            and not any(s in text for s in SAID)
        ):
            return Verdict(name, "warned", text)
    if not all(_same(*pair) for pair in zip((params, meta), _values(problem), strict=True)):
        return Verdict(name, "changed", "what was passed in")
    if not torch.equal(torch.get_rng_state(), expected.generator):
        return Verdict(name, "changed", "the generator is not as after each step and each outer loss once")
    if isinstance(estimator, FiniteDifference) and recipe.by_autograd:
        return Verdict(name, "undecided", "differences do not see hooks and detached parts")
    if expected.slope is None and (expected.by_torch is None or expected.torch_is_wrong):
        return Verdict(name, "undecided", "neither differences nor a double backward")
    error = expected.error(found, tolerance)
    return Verdict(name, "wrong" if error else "right", error)


def _values(problem: Composed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return problem.params, problem.meta_params


def _same(now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return all(t.grad is None and torch.equal(t, before[name]) for name, t in now.items())
