"""A bilevel problem whose inner step moves only some of the parameters."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from metakd.errors import MetaKDError
from metakd.estimators.problem import Inner, Outer, Problem
from metakd.inner import GradientTransformation, Params, own


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that fit one of the patterns; levels are joined by "." or "/". Raise if a pattern fits none."""
    dotted = {name: name.replace("/", ".") for name in names}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name, path in dotted.items() if fnmatchcase(path, pattern.replace("/", "."))}
        if not found:
            raise MetaKDError(
                f"no trainable parameter is named {pattern!r}; patterns are those of fnmatch, as in 'classifier.*', "
                f"and the parameters are {list(dotted.values())}"
            )
        chosen |= found
    return [name for name in dotted if name in chosen]


def moving_only(problem: Problem, patterns: Sequence[str]) -> Problem:
    """The same problem, but its inner steps move only these parameters, and its `params` are these.

    The optimizer sees the others without gradient: they keep value and state, and no norm counts them.
    """
    moving = dict.fromkeys(matching(problem.params, patterns))
    fixed = {name: p for name, p in problem.params.items() if name not in moving}

    def with_fixed(function: Any) -> Any:
        return lambda params, *others, **named: function({**fixed, **params}, *others, **named)

    def optimizer(meta: Params) -> GradientTransformation:
        whole = problem.optimizer(meta)

        def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
            gradients = {name: updates.get(name) for name in problem.params}
            new, state = whole.update(gradients, state, params={**fixed, **params}, inplace=inplace)
            return {name: new[name] for name in updates}, state

        return own(GradientTransformation(whole.init, update))

    inner: Inner = with_fixed(problem.inner)
    outers: list[Outer] = [with_fixed(outer) for outer in problem.outers]
    weighted = problem.weighted
    return replace(
        problem,
        inner=inner,
        weighted=None if weighted is None else weighted._replace(losses=with_fixed(weighted.losses)),
        outers=outers,
        params={name: problem.params[name] for name in moving},
        optimizer=optimizer,
    )
