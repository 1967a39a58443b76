"""Run the proof of random students widely: `python -m tests.proof.run_modules 2000 [first seed]`.

Each example is a random student; every call of a balancer is right, refuses by name, or is a fault. Faults are printed,
the fewest ingredients that show them first; then a table of ingredients with what happened to the students that hold
them.
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakd import Batch, BilevelLossBalancer, MetaKDError
from metakd.check.finite_differences import slope_at_zero
from metakd.estimators import Adjoint, Estimator, OneStep, Unroll
from tests.cases.real_steps import LR, SEED, Setup, balanced, data
from tests.proof.students.all import INGREDIENTS, Parts, walk_parts

FAULTS = ("wrong", "raised", "changed", "gradient", "alarm")


@dataclass(frozen=True)
class Recipe:
    """A random student: the names of its ingredients, and the seed of its numbers.

    Attributes:
        parts: in order.
        accumulate: of the balancer; with 2 the gradient is handed over.
        seed: of parameters and data.
    """

    parts: tuple[str, ...]
    accumulate: int = 1
    seed: int = 0

    def any(self, name: str) -> bool:
        return any(getattr(INGREDIENTS[part], name) for part in self.parts)


class Verdict(NamedTuple):
    """What one call did."""

    call: str
    kind: str
    words: str = ""


@dataclass
class Made:
    """A student built anew, with all that a call needs."""

    setup: Setup
    parts: Parts
    batches: tuple[Batch, ...]
    meta_batch: Batch

    @contextmanager
    def around(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.parts.around:
                stack.enter_context(context())
            yield


def make(recipe: Recipe, dtype: torch.dtype = torch.float64) -> Made:
    """Build a student in a floating-point type, and seed all generators for its passes."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(recipe.seed)
        parts = walk_parts(iter(recipe.parts))
    finally:
        torch.set_default_dtype(kept)

    logits, more = parts.logits, parts.meta_terms  # not the parts: nothing else of them is to be reached from here

    def hard(outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(outputs), batch.targets, reduction="none")

    def smooth(outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(outputs), batch.targets, reduction="none", label_smoothing=0.3)

    def meta(outputs: Any, batch: Batch) -> Tensor:
        return sum((term(outputs, batch) for term in more), start=hard(outputs, batch))

    drawn_ones = *data(seed=recipe.seed), data(seed=recipe.seed + 1)[0]
    first, meta_batch, second = (Batch(b.inputs.to(dtype), b.targets) for b in drawn_ones)
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    return Made(
        Setup(parts.student, {"hard": hard, "smooth": smooth, **parts.terms}, meta), parts, (first, second), meta_batch
    )


def real_pass(made: Made, batch: Batch) -> Tensor:
    with made.around():
        outputs = made.setup.student(batch.inputs)
        return torch.stack([term(outputs, batch) for term in made.setup.terms.values()], dim=1)


def real_step(made: Made, weights: Tensor, batch: Batch) -> None:
    ((weights * real_pass(made, batch)).sum() / len(weights)).backward()
    with torch.no_grad():
        for p in made.setup.student.parameters():
            if p.grad is not None:
                p.sub_(LR * p.grad.to_dense())
                p.grad = None
    for act in made.parts.after_step:
        act()


def real_meta_loss(made: Made) -> Tensor:
    with made.around():
        found: Tensor = made.setup.meta_loss(made.setup.student(made.meta_batch.inputs), made.meta_batch).mean()
    return found


def after_steps(recipe: Recipe, weights: Sequence[Tensor]) -> float:
    """The meta loss after real steps of a student built anew."""
    return float(real_meta_loss(_after(recipe, weights)).detach())


