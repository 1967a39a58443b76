"""An installation: what the core needs, and what no later Python may break."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALONE = """
import re, sys
from importlib.machinery import PathFinder

blocked, home = set(sys.argv[1:-1]), sys.argv[-1]

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in blocked or name.partition(".")[0] in blocked:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
(code,) = re.findall(r"```python\\n(.*?)```", open(home, encoding="utf-8").read(), flags=re.DOTALL)
exec(compile(code, "index.md", "exec"))
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(*names):
    """The distributions that come with these, extras left out."""
    found, waiting = set(), list(map(canonical, names))
    while waiting:
        name = waiting.pop()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [canonical(re.match(r"[\w.-]+", need)[0]) for need in needs if "extra ==" not in need]
    return found


@pytest.mark.parametrize("torchopt", ["as installed", pytest.param("pure Python", marks=pytest.mark.slow)])
def test_the_core_needs_torch_and_torchopt_alone(torchopt):
    known = installed_with("torch", "torchopt")
    assert {"torch", "torchopt"} <= known
    others = [
        package
        for package, distributions in metadata.packages_distributions().items()
        if package != "metakd" and not known & set(map(canonical, distributions))
    ]
    assert {"pytest", "torchvision", "torchmetrics", "matplotlib", "sklearn"} <= {*others}
    if torchopt == "pure Python":  # as its wheel for Pythons after 3.11 is
        others.append("torchopt._C")
    subprocess.run(
        [sys.executable, "-c", ALONE, *others, ROOT / "docs/index.md"], check=True, stdout=subprocess.DEVNULL
    )


def test_nothing_is_capped():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.10"
    assert sorted(re.fullmatch(r"(\w+)>=[\d.]+", need)[1] for need in project["dependencies"]) == ["torch", "torchopt"]


def test_the_source_is_the_oldest_pythons():
    files = sorted((ROOT / "metakd").rglob("*.py"))
    assert len(files) > 50
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 10))


def test_the_lowest_torch_that_is_promised_is_the_lowest_that_is_tested():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (promised,) = [need.removeprefix("torch>=") for need in project["dependencies"] if need.startswith("torch>")]
    assert f"torch=={promised}.0\n" in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")


def test_warnings_as_errors_meet_none_of_torchs_own_at_the_first_dual_number():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)
