"""Formulas become MathML when the site is built, wherever they stand, and one that cannot is an error."""

from types import SimpleNamespace

import pytest

pytest.importorskip("pypandoc", reason="needs the extra docs")
pytest.importorskip("mkdocs", reason="needs the extra docs")

from mkdocs.exceptions import PluginError

from docs.formulas import mathml, on_page_content

PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="theory.md"))


def rendered(content):
    return on_page_content(content, PAGE, None, None)


def test_formulas_of_a_page_become_mathml_in_their_places():
    inline, displayed = r'<span class="arithmatex">\(a &lt; b\)</span>', "\n\\[\\sqrt{c}\\]"
    page = rendered(f'{inline}<div class="arithmatex">{displayed}</div>')
    first, second = page.split("<div")
    assert "<mo>&lt;</mo>" in first and 'display="inline"' in first
    assert "<msqrt>" in second and 'display="block"' in second
    assert "\\" not in page and "annotation" not in page


def test_pages_without_formulas_stay_as_they_are():
    assert rendered("<p>a $b$</p>") == "<p>a $b$</p>"


@pytest.mark.parametrize("tex", [r"\nothing", r"\frac{a", "a}"])
def test_what_is_no_formula_stops_the_build(tex):
    with pytest.raises(PluginError, match=r"theory\.md: [\s\S]*Could not convert TeX math"):
        rendered(rf'<span class="arithmatex">\({tex}\)</span>')


@pytest.mark.parametrize("tex", [" ", "a\n\nb"])
def test_formulas_that_would_shift_the_others_stop_the_build(tex):
    with pytest.raises(RuntimeError, match="pandoc made 1 formulas of 2"):
        mathml([("x", False), (tex, False)])