def slope(recipe: Recipe, weights: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """The derivative of the meta loss after real steps, along a direction of all their weights."""

    def along(h: float) -> float:
        return after_steps(recipe, [w + h * d for w, d in zip(weights, direction, strict=True)])

    found = slope_at_zero(along, step=2e-2, rows=5)
    return found.value if found.spread <= 1e-7 * abs(found.value) + 1e-10 else float("nan")


def by_hand(recipe: Recipe, weights: Sequence[Tensor]) -> list[Tensor]:
    """The influence on each of K steps by double backwards, as autograd means it, from real students.

    Walks back from the gradient of the meta loss; each step's graph is that of a student built anew that has made the
    steps before it.
    """
    eager = torch.compiler.set_stance("force_eager")
    with sdpa_kernel(SDPBackend.MATH), eager, patch.object(torch, "_weight_norm", _weight_norm):
        return _walked_back(recipe, weights)


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The second derivative of torch's own takes the norm for a constant."""
    found: Tensor = g * v / v.norm(dim=1 - dim, keepdim=True)
    return found


def _walked_back(recipe: Recipe, weights: Sequence[Tensor]) -> list[Tensor]:
    made = _after(recipe, weights)
    adjoint = _gradient(real_meta_loss(made), made)
    found: list[Tensor] = []
    for t in reversed(range(len(weights))):
        made = _after(recipe, weights[:t])
        w = weights[t].clone().requires_grad_()
        loss = (w * real_pass(made, made.batches[t])).sum() / len(w)
        params = _trained(made)
        steps = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        products = [
            -LR * (torch.view_as_real(g) * torch.view_as_real(a) if g.is_complex() else g.to_dense() * a).sum()
            for g, a in zip(steps, adjoint, strict=True)
            if g is not None
        ]
        slope_in = torch.autograd.grad(torch.stack(products).sum(), [w, *params], allow_unused=True)
        found.insert(0, slope_in[0] * len(w))
        adjoint = [a if g is None else a + g.to_dense() for a, g in zip(adjoint, slope_in[1:], strict=True)]
    return found


def _after(recipe: Recipe, weights: Sequence[Tensor]) -> Made:
    made = make(recipe)
    for w, batch in zip(weights, made.batches, strict=False):
        real_step(made, w, batch)
    return made


def _trained(made: Made) -> list[Tensor]:
    return [p for p in made.setup.student.parameters() if p.requires_grad]


def _gradient(loss: Tensor, made: Made) -> list[Tensor]:
    params = _trained(made)
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(params, found, strict=True)]


def picture(value: Any, depth: int = 0) -> Any:
    """All that a pass may leave in an object, as plain numbers that can be compared."""
    if depth > 12 or (callable(value) and not isinstance(value, nn.Module) and not hasattr(value, "__dict__")):
        return type(value).__name__
    if isinstance(value, Tensor) and value.is_meta:
        return tuple(value.shape)
    if isinstance(value, Tensor):
        shown = value.detach()
        return str(value.dtype), tuple(value.shape), value.requires_grad, shown.to_dense().tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, nn.Module):
        hooks = {k: len(getattr(value, k)) for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")}
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") and not isinstance(v, nn.Module)}
        tensors = {**value._buffers, **value._parameters} if not isinstance(value, torch.jit.ScriptModule) else {}
        own = own if not isinstance(value, torch.jit.ScriptModule) else {}
        parts = {name: picture(child, depth + 1) for name, child in value.named_children()}
        return hooks, picture(own, depth + 1), picture(tensors, depth + 1), parts, value.training
    if isinstance(value, dict):
        return {str(k): picture(v, depth + 1) for k, v in value.items() if k != "of"}  # addresses differ
    if isinstance(value, list | tuple | deque):
        return [picture(v, depth + 1) for v in value]
    if isinstance(value, int | float | str | bool | set | type(None)):
        return value
    held = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("__")}
    return picture(held, depth + 1) if held and not callable(value) else type(value).__name__


