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
import sys
from importlib.machinery import PathFinder

blocked, page = set(sys.argv[1:-1]), sys.argv[-1]

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in blocked or name.partition(".")[0] in blocked:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
exec(compile(open(page, encoding="utf-8").read(), page, "exec"))
"""

(HOME,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
WITHOUT_TORCHOPT = """
import metakd
from metakd import estimators
from metakd.inner import GradientTransformation, mirror, own

for estimator in (estimators.OneStep(), estimators.Adjoint(), estimators.Unroll()):
    follower = BilevelLossBalancer(student, [CrossEntropy()], optimizer=optimizer, inner="mirror", estimator=estimator)
    follower.meta_step(train[: 1 if isinstance(estimator, estimators.OneStep) else 2], meta)

def descend(gradients, state, *, params=None, inplace=True):
    return {name: -0.1 * g for name, g in gradients.items()}, state

def problem(optimizer, estimator=estimators.Adjoint()):
    start = {"w": torch.tensor(2.0)}, {"m": torch.tensor(3.0)}
    inner, outer = lambda p, m, batch: m["m"] * p["w"] ** 2 / 2, lambda p, m: p["w"]
    return metakd.hypergradient(inner, outer, *start, [None], optimizer=optimizer, estimator=estimator)

plain = GradientTransformation(lambda params: (), descend)
unmarked = GradientTransformation(lambda params: (), lambda *given, **named: descend(*given, **named))
torch.testing.assert_close(problem(own(plain)).gradient["m"], torch.tensor(-0.2))
for arguments in ((unmarked,), (own(plain), estimators.Implicit("cg")), (own(plain), estimators.Implicit("neumann"))):
    try:
        problem(*arguments)
    except metakd.MetaKDError as error:
        assert 'needs TorchOpt, an optional package: pip install "metakd[torchopt]"' in str(error), error
    else:
        raise AssertionError(arguments)
"""
WITH_TORCHOPT = """
import torchopt

follower = BilevelLossBalancer(student, [CrossEntropy()], optimizer=optimizer, inner=torchopt.adam(lr=0.1))
follower(train[0], meta)
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


def packages():
    """Top-level package -> the distributions that have it; Python 3.10's own function misses many."""
    found = {}
    for distribution in metadata.distributions():
        record, own = distribution.read_text("RECORD") or "", canonical(distribution.metadata["Name"])
        for name in re.findall(r"^(\w+)(?:/|\.py,)", record, flags=re.MULTILINE):
            found.setdefault(name, set()).add(own)
    return found


def run_without(blocked, code, folder):
    """Run code in a process that cannot import some packages."""
    (folder / "code.py").write_text(code, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", ALONE, *blocked, folder / "code.py"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )


def but(*names):
    """All packages but metakd, these distributions and what they need."""
    known = installed_with(*names)
    assert {*names} <= known
    return [package for package, own in packages().items() if package != "metakd" and not known & own]


def test_the_core_needs_torch_alone(tmp_path):
    others = but("torch", "optree")  # which torch imports wherever it is installed
    assert {"pytest", "torchopt", "torchvision", "torchmetrics", "matplotlib", "sklearn"} <= {*others}
    run_without(others, HOME + WITHOUT_TORCHOPT, tmp_path)


@pytest.mark.slow
def test_torchopts_transformations_need_no_compiled_part(tmp_path):
    """Its wheel for Pythons after 3.11 has none."""
    run_without([*but("torch", "torchopt"), "torchopt._C"], HOME + WITH_TORCHOPT, tmp_path)


def test_nothing_is_capped():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.10"
    assert sorted(re.fullmatch(r"(\w+)>=[\d.]+", need)[1] for need in project["dependencies"]) == ["torch"]


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
    subprocess.run([sys.executable, "-W", "error", "-c", HOME], check=True, stdout=subprocess.DEVNULL)
