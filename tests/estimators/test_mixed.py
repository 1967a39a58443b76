"""How the mixed product is taken: forward mode for weighted losses alone, and what takes its place where it fails."""

import dataclasses
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from metakd import MetaKDError
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Memory, OneStep, Truncated, Unroll
from tests.estimators.problems import Cube, relative
from tests.estimators.weighted import data, mlp, weighted_problem
from tests.zoo import NoForwardMode, cdist_is_once_differentiable


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def problem_with(function, **options):
    return weighted_problem(mlp(Layer(function)), *data(), **options)


def exact(problem):
    return Unroll()(problem).gradient


FIRST_STEPS = [OneStep(), OneStep("forward"), Adjoint(), Adjoint("forward"), Truncated(1), IdentityJacobian()]


@pytest.mark.parametrize("estimator", FIRST_STEPS, ids=str)
@pytest.mark.parametrize("compare", [False, True])
def test_weighted_losses_are_differentiated_in_forward_mode(estimator, compare):
    problem = problem_with(torch.sin, memory=Memory(compare=compare))
    seen = []

    def losses(params, batch):
        seen.append(any(forward_ad.unpack_dual(p).tangent is not None for p in params.values()))
        return problem.weighted.losses(params, batch)

    spied = dataclasses.replace(problem, weighted=problem.weighted._replace(losses=losses))
    found = estimator(spied)
    assert relative(found.gradient, exact(problem)) < 1e-12
    assert seen == ([True, False, True] if compare else [True])
    assert problem.memory == Memory()  # compared once


def test_reverse_mode_does_not_touch_it():
    problem = problem_with(torch.sin, memory=Memory(compare=False))
    spied = dataclasses.replace(problem, weighted=problem.weighted._replace(losses=lambda *_: pytest.fail("called")))
    assert relative(OneStep("reverse")(spied).gradient, exact(problem)) < 1e-12


class Odd(Cube):
    """x^3; its forward mode raises an error of no known words."""

    @staticmethod
    def jvp(ctx, tangent):
        raise KeyError("the moon")


class Nothing(Odd):
    @staticmethod
    def jvp(ctx, tangent):
        raise AssertionError


@pytest.mark.parametrize(
    ("function", "words"),
    [(NoForwardMode.apply, "jvp"), (Odd.apply, "the moon"), (Nothing.apply, "AssertionError")],
)
def test_any_failure_of_forward_mode_alone_is_no_forward_mode(function, words):
    problem = problem_with(function)
    with pytest.warns(UserWarning, match=rf"no forward-mode derivative \(.*{words}.*reverse mode takes") as caught:
        found = [OneStep()(problem) for _ in range(3)]
    assert len(caught) == 1 and problem.memory.forward_mode is False
    assert all(relative(one.gradient, exact(problem)) < 1e-12 for one in found)
    with pytest.raises(MetaKDError, match=rf"OneStep\(mode='forward'\) fails: .*{words}.*mode='auto' or 'reverse'"):
        OneStep("forward")(problem)


class OnlyFirstOrder(torch.autograd.Function):
    """x^3 with one derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def distances(x):
    return torch.cdist(x, x.detach().flip(0) * 0.3, p=3.0).matmul(torch.ones(len(x), 8, dtype=x.dtype))


def sequences(x):
    """CTC's loss of a sequence a sample, beside its inputs."""
    targets, lengths = torch.tensor([[1, 2]] * len(x)), torch.full((len(x),), 2)
    steps = x[None].expand(4, *x.shape).log_softmax(2)
    return x + F.ctc_loss(steps, targets, lengths + 2, lengths, reduction="none")[:, None]


@pytest.mark.parametrize("function", [OnlyFirstOrder.apply, *[distances] * cdist_is_once_differentiable(), sequences])
@pytest.mark.parametrize("mode", ["auto", "forward"])
def test_a_model_with_neither_is_told_what_is_left(function, mode):
    problem = problem_with(function)
    with pytest.raises(MetaKDError, match="neither a forward-mode derivative") as error:
        OneStep(mode)(problem)
    assert "FiniteDifference()" in str(error.value) and "mode=" not in str(error.value)
    assert problem.memory.forward_mode is None
    assert relative(FiniteDifference(1e-5)(problem).gradient, FiniteDifference(1e-4)(problem).gradient) < 1e-3


def test_reverse_mode_advises_what_may_work():
    with pytest.raises(MetaKDError, match=r"marked @once_differentiable.*FiniteDifference") as error:
        OneStep("reverse")(problem_with(OnlyFirstOrder.apply))
    assert "mode=" not in str(error.value)


def broken(x):
    raise LookupError("no such thing")


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_an_error_of_the_losses_is_their_own(mode):
    fine = problem_with(torch.sin)
    gradient = {name: torch.ones_like(p) for name, p in fine.params.items()}
    problem = dataclasses.replace(problem_with(broken), first_gradient=lambda names: gradient, outers=fine.outers)
    with pytest.raises(LookupError, match="no such thing"):
        OneStep(mode)(problem)
    assert problem.memory.forward_mode is None


def test_running_out_of_memory_stays_what_it_is():
    calls = []

    def greedy(params, batch):
        calls.append(0)
        raise torch.cuda.OutOfMemoryError("out of memory")

    problem = problem_with(torch.sin)
    problem = dataclasses.replace(problem, weighted=problem.weighted._replace(losses=greedy))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        OneStep()(problem)
    assert len(calls) == 1 and problem.memory.forward_mode is None


def test_a_level_of_someone_else_makes_one_product_reverse():
    problem = problem_with(torch.sin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with forward_ad.dual_level():
            found = OneStep()(problem)
            with pytest.raises(MetaKDError, match="one level of dual numbers"):
                OneStep("forward")(problem)
            with pytest.raises(MetaKDError, match="one level of dual numbers"):
                Adjoint("forward")(dataclasses.replace(problem, batches=[0, 0]))
    assert relative(found.gradient, exact(problem)) < 1e-12
    assert problem.memory.forward_mode is None


def test_two_threads_take_turns():
    """Torch has one level of dual numbers for all threads: both stay in forward mode, without a word."""
    inside, most, lock, results = [0], [0], threading.Lock(), []
    both = threading.Barrier(2)

    def slow(x):
        if forward_ad.unpack_dual(x).tangent is not None:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.01)
            with lock:
                inside[0] -= 1
        return x.sin()

    def work():
        problem = problem_with(slow)
        both.wait()
        for _ in range(5):
            results.append((problem, OneStep()(problem).gradient))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 10 and most[0] == 1
    for problem, gradient in results:
        assert problem.memory.forward_mode is None
        assert relative(gradient, exact(problem)) < 1e-12


def test_a_subset_of_the_parameters_is_weighted_too():
    problem = problem_with(torch.sin)
    forward, reverse = (OneStep(mode, parameters=["3.*"])(problem) for mode in ("forward", "reverse"))
    assert relative(forward.gradient, reverse.gradient) < 1e-12
