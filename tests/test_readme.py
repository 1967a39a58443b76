"""The README keeps its word: its commands, its example and its links."""

import re
from pathlib import Path

import pytest
import torchopt

import metakd

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_two_commands_do_all_the_setting_up():
    commands = [line for line in README.splitlines() if line.startswith("pip install -c")]
    assert commands == [
        'pip install -c constraints.txt -e ".[examples]" && python examples/cifar_lt_bikd.py',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_example_runs_as_it_stands(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    report = scope["balancer"].report
    assert report.weights.shape == report.influence.shape == (16, 2)
    assert capsys.readouterr().out.count("tensor(") == 2


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).is_file()


def test_the_code_in_the_docs_runs(capsys):
    """On top of the README's example, in the order of the page."""
    (setting,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    exec(compile(setting, "README.md", "exec"), scope)
    scope |= {"torchopt": torchopt, "batch": scope["train"][0], "meta_batch": scope["meta"]}
    scope |= {name: getattr(metakd, name) for name in metakd.__all__}
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/index.md", "exec"), scope)
    assert "exact: the largest relative error is" in capsys.readouterr().out
    assert scope["result"].gradient["lr"].isfinite()
