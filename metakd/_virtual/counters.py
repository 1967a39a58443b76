"""The counters of batch normalisation in virtual passes: counted in Python, and written when something reads them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


class Counters:
    """Numbers of batches that a pass adds to; nearly no pass reads them, and a kernel for each is a third of a layer's.

    Args:
        counters: integer tensors, copies of a pass.

    Examples:
        >>> import torch
        >>> counter = torch.tensor(3)
        >>> late = Counters([counter])
        >>> late.takes(Tensor.add_, (counter, 1), {}), counter
        (True, tensor(3))
        >>> late.takes(torch.mul, (2.0, counter), {}), counter
        (False, tensor(4))
    """

    def __init__(self, counters: Iterable[Tensor] = ()) -> None:
        self._counters = {id(counter): counter for counter in counters}
        self._late = dict.fromkeys(self._counters, 0)

    def takes(self, function: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
        """Whether a call just counts one more, which is noted; before any other call of a counter it gets its value."""
        if not self._late:
            return False
        one = len(args) == 2 and type(args[1]) is int and args[1] == 1 and not options
        if function is Tensor.add_ and one and id(args[0]) in self._late:
            self._late[id(args[0])] += 1
            return True
        for value in (*args, *options.values()):
            for each in value if isinstance(value, list | tuple) else (value,):
                if id(each) in self._late:
                    self._write(id(each))
        return False

    def settle(self) -> None:
        """Write what is noted."""
        for counter in self._late:
            self._write(counter)

    def _write(self, counter: int) -> None:
        number, self._late[counter] = self._late[counter], 0
        if number:
            self._counters[counter].add_(number)
