"""The page on any bilevel problem is right about its hypergradients."""

from tests.docs.pages import run_page


def test_its_hypergradients_are_exact(capsys):
    scope = run_page("docs/hypergradient.md")
    assert capsys.readouterr().out.count("exact: the largest relative error is") == 2
    assert scope["result"].gradient["lr"].isfinite()
