"""Formulas become MathML when the site is built, wherever they stand, and one that cannot is an error."""

import pytest

pytest.importorskip("pypandoc", reason="needs the extra docs")
markdown = pytest.importorskip("markdown", reason="needs the extra docs")
pytest.importorskip("pymdownx", reason="needs the extra docs")


def rendered(text):
    extensions = ["pymdownx.arithmatex", "docs.formulas"]
    return markdown.markdown(text, extensions=extensions, extension_configs={extensions[0]: {"generic": True}})


def test_formulas_of_a_page_become_mathml_in_their_places():
    first, second = rendered("With $a < b$:\n\n$$\n\\sqrt{c}\n$$\n").split("<div")
    assert "<mo>&lt;</mo>" in first and 'display="inline"' in first and "With" in first
    assert "<msqrt>" in second and 'display="block"' in second
    assert "\\" not in first + second and "annotation" not in first + second


def test_pages_without_formulas_stay_as_they_are():
    assert rendered("a `$b$`") == "<p>a <code>$b$</code></p>"


@pytest.mark.parametrize("tex", [r"\nothing", r"\frac{a"])
def test_what_is_no_formula_stops_the_build(tex):
    with pytest.raises(RuntimeError, match="Could not convert TeX math"):
        rendered(f"${tex}$")


@pytest.mark.parametrize("tex", [" ", "a\n\nb", "a$ and $b"])
def test_what_is_not_one_formula_stops_the_build(tex):
    from docs.formulas import mathml

    with pytest.raises(RuntimeError, match=r"pandoc made [02] formulas of"):
        mathml(tex, False)
