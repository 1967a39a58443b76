"""Attention, recurrent cells, modules called as functions."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from tests.proof.registry import eye, grid, operation, operations, shaped, spread


def heads(x, a):
    """Queries, keys and values (1, 2, B, D)."""
    return [torch.stack([y, y.sin()])[None] for y in (x @ a, x @ a.T, x)]


def attended(**options):
    return lambda x, a: F.scaled_dot_product_attention(*heads(x, a), **options)[0].movedim(1, 0)


operations(
    attention=attended(),
    attention_causal=attended(is_causal=True),
    attention_scaled=attended(scale=0.7),
    attention_masked=lambda x, a: attended(attn_mask=grid(len(x), len(x)) > -0.9)(x, a),
    attention_biased=lambda x, a: F.scaled_dot_product_attention(*heads(x, a), attn_mask=x @ x.T)[0].movedim(1, 0),
    attention_by_hand=lambda x, a: (x @ a @ x.T).softmax(1) @ x,
    gru_cell=lambda x, a: torch.gru_cell(x, x.tanh(), shaped(a, 3 * len(a), len(a)), shaped(a.T, 3 * len(a), len(a))),
    lstm_cell=lambda x, a: torch.cat(
        torch.lstm_cell(x, (x.tanh(), x), shaped(a, 4 * len(a), len(a)), shaped(a.T, 4 * len(a), len(a))), 1
    ),
    rnn_tanh_cell=lambda x, a: torch.rnn_tanh_cell(x, x.sin(), a, a.T),
)


def _module(make, *inputs_of, first=False):
    """A module of constants, but its first matrix is the operand."""

    def call(x, a):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = make(len(a)).double()
        name = next(name for name, p in module.named_parameters() if p.dim() > 1)
        given = shaped(a, *module.get_parameter(name).shape)
        answer = functional_call(module, {name: given}, tuple(get(x) for get in inputs_of))
        return answer[0] if first else answer

    return call


def _parametrized(parametrize, **options):
    """A linear layer whose parametrised weight is the operand."""

    def call(x, a):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer = parametrize(nn.Linear(len(a), len(a)).double(), **options)
        name = max((name for name, _ in layer.named_parameters()), key=lambda name: layer.get_parameter(name).numel())
        return functional_call(layer.eval(), {name: a}, (x,))

    return call


operations(
    spectral_parametrization=_parametrized(parametrizations.spectral_norm),
    orthogonal_exp=_parametrized(parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    orthogonal_cayley=_parametrized(parametrizations.orthogonal, orthogonal_map="cayley"),
)
operations({"wrong_in_torch": True}, weight_norm_parametrization=_parametrized(parametrizations.weight_norm))


def sequence(x):
    return spread(x, 3, x.shape[1])


operations(
    module_linear=_module(lambda d: nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 3)), lambda x: x),
    module_gru=_module(lambda d: nn.GRU(d, 3, batch_first=True), sequence, first=True),
    module_lstm=_module(lambda d: nn.LSTM(d, 3, batch_first=True, bidirectional=True), sequence, first=True),
    module_rnn=_module(lambda d: nn.RNN(d, 3, num_layers=2, batch_first=True), sequence, first=True),
    module_attention=_module(
        lambda d: nn.MultiheadAttention(d, 1, batch_first=True), sequence, sequence, sequence, first=True
    ),
    module_encoder_layer=_module(
        lambda d: nn.TransformerEncoderLayer(d, 1, 4, dropout=0.0, batch_first=True, norm_first=True), sequence
    ),
    module_encoder_layer_eval=_module(
        lambda d: nn.TransformerEncoderLayer(d, 1, 4, dropout=0.1, batch_first=True).eval(), sequence
    ),
    module_conv=_module(
        lambda d: nn.Sequential(nn.Conv1d(3, 3, 2), nn.GroupNorm(1, 3), nn.SiLU()), lambda x: spread(x, 3, 4)
    ),
)


@operation
def residual_block(x, a):
    return x + F.layer_norm(F.gelu(x @ a), x.shape[1:], eps=1e-2) @ a.T


@operation
def mixture_of_experts(x, a):
    gates = (x @ a).softmax(1)
    best, chosen = gates.topk(2, 1)
    experts = torch.stack([(x @ a).sin(), (x @ a.T).cos(), *[x * grid(1)] * (len(a) - 2)], 1)
    return (best[..., None] * experts.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))).sum(1)


@operation
def deep_equilibrium(x, a):
    z = torch.zeros_like(x)
    for _ in range(4):
        z = (x + z @ a / (2 + a.square().sum())).tanh()
    return z


@operation
def ode_euler(x, a):
    for _ in range(3):
        x = x + 0.2 * (x @ a).tanh()
    return x


@operation(by_autograd=True)
def graph_convolution(x, a):
    adjacency = ((x @ x.T).sigmoid() + eye(x @ x.T)).detach()
    return (adjacency / adjacency.sum(1, keepdim=True)) @ x @ a
