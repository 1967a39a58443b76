"""Meta-parameters upstream of operations whose forward-mode result torch cannot differentiate in reverse."""

import pytest
import torch
import torch.nn.functional as F
import torchopt

from metakd import MetaKDError, check_hypergradient, hypergradient
from metakd.estimators import Adjoint, IdentityJacobian, OneStep, Truncated, Unroll

DEFAULTS = [OneStep(), Adjoint(), Truncated(1), IdentityJacobian(), Adjoint("auto"), Unroll()]


@pytest.mark.parametrize("estimator", DEFAULTS, ids=str)
def test_the_numbers_of_layer_norm(estimator):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    found = hypergradient(
        lambda p, m, b: F.mse_loss(F.layer_norm(x * m["g"] @ p["w"], (4,)), y),
        lambda p, m: F.mse_loss(x @ p["w"], y),
        {"w": torch.eye(4)},
        {"g": torch.ones(4)},
        [None],
        optimizer=torchopt.sgd(lr=0.1),
        estimator=estimator,
    )
    expected = torch.tensor([-0.0181, 0.0179, -0.0074, 0.0076])
    torch.testing.assert_close(found.gradient["g"], expected, rtol=0, atol=5e-5)


def gram(h):
    return h.T @ h / 8 + torch.eye(4, dtype=h.dtype)


OPERATIONS = {
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "instance_norm": lambda h: F.instance_norm(h.reshape(2, 4, 4)),
    "group_norm": lambda h: F.group_norm(h, 1),
    "det": lambda h: gram(h).det().reshape(1),
    "logdet": lambda h: gram(h).logdet().reshape(1),
    "slogdet": lambda h: torch.linalg.slogdet(gram(h))[1].reshape(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "weight_norm": lambda h: torch._weight_norm(h, h[:, :1].abs() + 1),
}


@pytest.mark.parametrize("estimator", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_they_are_finite_differences(name, estimator):
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    steps = 1 if estimator in (OneStep(), Truncated(1), IdentityJacobian()) else 3
    check_hypergradient(*upstream(name, x, y), range(steps), optimizer=torchopt.sgd(lr=0.02), estimator=estimator)


def upstream(name, x, y):
    return (
        lambda p, m, b: (OPERATIONS[name](x * m["g"] @ p["w"]) - 0.3).square().mean(),
        lambda p, m: F.mse_loss(x @ p["w"], y),
        {"w": torch.eye(4, dtype=torch.float64)},
        {"g": torch.linspace(0.8, 1.2, 4, dtype=torch.float64)},
    )


@pytest.mark.parametrize(("estimator", "steps"), [(OneStep("forward"), 1), (Adjoint("forward"), 3)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "group_norm", "logdet"])
def test_forward_mode_by_name_is_right_or_refused(name, estimator, steps):
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    arguments, options = (*upstream(name, x, y), range(steps)), {"optimizer": torchopt.sgd(lr=0.02)}
    try:
        found = hypergradient(*arguments, **options, estimator=estimator).gradient["g"]
    except MetaKDError as error:
        assert "mode='forward'" in str(error) or "forward over reverse" in str(error)
    else:
        torch.testing.assert_close(found, hypergradient(*arguments, **options, estimator=Unroll()).gradient["g"])


def test_weight_normalisation_has_the_right_curvature_in_a_module():
    """By itself torch's fused kernel forgets that the norm depends on the weights."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, dtype=torch.float64))
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    for estimator in (Adjoint(), Unroll(), Truncated(4)):
        check_hypergradient(
            lambda p, m, b: (m["scale"] * torch.func.functional_call(layer, p, (x,)) - y).square().mean(),
            lambda p, m: (torch.func.functional_call(layer, p, (x,)) - y).square().mean(),
            params,
            {"scale": torch.tensor(0.9, dtype=torch.float64)},
            range(4),
            optimizer=torchopt.sgd(lr=0.3),
            estimator=estimator,
        )
