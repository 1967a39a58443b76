"""Operations on many tensors at once have the bits, and the derivatives, of those on each."""

import torch

from benchmarks.common.counts import count
from metakd._basics.together import clones, copy_into, norm_of, scaled, summed, times


def several():
    torch.manual_seed(0)
    return [
        torch.randn(3, 4).t(),
        torch.randn(2, 1).expand(2, 5),
        torch.tensor(7),
        torch.tensor([float("nan"), -0.0]),
        torch.randn(3, dtype=torch.float64),
        torch.randn(2, 2).to_sparse(),
        torch.zeros(0),
    ]


def test_copies_have_the_same_bits_and_memory_of_their_own():
    values = several()
    for value, copy in zip(values, clones(values), strict=True):
        assert (value.dtype, value.shape, value.layout) == (copy.dtype, copy.shape, copy.layout)
        one, other = (t.to_dense().contiguous() for t in (value, copy))
        assert one.numpy().tobytes() == other.numpy().tobytes()
        assert value.layout != torch.strided or not value.numel() or copy.data_ptr() != value.data_ptr()


def test_copies_take_a_kernel_for_each_dtype():
    values = [torch.ones(n, dtype=dtype) for n in range(1, 9) for dtype in (torch.float32, torch.int64)]
    assert sum(count(lambda: clones(values)).kernels.values()) == 2
    into = [torch.zeros_like(value) for value in values]
    copy_into(into, values)
    assert all(map(torch.equal, into, values))


def test_scaled_is_differentiable_twice_by_as_many_kernels():
    x = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    y = scaled(x, -0.5)
    assert all(map(torch.equal, y, [-0.5 * one for one in x]))
    loss = sum((one**3).sum() for one in y[:3])  # one result is not used
    first = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True)
    assert first[3] is None
    second = torch.autograd.grad(sum(g.sum() for g in first[:3]), x[:3])
    for one, found in zip(x[:3], second, strict=True):
        torch.testing.assert_close(found, 6 * (-0.5) ** 3 * one.detach())
    many = [torch.randn(3, requires_grad=True) for _ in range(20)]
    found = count(lambda: torch.autograd.grad(scaled(many, 2.0), many, [torch.ones(3)] * 20)).kernels
    assert found["_foreach_mul"] == 2 and "mul" not in found
    assert scaled([], 2.0) == ()


def test_sums_products_and_norms():
    x, y = ([torch.randn(n, dtype=torch.float64) for n in (2, 3)] for _ in range(2))
    assert all(map(torch.equal, summed(x, y), [a + b for a, b in zip(x, y, strict=True)]))
    assert all(map(torch.equal, times(x, torch.tensor(3.0)), [3.0 * a for a in x]))
    torch.testing.assert_close(norm_of(x), torch.linalg.vector_norm(torch.cat(x)))
    torch.testing.assert_close(norm_of(x[:1]), torch.linalg.vector_norm(x[0]))
    sparse = times([torch.eye(2).to_sparse()], torch.tensor(3.0))
    assert torch.equal(sparse[0].to_dense(), 3 * torch.eye(2))
