"""The page on recipes runs as it stands, and names them all."""

import re
from pathlib import Path

from metakd import recipes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def test_the_code_runs_on_top_of_the_readmes(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (setting,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    scope = {}
    exec(compile(setting, "README.md", "exec"), scope)
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/recipes.md", "exec"), scope)
        scope["balancer"].weights((*scope["train"][0], scope["torch"].arange(16)))
    assert scope["loss"].item() > 0


def test_every_recipe_has_its_section():
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    assert all(f"recipes.{name}(" in code for name in recipes.__all__)


def test_the_tables_links_lead_to_headings():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^## (.*)$", PAGE, re.M)
    }
    targets = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert len(targets) == 7 and targets <= headings
