"""The page on monitoring keeps its word."""

import pytest

from tests.docs.pages import run_page


def test_it_writes_its_figures_and_diagnoses(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    scope = run_page("docs/monitoring.md", folder=tmp_path)
    assert scope["history"].steps == 5
    assert "Is it learning? " in capsys.readouterr().out
    assert "since the last diagnosis" in str(scope["later"])
    names = {"weights_over_time.png", "influence_by_class.png", "weights_by_loss.png"}
    assert names < {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("events.out") for path in tmp_path.iterdir())
