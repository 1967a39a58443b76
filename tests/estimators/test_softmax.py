"""Cross-entropy of logits that depend on phi: torch's forward mode cannot be differentiated there, in place or not."""

import pytest
import torch
import torch.nn.functional as F
import torchopt

from metakd import check_hypergradient, hypergradient
from metakd.estimators import Adjoint, OneStep, Unroll

LOSSES = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "log_softmax": lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
    "logsumexp": lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(),
}


def problem(loss, steps):
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    return (
        (
            lambda p, m, batch: loss((x * m["scale"]) @ p["w"], y),
            lambda p, m: loss(x @ p["w"], y.flip(0)),
            {"w": torch.randn(3, 3, dtype=torch.float64)},
            {"scale": torch.ones(3, dtype=torch.float64)},
            [None] * steps,
        ),
        {"optimizer": torchopt.sgd(lr=0.5)},
    )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("estimator", [OneStep(), Adjoint(), Adjoint("forward"), Adjoint("auto")], ids=str)
@pytest.mark.filterwarnings("ignore:an operation of this model:UserWarning")
def test_it_is_unroll(loss, estimator):
    arguments, options = problem(loss, 1 if isinstance(estimator, OneStep) else 3)
    found, expected = (hypergradient(*arguments, **options, estimator=e).gradient for e in (estimator, Unroll()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    check_hypergradient(*arguments, **options, estimator=Unroll())


def test_an_in_place_operation_of_the_users_own_stays_an_error():
    def inner(p, m, batch):
        grown = (p["w"] * m["phi"]).exp()
        loss = grown.sum()
        grown.mul_(2)
        return loss

    with pytest.raises(RuntimeError, match="inplace"):
        hypergradient(
            inner,
            lambda p, m: p["w"].sum(),
            {"w": torch.ones(2)},
            {"phi": torch.ones(2)},
            [None],
            optimizer=torchopt.sgd(lr=0.5),
        )
