"""The iterations of an epoch: as a user would write them, or in a hurry, as CUDA graphs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.longtail.fixed import FixedObjective
from benchmarks.longtail.learned import LearnedObjective
from benchmarks.longtail.setting import Objective
from metakd import Batch
from metakd._call.capture import numbers_of
from metakd._call.replay import Host, Replay

Losses = Iterator[tuple[Batch, Tensor]]


def as_written(objective: Objective, optimizer: torch.optim.Optimizer, epoch: int, batches: Any, meta: Any) -> Losses:
    """Each batch with its loss, on which the student has taken its step."""
    for batch, loss in objective.epoch(epoch, batches, meta):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield batch, loss


class InHalf(nn.Module):
    """A network whose forward pass runs in bfloat16, by autocast; what it returns is float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """As the network's."""
        with torch.autocast(inputs.device.type, torch.bfloat16, cache_enabled=False):
            outputs: Tensor = self.network(inputs)
        return outputs.float()


class Replayed:
    """The same as the replay of CUDA graphs, with which a GPU need not wait for Python.

    Without a GPU all iterations run as written, on the same tensors.

    Args:
        objective: its loss, see `replays`.
        optimizer: the student's.
        half: whether forward passes run in bfloat16, by autocast.
    """

    def __init__(
        self, objective: FixedObjective | LearnedObjective, optimizer: torch.optim.Optimizer, *, half: bool = False
    ) -> None:
        self.objective, self.optimizer, self.half = objective, optimizer, half
        self.device = optimizer.param_groups[0]["params"][0].device
        self._epoch = 0
        if isinstance(objective, LearnedObjective):
            self.step: Callable[..., Tensor] = objective.balancer.capture(self._iteration)
        else:
            self.step = Replay(self._iteration, self.device, Host(self._constants))

    def epoch(self, epoch: int, batches: Iterable[Sequence[Tensor]], meta: Iterator[Any]) -> Losses:
        """As `as_written`; the loss is the same tensor each time."""
        self._epoch = epoch
        for item in batches:
            others = [next(meta)] if isinstance(self.objective, LearnedObjective) else []
            yield Batch(item[0], item[1], index=item[2]), self.step(item, *others)

    def _constants(self) -> dict[str, Any]:
        weights = {name: (weight, id(term)) for name, (weight, term) in self.objective.weighted(self._epoch).items()}
        return {"a number of the optimizer": numbers_of(self.optimizer), "the weights": tuple(weights.items())}

    def _iteration(self, item: Sequence[Tensor], *others: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False):
            if isinstance(self.objective, LearnedObjective):
                loss = self.objective.balancer(Batch(item[0], item[1], index=item[2]), *others)
            else:
                _, loss = self.objective.loss(self._epoch, item)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def replays(objective: Objective) -> bool:
    """Whether its iterations can be captured: all but those of controls, and of looking several steps ahead."""
    if isinstance(objective, LearnedObjective):
        return objective.steps == 1 and objective.control is None
    return isinstance(objective, FixedObjective)
