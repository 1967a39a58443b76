"""The one door to torchvision: plain where it works, mended where its operators are missing."""

import subprocess
import sys

import pytest
import torch

from metakd.errors import MetaKDError
from metakd.longtail import _torchvision

SYMPTOM = "operator torchvision::nms does not exist"


def fails_first(monkeypatch, *outcomes):
    """Let the import give these outcomes in turn."""
    left = list(outcomes)

    def attempt():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(_torchvision, "_import", attempt)
    monkeypatch.setattr(_torchvision, "_forget_half_imported", lambda: None)
    declared = []

    class Library:
        def __init__(self, *args):
            declared.append(args)

        def define(self, schema):
            declared.append(schema.split("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(_torchvision, "_declared", [])
    return declared


def test_a_plain_import_declares_nothing(monkeypatch):
    declared = fails_first(monkeypatch, sys)
    assert _torchvision.import_torchvision() is sys
    assert declared == []


def test_the_known_failure_is_mended_by_two_schemas(monkeypatch):
    declared = fails_first(monkeypatch, RuntimeError(SYMPTOM), sys)
    assert _torchvision.import_torchvision() is sys
    assert declared == [("torchvision", "DEF"), "nms", "qnms"]
    assert len(_torchvision._declared) == 1  # kept alive


def test_any_other_failure_is_passed_on(monkeypatch):
    declared = fails_first(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.import_torchvision()
    assert declared == []


def test_not_installed(monkeypatch):
    fails_first(monkeypatch, ModuleNotFoundError("No module named 'torchvision'"))
    with pytest.raises(MetaKDError, match=r"No module named 'torchvision'.*pip install"):
        _torchvision.import_torchvision()


def test_a_mismatched_wheel_becomes_usable(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "part.py").write_text("")
    (package / "__init__.py").write_text(
        "import torch\n"
        "from torchvision import part\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def fake(dets, scores, iou_threshold): ...\n"
        "@torch.library.register_fake('torchvision::qnms')\n"
        "def fake(dets, scores, iou_threshold): ...\n"
        "usable = True\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from metakd.longtail._torchvision import import_torchvision, _declared\n"
        "assert import_torchvision().usable and import_torchvision().usable and len(_declared) == 1"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_installed_torchvision_has_data_sets_and_transforms():
    _torchvision.import_torchvision()
    from torchvision import datasets, models
    from torchvision.transforms import v2

    assert callable(datasets.CIFAR10) and callable(models.resnet18)
    assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)


def test_importing_the_library_imports_none_of_the_extras():
    code = (
        "import sys, metakd, metakd.longtail\n"
        "found = {'torchvision', 'torchmetrics', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
