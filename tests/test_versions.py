"""What `show_versions` prints."""

import importlib.metadata

import torch

import metakd


def test_versions_and_devices(capsys, monkeypatch):
    found = importlib.metadata.version

    def version(name):
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.8.7" if name == "torchvision" else found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    assert metakd.show_versions() is None
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == found("torch") and lines["torchopt"] == found("torchopt")
    assert lines["torchvision"] == "9.8.7" and lines["pyarrow"] == "not installed"
    assert lines["CUDA"].endswith(": card 0, card 1") and "MPS" in lines
