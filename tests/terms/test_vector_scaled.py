"""The vector-scaling loss against its formula, written out in float64."""

import pytest
import torch

from metakd import Batch, MetaKDError
from metakd.terms import CrossEntropy, LogitAdjusted, VectorScaled
from tests.terms.problems import problem


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learned", [False, True])
def test_the_formula(learned):
    z, batch, _ = problem(6, 4, 0)
    offset, scale = torch.randn(4).double(), torch.rand(4).double() * 0.8 + 0.1
    term = VectorScaled(4, offset=offset, scale=scale, learned=learned).double()
    if learned:
        term.offset.data, term.free_scale.data = offset, scale.logit()  # parameters are born in float32
    y = batch.targets
    e = (scale * z + offset).exp()
    close(term(z, batch).detach(), -(e[torch.arange(6), y] / e.sum(1)).log())
    # As AutoBalance writes it: log(1 + sum over other classes of exp(o_k - o_y) exp(D_k z_k - D_y z_y)).
    moved = scale * z + offset
    differences = (moved - moved[torch.arange(6), y][:, None]).exp()
    close(term(z, batch).detach(), (differences.sum(1)).log())


def test_known_special_cases():
    z, batch, counts = problem(6, 4, 0)
    close(VectorScaled(4, scale=1.0, learned=False)(z, batch), CrossEntropy()(z, batch))
    prior = (counts.double() / counts.sum()).log()
    close(VectorScaled(4, offset=prior, scale=1.0, learned=False)(z, batch), LogitAdjusted(counts)(z, batch))


def test_it_starts_as_published():
    term = VectorScaled(3)
    assert {name: p.tolist() for name, p in term.named_parameters()} == {
        "offset": [0.0] * 3,
        "free_scale": [pytest.approx(1.0)] * 3,
    }
    assert term.scale.tolist() == [pytest.approx(0.7311, abs=1e-4)] * 3
    assert not list(VectorScaled(3, learned=False).parameters())
    assert repr(term) == "VectorScaled(3 classes, learned=True)"


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: VectorScaled(0), "classes is 0"),
        (lambda: VectorScaled(3, offset=[1.0, 2.0]), r"offset has shape \(2,\), expected one finite number or 3"),
        (lambda: VectorScaled(3, offset=float("nan")), "offset has shape"),
        (lambda: VectorScaled(3, scale="big"), "scale must be a number or one per class, got str"),
        (lambda: VectorScaled(3, scale=1.0), r"a scale is 1, but must be in \(0, 1\) to be learned"),
        (lambda: VectorScaled(3, scale=[0.5, -1.0, 2.0], learned=False), "a scale is -1, but must be positive"),
        (lambda: VectorScaled(3)(torch.zeros(2, 4), Batch(None, torch.zeros(2).long())), "scales 3 classes .* has 4"),
    ],
)
def test_misuse(build, said):
    with pytest.raises(MetaKDError, match=said):
        build()
