"""The only place that imports torchvision.

Torchvision wheels built for CUDA cannot load their compiled operators beside a CPU-only torch. Their import then fails
with ``operator torchvision::nms does not exist``, although datasets, transforms and models need none of these
operators. Declaring the two schemas that the import looks up makes everything but the detection operators work.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from metakd.errors import MetaKDError

# The schemas that torchvision/csrc registers, without kernels: calling one still fails.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_SYMPTOM = "torchvision::nms does not exist"
# A torch.library.Library revokes its declarations when it is garbage-collected.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, working around the ``torchvision::nms`` failure of mismatched wheels, or raise."""
    try:
        return _import()
    except ImportError as error:
        raise MetaKDError(
            f"this needs torchvision, which could not be imported ({error}); "
            'install it with `pip install "metakd[examples]"`'
        ) from error
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
    _forget_half_imported()
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return _import()


def _import() -> ModuleType:
    return importlib.import_module("torchvision")


def _forget_half_imported() -> None:
    """Drop the submodules that a failed import leaves behind, so that the next import starts afresh."""
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
