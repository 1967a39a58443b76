"""Buffers that change their shape in a forward pass."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakd import Batch, MetaKDError, check_hypergradient
from metakd.terms import CrossEntropy
from tests.cases.real_optimizers import ESTIMATORS, TERMS, Build, Case, assert_right, balanced, mlp, seeded, sgd
from tests.cases.real_steps import data


class Observed(nn.Module):
    """Scales by the range that it has seen, which is empty at first, as observers of quantisation keep it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, mlp()
        self.register_buffer("high", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.amax(0)
        high = seen if self.high.numel() == 0 else torch.maximum(self.high, seen) + 0.1 * self.high
        if self.how == "resized":
            self.high.resize_(high.shape)
            self.high.copy_(high)
        elif self.how == "replaced":
            self.high = high
        else:
            self.high.data = high
        return self.net(x / (1 + self.high.abs()))


WAYS = ["resized", "replaced", "data"]


def observed(how: str, *, warm: bool = False) -> Build:
    def build() -> Case:
        case = sgd(seeded(lambda: Observed(how)))
        if warm:
            case.student(data(seed=7)[0].inputs)
        return case

    return build


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_a_buffer_that_changes_its_shape(how, warm):
    balancer = assert_right(observed(how, warm=warm))
    expected = observed(how, warm=warm)().student
    expected(data()[0].inputs)
    assert torch.equal(balancer.student.high, expected.high)  # as after the one pass
    for estimator in ESTIMATORS:
        balancer = assert_right(observed(how, warm=warm), 2, estimator=estimator)
        assert balancer.student.high.numel() == (4 if warm else 0)
    assert check_hypergradient(balancer, [data()[0]], data()[1]).verdict.startswith("exact")


class Typo(Exception):
    pass


@pytest.mark.parametrize("place", ["hard", "meta_loss"])
@pytest.mark.parametrize("how", WAYS)
def test_an_error_after_a_buffer_has_changed_its_shape_is_the_real_one(how, place):
    def broken(outputs: Tensor, batch: Batch) -> Tensor:
        raise Typo("logits is not defined")

    case = observed(how)()
    case = case._replace(meta_loss=broken) if place == "meta_loss" else case._replace(terms={"hard": broken})
    balancer, (batch, meta_batch) = balanced(case), data()
    buffer = case.student.high
    state = {name: value.clone() for name, value in case.student.state_dict().items()}
    steps = [lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)]
    for step in steps:
        with pytest.raises(MetaKDError, match=f"{place}.*Typo: logits is not defined") as caught:
            step()
        assert isinstance(caught.value.__cause__, Typo) or isinstance(caught.value.__cause__.__cause__, Typo)
        assert case.student.high is buffer and buffer.shape == (0,)
        for name, value in case.student.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("observer", ["MovingAveragePerChannelMinMaxObserver", "MovingAverageMinMaxObserver"])
def test_observers_of_quantisation(observer):
    """Fake quantisation is a straight-through estimator: the reference is a graph of the step."""
    quantization = pytest.importorskip("torch.ao.quantization")

    def fake() -> nn.Module:
        options = {"ch_axis": 1} if "Channel" in observer else {}
        return quantization.FakeQuantize(
            getattr(quantization, observer),
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
            qscheme=torch.per_channel_affine if options else torch.per_tensor_affine,
            **options,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to move it elsewhere
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(4, 6), fake(), nn.Tanh(), nn.Linear(6, 3))
        batch, meta_batch = (b._replace(inputs=b.inputs.float()) for b in data())
        balancer = balanced(sgd(student))
        balancer(batch, meta_batch)
        found, buffers = balancer.report.influence, {name: b.clone() for name, b in student.named_buffers()}
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(4, 6), fake(), nn.Tanh(), nn.Linear(6, 3))
        weights = balancer.report.weights.clone().requires_grad_()
        params = dict(student.named_parameters())
        outputs = student(batch.inputs)
        for name, buffer in student.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        losses = torch.stack([term(outputs, batch) for term in TERMS.values()], dim=1)
        steps = torch.autograd.grad((weights * losses).sum() / 5, list(params.values()), create_graph=True)
        ahead = {name: p - 0.2 * g for (name, p), g in zip(params.items(), steps, strict=True)}
        meta = CrossEntropy()(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
        torch.testing.assert_close(found, torch.autograd.grad(meta, weights)[0] * 5, rtol=1e-4, atol=1e-6)
