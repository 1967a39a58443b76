"""Trained teachers as small files: weights in eight bits, in safetensors, with the record of the training beside."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metakd import MetaKDError
from metakd.longtail.checkpoint import write_atomically

SCALE = ".scale"


def path_of(folder: Path, name: str) -> Path:
    """The file of a teacher."""
    return folder / f"{name.replace('/', '-')}.safetensors"


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as whole numbers up to 127 and one scale for each output; what is no matrix stays as it is."""
    found = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.ndim < 2 or not value.is_floating_point():
            found[name] = value
            continue
        scale = value.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
        found[name] = (value / _along(scale, value)).round().to(torch.int8)
        found[name + SCALE] = scale
    return found


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `packed` packed, rounded."""
    return {
        name: value.float() * _along(state[name + SCALE], value) if name + SCALE in state else value
        for name, value in state.items()
        if not name.endswith(SCALE)
    }


def _along(scale: Tensor, value: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (value.ndim - 1))


def save(model: nn.Module, record: dict[str, Any], path: Path) -> None:
    """Write the teacher, and its record as JSON."""
    files = _safetensors()
    write_atomically(path, lambda file: files.save_file(packed(model.state_dict()), str(file)))
    write_atomically(path.with_suffix(".json"), lambda file: file.write_text(json.dumps(record) + "\n"))


def load(model: nn.Module, path: Path) -> dict[str, Any] | None:
    """Load the teacher, rounded as it was written; its record, or None if it is not there."""
    if not path.exists() or not path.with_suffix(".json").exists():
        return None
    model.load_state_dict(unpacked(_safetensors().load_file(path)))
    return dict(json.loads(path.with_suffix(".json").read_text()))


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise MetaKDError(
            f"--teachers needs safetensors ({error}); install it with `pip install safetensors`"
        ) from error
