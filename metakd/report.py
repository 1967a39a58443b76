"""The report of a balancer's last step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Report:
    """The last step of a balancer; all tensors are detached and stay on their device.

    Attributes:
        losses: (B, M), each sample's loss in each term, in the order of the terms.
        weights: (B, M), the weights in the returned loss.
        influence: (B, M), how the meta loss changes when that sample's term counts more (negative: more weight helps):
            the directional derivative of each loss along u. None without a hypergradient, or with several inner steps.
        meta_loss: scalar, the meta loss after the lookahead; None without a hypergradient.
        hypergradient_norm: scalar, the Euclidean norm of this step's hypergradient (for a weight model without
            parameters, of the influence); None without one.
        skipped: why a requested hypergradient was not taken: the learning rate is 0, or float16 overflowed.
            The weight model has not moved then.

    Examples:
        >>> import torch
        >>> from metakd import BilevelLossBalancer, terms
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer)
        >>> batch = (torch.randn(8, 4), torch.randint(3, (8,)))
        >>> loss = balancer(batch, batch)
        >>> balancer.report.weights.shape, balancer.report.influence.shape, balancer.report.skipped
        (torch.Size([8, 1]), torch.Size([8, 1]), None)
    """

    losses: Tensor
    weights: Tensor
    influence: Tensor | None = None
    meta_loss: Tensor | None = None
    hypergradient_norm: Tensor | None = None
    skipped: str | None = None
