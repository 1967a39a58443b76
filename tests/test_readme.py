"""The README and the home page keep their word: commands, example and diff."""

from tests.docs.pages import HOME, blocks, execute, text_of


def test_two_commands_do_all_the_setting_up():
    commands = [line for line in text_of("README.md").splitlines() if line.startswith("pip install -c")]
    assert commands == [
        'pip install -c constraints.txt -e ".[examples]" && python examples/cifar_lt_bikd.py',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_example_runs_as_it_stands(capsys):
    execute(HOME, scope := {})
    report = scope["balancer"].report
    assert report.weights.shape == report.influence.shape == (16, 2)
    assert capsys.readouterr().out.count("tensor(") == 2


def test_both_show_the_same_diff():
    (diff,), (other,) = blocks("README.md", "diff"), blocks(HOME, "diff")
    assert diff.code == other.code
