"""Pages and pictures from outside of `docs/` on the site, and links that lead there in the repository and here.

Pages link to files as the repository has them, `../benchmarks/results/iteration/README.md`. On the site the results'
pages, their pictures and the pages beside the README lie below the same paths; links to any other file of the
repository become its path as code.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

OUTSIDE = ("benchmarks/results/*/README.md", "benchmarks/results/**/*.png", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of `docs/`; a page of it need not be in the navigation."""
    root = Path(config.config_file_path).parent
    for path in sorted({path for pattern in OUTSIDE for path in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        file = File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between `docs/` and the rest of the repository to where their ends are on the site."""
    root = Path(config.config_file_path).parent
    on_site = page.file.src_uri
    here = posixpath.dirname(on_site if page.file.generated_by else f"docs/{on_site}")

    def mended(link: re.Match[str]) -> str:
        text, target, anchor = link[1], posixpath.normpath(posixpath.join(here, link[2])), link[3] or ""
        if not (root / target).is_file():
            return link[0]
        goal = target.removeprefix("docs/")
        if files.get_file_from_path(goal) is None:
            return text if f"`{target}`" == text else f"{text} (`{target}`)" if text != link[2] else f"`{target}`"
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(on_site) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(mended, part) for part in parts)
