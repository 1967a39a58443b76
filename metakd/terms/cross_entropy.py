"""Cross-entropy with the labels."""

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
class CrossEntropy:
    """Cross-entropy of the student with the labels.

    `loss_i = -sum_c t_ic log softmax(z_i)_c` with `t_ic = (1 - s) [c = y_i] + s / C`, for logits `z`, label `y`,
    C classes and label smoothing `s`.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: label smoothing is from Szegedy et al., "Rethinking the Inception Architecture for Computer
    Vision" (CVPR 2016). Unlike `torch.nn.CrossEntropyLoss`, this term does not average over the batch and ignores
    no label: a label outside `[0, C)` is an error.

    Args:
        label_smoothing: `s`, the share of the target spread evenly over the classes, in `[0, 1)`.

    Raises:
        MetaKDError: `label_smoothing` is outside `[0, 1)`; in a call, outputs are not logits of at least two classes,
            or targets are missing, are not `(B,)` integers, or are out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import CrossEntropy
        >>> CrossEntropy()(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), Batch(None, targets=torch.tensor([0, 1])))
        tensor([0.1269, 2.1269])
    """

    label_smoothing: float = 0.0
    uses_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise MetaKDError(
                f"label_smoothing is {self.label_smoothing}, but must be in [0, 1); 0.1 is a common choice, 0 "
                "turns it off"
            )

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        labels = class_indices(z, batch)
        if self.label_smoothing:
            return F.cross_entropy(z, labels, reduction="none", label_smoothing=self.label_smoothing)
        return F.nll_loss(torch.log_softmax(z, dim=1), labels, reduction="none")
