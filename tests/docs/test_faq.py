"""The page of questions keeps its word: its tests are there, its code runs, its numbers are those of the results."""

import ast
import re

import pytest

from tests.docs.pages import ROOT, run_page, text_of

PAGE = text_of("docs/faq.md")
SECTIONS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
PROOFS = sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE)))


def names_in(file):
    """The names of a file's tests, those of a class with the class in front."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    owners = [("", tree), *((f"{c.name}::", c) for c in tree.body if isinstance(c, ast.ClassDef))]
    return {owner + f.name for owner, parent in owners for f in parent.body if isinstance(f, ast.FunctionDef)}


@pytest.mark.parametrize("question", SECTIONS)
def test_every_question_ends_with_its_proof_or_says_why_there_is_none(question):
    last = " ".join(SECTIONS[question].strip().split("\n\n")[-1].split())
    assert re.fullmatch(r"Tests: `tests/[^`]+`(, `tests/[^`]+`)*|No test: .+\.", last)


def test_every_question_is_there_once():
    assert len(SECTIONS) == len(re.findall(r"^### ", PAGE, flags=re.MULTILINE)) >= 16


@pytest.mark.parametrize("proof", PROOFS)
def test_the_named_test_is_there(proof):
    file, _, name = proof.partition("::")
    assert name.rpartition("::")[2].startswith("test_") and name in names_in(file)


def test_the_code_runs(capsys):
    scope = run_page("docs/faq.md")
    assert "Is it learning?" in capsys.readouterr().out
    assert len(scope["figure"].axes) >= 2
    assert scope["balancer"].report.influence.shape == (16, 2)


def test_the_numbers_are_those_of_the_results():
    rows = re.findall(r"^\|(.*)\| `([\w/-]+)` \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 3
    for row, folder in rows:
        page = ROOT / "benchmarks/results" / folder / "README.md"
        if not page.exists():  # an example's numbers are on its page
            page = ROOT / "docs/systems" / f"{folder.rpartition('_')[0].rpartition('/')[2]}.md"
        numbers = re.findall(r"\d+\.\d\d(?: ± \d+\.\d\d)?", row)
        known = page.read_text(encoding="utf-8")
        assert numbers and all(re.search(rf"(?<!\d){re.escape(number)}", known) for number in numbers)
