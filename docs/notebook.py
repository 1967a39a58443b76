"""The notebook of get_started.md, made from the page alone.

python docs/notebook.py
"""

import re
from pathlib import Path
from posixpath import join, relpath

import nbformat
from nbformat import v4

PAGE = Path(__file__).parent / "get_started.md"
NOTEBOOK = PAGE.parents[1] / "examples/get_started.ipynb"


def build(page: str) -> nbformat.NotebookNode:
    """Prose becomes Markdown cells, Python code cells, and the text below a piece of code its output."""
    pieces = re.split(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", page, flags=re.DOTALL)
    cells = []
    for prose, code, output in zip(pieces[::3], [*pieces[1::3], None], [*pieces[2::3], None], strict=True):
        if prose.strip():
            cells.append(v4.new_markdown_cell(_plain(prose)))
        if code is not None:
            stream = [v4.new_output("stream", name="stdout", text=output)] if output else []
            cells.append(v4.new_code_cell(code.rstrip(), outputs=stream))
    cells.insert(1, v4.new_code_cell("%matplotlib inline"))  # a figure at the end of a cell is shown
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # random otherwise
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def _plain(prose: str) -> str:
    """Without links into the reference, and with the others leading on from where the notebook is."""

    def moved(link: re.Match[str]) -> str:
        return f"]({relpath(join(PAGE.parent.name, link[1]), NOTEBOOK.parent.name)})"

    prose = re.sub(r"\[(`[^`]+`)\]\[[^\]]+\]", r"\1", prose)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", moved, prose).strip()


if __name__ == "__main__":
    nbformat.write(build(PAGE.read_text(encoding="utf-8")), NOTEBOOK)
