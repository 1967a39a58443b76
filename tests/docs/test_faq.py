"""The code of the page of questions does what its answers say."""

from tests.docs.pages import run_page


def test_the_code_runs(capsys):
    scope = run_page("docs/faq.md")
    assert "Is it learning?" in capsys.readouterr().out
    assert len(scope["figure"].axes) >= 2
    assert scope["balancer"].report.influence.shape == (16, 2)
