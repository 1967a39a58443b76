"""What runs in place of code that cannot be differentiated again computes the same, and can be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from metakd import MetaKDError
from metakd._virtual.kernels import compiled_parts, differentiable_kernels

BACKENDS = (torch.backends.mkldnn, torch.backends.cudnn)


def rows(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def recurrent(cell):
    layer = cell(4, 3, 2, bidirectional=True).double()
    return lambda x: layer(x)[0]


CASES = {
    "weight_norm_first": (lambda v, g: torch._weight_norm(v, g, 0), rows(5, 4), rows(5, 1)),
    "weight_norm_last": (lambda v, g: torch._weight_norm(v, g, 1), rows(5, 4), rows(1, 4)),
    "weight_norm_all": (lambda v, g: torch._weight_norm(v, g, -1), rows(5, 4), rows()),
    "weight_norm_conv": (lambda v, g: torch._weight_norm(v, g, dim=0), rows(2, 3, 2, 2), rows(2, 1, 1, 1)),
    "weight_norm_middle": (lambda v, g: torch._weight_norm(v, g, 1), rows(2, 3, 4), rows(1, 3, 1)),
    "weight_norm_vector": (lambda v, g: torch._weight_norm(v, g, 0), rows(5), rows(5)),
    "hardsigmoid": (lambda x: F.hardsigmoid(4 * x), rows(7, 4)),
    "hardsigmoid_inplace": (lambda x: F.hardsigmoid(4 * x, inplace=True), rows(7, 4)),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2], [2, 1]]), w), rows(3, 4)),
    "embedding_sparse": (lambda w: F.embedding(torch.tensor([0, 2, 2]), w, sparse=True), rows(3, 4)),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k), rows(1, 2, 5, 4), rows(1, 2, 5, 4)),
    "lstm": (recurrent(nn.LSTM), rows(3, 2, 4)),
    "gru": (recurrent(nn.GRU), rows(3, 2, 4)),
    "rnn": (recurrent(nn.RNN), rows(3, 2, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_values_with_all_derivatives(name):
    function, *inputs = CASES[name]
    expected = function(*inputs)
    with differentiable_kernels(nn.Identity()):
        torch.testing.assert_close(function(*inputs), expected, rtol=1e-12, atol=1e-14)
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs)
    assert all(backend.enabled for backend in BACKENDS)


def test_hardsigmoid_in_place_is_in_place():
    with differentiable_kernels(nn.Identity()):
        x = torch.tensor([-4.0, 1.5, 4.0])
        assert nn.Hardsigmoid(inplace=True)(x) is x
    assert x.tolist() == [0.0, 0.75, 1.0]


def test_the_second_derivative_of_fused_weight_norm_is_why():
    function, v, g = CASES["weight_norm_first"]
    assert gradcheck(function, (v, g)) and not gradgradcheck(function, (v, g), raise_exception=False)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("flag", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}])
def test_embeddings_without_a_derivative_are_refused(layer, flag):
    table = layer(3, 2, **flag)
    before = table.weight.detach().clone()
    with pytest.raises(MetaKDError, match=next(iter(flag))), differentiable_kernels(table):
        table(torch.tensor([[0, 1]]))
    assert torch.equal(table.weight, before)


def test_compiled_functions_run_as_written():
    function = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    with differentiable_kernels(nn.Identity()):
        assert function(torch.zeros(1)).item() == 0.0
    assert function(torch.zeros(1)).item() == 1.0


def test_compiled_parts_need_a_torch_that_can_run_them_as_written(monkeypatch):
    part, method = torch.compile(nn.Linear(2, 2), backend="eager"), nn.Tanh()
    method.compile(backend="eager")
    model = nn.Sequential(nn.Linear(2, 2), part, method)
    assert compiled_parts(model) == ["1", "2"] and compiled_parts(model[:1]) == []
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(MetaKDError, match=r"\['1', '2'\].*use torch 2.6"), differentiable_kernels(model):
        pass
    with differentiable_kernels(model[:1]):
        pass


def test_everything_is_put_back_after_an_error():
    with pytest.raises(ValueError), differentiable_kernels(nn.Identity()):
        raise ValueError
    with pytest.raises(RuntimeError), differentiable_kernels(nn.Identity()):
        nn.LSTM(4, 3)(torch.zeros(3, 2, 5))
    assert all(backend.enabled for backend in BACKENDS)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.overrides._get_current_function_mode() is None
