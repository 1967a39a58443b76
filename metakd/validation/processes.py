"""Findings about a student trained by several processes."""

from collections.abc import Iterator

import torch

from metakd._virtual.functional import data_parallel
from metakd.validation.finding import Finding, Subject, listed


def sharded_parameters(subject: Subject) -> Iterator[Finding]:
    """FSDP of either version, and other parameters that are split over processes."""
    # By name: torch imports these classes only on demand.
    wrapped = [name for name, module in subject.modules if _is_a(module, "FullyShardedDataParallel")]
    if where := wrapped or [name for name, p in subject.params.items() if _is_a(p, "DTensor")]:
        yield Finding(
            "error",
            listed([name or "the student" for name in where]),
            "each process holds parts of the parameters (fully_shard, tensor parallelism), but virtual steps need them "
            "whole",
            "Use torch.nn.parallel.DistributedDataParallel(student); if memory is short, checkpoint activations",
        )


def data_parallel_options(subject: Subject) -> Iterator[Finding]:
    """Options of `DistributedDataParallel`, and a student without it."""
    wrapper = data_parallel(subject.student)
    if wrapper is not None and wrapper.static_graph:
        yield Finding(
            "error",
            "the student (DistributedDataParallel)",
            "with static_graph=True its first backward pass decides how gradients are averaged, but that pass is the "
            "balancer's, which averages on its own",
            "Leave static_graph out, and use find_unused_parameters=True if a forward pass does not use all parameters",
        )
    if wrapper is None and world_size() > 1:
        yield Finding(
            "warning",
            "the student",
            f"it is not in DistributedDataParallel, so each of the {world_size()} processes learns a weight model of "
            "its own",
            "To train one student together, wrap it and pass the wrapped module to the balancer",
        )


def world_size() -> int:
    """The number of processes that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _is_a(value: object, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(value).__mro__)
