"""The page *get started* and its notebook: one text, which runs from top to bottom and prints what it shows."""

import doctest
import re

import pytest

nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
pytest.importorskip("ipykernel")

from docs.notebook import NOTEBOOK, build  # noqa: E402
from tests.docs.pages import ROOT, blocks, text_of  # noqa: E402

NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def execute(page, folder):
    """The notebook of a page, run in a folder."""
    notebook = build(text_of(page))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, where transformers is installed
        return nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The code cells, each as (source, what it shows, what it gives when it is run)."""
    ran = execute("docs/get_started.md", tmp_path_factory.mktemp("notebook"))
    pairs = zip(build(text_of("docs/get_started.md")).cells, ran.cells, strict=True)
    return [(old.source, old.outputs, new.outputs) for old, new in pairs if old.cell_type == "code"]


def printed(outputs, name="stdout"):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


def numbers(cells, start):
    """Of all lines that start so, the numbers behind that."""
    text = "".join(printed(ran) for _, _, ran in cells)
    lines = re.findall(rf"^{re.escape(start)}(.*)$", text, flags=re.MULTILINE)
    return [[float(number) for number in re.findall(NUMBER, line)] for line in lines]


def test_the_notebook_is_the_pages():
    made = build(text_of("docs/get_started.md"))
    nbformat.validate(made)
    assert NOTEBOOK.read_text(encoding="utf-8") == nbformat.writes(made) + "\n"


def test_the_notebooks_links_lead_somewhere():
    prose = "".join(cell.source for cell in build(text_of("docs/get_started.md")).cells)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert len(links) > 5 and "][" not in prose
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_what_is_shown_is_what_is_printed(cells):
    """Up to the values of fractions, which depend on torch and the processor; lines without any are equal."""
    same = doctest.OutputChecker().check_output
    assert sum(bool(shown) for _, shown, _ in cells) == len(blocks("docs/get_started.md", "text"))
    for source, shown, ran in cells:
        ours, theirs = (printed(outputs).splitlines() for outputs in (shown, ran))
        fractions = re.compile(r"\d\.\d|\d %")
        for a, b in zip(ours, theirs, strict=True):
            if fractions.search(a):
                a, b = (re.sub(NUMBER, "#", line) for line in (a, b))
            assert same(a, b, doctest.NORMALIZE_WHITESPACE), f"{source}\nshows\n{a}\nprints\n{b}"


@pytest.mark.slow
def test_nothing_warns_and_the_figure_is_drawn(cells):
    assert "".join(printed(ran, "stderr") for _, _, ran in cells) == ""
    (figure,) = [ran for source, _, ran in cells if "plots.weights_over_time(" in source]
    assert any("image/png" in output.get("data", {}) for output in figure)


@pytest.mark.slow
def test_the_hypergradient_is_that_of_finite_differences(cells):
    (ours,), (theirs,) = numbers(cells, "hypergradient:     "), numbers(cells, "finite differences:")
    assert len(ours) == 3 and ours == pytest.approx(theirs, abs=2e-10)
    assert numbers(cells, "exact: the largest relative error is ")[0][0] < 1e-6
