"""What a report of a bug needs to say about the machine."""

import platform
from importlib import metadata

import torch

_PACKAGES = ("metakd", "torch", "torchopt")
_OPTIONAL = (
    "numpy",
    "torchvision",
    "torchmetrics",
    "scikit-learn",
    "matplotlib",
    "tensorboard",
    "pyarrow",
    "accelerate",
    "lightning",
    "transformers",
)


def show_versions() -> None:
    """Print the versions and devices that a report of a bug should contain.

    No package is imported for it.

    Examples:
        >>> from metakd import show_versions
        >>> show_versions()
        Python        ...
        system        ...
        metakd        ...
        torch         ...
    """
    lines = {"Python": platform.python_version(), "system": platform.platform()}
    lines |= {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL)}
    lines |= {"CUDA": _cuda(), "MPS": "available" if torch.backends.mps.is_available() else "not available"}
    for name, value in lines.items():
        print(f"{name:<13} {value}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}: {devices}"
