"""The reference holds every public name, and every public name explains itself."""

import ast
import inspect
import re
import textwrap
from importlib import import_module
from pkgutil import iter_modules

import pytest

import metakd
from tests.docs.pages import text_of
from tests.docs.test_pages import resolved

WITHOUT_ALL = ("metakd.tensorboard", "metakd.longtail.plots")  # modules that are public as they stand
ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n      members: \[([^\]]*)\])?", flags=re.MULTILINE)


def public():
    """Dotted name -> object, each object once."""
    found = [module.name for module in iter_modules(metakd.__path__) if module.ispkg]
    subpackages = [f"metakd.{name}" for name in found if not name.startswith("_")]
    names = [f"{package}.{name}" for package in ("metakd", *subpackages) for name in import_module(package).__all__]
    for module in map(import_module, WITHOUT_ALL):
        own = [
            n for n, found in vars(module).items() if inspect.isfunction(found) and found.__module__ == module.__name__
        ]
        names += [f"{module.__name__}.{name}" for name in own if not name.startswith("_")]
    objects = {name: getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    return {id(found): (name, found) for name, found in objects.items() if not inspect.ismodule(found)}


def entries():
    """Dotted names of the reference's entries, with the members of modules and classes."""
    for name, members in ENTRY.findall(text_of("docs/api.md")):
        yield name
        yield from (f"{name}.{member}" for member in members.split(", ") if member)


PUBLIC = public()
OURS = [
    pytest.param(found, id=name)
    for name, found in PUBLIC.values()
    if (inspect.isclass(found) or inspect.isfunction(found)) and found.__module__.startswith("metakd")
]


def raising(found):
    """What has a `raise` of its own and does not say so: the function, or public methods."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    functions = (
        [tree] if inspect.isfunction(found) else [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    )
    return [
        f.name
        for f in functions
        if any(isinstance(node, ast.Raise) for node in ast.walk(f)) and "Raises:" not in (ast.get_docstring(f) or "")
        and (f is tree or f.name.startswith("__") or not f.name.startswith("_"))
    ]  # fmt: skip


def parameters(found):
    """Names of its parameters; an exception has none, and of `*args` a docstring need not speak."""
    if inspect.isclass(found) and issubclass(found, Exception):
        return []
    given = inspect.signature(found).parameters.values()
    return [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def lacking(found):
    """What a docstring does not say."""
    text = found.__doc__ or ""
    if not re.match(r"\S.*[.?:]", inspect.cleandoc(text).partition("\n")[0]):
        yield "a line that says what it is for"
    if not re.search(r"^\s*Examples:\n\s+>>> ", text, flags=re.MULTILINE) and not getattr(found, "_is_protocol", False):
        yield "an example"
    for name in parameters(found):
        if not re.search(rf"^\s+(\w+, )*{name}(, \w+)*:", text, flags=re.MULTILINE):
            yield f"the argument {name}"
    if inspect.isfunction(found) and found.__annotations__["return"] not in (None, "None") and "Returns:" not in text:
        yield "what it returns"
    if "Raises:" not in text and (names := raising(found)):
        yield f"what is raised by {names}"


def test_every_public_name_is_in_the_reference():
    documented = {id(resolved(name)) for name in entries()}
    assert {name for key, (name, _) in PUBLIC.items() if key not in documented} == set()


def test_every_entry_is_there_and_there_once():
    names = list(entries())
    assert len(names) == len({id(resolved(name)) for name in names})


@pytest.mark.parametrize("found", OURS)
def test_a_docstring_says_all(found):
    assert list(lacking(found)) == []


def test_what_a_docstring_lacks_is_found():
    def silent(x: int) -> int:
        """No"""
        raise ValueError(x)

    assert len(list(lacking(silent))) == 5
