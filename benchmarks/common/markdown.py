"""What a generated README.md is made of: tables, verdicts, the line on hardware and versions."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.numbers import Content, failures


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; all columns but the `left` first ones are aligned to the right.

    Example:
        >>> print(table(["a", "b"], [["x", "1"]]))
        | a | b |
        |---|---:|
        | x | 1 |
    """
    first, *others = ("|".join(["", *(f" {text} " for text in line), ""]) for line in (head, *rows))
    return "\n".join([first, "|" + left * "---|" + (len(head) - left) * "---:|", *others])


def provenance(content: Content) -> str:
    """The command of a record, its hardware and its versions."""
    about, settings = content["environment"], content["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:.0f} GB of memory"
    gpu = f"; {about['gpu']}" if about["gpu"] else ""
    threads = f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}"
    clock = {"cpu": "; all times are CPU time", "device": "; all times by the GPU's events"}.get(
        settings.get("clock"), ""
    )
    return f"```bash\n{content['command']}\n```\n\n{machine}{gpu}; {threads}{clock}; float32; {versions}."


def write_readme(folder: Path, text: str) -> Path:
    """Write README.md; what notes.md says comes last."""
    notes, readme = folder / "notes.md", folder / "README.md"
    readme.write_text(text + (f"\n{notes.read_text()}" if notes.exists() else ""))
    return readme


def memory_is(content: Content) -> str:
    """What a record's numbers of memory are, as the end of a paragraph."""
    return {
        "cpu": "the peak of the process's resident memory less the resident memory before the call. Each "
        "number comes from a process of\n  its own.",
        "cuda": "the peak of the GPU allocator less what was allocated before the call, which "
        "includes\n  its preparation.",
    }[content["settings"]["device"]]


def number(value: float | None, form: str) -> str:
    """A formatted number; nothing for None.

    Example:
        >>> number(1234.5, ",.0f"), number(0.0, ".2f"), number(None, ".2f")
        ('1,234', '0', '')
    """
    return "" if value is None else format(value, form) if value else "0"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of a single value the value.

    Example:
        >>> spread([1.0, 3.0]), spread([2.0])
        ('2.00 ± 1.41', '2.00')
    """
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def plain_milliseconds(cells: Iterable[Mapping[str, Any]]) -> str:
    """The unit of time in some time cells: median (10 to 90 % of them) in ms; nothing where none was measured.

    Example:
        >>> plain_milliseconds([{"rounds": [{"plain": [0.1, 0.2]}, {"plain": [0.3]}]}])
        '200 (100 to 300)'
    """
    plain = sorted(1000 * second for cell in cells for one in cell.get("rounds", []) for second in one["plain"])
    if not plain:
        return ""
    low, high = plain[len(plain) // 10], plain[-1 - len(plain) // 10]
    middle, low, high = (f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}" for ms in (statistics.median(plain), low, high))
    return f"{middle} ({low} to {high})"


def verdict(values: Mapping[str, float | None], limit: float) -> str:
    """Whether the largest of the values, each with its place, is within the limit; nothing for no values.

    Example:
        >>> verdict({"at K = 1": 2.0, "at K = 2": 3.0, "at K = 5": None}, 2.5), verdict({"": 2.0}, 2.5)
        ('missed by 20.0 %: 3.00 at K = 2', 'met: 2.00')
    """
    known = {where: value for where, value in values.items() if value is not None}
    if not known:
        return ""
    worst = max(known, key=lambda where: known[where])
    judged = "met" if known[worst] <= limit else f"missed by {100 * (known[worst] / limit - 1):.1f} %"
    return f"{judged}: {known[worst]:.2f} {worst}".strip()


def what_failed(content: Content, where: Callable[[Mapping[str, Any]], str]) -> str:
    """A list of what could not be measured; `where` names a cell's case and its like."""
    lines = [f"- {where(cell)}, {name}, {cell['kind']}: {why}" for cell, name, why in failures(content)]
    return "\n".join(["\n\nWhat failed:\n", *lines]) if lines else ""
