"""The iterations of an epoch: as a user would write them, or, with fixed weights and in a hurry, as CUDA graphs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import graphs
from benchmarks.longtail.fixed import FixedObjective
from benchmarks.longtail.setting import Objective
from metakd import Batch

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
    """The same for fixed weights: some iterations as written, then each as the replay of a CUDA graph.

    A graph holds learning rates and weights of terms as numbers, so it is captured anew when these change. Without
    a GPU all iterations run as written, on the same tensors.

    Args:
        objective: its loss, without a weight model.
        optimizer: the student's.
        half: whether forward passes run in bfloat16, by autocast.
    """

    def __init__(self, objective: FixedObjective, optimizer: torch.optim.Optimizer, *, half: bool) -> None:
        self.objective, self.optimizer, self.half = objective, optimizer, half
        self.captures = next(objective.setting.student.parameters()).is_cuda
        self._now: Any = None
        self._epoch = 0
        self._item: list[Tensor] = []
        self._replay: Any = None
        self._written = 0

    def epoch(self, epoch: int, batches: Iterable[Sequence[Tensor]]) -> Losses:
        """As `as_written`; batch and loss are the same tensors each time."""
        for item in batches:
            now = self._describe(epoch, item)
            if now != self._now:
                self._now, self._epoch, self._replay, self._written = now, epoch, None, 0
                self._item = [tensor.clone() for tensor in item]
            for mine, tensor in zip(self._item, item, strict=True):
                mine.copy_(tensor)
            yield self._step()

    def _describe(self, epoch: int, item: Sequence[Tensor]) -> Any:
        rates = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        weights = {name: (weight, id(term)) for name, (weight, term) in self.objective.weighted(epoch).items()}
        return rates, weights, [tensor.shape for tensor in item]

    def _step(self) -> tuple[Batch, Tensor]:
        if not self.captures:
            return self._iteration()
        if self._written < graphs.WARM_UP:
            self._written += 1
            return graphs.aside(self._iteration)
        if self._replay is None:
            self._replay = graphs.capture(self._iteration)
        found: tuple[Batch, Tensor] = self._replay()
        return found

    def _iteration(self) -> tuple[Batch, Tensor]:
        kind = self._item[0].device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.half, cache_enabled=False):
            batch, loss = self.objective.loss(self._epoch, self._item)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return batch, loss.detach()
