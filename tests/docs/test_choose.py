"""The page on choosing runs on top of the home page's example."""

import pytest

import metakd
from tests.docs.pages import run_page


def test_the_code_runs(capsys):
    losses = []
    scope = run_page("docs/choose.md", lambda scope: losses.append(scope.pop("loss", None)), metakd=metakd, loss=None)
    computed = [loss for loss in losses if loss is not None]
    assert computed and all(loss.requires_grad for loss in computed)
    assert scope["fixed"].report.weights.unique().tolist() == [pytest.approx(0.5)]
    assert scope["balancer"].report.influence.abs().sum() > 0
