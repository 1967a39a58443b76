"""The record of a benchmark: what was measured, with what on what, in one JSON file that grows cell by cell."""

import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from metakd import MetaKDError, __version__
from metakd.longtail.checkpoint import write_atomically

Cell = dict[str, Any]


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions that may change a number."""
    versions = {name: version for name in ("torch", "torchopt", "higher") if (version := _version(name))}
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), "metakd": __version__, **versions},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


class Record:
    """Cells of a run, by kind, each saved as soon as it is measured; a later run goes on where this one stopped.

    Args:
        path: the JSON file.
        device: what was measured on.
        settings: what else all cells have in common.

    Raises:
        MetaKDError: the file there has cells of other settings, hardware or versions.
    """

    def __init__(self, path: Path, device: str, settings: dict[str, Any]) -> None:
        self.path = path
        about: dict[str, dict[str, Any]] = {
            "environment": environment(device),
            "settings": {"device": device, **settings},
        }
        old = json.loads(path.read_text()) if path.exists() else {**about, "cells": []}
        for part, now in about.items():
            differs = [
                f"{key} {old[part].get(key)!r}, now {now[key]!r}" for key in now if old[part].get(key) != now[key]
            ]
            if differs:
                raise MetaKDError(
                    f"{path} was measured with {'; '.join(differs)}: choose another --output, or delete it"
                )
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        cells = [cell for cell in old["cells"] if "died" not in cell]  # to be tried again
        self.content: dict[str, Any] = {"command": command, **about, "cells": cells}

    def find(self, **key: Any) -> Cell | None:
        """The cell with these entries, if it was measured."""
        return next((cell for cell in self.content["cells"] if key.items() <= cell.items()), None)

    def put(self, found: Cell, **key: Any) -> None:
        """Save a cell, in the place of one with the same key."""
        others = [cell for cell in self.content["cells"] if not key.items() <= cell.items()]
        self.content["cells"] = [*others, {**key, **found}]
        write_atomically(self.path, lambda path: path.write_text(json.dumps(self.content, indent=1) + "\n"))
