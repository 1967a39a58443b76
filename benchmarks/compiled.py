"""What `torch.compile` would make of a step's passes: time and agreement, printed as a table.

    python benchmarks/compiled.py --cases resnet20 transformer

A virtual step of metakd runs the student as written. This measures whether its two passes, compiled by inductor as pure
functions of the parameters, would be faster, and give the same: the meta batch's loss with its gradient, and the
forward-mode pass as `torch.func.jvp` of the losses. Beside them a plain training pass. Each time is the median after
the first calls, which compile. Needs a C++ compiler.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from tqdm import tqdm

from benchmarks.common.cases import CASES, Task, differentiable_kernels
from benchmarks.common.command import run
from benchmarks.common.markdown import table
from metakd.batch import map_tensors

Tensors = dict[str, Tensor]


def flat(values: Tensors) -> Tensor:
    """All in one vector."""
    return torch.cat([value.flatten() for value in values.values()])


class Passes:
    """The passes of a task, each a function of nothing that returns what it computed."""

    def __init__(self, task: Task, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        self.task, (self.batch,) = task, task.batches
        self.params = {name: p.detach() for name, p in task.student.named_parameters()}
        self.buffers = dict(task.student.named_buffers())
        generator = torch.Generator().manual_seed(1)
        self.along = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in self.params.items()}
        self._train, self._meta, self._tangent = wrap(self._losses), wrap(self._outer), wrap(self._jvp)

    def _outputs(self, params: Tensors, inputs: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        outputs: Tensor = functional_call(self.task.student, (params, buffers), (inputs,))
        return outputs

    def _losses(self, params: Tensors) -> Tensor:
        return self.task.losses(self._outputs(params, self.batch.inputs), self.batch)

    def _outer(self, params: Tensors) -> Tensor:
        return self.task.outer(self._outputs(params, self.task.meta_batch.inputs))

    def _jvp(self, params: Tensors, along: Tensors) -> Tensor:
        tangent: Tensor = jvp(self._losses, (params,), (along,))[1]
        return tangent

    def _gradient(self, loss: Callable[..., Tensor]) -> Tensor:
        params = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        found = torch.autograd.grad(loss(params).mean(), list(params.values()))
        return flat(dict(zip(params, found, strict=True)))

    def plain(self) -> Tensor:
        """The training pass and its gradient."""
        return self._gradient(self._train)

    def meta(self) -> Tensor:
        """The meta batch's, with its gradient."""
        return self._gradient(self._meta)

    def forward_mode(self) -> Tensor:
        """The tangents of all losses."""
        with differentiable_kernels(self.task.student):
            return self._tangent(self.params, self.along)


PASSES = {"training pass": Passes.plain, "meta pass": Passes.meta, "forward-mode pass": Passes.forward_mode}


def measure(case: str, name: str, repeats: int) -> list[str]:
    """A row of the table."""
    task = Task.build(CASES[case], 1)
    double = task._replace(
        student=Task.build(CASES[case], 1).student.double(),
        batches=[map_tensors(_double, batch) for batch in task.batches],
        meta_batch=map_tensors(_double, task.meta_batch),
    )
    take = PASSES[name]
    ways = {"as written": Passes(task, lambda f: f), "compiled": Passes(task, torch.compile)}
    right = take(Passes(double, lambda f: f))
    off = {way: float((take(passes) - right).norm() / right.norm()) for way, passes in ways.items()}
    for passes in ways.values():
        take(passes)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, passes in ways.items():
            start = time.process_time()
            take(passes)
            seconds[way].append(time.process_time() - start)
    written, compiled = (statistics.median(found) for found in seconds.values())
    errors = [f"{error:.1g}" for error in off.values()]
    return [case, name, f"{1000 * written:.0f}", f"{compiled / written:.2f}", *errors]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def main() -> None:
    """Measure and print; CPU time of one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["resnet8x4", "resnet20", "transformer"])
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, name, args.repeats) for case in args.cases for name in tqdm(args.passes, desc=case)]
    errors = ["off from float64, as written", "compiled"]
    print(table(["case", "pass", "as written, ms", "compiled over it", *errors], rows, left=2))


if __name__ == "__main__":
    run(main)
