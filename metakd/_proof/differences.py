"""The errors when a virtual pass differs from the real one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from metakd._autodiff import Gradients, leaves, norm
from metakd.errors import MetaKDError
from metakd.estimators.tolerance import CANCELLED, as_share
from metakd.estimators.verification import is_faint, nudged
from metakd.inner import Params


def check_losses(real: Tensor, virtual: Tensor, names: Sequence[str], limit: float, where: str) -> None:
    """Raise if two passes gave different losses (B, M); the message names the term and the sample."""
    for k, name in enumerate(names):
        one, other = real[:, k].double(), virtual[:, k].double()
        difference = one - other
        floor = CANCELLED * len(one) ** 0.5  # losses near zero are rounding only
        if bool(difference.norm() <= limit * (max(one.norm(), other.norm()) + floor)):
            continue
        i = int(difference.abs().argmax())
        raise MetaKDError(
            f"a virtual pass over {where} gives other losses than the real one: term {name!r}, sample {i}: "
            f"{other[i]:.6g} in place of {one[i]:.6g}. {_HIDDEN_STATE}"
        )


class _Sizes(NamedTuple):
    """Norms of a parameter's gradient in the real pass, in the virtual pass, and of their difference."""

    real: float
    virtual: float
    difference: float


def check_gradients(
    real: Gradients,
    virtual: Gradients,
    params: Params,
    again: Callable[[Params], Gradients],
    limit: float,
    where: str,
) -> None:
    """Raise if two passes gave different gradients at `params`; the message names the parameters.

    `again` computes the virtual gradient elsewhere. A vanishing gradient is rounding only: then a few roundings of the
    parameters change it as much as the two passes differ, and that is no error.
    """
    if broken := [name for name, g in real.items() if g is not None and not bool(g.to_dense().isfinite().all())]:
        raise MetaKDError(
            f"the gradient of the losses over {where} is NaN or infinite in {', '.join(map(repr, broken[:4]))} "
            "although the losses are finite: a term or the student takes a root, a norm or a logarithm of zero, or "
            "overflows; add a small number inside, or clamp"
        )
    wrong = _other_gradients(real, virtual, limit)
    if wrong and is_faint(real, params, limit):
        near = again(leaves(nudged(params, limit)))
        noise = {name: _difference(near[name], virtual[name]) for name in wrong}
        wrong = {name: sizes for name, sizes in wrong.items() if sizes.difference > 10 * noise[name]}
    if wrong:
        said = [
            f"{name!r} ({of.virtual:.4g} in place of {of.real:.4g}, "
            f"off by {as_share(of.difference / max(of.real, of.virtual))})"
            for name, of in wrong.items()
        ]
        raise MetaKDError(
            f"the gradient of a virtual pass over {where} differs from that of the real one although the losses are "
            f"the same. Norms by parameter: {', '.join(said[:4])}{', ...' if len(said) > 4 else ''}. {_ELSEWHERE}"
        )


def _other_gradients(real: Gradients, virtual: Gradients, limit: float) -> dict[str, _Sizes]:
    """The parameters whose gradients differ by more than the limit."""
    total = norm(real.values())
    sizes = {
        name: _Sizes(norm([one]), norm([virtual[name]]), _difference(one, virtual[name])) for name, one in real.items()
    }
    return {
        name: of
        for name, of in sizes.items()
        if not of.difference <= limit * max(of.real, of.virtual) + CANCELLED * limit * total
    }


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """The norm of the difference of two gradients; None counts as zero."""
    if one is None or other is None:
        return norm([one, other])
    return norm([one.double() - other.double()])


_HIDDEN_STATE = (
    "The student or the loss draws from a random generator, keeps a counter, a cache or a copy of parameters, or "
    "changes a tensor, in a place that virtual passes cannot see. Keep such things as attributes or buffers of the "
    "module, draw from torch's default generator, read parameters as attributes, key dicts by a parameter or its name "
    "instead of id(parameter), and write to clones; or pass verify=False if no hypergradient needs to be exact"
)
_ELSEWHERE = (
    "The student or a loss reads these parameters from a place where virtual passes cannot swap them: an object of "
    "another package, a view, a cache, a dict keyed by id(parameter), or a custom backward that recomputes a part of "
    "the model. Virtual parameters are other objects: read them as attributes of the module, key dicts by the "
    "parameter or its name, and recompute with torch.utils.checkpoint; or pass verify=False if no hypergradient needs "
    "to be exact"
)
