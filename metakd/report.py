"""The report of a balancer's last step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
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
        terms: the names of the M terms.
        term_parameters: the values of terms' own parameters after the step, by name, such as "terms.hard.offset".

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
        >>> list(balancer.report.scalars())
        ['weight/hard', 'loss/hard', 'influence/hard', 'meta_loss', 'hypergradient_norm']
    """

    losses: Tensor
    weights: Tensor
    influence: Tensor | None = None
    meta_loss: Tensor | None = None
    hypergradient_norm: Tensor | None = None
    skipped: str | None = None
    terms: tuple[str, ...] = ()
    term_parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The step in numbers, for any logger; waits for the device once.

        The names are `weight/<term>`, `loss/<term>` and `influence/<term>` for the means over the batch, `meta_loss`
        and `hypergradient_norm`. A step without a hypergradient has no influence, meta loss and norm, so they are left
        out. A report that was built without `terms` counts them from 0. A term's own parameter is one number, such as
        `terms.hard.tau`, or its mean, smallest and largest entry, `terms.hard.offset/mean` and so on.

        Returns:
            Name -> number.
        """
        terms = self.terms or tuple(map(str, range(self.weights.shape[1])))
        by_sample = {"weight": self.weights, "loss": self.losses, "influence": self.influence}
        found = {
            f"{name}/{term}": mean
            for name, values in by_sample.items()
            if values is not None
            for term, mean in zip(terms, _at_least_float32(values).mean(0), strict=True)
        }
        alone = {"meta_loss": self.meta_loss, "hypergradient_norm": self.hypergradient_norm}
        found |= {name: _at_least_float32(value) for name, value in alone.items() if value is not None}
        for name, value in self.term_parameters.items():
            wide = _at_least_float32(value)
            ways = {"": wide} if wide.numel() == 1 else {"/mean": wide.mean(), "/min": wide.min(), "/max": wide.max()}
            found |= {f"{name}{way}": number.flatten()[0] for way, number in ways.items()}
        # One tensor, so one host sync.
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
