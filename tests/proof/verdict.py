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
    """What an estimator did, in one of these kinds, or one of the faults.

    "right"; "refused"; "declined": refused what a plain double backward has; "undecided": there is nothing to compare
    with; "as torch": what torch's own double backward gives, where that is known to be wrong.
    """

    estimator: str
    kind: str
    words: str = ""


class Unfit(Exception):
    """The recipe's numbers overflow, or it says nothing: no test of anything."""


@dataclass
class Truth:
    """What the estimators are compared with.

    Attributes:
        plain: a double backward, whether it is right or not.
        by_torch: the same where it is; None where torch has no second derivative, or a wrong one.
        direction: in the meta-parameters.
        slope: along it, by differences; None across a kink, and where autograd means something else.
        generator: the state after each step and the outer loss.
    """

    plain: DoubleBackward | None
    by_torch: DoubleBackward | None
    direction: dict[str, Tensor]
    slope: float | None
    generator: Tensor

    def error(self, found: Hypergradient, tolerance: float) -> str:
        """What is wrong about a hypergradient; an empty string if nothing is."""
        scale = vector(found.gradient).norm().item() if self.by_torch is None else self.norm
        noise = max(1e-10, 1e-4 * tolerance) * (1 + abs(found.outer_loss.item()))  # rounding, over a difference's step
        if self.slope is not None:
            slope = (vector(found.gradient) * vector(self.direction)).sum().item()
            if not abs(slope - self.slope) <= max(tolerance, 1e-5) * scale + noise:
                return f"slope {slope:.6e}, by differences {self.slope:.6e}, norm {scale:.1e}"
        if self.by_torch is None:
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
    generator = torch.get_rng_state()
    plain = _double_backward(problem)
    found = Truth(plain, None if problem.recipe.wrong_in_torch else plain, {}, None, generator)
    if plain is not None and not vector(plain.gradient).norm().item() < 1e4:
        raise Unfit
    if not problem.recipe.by_autograd:
        found.direction, slope, doubt = differences(problem)
        if doubt <= 1e-6 * (abs(slope) if plain is None else vector(plain.gradient).norm().item()) + 1e-11:
            found.slope = slope
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
    if expected.by_torch is not None and (error := expected.error(_as_answer(expected.by_torch), 1e-5)):
        made.append(Verdict("torch", "wrong", error))
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
            has_it = expected.by_torch is not None and bool(vector(expected.by_torch.gradient).any())
            has_it = has_it and getattr(estimator, "mode", "") != "forward"
            return Verdict(name, "declined" if has_it else "refused", str(error))
        except Exception as error:
            return Verdict(name, "raised", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    for warning in said:
        text = str(warning.message)
        fit = issubclass(warning.category, DeprecationWarning) or any(words in text for words in SAID)
        if text not in known and not fit:
            return Verdict(name, "warned", text)
    if not all(_same(*pair) for pair in zip((params, meta), _values(problem), strict=True)):
        return Verdict(name, "changed", "what was passed in")
    if not torch.equal(torch.get_rng_state(), expected.generator):
        return Verdict(name, "changed", "the generator is not as after each step and each outer loss once")
    if isinstance(estimator, FiniteDifference) and recipe.by_autograd:
        return Verdict(name, "undecided", "differences do not see hooks and detached parts")
    if isinstance(estimator, FiniteDifference) and expected.slope is None:
        return Verdict(name, "undecided", "a kink is near")
    if expected.slope is None and expected.by_torch is None:
        return Verdict(name, "undecided", "neither differences nor a double backward")
    error = expected.error(found, tolerance)
    if error and recipe.wrong_in_torch and expected.plain is not None and _equal(found, expected.plain):
        return Verdict(name, "as torch", error)
    return Verdict(name, "wrong" if error else "right", error)


def _equal(found: Hypergradient, plain: DoubleBackward) -> bool:
    return bool(torch.allclose(vector(found.gradient), vector(plain.gradient), rtol=1e-6, atol=1e-9))


def _values(problem: Composed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return problem.params, problem.meta_params


def _same(now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return all(t.grad is None and torch.equal(t, before[name]) for name, t in now.items())
