"""Every page: links and pictures lead somewhere, code runs or is an example's, commands are there."""

import re
import shlex
from functools import cache
from importlib import import_module
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import HOME, PAGES, ROOT, blocks, execute, is_excerpt, prose, run_page, text_of
from tests.zoo import QUIET

HOSTS = {"arxiv.org", "keepachangelog.com", "semver.org", "zensical.org"}
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
BESIDE = {page for page in PAGES if not page.startswith(("docs/", "benchmarks/"))}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
OWN_TEST = set(re.findall(r'\b(?:run_page|execute)\(\s*"([^"]+\.md)"', TESTS))
CODE = [page for page in PAGES if blocks(page) and page not in OWN_TEST and page != HOME]


@cache
def anchors(page):
    """What `#` can lead to: headings, as both the site and the repository name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M), flags=re.M)
    found = []
    for heading in headings:
        words = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", heading)
        found.append(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words.lower()).strip()))
    return set(found)


def broken_links(page):
    """What is wrong with the links of a page, in words."""
    definitions = re.findall(r"^\[[^\]]+\]: (\S+)", prose(page), flags=re.M)
    for target in [*LINK.findall(prose(page)), *definitions]:
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme != "https" or url.netloc not in HOSTS:
                yield f"{target} is not https, or its host not known"
            continue
        there = ((ROOT / page).parent / url.path).resolve() if url.path else ROOT / page
        if not there.is_relative_to(ROOT) or not there.exists():
            yield f"{target} leads nowhere"
        elif url.fragment and url.fragment not in anchors(there.relative_to(ROOT).as_posix()):
            yield f"{target}: no such heading"


def resolved(name):
    """The object of a dotted name; a function where a module has its name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise AttributeError(name)


def missing_in(line):
    """What a command of a page names and is not there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if "torchrun" in words or words[:1] == ["python"]:
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            return
        if not (ROOT / script).is_file():
            yield script
            return
        text = (ROOT / script).read_text(encoding="utf-8")
        imported = re.findall(r"^from (benchmarks[\w.]*) import (.*)$", text, flags=re.M)
        for module, names in imported:
            for place in [module, *(f"{module}.{name.strip()}" for name in names.split(","))]:
                if (file := ROOT / (place.replace(".", "/") + ".py")).is_file():
                    text += file.read_text(encoding="utf-8")
        for flag in words[words.index(script) :]:
            if flag.startswith("--") and f'"{flag.partition("=")[0]}"' not in text:
                yield f"{script} {flag}"
    elif words[:1] == ["pip"]:
        yield from (word for word in re.findall(r"-c (\S+)", line) if not (ROOT / word).is_file())
        extras = re.findall(r"\[([\w,]+)\]", line)
        known = re.findall(r"^(\w+) = \[", text_of("pyproject.toml"), flags=re.M)
        yield from (extra for part in extras for extra in part.split(",") if extra not in known)
    elif words[:1] in (["pytest"], ["ruff"]):
        yield from (word for word in words[1:] if "/" in word and not (ROOT / word.partition("::")[0]).exists())


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_references_resolve(page):
    for name in re.findall(r"\]\[(metakd[\w.]*)\]", text_of(page)):
        assert resolved(name) is not None


def test_what_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](nowhere.md) [b](#none) [c](http://arxiv.org) [d](https://who.is)\n# Here\n")
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr("tests.docs.pages.ROOT", tmp_path)
        patched.setitem(broken_links.__globals__, "ROOT", tmp_path)
        assert len(list(broken_links("page.md"))) == 4
    assert list(missing_in("python examples/cifar_lt_bikd.py --seed 1 --no-such 2"))
    assert list(missing_in("python examples/none.py")) and list(missing_in('pip install -e ".[none]"'))
    assert list(missing_in("pytest tests/none.py")) and not list(missing_in("METAKD_CIFAR10=data pytest tests/terms"))
    with pytest.raises(AttributeError):
        resolved("metakd.terms.NoTerm")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_compiles(page):
    for block in blocks(page):
        if not is_excerpt(block):
            compile(block.code, page, "exec")


@pytest.mark.parametrize("page", CODE)
def test_code_that_no_other_test_runs(page, tmp_path, monkeypatch):
    """On top of the home page's example, unless all of it stands in the examples."""
    monkeypatch.chdir(tmp_path)
    if not all(map(is_excerpt, blocks(page))):
        run_page(page)


test_code_that_no_other_test_runs.pytestmark = [*test_code_that_no_other_test_runs.pytestmark, *QUIET]


def test_the_home_pages_example_runs(capsys):
    execute(HOME, scope := {})
    report = scope["balancer"].report
    assert report.weights.shape == report.influence.shape == (16, 2)
    assert capsys.readouterr().out.count("tensor(") == 2


def test_the_readmes_example_runs_alone(capsys):
    execute("README.md", scope := {})
    assert scope["balancer"].report.weights.shape == (16, 2)
    assert capsys.readouterr().out.startswith("tensor(")
    (block,) = blocks("README.md")
    assert len(block.code.splitlines()) < 18


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_are_there(page):
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    assert {part: missing for part in parts if (missing := list(missing_in(part)))} == {}
