"""Paths on the page of internals lead somewhere, its picture is today's, and the imports keep the house's rules."""

import ast
import re
import sys
from pathlib import Path

import pytest

from docs.layout_figure import PICTURE, Room, arrows, imports

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "metakd"
PAGE = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
IMPORTS = imports(PACKAGE)


def tree(name):
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def libraries(name, *, at_the_top=False):
    """What a module imports, by dotted names; at the top only what the import of the module itself needs."""
    for node in tree(name).body if at_the_top else ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def only_public_names(name):
    return name.endswith("/__init__.py") and not any(isinstance(n, ast.FunctionDef) for n in tree(name).body)


def test_paths_on_the_page_lead_somewhere():
    paths = set(re.findall(r"`((?:metakd|tests|docs|examples|benchmarks)/[\w/.]*)`", PAGE))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert "python docs/layout_figure.py" in PAGE and f"images/{PICTURE.name}" in PAGE


def test_the_picture_is_that_of_todays_imports():
    drawn = set(re.findall(r'id="([a-z]+--[a-z]+)"', PICTURE.read_text(encoding="utf-8")))
    assert drawn == {f"{a}--{b}" for a, others in arrows(IMPORTS).items() for b in others}


def test_rooms_that_import_each_other_are_an_error(tmp_path):
    for name, text in {"a.py": "from p.b import f", "b.py": "import p.c", "c.py": "from p import a"}.items():
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_text(text)
    found = imports(tmp_path / "p")
    assert found == {"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"a.py"}}
    rooms = {name: Room(name, "", f"{name}.py", 0) for name in "abc"}
    with pytest.raises(ValueError, match=r"b\.py imports c\.py"):
        arrows(found, rooms)
    assert arrows(found | {"c.py": set()}, rooms) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_arrows_that_follow_from_others_are_left_out():
    rooms = {name: Room(name, "", f"{name}.py", 0) for name in "abc"}
    assert arrows({"a.py": {"b.py", "c.py"}, "b.py": {"c.py"}, "c.py": set()}, rooms)["a"] == {"b"}


def test_a_file_without_a_room_is_an_error():
    with pytest.raises(ValueError, match=r"metakd/new\.py stands in the rooms \[\]"):
        arrows({"new.py": set()})


def test_only_inner_imports_torchopt():
    users = {name for name in IMPORTS if any(library.split(".")[0] == "torchopt" for library in libraries(name))}
    assert users and all(name.startswith("inner/") for name in users)


def test_estimators_know_nothing_of_students():
    allowed = ("estimators/", "inner/", "_basics/", "_autodiff.py", "batch.py", "errors.py")
    known = set().union(*(IMPORTS[name] for name in IMPORTS if name.startswith(("estimators/", "inner/"))))
    assert [name for name in known if not name.startswith(allowed)] == []


def test_the_balancer_knows_no_calculus():
    assert not [name for name in libraries("balancer.py") if name.startswith(("torch.func", "torch.autograd"))]
    used = {ast.unparse(n) for n in ast.walk(tree("balancer.py")) if isinstance(n, ast.Attribute)}
    assert "torch.enable_grad" in used
    assert not [name for name in used if re.match(r"torch\.(func|autograd)\b|.*\.backward$", name)]


def test_the_package_needs_torch_alone():
    later = ("longtail/", "inner/mended.py")  # which `import metakd` does not reach
    core = [name for name in IMPORTS if not name.startswith(later)]
    assert not any(other.startswith("longtail/") for name in core for other in IMPORTS[name])
    needed = {library.split(".")[0] for name in core for library in libraries(name, at_the_top=True)}
    assert needed - set(sys.stdlib_module_names) == {"torch", "metakd"}
