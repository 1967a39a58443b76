"""The overview of results says what the results say."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, text_of

PAGE = text_of("docs/results.md")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
NUMBER = re.compile(r"(?<![\w.,-])[\u2212-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def sources(section):
    """The files that a section links to."""
    targets = re.findall(r"\]\(([^)#]+\.md)\)", SECTIONS[section])
    return [(ROOT / "docs" / target).read_text(encoding="utf-8") for target in targets]


def numbers(text):
    """All numbers of a page but those in code, links and other words."""
    return NUMBER.findall(re.sub(r"^```.*?^```$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE))


def unknown(text, sources):
    known = {number for source in sources for number in NUMBER.findall(source)}
    return [number for number in numbers(text) if number not in known]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_is_in_the_result(section):
    assert len(numbers(SECTIONS[section])) > 1
    assert unknown(SECTIONS[section], sources(section)) == []


def cells(row):
    return [re.sub(r"[`*]", "", cell).strip() for cell in row.strip("|").split("|")]


def misplaced(text, sources):
    """Numbers of tables that do not stand in a row of that name, and of that column if a row can have its name."""
    known = [cells(line) for source in sources for line in source.splitlines() if line.startswith("|")]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        (_, *columns), _, *rows = map(cells, table.splitlines())
        for label, *values in rows:
            named = [row for row in known if {label, label.split(",")[0]} & {*row}]
            for column, value in zip(columns, values, strict=True):
                places = [row for row in named if column in row] or named
                wanted = set(NUMBER.findall(value)) or {value}
                if not any(wanted <= {*NUMBER.findall(" ".join(row))} for row in places):
                    yield label, column, value


@pytest.mark.parametrize("section", SECTIONS)
def test_tables_have_the_numbers_of_their_rows(section):
    assert list(misplaced(SECTIONS[section], sources(section))) == []


def test_the_readme_has_the_numbers_of_the_long_tailed_table():
    (table,) = re.findall(r"^## Does it help\?\n(.*?)^## ", text_of("README.md"), flags=re.DOTALL | re.MULTILINE)
    assert "BiKD" in table and list(misplaced(table, [text_of("benchmarks/results/longtail-small/README.md")])) == []


@pytest.mark.parametrize("section", SECTIONS)
def test_every_command_is_that_of_the_result(section):
    commands = re.findall(r"^python .*$|(?<=`)python [^`]*(?=`)", SECTIONS[section], flags=re.MULTILINE)
    there = " ".join(" ".join(sources(section)).split())
    assert commands and [command for command in commands if command not in there] == []


def test_every_result_has_its_section():
    folders = [page.split("/")[2] for page in PAGES if page.startswith("benchmarks/results/")]
    assert folders and [folder for folder in folders if f"(../benchmarks/results/{folder}/README.md)" not in PAGE] == []


def test_a_number_that_is_not_there_is_found():
    assert unknown("| CE | 61.23 | **-2.5** | k = 5 |", ["| CE | 61.2 | 2.5 | K = 5"]) == ["61.23", "-2.5"]
    table = "| method | many |\n|---|---|\n| CE | 61.2 |\n| KD, twice | 7 |\n"
    assert not list(misplaced(table, [table]))
    assert list(misplaced(table, [table.replace("KD, twice", "KD").replace("7", "8")])) == [("KD, twice", "many", "7")]
