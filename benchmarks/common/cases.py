"""The cases: a student, random data of its kind, and the bilevel problem on them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakd import Batch
from metakd.longtail import build_model
from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget, Term
from metakd.weighting import LossMLP

CLASSES, WORDS, LENGTH, WIDTH = 100, 1000, 32, 128
TERMS: list[Term] = [  # a task has the first two, unless it wants more
    CrossEntropy(),
    SoftTarget(4.0),
    ReverseSoftTarget(4.0),
    CrossEntropy(label_smoothing=0.1),
    SoftTarget(1.0),
    ReverseSoftTarget(1.0),
    SoftTarget(2.0),
    ReverseSoftTarget(2.0),
]


class Transformer(nn.Module):
    """A text classifier: encoder layers of width 128 with four heads, no dropout, the mean of the last layer."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=layers)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """(B, LENGTH) words to (B, CLASSES) logits."""
        logits: Tensor = self.classifier(self.layers(self.words(words) + self.places).mean(1))
        return logits


class Lstm(nn.Module):
    """A text classifier: LSTM layers of 128 units, the last word's output."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=layers, batch_first=True)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """(B, LENGTH) words to (B, CLASSES) logits."""
        logits: Tensor = self.classifier(self.lstm(self.words(words))[0][:, -1])
        return logits


def _images(size: int) -> Tensor:
    return torch.randn(size, 3, 32, 32)


def _digits(size: int) -> Tensor:
    return torch.randn(size, 1, 8, 8)


def _words(size: int) -> Tensor:
    return torch.randint(WORDS, (size, LENGTH))


@dataclass(frozen=True)
class Case:
    """A student and its data.

    Attributes:
        student: builds it.
        teacher: builds its teacher.
        inputs: draws those of a batch.
        batch_size: of the training batches and of the meta batch.
        classifier: names the student's last layer, as a pattern.
        stage: likewise the last stage before that.
        lr: of the inner steps.
    """

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch_size: int
    classifier: str
    stage: str
    lr: float = 0.1


def _network(name: str, **options: int) -> Callable[[], nn.Module]:
    return partial(build_model, name, classes=CLASSES, **options)


CASES = {
    "resnet8x4": Case(_network("resnet8x4"), _network("resnet32x4"), _images, 100, "classifier.*", "blocks.2.*"),
    "resnet20": Case(_network("resnet20"), _network("resnet56"), _images, 100, "classifier.*", "blocks.[678].*"),
    "transformer": Case(
        Transformer, partial(Transformer, layers=8), _words, 32, "classifier.*", "layers.layers.3.*", lr=0.01
    ),
    "lstm": Case(Lstm, partial(Lstm, layers=4), _words, 32, "classifier.*", "lstm.*_l1"),
    "mlp32": Case(
        _network("mlp32", channels=1, size=8), _network("convnet16", channels=1, size=8), _digits, 32, "3.*", "1.*"
    ),
    "convnet4": Case(_network("convnet4"), _network("convnet8"), _images, 16, "9.*", "[45].*"),  # for a smoke test
}


class Task(NamedTuple):
    """The bilevel problem of one cell: K inner steps on weighted losses, the cross-entropy of a meta batch after them.

    Attributes:
        student: in train mode.
        weighting: the weight model; its features are the detached losses.
        batches: one for each inner step, with a teacher's logits if there is no teacher.
        meta_batch: of the outer loss.
        lr: of the inner SGD.
        teacher: a network to run on every batch, in eval mode; or None.
        terms: the per-sample losses.
        classifier: the pattern of the student's last layer.
        stage: likewise of the last stage before that.
    """

    student: nn.Module
    weighting: nn.Module
    batches: list[Batch]
    meta_batch: Batch
    lr: float
    teacher: nn.Module | None = None
    terms: Sequence[Term] = TERMS[:2]
    classifier: str = "*"
    stage: str = "*"

    @classmethod
    def build(
        cls, case: Case, steps: int, *, batch_size: int | None = None, teacher: bool = False, device: str = "cpu"
    ) -> "Task":
        """The same task at every call."""
        torch.manual_seed(0)
        student, weighting = case.student().train(), LossMLP(2, 2)
        size = batch_size or case.batch_size

        def batch() -> Batch:
            inputs, targets = case.inputs(size), torch.randint(CLASSES, (size,))
            logits = (torch.randn(size, CLASSES) + 3 * F.one_hot(targets, CLASSES)).to(device)
            return Batch(inputs.to(device), targets.to(device), None if teacher else logits)

        batches = [batch() for _ in range(steps)]
        network = case.teacher().to(device).eval() if teacher else None
        return cls(
            student.to(device),
            weighting.to(device),
            batches,
            batch(),
            case.lr,
            network,
            classifier=case.classifier,
            stage=case.stage,
        )

    def with_terms(self, number: int) -> "Task":
        """The same task on the first `number` of `TERMS`, with a new weight model."""
        like = next(self.weighting.parameters())
        return self._replace(terms=TERMS[:number], weighting=LossMLP(number, number).to(like))

    def taught(self, batch: Batch) -> Batch:
        """The batch with the outputs of the teacher, if there is one."""
        if self.teacher is None:
            return batch
        with torch.no_grad():
            return batch._replace(teacher=self.teacher(batch.inputs))

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """All terms' losses, (B, M)."""
        return torch.stack([term(outputs, batch) for term in self.terms], dim=1)

    def inner(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The weighted loss of an inner step."""
        losses = self.losses(outputs, batch)
        weights: Tensor = self.weighting(losses.detach(), batch)
        return (weights * losses).sum() / len(losses)

    def outer(self, outputs: Tensor) -> Tensor:
        """The loss of the meta batch."""
        return F.cross_entropy(outputs, self.meta_batch.targets)


def differentiable_kernels(student: nn.Module) -> ExitStack:
    """A block in which attention and LSTMs use kernels that can be differentiated twice."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if any(isinstance(module, nn.RNNBase) for module in student.modules()):
        backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
        for backend in backends:
            stack.callback(setattr, backend, "enabled", backend.enabled)
            backend.enabled = False
    return stack
