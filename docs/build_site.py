"""`python docs/build_site.py` builds the site in `build/site` and checks it; with `serve` it shows the site.

Zensical reads one folder. This script lays it out in `build/docs`: the pages of `docs/`, and from outside of it the
results' pages, their pictures and the pages beside the README, below the same paths. Pages link to files as the
repository has them, `../benchmarks/results/iteration/README.md`; here such a link leads to its end on the site,
and a link to any other file of the repository becomes its path as code.
"""

import os
import posixpath
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs.check_site import faults  # noqa: E402

SOURCE, SITE = ROOT / "build/docs", ROOT / "build/site"  # as mkdocs.yml has them
INSIDE = ("*.md", "systems/*.md", "images/*", "stylesheets/*")
OUTSIDE = (
    "benchmarks/results/*/README.md",
    "benchmarks/results/**/*.png",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
FONT = "STIXTwoMath-Regular.ttf"  # the stylesheet names it, for readers whose system has no font for mathematics
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def files(root: Path) -> dict[str, Path]:
    """Path on the site -> file in the repository."""
    found = {path.relative_to(root / "docs"): path for part in INSIDE for path in (root / "docs").glob(part)}
    found |= {path.relative_to(root): path for part in OUTSIDE for path in root.glob(part)}
    return {name.as_posix(): path for name, path in sorted(found.items()) if path.is_file()}


def mended(markdown: str, on_site: str, root: Path, known: dict[str, Path]) -> str:
    """A page with its links leading to where their ends are on the site."""
    here = posixpath.dirname(known[on_site].relative_to(root).as_posix())

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], posixpath.normpath(posixpath.join(here, found[2])), found[3] or ""
        if not (root / target).is_file():
            return found[0]
        goal = target.removeprefix("docs/")
        if goal not in known:
            return text if f"`{target}`" == text else f"{text} (`{target}`)" if text != found[2] else f"`{target}`"
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(on_site) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def lay_out(root: Path, source: Path) -> None:
    """Write the folder that Zensical reads."""
    shutil.rmtree(source, ignore_errors=True)
    known = files(root)
    for name, path in known.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            page = mended(path.read_text(encoding="utf-8"), name, root, known)
            (source / name).write_text(page, encoding="utf-8")
        else:
            shutil.copy(path, source / name)
    (source / "stylesheets" / FONT).write_bytes((resources.files("ziamath") / "fonts" / FONT).read_bytes())


def main() -> None:
    """Lay out, build and check the site, or serve it."""
    lay_out(ROOT, SOURCE)
    way = ["serve"] if sys.argv[1:] == ["serve"] else ["build", "--clean", "--strict"]
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for docs.formulas
    if failed := subprocess.run(["zensical", *way], cwd=ROOT, env=os.environ | {"PYTHONPATH": places}).returncode:
        sys.exit(failed)
    if way != ["serve"] and (found := list(faults(SOURCE, SITE))):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
