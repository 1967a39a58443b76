"""Modules that have broken meta-gradient code elsewhere, and batches for them; all float64 and small."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 3

# Older torch passes the inputs of a checkpoint through an operation that has no forward-mode derivative.
CHECKPOINTS_HAVE_FORWARD_MODE = not hasattr(torch.utils.checkpoint, "_NoopSaveInputs")


def differentiable(function: Callable[[torch.Tensor], torch.Tensor], times: int = 1) -> bool:
    """Whether this torch has so many derivatives of a function of a matrix (8, 4); older ones lack a few."""
    value = x = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    try:
        for _ in range(times):
            (value,) = torch.autograd.grad(function(x).sum() if value is x else value.sum(), x, create_graph=True)
    except RuntimeError:
        return False
    return True


def cdist_is_once_differentiable() -> bool:
    """It has neither forward mode nor a second derivative in torch before 2.14."""
    return not differentiable(lambda x: torch.cdist(x, x.detach() + 1, p=3.0), times=2)


# What the animals make the library and torch say.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*in train mode every gradient of spectral norm"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's tracer
]


class Animal(NamedTuple):
    """A student and how to feed it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    forward_mode: bool = True
    forward_over_reverse: bool = True
    true_slope: bool = True  # False: torch itself holds a part fixed, and finite differences see it move


class TiedLanguageModel(nn.Module):
    """Input and output embeddings share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).mean(1))))


class LastState(nn.Module):
    """A recurrent layer read at its last step."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention by torch's own layer, or by the fused function alone."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attention = None if fused else nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        if self.attention is None:
            x = F.scaled_dot_product_attention(x, x, x)
        else:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class UnusedAndFrozen(nn.Module):
    """One layer that the forward pass never calls, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, CLASSES), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


class MovingCentre(nn.Module):
    """A buffer that is replaced, not written to, and that the outputs depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return self.head(torch.tanh(x - self.centre))


class NoForwardMode(torch.autograd.Function):
    """x^3 with a double backward and no forward-mode formula."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Custom(nn.Module):
    """Uses an operation that forward-mode AD does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(NoForwardMode.apply(torch.tanh(self.body(x))))


class TwoLevels(nn.Module):
    """Recomputes its middle in the backward pass."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), middle, nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.middle, self.first(x), use_reentrant=False))


def compiled_part() -> nn.Module:
    return mlp(torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="aot_eager"))


def rows(size: int) -> Tensor:
    return torch.randn(size, 4, dtype=torch.float64)


def images(size: int) -> Tensor:
    return torch.randn(size, 2, 5, 5, dtype=torch.float64)


def sequences(size: int) -> Tensor:
    return torch.randn(size, 3, 4, dtype=torch.float64)


def tokens(size: int) -> Tensor:
    return torch.randint(CLASSES, (size, 3))


def conv(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, CLASSES))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def checkpointed(layer: nn.Module) -> Animal:
    def build() -> nn.Module:
        return TwoLevels(nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer), nn.Tanh()))

    return Animal(build, rows, CHECKPOINTS_HAVE_FORWARD_MODE, CHECKPOINTS_HAVE_FORWARD_MODE)


ZOO: dict[str, Animal] = {
    "linear": Animal(lambda: nn.Linear(4, CLASSES), rows),
    "mlp": Animal(lambda: mlp(nn.Tanh()), rows),
    "inplace_relu": Animal(lambda: mlp(nn.ReLU(inplace=True)), rows),
    "dropout": Animal(lambda: mlp(nn.Tanh(), nn.Dropout(0.4)), rows),
    "batch_norm": Animal(lambda: conv(nn.BatchNorm2d(4), nn.Tanh()), images),
    "batch_norm_eval": Animal(lambda: conv(nn.BatchNorm2d(4), nn.Tanh()).eval(), images),
    "batch_norm_cumulative": Animal(
        lambda: conv(nn.BatchNorm2d(4, momentum=None), nn.SiLU()), images, forward_over_reverse=False
    ),
    "group_norm": Animal(lambda: conv(nn.GroupNorm(2, 4), nn.SiLU()), images, forward_over_reverse=False),
    "instance_norm": Animal(lambda: conv(nn.InstanceNorm2d(4, affine=True), nn.GELU()), images),
    "layer_norm": Animal(lambda: mlp(nn.LayerNorm(6), nn.Tanh()), rows),
    "max_pool": Animal(lambda: conv(nn.MaxPool2d(2), nn.Tanh()), images),
    "tied_embedding": Animal(TiedLanguageModel, tokens),
    "lstm": Animal(lambda: LastState(nn.LSTM(4, 5, batch_first=True)), sequences),
    "lstm_dropout": Animal(lambda: LastState(nn.LSTM(4, 5, 2, dropout=0.3, batch_first=True)), sequences),
    "gru": Animal(lambda: LastState(nn.GRU(4, 5, batch_first=True)), sequences),
    "multihead_attention": Animal(lambda: Attention(fused=False), sequences),
    "fused_attention": Animal(lambda: Attention(fused=True), sequences),
    "transformer_layer": Animal(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        ),
        sequences,
    ),
    "unused_and_frozen": Animal(UnusedAndFrozen, rows),
    "moving_centre": Animal(MovingCentre, rows),
    "weight_norm": Animal(weight_norm, rows),
    "spectral_norm_eval": Animal(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, CLASSES))).eval(), rows
    ),
    "spectral_norm_train": Animal(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, CLASSES))), rows, true_slope=False
    ),
    "sync_batch_norm": Animal(lambda: conv(nn.SyncBatchNorm(4), nn.Tanh()), images),
    "compiled_part": Animal(compiled_part, rows),
    "checkpoint_dropout": checkpointed(nn.Dropout(0.4)),
    "checkpoint_batch_norm": checkpointed(nn.BatchNorm1d(6)),
    "custom_function": Animal(Custom, rows, forward_mode=False, forward_over_reverse=False),
}


def meet(name: str, size: int = 5, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The student of that name, a training batch and a meta batch."""
    torch.manual_seed(seed)
    animal = ZOO[name]
    student = animal.build().double()
    batches = [(animal.inputs(n), torch.randint(CLASSES, (n,))) for n in (size, size + 1)]
    return student, batches[0], batches[1]
