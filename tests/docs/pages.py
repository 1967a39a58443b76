"""The pages that readers see, and their code."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "docs/*/*.md", "benchmarks/results/*/README.md")
HOME = "docs/index.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place))
EXAMPLES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))]


class Block(NamedTuple):
    """Code between two fences, and the line it starts on."""

    code: str
    line: int


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "python") -> list[Block]:
    text = text_of(page)
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(match[1], text[: match.start(1)].count("\n")) for match in found]


def prose(page: str) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def is_excerpt(block: Block) -> bool:
    """Whether each paragraph stands in one of the examples, further in or not."""
    parts = [textwrap.dedent(part).strip("\n") for part in block.code.split("\n\n")]
    inner = [[textwrap.indent(part, " " * depth) for depth in range(0, 20, 4)] for part in parts]
    return any(all(any(one in example for one in depths) for depths in inner) for example in EXAMPLES)


def execute(page: str, scope: dict[str, Any], after: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Run the blocks in order, with the page's own lines in a traceback."""
    for block in blocks(page):
        exec(compile("\n" * block.line + block.code, page, "exec"), scope)
        if after is not None:
            after(scope)


def run_page(page: str, after: Callable[[dict[str, Any]], object] | None = None, **names: Any) -> dict[str, Any]:
    """Run a page after the home page's example: student, teacher, train, meta, optimizer, balancer and `names` exist.

    Args:
        page: its path in the repository.
        after: called with the names there are, after each block.
        names: what the page may take for granted besides.

    Returns:
        All names at the end of the page.
    """
    scope: dict[str, Any] = {}
    execute(HOME, scope)
    scope.update(names)
    execute(page, scope, after)
    return scope
