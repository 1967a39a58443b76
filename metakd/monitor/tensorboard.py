"""A balancer's report in TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from metakd.balancer import BilevelLossBalancer


def log(
    writer: SummaryWriter,
    balancer: BilevelLossBalancer,
    step: int,
    *,
    every: int = 1,
    histograms: bool = False,
    prefix: str = "metakd",
) -> None:
    """Write the balancer's last step to TensorBoard, on every n-th step.

    The scalars are those of `report.scalars()`: the mean weight, loss and influence of each term, the meta loss and
    the norm of the hypergradient. Those that need a hypergradient are omitted if the step took none. For a balancer
    with `every=n`, count steps from 1 and choose a multiple of n. A written step waits for the device once
    (histograms: once more each); other steps cost nothing.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or any object with its methods.
        balancer: after the step.
        step: the number of the step.
        every: write only steps that it divides.
        histograms: also write the distribution of each term's weights, losses and influence over the batch.
        prefix: of all tags.

    Raises:
        MetaKDError: the balancer has no report yet.

    Examples:
        >>> import torch
        >>> from metakd import BilevelLossBalancer, terms
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, round(value, 3))
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer)
        >>> _ = balancer.loss((torch.zeros(2, 4), torch.tensor([0, 1])))
        >>> log(Printer(), balancer, 1, every=2)
        >>> log(Printer(), balancer, 2, every=2)
        2 metakd/weight/hard ...
        2 metakd/loss/hard ...
    """
    if step % every:
        return
    report = balancer.report
    for name, number in report.scalars().items():
        writer.add_scalar(f"{prefix}/{name}", number, step)
    by_sample = {"weight": report.weights, "loss": report.losses, "influence": report.influence}
    for name, values in by_sample.items() if histograms else ():
        if values is not None:
            for term, column in zip(balancer.terms, values.float().unbind(1), strict=True):
                writer.add_histogram(f"{prefix}/{name} of samples/{term}", column, step)
