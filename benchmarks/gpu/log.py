"""What became of the jobs, over all runs, in one JSON file that is written after each change."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metakd.longtail.checkpoint import write_atomically

OVER = ("done",)
TRIED = ("failed", "killed")
"""Tried again in a later run, after all others."""


class Log:
    """The file, and this run's entry in it.

    Each job has a `status`: done; part, it goes on in the next run; killed, at its limit; failed; skipped, something is
    missing; or waiting, for a run with more time. `seconds` are those of all runs.
    """

    def __init__(self, path: Path, **run: Any) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.exists() else {"runs": [], "jobs": {}}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self.run = {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version(), **run}
        self.content: dict[str, Any] = {"runs": [*old["runs"], self.run], "jobs": old["jobs"]}

    def of(self, name: str) -> Mapping[str, Any]:
        """A job's entry; empty if it never had its turn."""
        entry: Mapping[str, Any] = self.content["jobs"].get(name, {})
        return entry

    def status(self, name: str | None) -> str | None:
        """A job's status."""
        return self.of(name).get("status") if name else None

    def put(self, name: str, status: str, reason: str = "", seconds: float = 0.0, **more: Any) -> None:
        """Write down what became of a job."""
        entry = {"status": status, "seconds": round(self.of(name).get("seconds", 0.0) + seconds, 1), **more}
        self.content["jobs"][name] = entry | ({"reason": reason} if reason else {})
        self.save()

    def save(self) -> None:
        """Write the file."""
        text = json.dumps(self.content, indent=1) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text))
