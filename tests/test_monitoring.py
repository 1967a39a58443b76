"""The page on monitoring keeps its word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")


def test_the_code_runs_on_top_of_the_readme(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (setting,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    scope = {"folder": tmp_path}
    for block in (setting, *re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)):
        exec(compile(block, "docs/monitoring.md", "exec"), scope)
    assert scope["history"].steps == 5
    assert "Is it learning? " in capsys.readouterr().out
    assert "since the last diagnosis" in str(scope["later"])
    names = {"weights_over_time.png", "influence_by_class.png", "weights_by_loss.png"}
    assert names < {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("events.out") for path in tmp_path.iterdir())


@pytest.mark.parametrize("picture", re.findall(r"\]\((images/[^)]+)\)", PAGE))
def test_pictures_are_there_and_described(picture):
    assert (ROOT / "docs" / picture).is_file()
    assert re.search(rf"!\[[^\]]{{20,}}\]\({picture}\)", PAGE)
