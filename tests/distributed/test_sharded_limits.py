"""What a student of `fully_shard` rules out, what is noticed, and what a rank holds."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from benchmarks.sharded import Peak, parts
from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms, validate
from tests.distributed.pair import SIZE
from tests.distributed.sharded import Stack, balancer_of, shard
from tests.distributed.training import batch, momentum, plain


def in_part():
    student = plain()
    fully_shard(student[2], mesh=init_device_mesh("cpu", (SIZE,)))
    return student


def tensor_parallel():
    return parallelize_module(plain(), init_device_mesh("cpu", (SIZE,)), {"0": ColwiseParallel()})


def two_dimensions():
    mesh = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicate", "shard"))
    fully_shard(student := plain(), mesh=mesh)
    return student


def first_version():
    return FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))


def halved():
    return shard(Stack().bfloat16())


def computing_in_half():
    return shard(Stack(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def sharded():
    return shard(Stack())


BUILT = {
    in_part: (estimators.OneStep(), r"0\.weight.*not called on them.*Call torch.distributed.fsdp.fully_shard on the"),
    tensor_parallel: (estimators.OneStep(), r"not by fully_shard.*Call torch"),
    two_dimensions: (estimators.OneStep(), r"more than one dimension.*one-dimensional mesh"),
    first_version: (estimators.OneStep(), r"FullyShardedDataParallel flattens.*fully_shard on the whole"),
    halved: (estimators.OneStep(), r"rounding of half precision.*float32"),
    computing_in_half: (estimators.FiniteDifference(), r"swallows finite differences.*estimators.OneStep"),
}


def refused(rank):
    for build, (estimator, words) in BUILT.items():
        student = build()
        with pytest.raises(MetaKDError, match=words):
            BilevelLossBalancer(
                student, [terms.CrossEntropy()], optimizer=momentum(student.parameters()), estimator=estimator
            )
    for estimator in (estimators.Adjoint(), estimators.OneStep("reverse"), estimators.Unroll(), estimators.Implicit()):
        with pytest.raises(
            MetaKDError, match=r"reverse mode.*Use estimators.OneStep\(\) \(exact, forward mode\), Fini"
        ):
            balancer_of(rank, estimator=estimator)
    assert not [finding for finding in validate(sharded()) if finding.level != "note"]
    with pytest.raises(MetaKDError, match="a torchopt transformation as inner= may need whole"):
        import torchopt

        balancer_of(rank, inner=torchopt.sgd(lr=0.1))
    student, _, balancer = balancer_of(rank)
    with pytest.raises(MetaKDError, match="check the student before it is sharded"):
        check_hypergradient(balancer, [batch(0, rank)], batch(1, rank, 1))
    student.set_requires_gradient_sync(False)
    with pytest.raises(MetaKDError, match=r"set_requires_gradient_sync\(False\).*leave it out"):
        balancer(batch(0, rank), batch(0, rank, 1))
    student.set_requires_gradient_sync(True)
    balancer(batch(0, rank), batch(0, rank, 1))


def test_what_a_sharded_student_cannot_have_is_refused_by_name(pair):
    pair(refused)


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Opaque(Stack):
    def forward(self, x):
        return super().forward(_NoForwardMode.apply(self.enter(x)) @ self.enter.weight)


def without_forward_mode(rank):
    _, _, balancer = balancer_of(rank, build=Opaque)
    with pytest.raises(MetaKDError, match=r"forward-mode.*no second derivatives in reverse.*FiniteDifference"):
        balancer(batch(0, rank), batch(0, rank, 1))
    balancer_of(rank, build=Opaque, estimator=estimators.FiniteDifference())[2](batch(0, rank), batch(0, rank, 1))


def test_a_student_without_forward_mode_is_told_of_finite_differences(pair):
    pair(without_forward_mode)


def wrong_means(rank):
    student, _, balancer = balancer_of(rank)
    student.set_gradient_divide_factor(1.0)
    for block in student.blocks:
        block.set_gradient_divide_factor(1.0)
    with pytest.raises(MetaKDError, match=r"sharded student.* along the gradient is off by .*set_gradient_divide"):
        balancer(batch(0, rank), batch(0, rank, 1))


def unmoved(rank):
    """Passes that do not see the moved parts."""
    _, _, balancer = balancer_of(rank)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MetaKDError, match="a finite difference along the grad"):
        patch.setattr("metakd._virtual.sharded.shards_at", lambda shards, values: contextlib.nullcontext())
        balancer(batch(0, rank), batch(0, rank, 1))


def test_the_proof_notices_gradients_that_are_no_means_and_parts_that_do_not_move(pair):
    pair(wrong_means)
    pair(unmoved)


def in_half(rank):
    _, _, balancer = balancer_of(rank, fsdp={"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)})
    balancer(batch(0, rank), batch(0, rank, 1)).backward()
    return balancer.report.influence


def in_full(rank):
    _, _, balancer = balancer_of(rank)
    balancer(batch(0, rank), batch(0, rank, 1))
    return balancer.report.influence


def test_one_step_follows_a_policy_of_half_precision(pair):
    for half, full in zip(pair(in_half), pair(in_full), strict=True):
        assert (half - full).norm() < 0.05 * full.norm()


def held(rank, estimator, width=96, depth=12):
    """Peak bytes of a plain and of a balanced step: all, and in tensors of whole parameters' size."""
    found = []
    for step in parts(width, depth, estimator):
        step()
        with Peak(4 * width * width) as peak:
            step()
        found.append((peak.bytes, peak.whole))
    return found


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.FiniteDifference()], ids=["one", "differences"])
def test_no_rank_gathers_more_of_the_parameters_than_a_plain_step(pair, estimator):
    layer = 4 * 96 * 97
    for (_, plainly), (balanced, whole) in pair(held, estimator):
        assert whole <= plainly + layer <= 6 * layer
        assert balanced < 12 * layer * 12 / SIZE  # the rank's own part of 12 layers, twelve times


def test_the_measure_sees_a_whole_copy():
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    with Peak(4 * 64 * 64) as peak:
        kept = [p.clone() for p in layers.parameters()]
    assert peak.whole == 12 * 4 * 64 * 64 and len(kept) == 24
