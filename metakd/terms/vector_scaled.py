"""Cross-entropy with an offset and a scale for each class's logit, given or learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.counts import PerClass
from metakd.terms.reading import class_indices, class_logits

Numbers = float | Sequence[float] | Tensor

_START = 0.7310585786300049  # sigmoid(1), where the authors' code starts


class VectorScaled(nn.Module):
    """Vector-scaling loss: cross-entropy of logits with a scale and an offset for each class.

    `loss_i = CE(D * z_i + o, y_i)` with scales `D_c > 0` and offsets `o_c`. Both are for training only: predict with
    the plain logits. With `learned` they are meta-parameters, `D = sigmoid(a)`, that the balancer learns beside its
    weight model: `o` is the parameter `offset`, `a` the parameter `free_scale`. To learn one of them, freeze the other
    with `requires_grad_(False)`.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: the loss is that of Kini et al., "Label-Imbalanced and Group-Sensitive Classification under
    Overparameterization" (NeurIPS 2021); learning it, with sigmoids and starts, is AutoBalance (Li et al., NeurIPS
    2021) and its published code. Both can also weigh each class, which here is the weight model's part.

    Args:
        classes: C.
        offset: `o`, one number or one per class.
        scale: `D`, one number or one per class; if learned in (0, 1).
        learned: whether both are learned, from these values on.

    Raises:
        MetaKDError: `classes` is no positive integer, numbers are not finite or not one per class, or a scale is out of
            range; in a call, the student has another number of outputs, or as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import VectorScaled
        >>> term = VectorScaled(2, offset=[0.0, 1.0], scale=0.5)
        >>> term(torch.tensor([[2.0, 0.0]]), Batch(None, targets=torch.tensor([0]))).detach()
        tensor([0.6931])
        >>> [name for name, _ in term.named_parameters()]
        ['offset', 'free_scale']
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, classes: int, *, offset: Numbers = 0.0, scale: Numbers = _START, learned: bool = True) -> None:
        super().__init__()
        self.classes, self.learned = positive_int(classes, "classes"), learned
        shift, factor = self._per_class(offset, "offset"), self._per_class(scale, "scale")
        if bool((factor <= 0).any()) or (learned and bool((factor >= 1).any())):
            worst = factor.min() if bool((factor <= 0).any()) else factor.max()
            allowed = "in (0, 1) to be learned, as it is a sigmoid" if learned else "positive"
            raise MetaKDError(f"a scale is {worst.item():g}, but must be {allowed}")
        if learned:
            dtype = torch.get_default_dtype()
            self.offset, self.free_scale = nn.Parameter(shift.to(dtype)), nn.Parameter(factor.logit().to(dtype))
        else:
            self._offset, self._scale = PerClass(shift), PerClass(factor)

    @property
    def scale(self) -> Tensor:
        """The present scales `(C,)`, detached."""
        return self.free_scale.detach().sigmoid() if self.learned else self._scale.values.clone()

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        if z.shape[1] != self.classes:
            raise MetaKDError(
                f"the term scales {self.classes} classes but the student has {z.shape[1]} outputs; pass classes="
                f"{z.shape[1]}"
            )
        if self.learned:
            scale, offset = self.free_scale.to(z.dtype).sigmoid(), self.offset.to(z.dtype)
        else:
            scale, offset = self._scale.like(z), self._offset.like(z)
        return F.cross_entropy(scale * z + offset, class_indices(z, batch), reduction="none")

    def extra_repr(self) -> str:
        """The settings in the module's description."""
        return f"{self.classes} classes, learned={self.learned}"

    def _per_class(self, values: Numbers, what: str) -> Tensor:
        try:
            numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetaKDError(
                f"{what} must be a number or one per class, got {type(values).__name__}: {error}"
            ) from error
        if numbers.ndim > 1 or numbers.numel() not in (1, self.classes) or not bool(numbers.isfinite().all()):
            raise MetaKDError(
                f"{what} has shape {tuple(numbers.shape)}, expected one finite number or {self.classes}: one per class"
            )
        return numbers.expand(self.classes).clone()
