"""Time and memory of a rank, with and without the balancer, for a student of `fully_shard`.

    torchrun --nproc-per-node 2 benchmarks/sharded.py

A stack of linear layers, one group of `fully_shard` each. Sizes are in units of the rank's own part of the parameters
("parts") and of one layer's whole parameters ("layers"). A plain step is forward, backward and the optimizer's step.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from metakd import BilevelLossBalancer, estimators, terms, weighting


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at once.

    Attributes:
        bytes: in all storages.
        whole: in storages of at least `size` bytes: parameters in one piece.
    """

    def __init__(self, size):
        super().__init__()
        self._size, self._known = size, {}
        self.bytes = self.whole = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and not is_traceable_wrapper_subclass(t) and t.device.type != "meta":
                ref = StorageWeakRef(t.untyped_storage())
                self._known.setdefault(ref.cdata, ref)
        self._known = {key: ref for key, ref in self._known.items() if not ref.expired()}
        sizes = [torch.UntypedStorage._new_with_weak_ptr(key).nbytes() for key in self._known]
        self.bytes = max(self.bytes, sum(sizes))
        self.whole = max(self.whole, sum(size for size in sizes if size >= self._size))
        return found


def parts(width, depth, estimator):
    """A plain step and a balanced one, of two stacks with the same start."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    steps = []
    for balanced in (False, True):
        torch.manual_seed(0)
        student = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        for layer in student:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(dist.get_rank())
        batch, meta = (
            (torch.randn(32, width, generator=generator), torch.randint(width, (32,), generator=generator))
            for _ in "ab"
        )
        balancer = BilevelLossBalancer(
            student, [terms.CrossEntropy()], optimizer=optimizer, weighting=weighting.LossMLP(1, 1), estimator=estimator
        )

        def step(student=student, optimizer=optimizer, batch=batch, meta=meta, balancer=balanced and balancer):
            value = balancer(batch, meta) if balancer else F.cross_entropy(student(batch[0]), batch[1])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        steps.append(step)
    return steps


def measured(width, depth, estimator, repeats):
    """Seconds of a step and peak bytes of a rank: plain, and balanced."""
    rows = []
    for step in parts(width, depth, estimator):
        step()
        with Peak(4 * width * width) as peak:
            step()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        rows.append(((time.perf_counter() - begin) / repeats, peak.bytes, peak.whole))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    layer = 4 * args.width * (args.width + 1)
    part = layer * args.depth / dist.get_world_size()
    found = {"ranks": dist.get_world_size(), "width": args.width, "depth": args.depth}
    for name, estimator in {"OneStep": estimators.OneStep(), "FiniteDifference": estimators.FiniteDifference()}.items():
        plain, balanced = measured(args.width, args.depth, estimator, args.repeats)
        found["plain"] = {"time": 1.0, "parts": round(plain[1] / part, 2), "layers": round(plain[2] / layer, 2)}
        found[name] = {
            "time": round(balanced[0] / plain[0], 2),
            "parts": round(balanced[1] / part, 2),
            "layers": round(balanced[2] / layer, 2),
        }
    if dist.get_rank() == 0:
        print(text := json.dumps(found, indent=2))
        if args.output:
            args.output.write_text(text + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
