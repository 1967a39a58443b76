"""The record of a run: what was run with what on what, and the table that ends it."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from metakd.longtail.checkpoint import write_atomically

_PACKAGES = ("metakd", "torch", "torchopt", "torchvision", "torchmetrics", "scikit-learn")


def provenance() -> dict[str, Any]:
    """The command and the versions of everything that may change a number."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A plain-text table of numbers, one row a name.

    Args:
        rows: name -> column -> number; all rows with the same columns.

    Example:
        >>> print(table({"ce": {"overall": 80.0, "few": 61.234}, "bikd": {"overall": 82.1, "few": 70.0}}))
              overall    few
        ce      80.00  61.23
        bikd    82.10  70.00
    """
    columns = list(next(iter(rows.values())))
    first = max(map(len, rows))
    widths = [max(len(c), 6) for c in columns]
    lines = [" " * first + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for name, row in rows.items():
        lines.append(f"{name:<{first}}" + "".join(f"  {row[c]:>{w}.2f}" for c, w in zip(columns, widths, strict=True)))
    return "\n".join(line.rstrip() for line in lines)
