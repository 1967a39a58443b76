"""Formulas as MathML, made when the site is built: they need no script, no network, and no font of the reader's own.

A Markdown extension, after `pymdownx.arithmatex` in mkdocs.yml.
"""

import html
import re
from functools import cache
from typing import Any

import pypandoc
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

FORMULA = re.compile(r'(?<=class="arithmatex">)\s*\\[(\[](.*?)\\[)\]]\s*(?=</(span|div)>)', re.DOTALL)


@cache
def mathml(tex: str, displayed: bool) -> str:
    """MathML of a formula in TeX; one that pandoc cannot read is an error."""
    mark = "$$" if displayed else "$"
    options = ["--mathml", "--wrap=none", "--fail-if-warnings"]
    page = pypandoc.convert_text(f"{mark}{tex.strip()}{mark}", "html", format="markdown", extra_args=options)
    found = re.findall(r"<math.*?</math>", page, re.DOTALL)
    if len(found) != 1:
        raise RuntimeError(f"pandoc made {len(found)} formulas of {tex!r}; is it empty, or has it a blank line?")
    return re.sub(r"<annotation.*?</annotation>", "", found[0], flags=re.DOTALL)


class InPlaceOfTeX(Postprocessor):
    """Puts MathML in the place of TeX in HTML, whether of a page itself or of a docstring."""

    def run(self, text: str) -> str:
        """Convert all formulas."""
        return FORMULA.sub(lambda found: mathml(html.unescape(found[1]), found[2] == "div"), text)


class Formulas(Extension):
    """The extension's name is `docs.formulas`."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Run after all that puts HTML back into the page."""
        md.postprocessors.register(InPlaceOfTeX(md), "formulas", -100)


def makeExtension(**settings: Any) -> Formulas:
    """What Markdown calls."""
    return Formulas(**settings)
