"""Formulas as MathML, made when the site is built: they need no script, no network, and no font of the reader's own."""

import html
import re
from importlib import resources

import pypandoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FONT = "STIXTwoMath-Regular.ttf"  # the stylesheet names it, for readers whose system has no font for mathematics
FORMULA = re.compile(r'(?<=class="arithmatex">)\s*\\[(\[](.*?)\\[)\]]\s*(?=</(span|div)>)', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the font, which the package `ziamath` brings."""
    content = (resources.files("ziamath") / "fonts" / FONT).read_bytes()
    files.append(File.generated(config, f"stylesheets/{FONT}", content=content))
    return files


def mathml(formulas: list[tuple[str, bool]]) -> list[str]:
    """MathML of formulas in TeX, each with whether it is displayed; a formula that pandoc cannot read is an error."""
    marks = (f"$${tex.strip()}$$" if displayed else f"${tex.strip()}$" for tex, displayed in formulas)
    options = ["--mathml", "--wrap=none", "--fail-if-warnings"]
    page = pypandoc.convert_text("\n\n".join(marks), "html", format="markdown", extra_args=options)
    found = re.findall(r"<math.*?</math>", page, re.DOTALL)
    if len(found) != len(formulas):
        raise RuntimeError(
            f"pandoc made {len(found)} formulas of {len(formulas)}; is one empty, or has it a blank line?"
        )
    return [re.sub(r"<annotation.*?</annotation>", "", one, flags=re.DOTALL) for one in found]


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put MathML in the place of TeX in the page's HTML, whether of the page itself or of a docstring."""
    formulas = [(html.unescape(found[1]), found[2] == "div") for found in FORMULA.finditer(content)]
    try:
        made = iter(mathml(formulas) if formulas else ())
    except RuntimeError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
    return FORMULA.sub(lambda _: next(made), content)
