"""What a forward pass must not do to its parameters, nor keep for the next pass."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metakd._autodiff import graph_nodes
from metakd.errors import MetaKDError
from metakd.inner import Params


def check_disjoint(params: Params) -> None:
    """Raise if two parameters share memory: a real step would move it twice."""
    spans = sorted(
        (p.device.type, p.data_ptr(), p.data_ptr() + p.element_size() * (1 + _last(p)), name)
        for name, p in params.items()
        if p.layout == torch.strided and p.numel()
    )
    for (device, _, end, one), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise MetaKDError(
                f"the parameters {one!r} and {other!r} share memory, so that a step moves it twice; "
                "use one nn.Parameter in both places (decoder.weight = encoder.weight), or a copy"
            )


def _last(p: Tensor) -> int:
    """The offset of a tensor's last entry from its first."""
    return sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def check_same_parameters(before: Params, now: Params) -> None:
    """Raise if a pass freezes or unfreezes parameters."""
    if other := before.keys() ^ now.keys():
        raise MetaKDError(
            f"a forward pass changes requires_grad of parameters ({', '.join(sorted(other)[:5])}); do that between "
            "steps, or stop their gradients with .detach()"
        )


def check_unwritten(names: Sequence[str]) -> None:
    """Raise if a pass wrote to the parameters with these names."""
    if names:
        raise MetaKDError(
            f"a forward pass writes to parameters ({', '.join(names[:5])}), so that the lookahead's step differs from "
            "the one that training takes. Change them after optimizer.step() in your loop, or make them buffers; "
            "if only the first pass initialises them, run it once before the first call"
        )


def check_apart(losses: Tensor, nodes: set[Any]) -> None:
    """Raise if a pass continues the graph of an earlier one, whose nodes are in `nodes`; add its own nodes."""
    found = set(graph_nodes(losses))
    if any(not hasattr(node, "variable") for node in found & nodes):
        raise MetaKDError(
            "a forward pass uses a tensor that an earlier one has computed, with its graph: a cache of values computed "
            "from the parameters that is not emptied when they move. Empty it at the start of forward, or detach what "
            "one pass keeps for the next; verify=False accepts it, which is exact only if the value is meant to stay"
        )
    nodes |= found
