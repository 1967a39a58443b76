"""Findings about a student trained by several processes."""

from collections.abc import Iterator
from typing import Any

import torch

from metakd._virtual.functional import data_parallel
from metakd._virtual.precision import HALF
from metakd._virtual.shards import computing_dtypes, fsdp_modules, is_a
from metakd.estimators import FiniteDifference
from metakd.estimators.estimate import takes_shards
from metakd.validation.finding import Finding, Subject, listed


def sharded_parameters(subject: Subject) -> Iterator[Finding]:
    """Parameters that are split over processes: by `fully_shard`, or in a way that is refused."""
    problem = _not_shared(subject)
    if problem is not None:
        yield Finding("error", *problem, _WHOLE)
    elif parts := fsdp_modules(subject.student):
        yield from _of_shards(subject, [name for name, module in subject.modules if any(module is p for p in parts)])


def _not_shared(subject: Subject) -> tuple[str, str] | None:
    """Which parameters are split in another way than `fully_shard` splits the whole student, and how."""
    if wrapped := [name for name, module in subject.modules if is_a(module, "FullyShardedDataParallel")]:
        return listed([name or "the student" for name in wrapped]), "FullyShardedDataParallel flattens its parameters"
    split: dict[str, Any] = {name: p for name, p in subject.params.items() if is_a(p, "DTensor")}
    if not split:
        return None
    if not fsdp_modules(subject.student):
        return listed(list(split)), "they are split over processes, but not by fully_shard (tensor parallelism)"
    if rest := [name for name, p in subject.trainable().items() if name not in split]:
        return listed(rest), "fully_shard was not called on them, so each process would train its own"
    meshes = {p.device_mesh for p in split.values()}
    other = [name for name, p in split.items() if len(p.placements) != 1 or not p.placements[0].is_shard()]
    if len(meshes) > 1 or other:
        return listed(other or list(split)), "they are split over more than one dimension of a mesh"
    return None


def _of_shards(subject: Subject, names: list[str]) -> Iterator[Finding]:
    """What a student of `fully_shard` rules out."""
    where = f"the student (fully_shard on {len(names)} modules)"
    if subject.estimator is not None and not takes_shards(subject.estimator):
        yield Finding(
            "error", where, f"{type(subject.estimator).__name__} needs second derivatives in reverse mode", _ESTIMATORS
        )
    if half := [name for name, p in subject.trainable().items() if p.dtype in HALF]:
        yield Finding(
            "error",
            listed(half),
            "a step ahead is lost in the rounding of half precision",
            "Keep parameters in float32 and compute in half: fully_shard(mp_policy=MixedPrecisionPolicy(bfloat16))",
        )
    if computing_dtypes(subject.student) & {*HALF} and isinstance(subject.estimator, FiniteDifference):
        problem = "its mixed-precision policy computes in half precision, whose rounding swallows finite differences"
        yield Finding("error", where, problem, "Use estimators.OneStep(), or a policy with param_dtype=None")


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
    if wrapper is None and not fsdp_modules(subject.student) and world_size() > 1:
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


_ESTIMATORS = (
    "Use estimators.OneStep() (exact, forward mode), FiniteDifference() or IdentityJacobian(); "
    "DistributedDataParallel takes all estimators"
)
_WHOLE = (
    "Call torch.distributed.fsdp.fully_shard on the whole student with a one-dimensional mesh, or use "
    "torch.nn.parallel.DistributedDataParallel(student)"
)
