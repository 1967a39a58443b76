"""The type of a term, names for terms, and their evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metakd.batch import Batch, counted
from metakd.errors import MetaKDError
from metakd.terms.cross_entropy import CrossEntropy
from metakd.terms.reading import describe, tensor_in

Term: TypeAlias = Callable[[Any, Batch], Tensor]
"""A per-sample loss: called as `term(outputs, batch)`, returns a `(B,)` tensor."""


def named(terms: Mapping[str, Term] | Sequence[Term]) -> dict[str, Term]:
    """Give every term a name.

    A mapping keeps its names. In a sequence, a term is named after its class or function in snake case:
    `CrossEntropy()` becomes `cross_entropy`, a second one `cross_entropy_2`, a lambda at position `i` `term_i`.

    Args:
        terms: a mapping name -> term (or `nn.ModuleDict`), or a sequence of terms (or `nn.ModuleList`).

    Returns:
        The terms by name, in the order given.

    Raises:
        MetaKDError: there are no terms, a term is not callable or is a class, or a name is not a string.

    Examples:
        >>> from metakd.terms import CrossEntropy, named
        >>> list(named([CrossEntropy(), CrossEntropy(label_smoothing=0.1), lambda outputs, batch: ...]))
        ['cross_entropy', 'cross_entropy_2', 'term_2']
    """
    result: dict[str, Term] = {}
    if isinstance(terms, (Mapping, nn.ModuleDict)):
        for name, term in terms.items():
            if not isinstance(name, str) or not name:
                raise MetaKDError(f"a term's name must be a non-empty string, got {name!r}; rename it")
            result[name] = _callable(term, f"{name!r}")
    elif isinstance(terms, (Sequence, nn.ModuleList)) and not isinstance(terms, str):
        for position, term in enumerate(terms):
            stem = _stem(_callable(term, f"at position {position}"), position)
            name, copy = stem, 1
            while name in result:
                copy += 1
                name = f"{stem}_{copy}"
            result[name] = term
    else:
        raise MetaKDError(
            f"terms must be a mapping name -> term or a sequence of terms, got {type(terms).__name__}; "
            "put a single term in a list: [CrossEntropy()]"
        )
    if not result:
        raise MetaKDError("there are no terms; pass at least one, such as {'hard': CrossEntropy()}")
    return result


def evaluate(terms: Mapping[str, Term], outputs: Any, batch: Batch) -> Tensor:
    """Evaluate every term and stack the losses.

    Args:
        terms: name -> term, as `named` returns them; M of them.
        outputs: the student's outputs for `batch.inputs`.
        batch: the batch of B samples.

    Returns:
        The losses, shape `(B, M)`, in the order of the terms. They are not checked for NaN.

    Raises:
        MetaKDError: a term raised (the exception is chained) or returned anything but a real floating `(B,)` tensor,
            the losses are on different devices, or the batch size is unknown. The message names the term.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import CrossEntropy, evaluate
        >>> batch = Batch(inputs=None, targets=torch.tensor([0, 2]))
        >>> logits = torch.zeros(2, 3)
        >>> evaluate({"hard": CrossEntropy(), "size": lambda z, batch: z.square().sum(1)}, logits, batch)
        tensor([[1.0986, 0.0000],
                [1.0986, 0.0000]])
    """
    if not terms:
        raise MetaKDError("there are no terms to evaluate; pass at least one")
    samples = counted(batch, "the batch", tensor_in(outputs))
    columns: list[Tensor] = []
    for name, term in terms.items():
        try:
            loss = term(outputs, batch)
        except MetaKDError as error:
            raise MetaKDError(f"term {name!r}: {error}{_other_meta_loss(name, term)}") from error
        except Exception as error:
            raise MetaKDError(
                f"term {name!r} raised {type(error).__name__}: {error}; it was called as term(outputs, "
                f"batch) with outputs {describe(outputs)} and must return one loss per sample (the full "
                "traceback is above)"
            ) from error
        columns.append(_checked(name, loss, *samples))
    devices = {name: loss.device for name, loss in zip(terms, columns, strict=True)}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name!r} on {device}" for name, device in devices.items())
        raise MetaKDError(
            f"the terms' losses are on different devices: {listing}; move all tensors that a term uses to "
            "the device of the student's outputs"
        )
    return torch.stack(columns, dim=1) if len(columns) > 1 else columns[0].unsqueeze(1)


def nested(term: Any) -> list[Any]:
    """A term, and the terms inside it: some hold another one as `.term`, such as `Tokens`.

    Examples:
        >>> from metakd.terms import CrossEntropy, Tokens
        >>> nested(Tokens(CrossEntropy(), shift=True))[1]
        CrossEntropy(label_smoothing=0.0)
    """
    found = [term]
    while not isinstance(found[-1], nn.Module) and (inner := getattr(found[-1], "term", None)) is not None:
        found.append(inner)
    return found


def _callable(term: Any, where: str) -> Term:
    if isinstance(term, type):
        raise MetaKDError(f"term {where} is the class {term.__name__}, not an object of it; write {term.__name__}()")
    if not callable(term):
        raise MetaKDError(
            f"term {where} cannot be called, it is {type(term).__name__}; a term is any callable (outputs, "
            "batch) -> (B,) tensor"
        )
    checked: Term = term
    return checked


def _stem(term: Term, position: int) -> str:
    name = getattr(term, "__name__", type(term).__name__)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return snake if snake.isidentifier() else f"term_{position}"


def _checked(name: str, loss: Any, size: int, source: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise MetaKDError(
            f"term {name!r} returned {describe(loss)}, not a tensor; return one of shape ({size},): one loss per sample"
        )
    if loss.shape != (size,):
        raise MetaKDError(
            f"term {name!r} returned shape {tuple(loss.shape)}, expected ({size},): one loss for each of the "
            f"{size} samples in {source}; do not average over the batch (use reduction='none'), and reduce "
            "every other dimension with .sum(dim) or .mean(dim); if the batch has another number of samples, pass it "
            "as Batch(size=...)"
        )
    dtype = loss.dtype
    if dtype.is_complex:
        raise MetaKDError(f"term {name!r} returned {dtype}, but a loss must be real; return its .abs() or its .real")
    if not dtype.is_floating_point:
        raise MetaKDError(f"term {name!r} returned {dtype}, which has no gradient; return a floating tensor")
    return loss


def _other_meta_loss(name: str, term: Term) -> str:
    # The balancer evaluates its meta loss under this name. Its default is cross-entropy, which the user did not choose.
    if name != "meta_loss" or type(term) is not CrossEntropy:
        return ""
    return (
        ". The default meta loss is cross-entropy. For a student that is no classifier pass another term: "
        "meta_loss=lambda outputs, batch: ..., with one loss for each sample"
    )
