"""The real packages, without a network, and the examples as modules."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from metakd.longtail._torchvision import import_torchvision

os.environ["HF_HUB_OFFLINE"] = "1"
if find_spec("torchvision"):
    # Lightning and the Trainer import it where it is installed; beside a CPU torch some of its wheels need help.
    import_torchvision()

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example():
    """The functions and classes of an example, by its file's name."""
    return lambda name: runpy.run_path(str(EXAMPLES / name))


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """An example run as a script in an empty folder; gives what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run
