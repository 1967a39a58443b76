"""Losses of dual outputs have the tangents that forward mode gives, whatever the terms do."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from metakd import Batch, terms
from metakd.dual_losses import dual_losses
from metakd.objective import weighted_mean
from metakd.terms import evaluate


class Once(torch.autograd.Function):
    """x^2 with a forward-mode formula, and one backward only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


TERMS = {
    "hard": terms.CrossEntropy(label_smoothing=0.1),
    "soft": terms.SoftTarget(temperature=4.0),
    "reverse": terms.ReverseSoftTarget(temperature=2.0),
    "balanced": terms.BalancedSoftmax([5, 3, 2]),
    "linear": lambda z, batch: 3 * z.sum(1),
    "constant": lambda z, batch: torch.ones_like(batch.teacher[:, 0]),
    "coupled": lambda z, batch: (z - z.mean(0)).square().sum(1) * z.norm(),
    "once": lambda z, batch: Once.apply(z).sum(1),
    "hinge": lambda z, batch: (1 + z - z.gather(1, batch.targets[:, None])).relu().sum(1),
}


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, tangent, teacher = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    return z, tangent, Batch(None, torch.arange(6) % 3, teacher)


def tangent_of(function, z, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(z, tangent)))


@pytest.mark.parametrize("names", [[name] for name in TERMS] + [list(TERMS)], ids=str)
def test_tangents_are_those_of_forward_mode(names):
    z, tangent, batch = data()
    chosen = {name: TERMS[name] for name in names}
    expected = tangent_of(lambda z: evaluate(chosen, z, batch), z, tangent)
    found = tangent_of(lambda z: dual_losses(lambda z: evaluate(chosen, z, batch), z), z, tangent)
    torch.testing.assert_close(found.primal, expected.primal, rtol=1e-14, atol=1e-14)
    zero = torch.zeros_like(found.primal)
    ours, torchs = (zero if d.tangent is None else d.tangent for d in (found, expected))
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [tuple, list, dict, OrderedDict])
def test_outputs_in_a_nest(kind):
    z, tangent, _ = data()

    def nest(z):
        parts = {"logits": z, "names": torch.arange(6), "auxiliary": 2 * z}
        return kind(parts) if kind in (dict, OrderedDict) else kind(parts.values())

    def losses(outputs):
        first, _, last = outputs.values() if hasattr(outputs, "values") else outputs
        assert type(outputs) is kind
        return (first * last).sum(1, keepdim=True)

    expected = tangent_of(lambda z: losses(nest(z)), z, tangent)
    found = tangent_of(lambda z: dual_losses(losses, nest(z)), z, tangent)
    torch.testing.assert_close(found.tangent, expected.tangent)


def test_without_tangents_and_with_a_graph_nothing_is_changed():
    z, tangent, batch = data()
    z.requires_grad_()
    losses = dual_losses(lambda z: TERMS["hard"](z, batch)[:, None], z)
    assert losses.requires_grad
    with forward_ad.dual_level():
        dual = dual_losses(lambda z: TERMS["hard"](z, batch)[:, None], forward_ad.make_dual(z, tangent))
        (g,) = torch.autograd.grad(dual.sum(), z)
        curvature = forward_ad.unpack_dual(g).tangent
    probabilities = z.detach().softmax(1)
    expected = probabilities * (tangent - (probabilities * tangent).sum(1, keepdim=True))
    torch.testing.assert_close(curvature, expected)


def test_an_error_of_a_term_is_its_own():
    z, tangent, _ = data()

    def broken(z):
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        tangent_of(lambda z: dual_losses(broken, z), z, tangent)


def test_the_weighted_mean_of_dual_losses():
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    losses, tangent = torch.rand(2, 6, 2, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(weighted_mean(weights, forward_ad.make_dual(losses, tangent)))
    torch.testing.assert_close(found.primal, (weights * losses).sum() / 6)
    torch.testing.assert_close(torch.autograd.grad(found.tangent, weights)[0], tangent / 6)


def test_logits_in_half_precision_keep_their_type():
    z, tangent, batch = data()
    found = tangent_of(
        lambda z: dual_losses(lambda z: F.cross_entropy(z, batch.targets, reduction="none")[:, None], z),
        z.bfloat16(),
        tangent.bfloat16(),
    )
    assert found.tangent.dtype == found.primal.dtype == torch.bfloat16
