"""The README keeps its word: its commands, its example and its links."""

import re
from pathlib import Path

import pytest

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
