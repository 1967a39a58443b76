"""What is wrong with a built site: missing pages and entries, links to nowhere, names and formulas left as text."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NO_TEXT = ("code", "script", "style", "pre", "math")
ENTRY = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)


class Page(HTMLParser):
    """Anchors, links and text of a page; code and formulas are no text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take anchors and links."""
        named = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := named.get(key))}
        self.links += [value for key in ("href", "src") if tag in ("a", "img") and (value := named.get(key))]
        self._code += tag in NO_TEXT

    def handle_endtag(self, tag: str) -> None:
        """Leave code."""
        self._code -= tag in NO_TEXT

    def handle_data(self, data: str) -> None:
        """Take text."""
        self.text += "" if self._code else data


def faults(source: Path, site: Path) -> Iterator[str]:
    """What is wrong, in words."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for page in sorted(source.rglob("*.md")):
        place = page.relative_to(source).with_suffix("")
        place = place.parent if place.name in ("index", "README") else place
        if (built := site / place / "index.html") not in pages:
            yield f"{page.relative_to(source)} has no page"
            continue
        for name in ENTRY.findall(page.read_text(encoding="utf-8")):
            if name not in pages[built].anchors:
                yield f"{page.relative_to(source)}: no entry of {name}"
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        yield from (
            f"{here}: {found} is no formula" for found in re.findall(r"\\[(\[].*?\\[)\]]|\$[^$\s]+\$", page.text)
        )
        yield from (f"{here}: {found} is no link" for found in re.findall(r"\]\[\S*?\]|\]\(\S+?\)", page.text))
        yield from (f"{here}: {link} leads nowhere" for link in page.links if not leads(link, path, site, pages))


def leads(link: str, path: Path, site: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link leads to a file of the site and an anchor on it, or away from the site."""
    url = urlsplit(link)
    if url.scheme or url.netloc or path.name == "404.html":
        return True
    goal = (site / url.path.lstrip("/") if url.path.startswith("/") else path.parent / unquote(url.path)).resolve()
    goal = (goal / "index.html" if goal.is_dir() else goal) if url.path else path.resolve()
    known = {place.resolve(): page for place, page in pages.items()}
    return goal.is_file() and (not url.fragment or goal not in known or unquote(url.fragment) in known[goal].anchors)
