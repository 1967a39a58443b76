"""Cross-entropies that trust the labels less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import class_indices, class_logits


@dataclass(frozen=True)
class GeneralisedCrossEntropy:
    """Generalised cross-entropy: between cross-entropy and the absolute error of the label's probability.

    `loss_i = (1 - q_iy^a) / a` with the student's `q = softmax(z)`, label `y` and exponent `a`. As `a` goes to 0 it is
    cross-entropy; `a = 1` is `1 - q_iy`. The gradient is cross-entropy's times `q_iy^a`, so that a label which the
    student finds unlikely counts little.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels"
    (NeurIPS 2018), who write q for the exponent and recommend 0.7; their equation 6, without truncation.

    Args:
        q: the exponent, in (0, 1].

    Raises:
        MetaKDError: `q` is outside (0, 1]; in a call, as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import GeneralisedCrossEntropy
        >>> batch = Batch(None, targets=torch.tensor([0, 1]))
        >>> GeneralisedCrossEntropy(q=1.0)(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), batch)
        tensor([0.1192, 0.8808])
    """

    q: float = 0.7
    uses_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.q <= 1.0:
            raise MetaKDError(
                f"q is {self.q}, but must be in (0, 1]; 0.7 is the authors' choice, and CrossEntropy() is the limit 0"
            )

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        hard = F.cross_entropy(z, class_indices(z, batch), reduction="none")
        return -torch.expm1(-self.q * hard) / self.q


@dataclass(frozen=True)
class Bootstrapped:
    """Bootstrapping: the target is a mixture of the label and the student's own prediction.

    `loss_i = -sum_c (b [c = y_i] + (1 - b) p_ic) log q_ic` with the student's `q = softmax(z)` and label `y`. Soft
    bootstrapping has `p = q`, with its gradient, and is cross-entropy plus an entropy; hard bootstrapping has `p = 1`
    for the likeliest class and 0 for the others.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping" (ICLR 2015 workshop),
    equations 6 and 7, with their `b` as defaults.

    Args:
        beta: `b`, the label's share, in [0, 1]; None for 0.95 (soft) or 0.8 (hard).
        hard: whether the prediction is the likeliest class alone.

    Raises:
        MetaKDError: `beta` is outside [0, 1]; in a call, as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import Bootstrapped
        >>> batch = Batch(None, targets=torch.tensor([0, 1]))
        >>> Bootstrapped(hard=True)(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), batch)
        tensor([0.1269, 1.7269])
    """

    beta: float | None = None
    hard: bool = False
    uses_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.beta is not None and not 0.0 <= self.beta <= 1.0:
            raise MetaKDError(f"beta is {self.beta}, but must be in [0, 1]: the label's share of the target")

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        beta = (0.8 if self.hard else 0.95) if self.beta is None else self.beta
        label = F.cross_entropy(z, class_indices(z, batch), reduction="none")
        if self.hard:
            own = F.cross_entropy(z, z.detach().argmax(dim=1), reduction="none")
        else:
            # Clamped, as 0 * -inf of a masked class would be NaN.
            log_q = F.log_softmax(z, dim=1).clamp(min=torch.finfo(z.dtype).min)
            own = -(log_q.exp() * log_q).sum(dim=1)
        return beta * label + (1 - beta) * own
