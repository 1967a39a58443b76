"""Cross-entropy with noisy labels, corrected by the probabilities that one class is labelled as another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd._virtual.teacher import teacher_outputs
from metakd.batch import Batch, as_batch
from metakd.errors import MetaKDError
from metakd.terms.counts import PerClass
from metakd.terms.reading import class_indices, class_logits

Matrix = Sequence[Sequence[float]] | Tensor


class ForwardCorrected(nn.Module):
    """Forward correction: cross-entropy of the noisy label that the student's prediction would get.

    `loss_i = -log sum_c q_ic T[c, y_i]` with the student's `q = softmax(z)`, label `y`, and `T[c, k]` the probability
    that a sample of class c is labelled k. The minimiser over noisy labels predicts clean ones. Use it for the noisy
    labels only: trusted samples take `CrossEntropy`.

    The matrix is known, or estimated from trusted samples by `estimated_transition` (as GLC does), or with `learned`
    itself a meta-parameter: `T = softmax(A)` by rows, and the balancer learns A beside its weight model.

    Shapes: outputs `(B, C)` (a tensor or an object with `.logits`), `batch.targets` `(B,)` integers,
    result `(B,)`.

    Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (CVPR 2017);
    with an estimated matrix, GLC of Hendrycks et al. (NeurIPS 2018). Learning it by hypergradients is our addition.

    Args:
        transition: T, `(C, C)`, rows with sum one.
        learned: whether to learn the matrix, from this one on; its entries must be positive then.

    Raises:
        MetaKDError: the matrix is not square, has a negative or infinite entry, a row whose sum is not one, or a label
            that no class gets; or a zero entry with `learned`; in a call, the student has another number of outputs, or
            as `CrossEntropy`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import ForwardCorrected
        >>> batch = Batch(None, targets=torch.tensor([0, 1]))
        >>> ForwardCorrected([[0.8, 0.2], [0.0, 1.0]])(torch.zeros(2, 2), batch)
        tensor([0.9163, 0.5108])
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, transition: Matrix, *, learned: bool = False) -> None:
        super().__init__()
        matrix = _checked(transition)
        self.learned = learned
        if learned:
            if bool((matrix == 0).any()):
                raise MetaKDError(
                    f"a learned transition matrix needs positive entries, but {int((matrix == 0).sum())} are zero and "
                    "would stay so; start from a mixture, such as 0.9 * torch.eye(C) + 0.1 / C"
                )
            self.free = nn.Parameter(matrix.log().to(torch.get_default_dtype()))
        else:
            self._log = PerClass(matrix.log())

    @property
    def transition(self) -> Tensor:
        """The present matrix `(C, C)`, detached."""
        return (self.free.detach().softmax(dim=1) if self.learned else self._log.values.exp()).clone()

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        z = class_logits(outputs)
        classes = len(self.free if self.learned else self._log.values)
        if z.shape[1] != classes:
            raise MetaKDError(
                f"the transition matrix has {classes} classes but the student has {z.shape[1]} outputs; give one row "
                "and one column per class, in label order"
            )
        log_t = F.log_softmax(self.free.to(z.dtype), dim=1) if self.learned else self._log.like(z)
        of_label = log_t[:, class_indices(z, batch)].T
        return -torch.logsumexp(F.log_softmax(z, dim=1) + of_label, dim=1)

    def extra_repr(self) -> str:
        """The settings in the module's description."""
        return f"{len(self.transition)} classes, learned={self.learned}"


def estimated_transition(model: Callable[..., Any], batches: Iterable[Any]) -> Tensor:
    """Estimate label noise from trusted samples: the matrix for `ForwardCorrected`.

    `T[c, k]` is the mean probability of label k over the trusted samples of class c, given by a model that was trained
    on the noisy labels.

    Source: Hendrycks et al., "Using Trusted Data to Train Deep Networks on Labels Corrupted by Severe Noise" (GLC,
    NeurIPS 2018).

    Args:
        model: a classifier trained on noisy labels; it runs in eval mode, without gradients, and is left unchanged.
        batches: trusted samples with true labels, such as the meta loader.

    Returns:
        T, `(C, C)` in float64 on the CPU; rows have sum one.

    Raises:
        MetaKDError: a class has no trusted sample; outputs are not logits, or targets no labels.

    Examples:
        >>> import torch
        >>> from metakd.terms import estimated_transition
        >>> inputs = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> estimated_transition(torch.nn.Identity(), [(inputs, torch.tensor([0, 1]))]).round(decimals=4)
        tensor([[0.8808, 0.1192],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    sums, counts = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for item in batches:
        batch = as_batch(item)
        z = class_logits(teacher_outputs(model, batch.inputs))
        if not len(counts):
            sums, counts = sums.new_zeros(z.shape[1], z.shape[1]), counts.new_zeros(z.shape[1])
        targets = class_indices(z, batch).cpu()
        sums.index_add_(0, targets, z.double().softmax(dim=1).cpu())
        counts += torch.bincount(targets, minlength=z.shape[1])
    if not len(counts) or bool((counts == 0).any()):
        missing = (counts == 0).nonzero().flatten().tolist()
        raise MetaKDError(
            f"the trusted samples have none of the classes {missing[:10]}; every row of the matrix needs samples of "
            "its class"
            if missing
            else "batches is empty; give batches of trusted samples with their labels"
        )
    return sums / counts.unsqueeze(1)


def _checked(transition: Matrix) -> Tensor:
    """The matrix in float64 on the CPU, or raise."""
    try:
        matrix = torch.as_tensor(transition, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetaKDError(
            f"a transition matrix holds numbers, C rows of C, got {type(transition).__name__}: {error}; pass a tensor"
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 2:
        raise MetaKDError(f"a transition matrix has shape (C, C) with at least two classes, got {tuple(matrix.shape)}")
    if not bool((matrix.isfinite() & (matrix >= 0)).all()):
        raise MetaKDError("a transition matrix holds probabilities, but has a negative or infinite entry")
    sums = matrix.sum(dim=1)
    off = int((sums - 1).abs().argmax())
    if abs(float(sums[off]) - 1) > 1e-3:
        raise MetaKDError(
            f"row {off} of the transition matrix has the sum {float(sums[off]):.4g}, expected 1; T[c, k] is the "
            "probability that a sample of class c is labelled k: divide rows by their sums, or pass T.T"
        )
    if never := (matrix.sum(dim=0) == 0).nonzero().flatten().tolist():
        raise MetaKDError(
            f"no class is ever labelled {never[0]} by the transition matrix, so that such a label would have an "
            "infinite loss; give it a small probability"
        )
    return matrix / sums.unsqueeze(1)
