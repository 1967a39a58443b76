"""Tables and the line on hardware and versions for a generated README.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def provenance(content: Mapping[str, Any]) -> str:
    """The command of a record, its hardware and its versions."""
    about, settings = content["environment"], content["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:.0f} GB of memory"
    gpu = f"; {about['gpu']}" if about["gpu"] else ""
    threads = f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}"
    return f"```bash\n{content['command']}\n```\n\n{machine}{gpu}; {threads}; float32; {versions}."
