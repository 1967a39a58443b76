"""Familiar terms whose settings the balancer learns: temperature and teachers' shares, and label smoothing."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import class_indices, class_logits, every_teachers_outputs, teacher_logits
from metakd.terms.softened import divergence, floored, softened


class LearnedSoftTarget(nn.Module):
    """Distillation whose temperature, and shares of several teachers, are learned.

    `loss_i = T^2 KL(p_i || q_i)` with the student's `q = softmax(z_student / T)` and the teachers' mixture
    `p = sum_j a_j softmax(z_j / T)`. The meta-parameters are `log_temperature`, `T = exp(log_temperature)`, and with
    several teachers `free_shares`, `a = softmax(free_shares)`, which starts at equal shares. To learn one of them,
    freeze the other with `requires_grad_(False)`. No gradient flows into the teachers.

    Shapes: outputs `(B, C)`, `batch.teacher` the same, or with several teachers a list of such (tensors or objects
    with `.logits`), result `(B,)`.

    Source: the divergence is `SoftTarget`'s (Hinton, Vinyals, Dean, 2015). Learning its settings by hypergradients is
    ours.

    Args:
        teachers: how many.
        temperature: `T > 0`, from which it is learned.

    Raises:
        MetaKDError: `teachers` is no positive integer, or `temperature` not positive and finite; in a call, teachers'
            outputs are missing, or differ in number or shape.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import LearnedSoftTarget
        >>> term = LearnedSoftTarget(teachers=2, temperature=4.0)
        >>> teachers = [torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0, 0.0]])]
        >>> term(torch.tensor([[0.0, 4.0]]), Batch(None, teacher=teachers)).detach()
        tensor([7.3939])
        >>> term.shares, term.temperature
        (tensor([0.5000, 0.5000]), 4.0)
    """

    uses_teacher: ClassVar[bool] = True

    def __init__(self, teachers: int = 1, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.teachers = positive_int(teachers, "teachers")
        if not isinstance(temperature, int | float) or not (temperature > 0 and math.isfinite(temperature)):
            raise MetaKDError(
                f"temperature is {temperature!r}, but must be positive and finite to be learned; 4 is a common start"
            )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        if teachers > 1:  # a single teacher has the share 1, with nothing to learn
            self.free_shares = nn.Parameter(torch.zeros(teachers))

    @property
    def temperature(self) -> float:
        """The present temperature."""
        return round(float(self.log_temperature.detach().exp()), 6)

    @property
    def shares(self) -> Tensor:
        """The present shares of the teachers, `(teachers,)`, detached."""
        return self.free_shares.detach().softmax(0) if self.teachers > 1 else torch.ones(1)

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        temperature = self.log_temperature.to(z.dtype).exp()
        found = [softened(_bounded(one), temperature) for one in self._logits(z, batch)]
        of = found[0]
        if self.teachers > 1:
            shares = F.log_softmax(self.free_shares.to(z.dtype), 0)
            of = torch.stack(found).add(shares[:, None, None]).logsumexp(0)
        return divergence(of, softened(_bounded(z), temperature), temperature)

    def extra_repr(self) -> str:
        """The settings in the module's description."""
        return f"{self.teachers} teachers, temperature={self.temperature:g}"

    def _logits(self, z: Tensor, batch: Batch) -> list[Tensor]:
        found = [teacher_logits(z, batch._replace(teacher=one)) for one in every_teachers_outputs(batch)]
        if len(found) != self.teachers:
            raise MetaKDError(
                f"the term mixes {self.teachers} teachers, but batch.teacher has {len(found)} outputs; write "
                f"LearnedSoftTarget(teachers={len(found)})"
            )
        return found


class SmoothedCrossEntropy(nn.Module):
    """Cross-entropy with smoothed labels, where the smoothing is learned.

    `loss_i = -(1 - e) log q_i,y - e / C sum_c log q_ic` with `q = softmax(z)`, label `y`, and the smoothing
    `e = sigmoid(free)`, one for all labels, or with `classes` one for each label. `free` is a meta-parameter.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers, result `(B,)`.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016); with `e` fixed it
    is `F.cross_entropy(..., label_smoothing=e)`. Learning it by hypergradients is ours.

    Args:
        smoothing: `e` in (0, 1), from which it is learned.
        classes: C, for a smoothing of each label's own.

    Raises:
        MetaKDError: `smoothing` is not in (0, 1), or `classes` no positive integer; in a call, the student has another
            number of outputs, or as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import SmoothedCrossEntropy
        >>> term = SmoothedCrossEntropy(0.2)
        >>> term(torch.tensor([[2.0, 0.0]]), Batch(None, targets=torch.tensor([0]))).detach()
        tensor([0.3269])
        >>> SmoothedCrossEntropy(0.2, classes=3).smoothing
        tensor([0.2000, 0.2000, 0.2000])
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, smoothing: float = 0.1, *, classes: int | None = None) -> None:
        super().__init__()
        if not isinstance(smoothing, int | float) or not 0 < smoothing < 1:
            raise MetaKDError(f"smoothing is {smoothing!r}, but must be in (0, 1) to be learned; 0.1 is a common start")
        self.classes = None if classes is None else positive_int(classes, "classes")
        start = math.log(smoothing / (1 - smoothing))
        self.free = nn.Parameter(torch.full(() if classes is None else (classes,), start))

    @property
    def smoothing(self) -> Tensor:
        """The present smoothing, detached: one number, or `(C,)`."""
        return self.free.detach().sigmoid()

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        if self.classes not in (None, z.shape[1]):
            raise MetaKDError(
                f"the term has a smoothing for {self.classes} classes but the student has {z.shape[1]} outputs; pass "
                f"classes={z.shape[1]}"
            )
        labels, log_q = class_indices(z, batch), F.log_softmax(z, dim=1)
        e = self.free.to(z.dtype).sigmoid()
        e = e if self.classes is None else e[labels]
        return -(1 - e) * log_q.gather(1, labels[:, None]).squeeze(1) - e * log_q.mean(1)

    def extra_repr(self) -> str:
        """The settings in the module's description."""
        return "" if self.classes is None else f"{self.classes} classes"


def _bounded(z: Tensor) -> Tensor:
    """Logits of which masked ones (-inf) are so large that their derivative in the temperature is still finite."""
    return floored(z, share=1e-6)
