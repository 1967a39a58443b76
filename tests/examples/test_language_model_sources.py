"""The language model example: its sources are apart and are what they say, and a small run writes what it says."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from metakd.longtail._torchvision import import_torchvision

PATH = Path(__file__).parents[2] / "examples" / "language_model_sources.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("language_model_sources", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # other processes look the functions up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def cut(example):
    return example.data(0, 60)


def text(row):
    return "".join(map(chr, row.tolist()))


@pytest.mark.slow
def test_sources_are_what_they_say_and_validation_is_of_other_files(example, cut):
    sequences, ids, meta, validation = cut
    assert ids.bincount().tolist() == [60] * len(example.SOURCES) and len(meta) == example.META
    known = {text(row) for row in torch.cat([sequences[ids == 0], meta])}
    assert len(known & {text(row) for row in validation}) < 3  # licence texts and the like
    alphabet = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
    assert set(text(sequences[ids == 5].flatten())) <= alphabet
    code = text(sequences[ids == 2].flatten())
    assert "def " in code and "return" in code
    letters = [sum(letter.islower() for letter in text(sequences[ids == source].flatten())) for source in (0, 4)]
    assert abs(letters[0] - letters[1]) < 0.1 * letters[0]


@pytest.mark.slow
def test_other_seeds_share_the_validation_set_alone(example, cut):
    other = example.data(1, 60)
    assert torch.equal(other[3], cut[3]) and not torch.equal(other[2], cut[2])


def test_a_causal_model_sees_no_later_byte(example):
    student = example.student_of("own", 0).eval()
    tokens = torch.randint(128, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = 7
    with torch.no_grad():
        torch.testing.assert_close(student(tokens)[:, :12], student(changed)[:, :12])
        uniform = example.bits(torch.nn.Sequential(torch.nn.Embedding.from_pretrained(torch.zeros(128, 128))), tokens)
    assert uniform == pytest.approx(7.0) and math.log2(128) == 7.0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["own", "huggingface"])
def test_a_small_run_writes_the_scores_and_weights_of_every_method(example, model, tmp_path, monkeypatch, capsys):
    if model == "huggingface":
        pytest.importorskip("transformers")
        if importlib.util.find_spec("torchvision"):
            import_torchvision()  # transformers imports it; beside a CPU torch some of its wheels need help
    methods = ["uniform", "random search", "meta added", "meta alone", "by source", "by sequence"]
    arguments = ["--seeds", "1", "--steps", "4", "--jobs", "1", "--model", model, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--methods", *methods])
    monkeypatch.setattr(example, "ProcessPoolExecutor", _InThisProcess)
    example.main()
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["methods"]) == methods and (tmp_path / "language_model_sources.png").stat().st_size > 10_000
    for method in ("by source", "by sequence"):
        (run,) = record["methods"][method]
        assert len(run["weights"]) == len(example.SOURCES)
        assert sum(run["weights"]) / len(run["weights"]) == pytest.approx(1.0, abs=0.3)
        assert run["bits"] != record["methods"]["uniform"][0]["bits"]
    assert f"{record['methods']['uniform'][0]['bits']:.3f}" in capsys.readouterr().out


class _InThisProcess:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, *arguments):
        return map(*arguments)
