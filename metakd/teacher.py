"""The teacher's outputs, without a trace on the teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from metakd.calling import call
from metakd.errors import blamed


def teacher_outputs(teacher: nn.Module, inputs: Any) -> Any:
    """Run the teacher in eval mode and without gradients; its modes are put back.

    Raises:
        MetaKDError: the teacher raised something (chained).

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> teacher_outputs(norm, torch.ones(3, 2)).requires_grad, norm.training
        (False, True)
    """
    with blamed("the teacher"), in_eval_mode(teacher), torch.no_grad():
        outputs = call(teacher, inputs)
    torch.clear_autocast_cache()  # older torch would cast what it shares with the student without gradients
    return outputs


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A block with the module in eval mode; afterwards every part has the mode it had.

    Examples:
        >>> module = nn.Dropout()
        >>> with in_eval_mode(module):
        ...     print(module.training)
        False
        >>> module.training
        True
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
