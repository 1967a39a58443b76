"""What a balancer has learned: its weights by class and as a function of the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd.batch import Batch
from metakd.longtail.batches import Batches

if TYPE_CHECKING:
    from metakd.balancer import BilevelLossBalancer


class LearnedWeights(NamedTuple):
    """The weights of a trained balancer on the training images, without augmentation.

    Attributes:
        terms: names of the M terms.
        targets: (N,) labels.
        losses: (N, 2) cross-entropy of student and teacher on the label.
        weights: (N, M) weights.
        axes: (G, 2) student and teacher losses that span the observed range.
        surface: (G, G, M) weights over the grid of ``axes``: student's loss first, teacher's second.
    """

    terms: tuple[str, ...]
    targets: Tensor
    losses: Tensor
    weights: Tensor
    axes: Tensor
    surface: Tensor

    def by_class(self, classes: int) -> Tensor:
        """(C, M) mean weight of every class."""
        one_hot = F.one_hot(self.targets, classes).to(self.weights.dtype)
        return (one_hot.T @ self.weights) / one_hot.sum(0).clamp_min(1).unsqueeze(1)


@torch.no_grad()
def learned_weights(
    balancer: BilevelLossBalancer, student: nn.Module, teacher: nn.Module, train: Batches, *, grid: int = 64
) -> LearnedWeights:
    """Read the weights off a balancer that sees the losses of student and teacher (BiKD's features).

    Args:
        balancer: after training.
        student: the student it trained; evaluated in eval mode, flags put back.
        teacher: the teacher.
        train: the training images.
        grid: points along each axis of the surface.
    """
    flags = [(module, module.training) for module in student.modules()]
    student.eval()
    losses, weights, labels = [], [], []
    for inputs, targets, index in train.plain():
        pair = [F.cross_entropy(net(inputs), targets, reduction="none") for net in (student, teacher)]
        losses.append(torch.stack(pair, 1).cpu())
        weights.append(balancer.weights((inputs, targets, index)).cpu())
        labels.append(targets.cpu())
    for module, flag in flags:
        module.training = flag
    seen, device = torch.cat(losses), inputs.device
    top = torch.quantile(seen[:: len(seen) // 100_000 + 1], 0.98, dim=0)
    # A teacher that knows its training images by heart would leave a flat strip.
    top = top.clamp_min(0.25 * float(top.max()))
    axes = torch.linspace(0, 1, grid).unsqueeze(1) * top.clamp_min(0.1)
    points = torch.cartesian_prod(axes[:, 0], axes[:, 1])
    surface = balancer.weighting(points.to(device), Batch(points.to(device))).cpu()
    return LearnedWeights(
        tuple(balancer.terms), torch.cat(labels), seen, torch.cat(weights), axes, surface.view(grid, grid, -1)
    )
