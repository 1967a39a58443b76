"""Layers and wide operations: recurrent, attention, sparse, complex, compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from tests.proof.students.registry import WIDTH, Loose, Parts, Stage, linear, part, stage


@part()
def ensemble_by_vmap(parts: Parts) -> None:
    class Ensemble(Loose):
        def __init__(self) -> None:
            super().__init__()
            members = [linear() for _ in range(2)]
            params, _ = stack_module_state(members)
            self.weight, self.bias = (nn.Parameter(params[name].detach()) for name in ("weight", "bias"))
            self.base = [members[0].to("meta")]

        def forward(self, z: Tensor) -> Tensor:
            def one(p: dict[str, Tensor]) -> Tensor:
                return torch.tanh(functional_call(self.base[0], p, (z,)))

            return vmap(one)({"weight": self.weight, "bias": self.bias}).mean(0)

    parts.add(Ensemble())


@stage()
def checkpointed(self: Any, z: Tensor) -> Any:
    return checkpoint(lambda z: torch.tanh(self.layer(z)), z, use_reentrant=False)


@stage(norm=lambda: nn.BatchNorm1d(WIDTH), by_autograd=True)
def checkpointed_norm(self: Any, z: Tensor) -> Any:
    return checkpoint(lambda z: torch.tanh(self.norm(self.layer(z))), z, use_reentrant=False)


@part()
def dropout(parts: Parts) -> None:
    parts.add(nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.3)))


class Scripted(Loose):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) * 1.1


@part()
def scripted(parts: Parts) -> None:
    parts.add(torch.jit.script(Scripted()))


@part(slow=True)
def compiled(parts: Parts) -> None:
    layer: Any = torch.compile(nn.Sequential(linear(), nn.Tanh()), backend="aot_eager")
    parts.add(layer)


class Recurrent(Loose):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.net = kind(2, WIDTH, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = self.net(z.reshape(len(z), 3, 2))[0][:, -1]
        return found


@part()
def lstm(parts: Parts) -> None:
    parts.add(Recurrent(nn.LSTM))


@part()
def gru(parts: Parts) -> None:
    parts.add(Recurrent(nn.GRU))


@part()
def attention(parts: Parts) -> None:
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True, activation=F.gelu)
    parts.add(nn.Sequential(nn.Unflatten(1, (3, 2)), layer, nn.Flatten()))


@part()
def sdpa_causal(parts: Parts) -> None:
    def attended(self: Any, z: Tensor) -> Any:
        q = self.layer(z).reshape(len(z), 1, 3, 2)
        return F.scaled_dot_product_attention(q, q, q.tanh(), is_causal=True).reshape(len(z), WIDTH)

    parts.add(Stage(attended))


def embedded(sparse: bool) -> Stage:
    def added(self: Any, z: Tensor) -> Any:
        rows = torch.arange(len(z)) % 4
        return torch.tanh(self.layer(z + self.table(rows)))

    return Stage(added, table=nn.Embedding(4, WIDTH, sparse=sparse))


@part()
def embedding(parts: Parts) -> None:
    parts.add(embedded(False))


@part()
def embedding_sparse(parts: Parts) -> None:
    parts.add(embedded(True))


@part()
def complex_layer(parts: Parts) -> None:
    class Spectral(Loose):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))

        def forward(self, z: Tensor) -> Any:
            return torch.fft.irfft(torch.fft.rfft(z) * self.weight.to(torch.complex128), n=WIDTH).to(z).tanh()

    parts.add(Spectral())


@part()
def convolution(parts: Parts) -> None:
    parts.add(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.GELU(), nn.Flatten()))
    parts.add(nn.Linear(12, WIDTH))


@part()
def group_norm(parts: Parts) -> None:
    parts.add(nn.Sequential(linear(), nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH)))


@part()
def experts(parts: Parts) -> None:
    def routed(self: Any, z: Tensor) -> Any:
        gates = self.layer(z).softmax(1)[:, :2]
        self.load = (gates.mean(0) * gates).sum(1)
        kept = gates.topk(1, dim=1)
        out = torch.zeros_like(z)
        for i, expert in enumerate(self.experts):
            rows = (kept.indices[:, 0] == i).nonzero()[:, 0]
            out = out.index_add(0, rows, torch.tanh(expert(z[rows])) * kept.values[rows])
        return out

    parts.add(Stage(routed, experts=nn.ModuleList([linear(), linear()])))
    made = parts.last
    parts.terms["load"] = lambda outputs, batch: made.load
