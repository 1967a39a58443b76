"""The README keeps its word: its commands and its example."""

from tests.docs.pages import execute, text_of


def test_two_commands_do_all_the_setting_up():
    commands = [line for line in text_of("README.md").splitlines() if line.startswith("pip install -c")]
    assert commands == [
        'pip install -c constraints.txt -e ".[examples]" && python examples/cifar_lt_bikd.py',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_example_runs_as_it_stands(capsys):
    execute("README.md", scope := {})
    report = scope["balancer"].report
    assert report.weights.shape == report.influence.shape == (16, 2)
    assert capsys.readouterr().out.count("tensor(") == 2
