"""The page on monitoring keeps its word."""

import sys
from unittest.mock import MagicMock

import pytest

from tests.docs.pages import run_page, text_of


def test_it_writes_its_figures_and_diagnoses(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    loggers = {name: MagicMock() for name in ("wandb", "trackio", "mlflow")}
    for name, module in loggers.items():
        monkeypatch.setitem(sys.modules, name, module)
    scope = run_page("docs/monitoring.md", folder=tmp_path)
    assert scope["history"].steps == 5
    scope["writer"].close()
    printed = capsys.readouterr().out
    assert "Is it learning? " in printed and str(list(scope["numbers"])) in text_of("docs/monitoring.md")
    assert "['index,term,weight', '0,hard," in printed and len(scope["table"]["weight"]) == 5 * 16 * 2
    logged = [
        loggers["wandb"].init.return_value.log,
        loggers["trackio"].log,
        loggers["mlflow"].log_metrics,
    ]
    for log in logged:
        log.assert_called_once_with(scope["numbers"], step=1)
    assert "since the last diagnosis" in str(scope["later"])
    names = {"weights_over_time.png", "influence_by_class.png", "weights_by_loss.png"}
    assert names < {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("events.out") for path in tmp_path.iterdir())
