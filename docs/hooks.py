"""Pictures of `benchmarks/results` on the site: pages link to them as they do on the repository's pages."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the site, below the path they have in the repository."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).rglob("*.png")):
        files.append(File.generated(config, str(picture.relative_to(root)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of the documentation's folder to where the pictures are on the site."""
    depth = page.file.src_uri.count("/")
    return markdown.replace("../" * (depth + 1) + RESULTS, "../" * depth + RESULTS)
