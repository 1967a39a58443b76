"""What can be wrong with a student that several processes train."""

from collections.abc import Iterator

import torch

from metakd.student import data_parallel
from metakd.validation.finding import Finding, Subject, listed


def sharded_parameters(subject: Subject) -> Iterator[Finding]:
    """FSDP, of either version, and other parameters of which each process holds a part."""
    # By name, as torch imports what defines them only on demand.
    wrapped = [name for name, module in subject.modules if _is_a(module, "FullyShardedDataParallel")]
    if where := wrapped or [name for name, p in subject.params.items() if _is_a(p, "DTensor")]:
        yield Finding(
            "error",
            listed([name or "the student" for name in where]),
            "each process holds parts of the parameters (fully_shard, tensor parallelism), but virtual steps need them "
            "whole",
            "Use torch.nn.parallel.DistributedDataParallel(student), which works; where memory is short, checkpoint "
            "activations",
        )


def data_parallel_options(subject: Subject) -> Iterator[Finding]:
    """What `DistributedDataParallel` was told."""
    wrapper = data_parallel(subject.student)
    if wrapper is not None and wrapper.static_graph:
        yield Finding(
            "error",
            "the student (DistributedDataParallel)",
            "with static_graph=True its first backward pass decides how gradients are averaged, and that is not yours "
            "but the balancer's, which averages on its own",
            "Leave static_graph out, and use find_unused_parameters=True where a forward pass leaves parameters out",
        )
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if wrapper is None and several and torch.distributed.get_world_size() > 1:
        yield Finding(
            "warning",
            "the student",
            f"it is not in DistributedDataParallel, so that each of the {torch.distributed.get_world_size()} processes "
            "learns a weight model of its own",
            "To train one student together, wrap it and give the wrapped module to the balancer",
        )


def _is_a(value: object, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(value).__mro__)
