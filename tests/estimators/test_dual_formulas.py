"""Tangents by the formulas of `dual_formulas` are torch's own, for any operand that has or lacks a tangent."""

import operator
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from benchmarks.common.counts import count
from metakd.estimators.dual import dual_numbers
from metakd.estimators.dual_formulas import dual_formula

BINARY = {
    "mul": torch.mul,
    "method mul": torch.Tensor.mul,
    "*": operator.mul,
    "div": torch.div,
    "/": operator.truediv,
    "add": torch.add,
    "+": operator.add,
    "sub": torch.sub,
    "-": operator.sub,
}
SHAPES = [((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (3, 1)), ((), (2,)), ((2, 1), ())]


def numbers(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 5
    return values.to(dtype)


def apart(function, args, moving):
    """Value and tangent of a function whose arguments at `moving` are dual numbers."""
    duals = [
        forward_ad.make_dual(x, numbers(x.shape, 10 + i, x.dtype)) if i in moving else x for i, x in enumerate(args)
    ]
    return forward_ad.unpack_dual(function(*duals))


def compare(function, args, moving):
    with dual_numbers():
        value, tangent = apart(function, args, moving)
    with forward_ad.dual_level():
        wanted, expected = apart(function, args, moving)
    assert value.dtype == wanted.dtype
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    if expected is None:
        assert tangent is None
    else:
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from(sorted(BINARY)),
    st.sampled_from(SHAPES),
    st.sampled_from([(0,), (1,), (0, 1), ()]),
    st.sampled_from(["float64", "float32", "int64", "number"]),
)
def test_sums_and_products(name, shapes, moving, other):
    left, right = (numbers(shape, seed) for seed, shape in enumerate(shapes))
    if other == "number" and moving in ((0,), ()):
        right = 3 if name in ("mul", "*") else 2.5
    elif other != "number" and moving == (0,):
        right = right.to(getattr(torch, other))
    compare(BINARY[name], [left, right], moving)


@given(st.sampled_from([(0,), ()]), st.sampled_from([3, 2.5]))
def test_numbers_on_the_left(moving, number):
    for function in (lambda x: number * x, lambda x: number - x, lambda x: number + x, lambda x: number / x):
        compare(function, [numbers((3, 2), 0)], moving)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (4,)], ids=str)
@pytest.mark.parametrize(
    ("moving", "arguments"),
    [(moving, n) for n in (2, 3) for k in range(n + 1) for moving in combinations(range(n), k)],
    ids=str,
)
def test_linear(moving, arguments, shape):
    args = [numbers(shape, 0), numbers((3, 4), 1), numbers((3,), 2)][:arguments]
    compare(F.linear, args, moving)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax(dim):
    z = numbers((4, 3), 0)
    z[1, 2] = -torch.inf  # a masked class
    for function in (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax):
        compare(lambda z: function(z, dim=dim), [z], (0,))  # noqa: B023
        compare(lambda z: function(z, dim), [z], (0,))  # noqa: B023
        compare(lambda z: function(z, dim=dim, dtype=torch.float64), [z.float()], (0,))  # noqa: B023
    compare(lambda z: torch.log_softmax(z, dim, torch.float64), [z.float()], (0,))


def test_a_result_shares_no_memory_with_its_arguments():
    x = numbers((3,), 0)
    with dual_numbers():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for function in (lambda x: x + 1, lambda x: 1 - x, lambda x: x * 2):
            function(dual).mul_(7)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, torch.ones_like(x))


def test_no_grad_and_operands_of_autograd_are_left_to_torch():
    x, w = numbers((3,), 0), numbers((3,), 1).requires_grad_()
    with dual_numbers():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert dual_formula(torch.mul, (dual, w), {}) is None
        assert dual_formula(torch.add, (dual, 1.0), {"alpha": 2}) is None
        with torch.no_grad():
            assert forward_ad.unpack_dual(dual * 2).tangent is None
    with forward_ad.dual_level():
        z = forward_ad.make_dual(x.to(torch.complex128), torch.ones(3, dtype=torch.complex128))
        assert dual_formula(torch.mul, (z, 2.0), {}) is None


def test_formulas_take_fewer_kernels():
    x, w, b = numbers((5, 4), 0), numbers((3, 4), 1), numbers((3,), 2)

    def run(block):
        def call():
            with block():
                duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in (w, b)]
                F.log_softmax((F.linear(x, *duals) / 4 - 1) * 3, dim=1)

        call()
        return sum(count(call).kernels.values())

    # A linear layer and its tangent (2), three operations with constants (2 each), log_softmax (1) and its tangent (4).
    assert run(dual_numbers) <= 2 + 6 + 5 + 3 < run(forward_ad.dual_level)
