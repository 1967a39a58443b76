"""The methods: each takes a task and returns a function that takes one hypergradient, again and again the same one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.common.cases import Task, differentiable_kernels
from metakd import BilevelLossBalancer, estimators
from metakd.estimators import Estimator

Call = Callable[[], Sequence[Tensor]]
"""One measured call; returns the hypergradient in the weight model's parameters, or nothing."""


def plain(task: Task) -> Call:
    """The unit of time: forward and backward pass of knowledge distillation with fixed weights."""
    (batch, *_), params = task.batches, list(task.student.parameters())

    def call() -> Sequence[Tensor]:
        loss = task.losses(task.student(batch.inputs), batch).mean()
        torch.autograd.grad(loss, params)
        return ()

    return call


def plain_unfused(task: Task) -> Call:
    """The same on the kernels that a hypergradient needs."""
    fused = plain(task)

    def call() -> Sequence[Tensor]:
        with differentiable_kernels(task.student):
            return fused()

    return call


def by_metakd(estimator: Estimator, task: Task) -> Call:
    """`BilevelLossBalancer.meta_step`; the weight model's optimizer has lr 0, so all calls see the same weights."""
    balancer = BilevelLossBalancer(
        task.student,
        task.terms,
        optimizer=torch.optim.SGD(task.student.parameters(), lr=task.lr),
        weighting=task.weighting,
        weighting_optimizer=torch.optim.SGD(task.weighting.parameters(), lr=0.0),
        features=lambda losses, outputs, batch: losses,
        estimator=estimator,
    )

    def call() -> Sequence[Tensor]:
        balancer.meta_step(task.batches, task.meta_batch)
        return [p.grad for p in task.weighting.parameters() if p.grad is not None]

    return call


def by_hand(task: Task) -> Call:
    """A double backward through `torch.func.functional_call`, as one would write it."""

    def call() -> Sequence[Tensor]:
        params: dict[str, Tensor] = dict(task.student.named_parameters())
        buffers = {name: b.clone() for name, b in task.student.named_buffers()}
        with differentiable_kernels(task.student):
            for batch in task.batches:
                loss = task.inner(functional_call(task.student, (params, buffers), batch.inputs), batch)
                gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {name: p - task.lr * g for (name, p), g in zip(params.items(), gradients, strict=True)}
            outer = task.outer(functional_call(task.student, (params, buffers), task.meta_batch.inputs))
            return torch.autograd.grad(outer, list(task.weighting.parameters()))

    return call


def by_torchopt(task: Task) -> Call:
    """`torchopt.MetaSGD`."""
    import torchopt  # a peer that is not installed fails alone

    recurrent = [module for module in task.student.modules() if isinstance(module, nn.RNNBase)]

    def call() -> Sequence[Tensor]:
        start = torchopt.extract_state_dict(task.student, by="deepcopy")
        optimizer = torchopt.MetaSGD(task.student, lr=task.lr)
        with differentiable_kernels(task.student):
            for batch in task.batches:
                optimizer.step(task.inner(task.student(batch.inputs), batch))
                refresh()
            outer = task.outer(task.student(task.meta_batch.inputs))
            gradients = torch.autograd.grad(outer, list(task.weighting.parameters()))
        torchopt.recover_state_dict(task.student, start)
        refresh()
        return gradients

    def refresh() -> None:
        # MetaSGD replaces parameters behind the back of nn.LSTM, which would go on with its list of the old ones.
        for module in recurrent:
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]

    return call


def by_higher(task: Task) -> Call:
    """`higher.innerloop_ctx`."""
    import higher

    optimizer = torch.optim.SGD(task.student.parameters(), lr=task.lr)

    def call() -> Sequence[Tensor]:
        with (
            differentiable_kernels(task.student),
            higher.innerloop_ctx(task.student, optimizer) as (student, inner_optimizer),
        ):
            for batch in task.batches:
                inner_optimizer.step(task.inner(student(batch.inputs), batch))
            return torch.autograd.grad(task.outer(student(task.meta_batch.inputs)), list(task.weighting.parameters()))

    return call


METHODS: dict[str, Callable[[Task], Call]] = {
    "plain": plain,
    "plain, unfused": plain_unfused,
    "OneStep": partial(by_metakd, estimators.OneStep()),
    "Unroll": partial(by_metakd, estimators.Unroll()),
    "Adjoint": partial(by_metakd, estimators.Adjoint()),
    "Adjoint, forward": partial(by_metakd, estimators.Adjoint("forward")),
    "IdentityJacobian": partial(by_metakd, estimators.IdentityJacobian()),
    "FiniteDifference": partial(by_metakd, estimators.FiniteDifference()),
    "TorchOpt MetaSGD": by_torchopt,
    "higher": by_higher,
    "by hand": by_hand,
}
ONE_STEP = ("plain, unfused", "OneStep")