def whole_picture(made: Made) -> dict[str, Any]:
    return {
        "student": picture(made.setup.student),
        "watched": picture([watch() for watch in made.parts.watched]),
        "input": picture([made.batches[0].inputs, made.meta_batch.inputs]),
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two pictures differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        found = (difference(v, other[k], f"{path}.{k}") for k, v in one.items())
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        found = (difference(v, other[i], f"{path}[{i}]") for i, v in enumerate(one))
    else:
        return None if one == other or (one != one and other != other) else f"{path}: {one!s:.60} for {other!s:.60}"
    return next((words for words in found if words is not None), None)


def calls() -> Iterator[tuple[str, Estimator]]:
    yield from (("call", OneStep()), ("call", Adjoint()), ("call", OneStep("reverse")))
    yield from (("meta_step", Adjoint()), ("meta_step", Unroll()))


def expected_state(recipe: Recipe, weights: Tensor) -> tuple[dict[str, Any], dict[str, Any], list[Tensor | None]]:
    """The state after one pass of a twin, that after the backward pass too, and its gradient."""
    twin = make(recipe)
    losses = real_pass(twin, twin.batches[0])
    after = whole_picture(twin)
    (weights / len(weights) * losses).sum().backward()  # in the library's order of rounding: what hooks saw is compared
    return after, whole_picture(twin), [p.grad for p in twin.setup.student.parameters()]


def verdicts(recipe: Recipe) -> list[Verdict]:
    """What each call does on a recipe."""
    found = []
    influences: dict[str, Tensor] = {}
    for kind, estimator in calls():
        name = f"{kind} {estimator}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                made = one_call if kind == "call" else one_meta_step
                kind_found, words = made(recipe, estimator, influences)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind_found = "raised"
                words = f"{type(error).__name__}: {str(error)[:200]!r} at {where.filename[-40:]}:{where.lineno}"
        found.append(Verdict(name, kind_found, words or "; ".join({str(w.message)[:90] for w in said})))
    if found[0].kind == "right":
        found.append(in_float32(recipe, influences["call"], found[0].words))
    return found


def refused(made: Made, error: MetaKDError, before: dict[str, Any], values: list[Tensor]) -> tuple[str, str]:
    params = list(made.setup.student.parameters())
    if not all(torch.equal(p.data, v) for p, v in zip(params, values, strict=True)):
        return "changed", f"after a refusal a parameter has other values ({error!s:.100})"
    now = whole_picture(made)
    if words := difference(now, before):
        return "changed", f"after a refusal: {words} ({error!s:.100})"
    return "refused", str(error)


def one_call(recipe: Recipe, estimator: Estimator, influences: dict[str, Tensor]) -> tuple[str, str]:
    made = make(recipe)
    student = made.setup.student
    balancer = balanced(made.setup, estimator=estimator, accumulate=recipe.accumulate)
    params = dict(student.named_parameters())
    values, before = [p.detach().clone() for p in params.values()], whole_picture(made)
    try:
        with made.around():
            loss = balancer(made.batches[0], made.meta_batch)
    except MetaKDError as error:
        return refused(made, error, before, values)
    report = balancer.report
    now = whole_picture(made)
    after, finally_, gradient = expected_state(recipe, report.weights)
    if words := changed_parameters(student, params, values if not recipe.any("carries") else None):
        return "changed", words
    if words := difference(now, after):
        return "changed", words
    loss.backward()
    for name, g, p in zip(params, gradient, params.values(), strict=True):
        both = g is not None and p.grad is not None
        same = relative(dense(p.grad), dense(g)) <= 1e-9 if both else g is p.grad
        if not same:
            return "gradient", f"{name}: {p.grad} for {g}"[:200]
    if not recipe.any("by_autograd") and (words := difference(whole_picture(made), finally_)):
        return "changed", f"after the backward pass: {words}"
    assert report.influence is not None
    influences["call"] = report.influence
    return compared(recipe, report.weights, report.influence)


def compared(recipe: Recipe, weights: Tensor, influence: Tensor) -> tuple[str, str]:
    if recipe.any("by_autograd"):
        error = relative(influence, by_hand(recipe, [weights])[0])
        return ("right", "") if error <= 1e-6 else ("wrong", f"{error:.1e} off a double backward")
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = slope(recipe, [weights], [direction])
    if expected != expected:
        return "undecided", "differences do not converge"
    value = float((influence * direction).sum()) / len(weights)
    scale = max(abs(expected), 1e-2 * float(influence.norm() * direction.norm()) / len(weights))
    if abs(value - expected) > 1e-6 * scale:
        return "wrong", f"{value:.8g} for {expected:.8g}"
    return "right", ""


def dense(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to_dense()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def changed_parameters(student: nn.Module, params: dict[str, nn.Parameter], values: list[Tensor] | None) -> str | None:
    now = dict(student.named_parameters())
    for i, (name, p) in enumerate(params.items()):
        if now.get(name) is not p or not isinstance(p, nn.Parameter):
            return f"{name} is another tensor"
        if values is not None and not torch.equal(p.data, values[i]):
            return f"{name} has other values"
    return None


def one_meta_step(recipe: Recipe, estimator: Estimator, influences: dict[str, Tensor]) -> tuple[str, str]:
    made = make(recipe)
    student = made.setup.student
    balancer = balanced(made.setup, estimator=estimator)
    params = dict(student.named_parameters())
    values, before = [p.detach().clone() for p in params.values()], whole_picture(made)
    try:
        with made.around():
            balancer.meta_step(list(made.batches), made.meta_batch)
    except MetaKDError as error:
        return refused(made, error, before, values)
    if words := changed_parameters(student, params, values):
        return "changed", words
    if words := difference(whole_picture(made), before):
        return "changed", words
    (phi,) = balancer.weighting.parameters()
    assert phi.grad is not None
    gradient = phi.grad.clone()
    if (other := influences.get("meta_step")) is not None and relative(gradient, other) > 1e-6:
        return "wrong", f"Unroll gives {gradient.tolist()}, Adjoint {other.tolist()}"
    influences["meta_step"] = gradient
    if recipe.any("by_autograd"):
        free = next(balancer.weighting.parameters()).detach().clone().requires_grad_()
        w = F.softplus(free).expand(len(balancer.report.weights), -1)
        influence = torch.stack([g / len(w) for g in by_hand(recipe, [w.detach(), w.detach()])]).sum(0)
        (expected,) = torch.autograd.grad(w, free, influence)
        off = relative(gradient, expected)
        return ("right", "") if off <= 1e-6 else ("wrong", f"{off:.1e} off a double backward")
    return compared_in_phi(recipe, balancer, gradient)


def compared_in_phi(recipe: Recipe, balancer: BilevelLossBalancer, gradient: Tensor) -> tuple[str, str]:
    rows = balancer.report.weights.shape[0]
    (phi,) = balancer.weighting.parameters()
    free = phi.detach().clone()

    def along(h: float) -> float:
        w = F.softplus(free + h * direction).expand(rows, -1)
        return after_steps(recipe, [w, w])

    direction = torch.randn(free.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = slope_at_zero(along, step=2e-2, rows=5)
    if not found.spread <= 1e-7 * abs(found.value) + 1e-10:
        return "undecided", "differences do not converge"
    value = float((gradient * direction).sum())
    if abs(value - found.value) > 1e-6 * max(abs(found.value), 1e-2 * float(gradient.norm() * direction.norm())):
        return "wrong", f"{value:.8g} for {found.value:.8g}"
    return "right", ""


def in_float32(recipe: Recipe, exact: Tensor, said: str) -> Verdict:
    """The same call in float32 raises nothing new, and gives the same but for rounding."""
    name = "call in float32"
    made = make(recipe, torch.float32)
    made.setup.student.load_state_dict(make(recipe).setup.student.state_dict())
    weighting = nn.Module.float(balanced(made.setup).weighting)
    optimizer = torch.optim.SGD(made.setup.student.parameters(), lr=LR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            balancer = BilevelLossBalancer(
                made.setup.student,
                made.setup.terms,
                optimizer=optimizer,
                weighting=weighting,
                weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
                meta_loss=made.setup.meta_loss,
            )
            with made.around():
                balancer(made.batches[0], made.meta_batch)
        except Exception as error:
            return Verdict(name, "alarm", f"{type(error).__name__}: {str(error)[:200]}")
    if any("is wrong on this model" in str(w.message) for w in caught) and "is wrong on this model" not in said:
        return Verdict(name, "alarm", next(str(w.message) for w in caught)[:200])
    found = balancer.report.influence
    off = float("inf") if found is None else relative(found.double(), exact)
    return Verdict(name, "wrong" if off > 1e-2 else "right", f"{off:.1e} off float64" if off > 1e-2 else "")


def drawn(choose: Callable[[Sequence[Any]], Any]) -> Recipe:
    """A recipe by a function that picks one of several."""
    usual = [name for name, part in INGREDIENTS.items() if not part.slow]
    parts = [choose(usual) for _ in range(choose((1, 2, 3)))]
    if choose(range(40)) == 39:
        parts.append(choose([name for name in INGREDIENTS if name not in usual]))
    return Recipe(tuple(dict.fromkeys(parts)), accumulate=choose((1, 2)), seed=choose(range(1000)))


def recipe_of(number: int) -> Recipe:
    """The recipe of a number; the first have one ingredient each."""
    every = list(INGREDIENTS)
    if number < 2 * len(every):
        return Recipe((every[number // 2],), accumulate=1 + number % 2)
    chance = random.Random(number)
    return drawn(lambda options: chance.choice(list(options)))


def main() -> None:
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    by_name: dict[str, Counter[str]] = {}
    guilty: set[tuple[str, str]] = set()
    for number in range(first, first + count):
        recipe = recipe_of(number)
        shown: dict[tuple[str, str], list[str]] = {}
        for verdict in verdicts(recipe):
            for name in recipe.parts:
                by_name.setdefault(name, Counter())[verdict.kind] += 1
            if verdict.kind in FAULTS or verdict.kind == "refused":
                shown.setdefault((verdict.kind, verdict.words[:260]), []).append(verdict.call)
        for (kind, words), said_by in shown.items():
            if any((part, kind) in guilty for part in recipe.parts):
                continue  # explained by one of them alone
            print(f"{recipe}\n    {kind}: {', '.join(said_by)}: {words}", flush=True)
        if len(recipe.parts) == 1:
            guilty.update((recipe.parts[0], kind) for kind, _ in shown)
    for name, kinds in sorted(by_name.items()):
        print(f"  {name:35} {dict(kinds)}")


if __name__ == "__main__":
    main()
