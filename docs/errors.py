"""The page `docs/errors.md`: every message that metakd can raise, with its cause and its cure.

    python docs/errors.py

writes the page anew. The messages come from the source; whatever else is on the page is written by hand, and stays. The
explanation of a message that was reworded stays with it, and a new message is marked as one that has none yet.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from docs.messages import FRAMES, HOLE, Message, messages

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
UNEXPLAINED = "TODO: cause and cure."

# What a reader would look under, in the order of the page; a module is in the group that has its longest prefix.
GROUPS = {
    "Where it happened": "",
    "Building a balancer": "balancer parts weighting_step inner/choose inner/mirror validation/setup",
    "Batches": "batch reader calling",
    "Terms": "terms",
    "Weight models and features": "weighting checked features learned",
    "Layers of the student": "validation/layers kernels errors",
    "Hypergradients": "estimators/problem estimators/estimate derivatives estimators/hypergradient estimators/nested",
    "Estimators": "estimators",
    "Inner optimizers and linear solvers": "inner",
    "Checking a hypergradient": "check hints",
    "Several processes": "distributed validation/processes",
    "Saved states": "checkpoint optimizer_state",
    "Recipes": "recipes",
    "Constraints": "constraints",
    "History, figures and diagnosis": "history plots doctor",
    "Long-tailed data": "longtail",
}


class Entry(NamedTuple):
    """Messages with one explanation."""

    texts: list[str]
    explanation: str


def group(message: Message) -> str:
    """The group that a message is in.

    Raises:
        ValueError: its module is in none.
    """
    if message.text in FRAMES:
        return next(iter(GROUPS))
    prefixes = {prefix: title for title, known in GROUPS.items() for prefix in known.split()}
    if not (found := [p for p in prefixes if f"{message.module}/".startswith(f"{p}/")]):
        raise ValueError(f"{message.module} is in no group; give it one in docs/errors.py")
    return prefixes[max(found, key=len)]


def parsed(page: str) -> tuple[str, dict[str, tuple[str, list[Entry]]]]:
    """What is on the page: its head, and by group the words before the entries, and the entries."""
    head, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    groups = {}
    for part in parts:
        title, _, body = part.partition("\n")
        before, *items = re.split(r"^- (?=`)", body, flags=re.MULTILINE)
        entries = []
        for item in items:
            lines = [line.strip() for line in item.strip().splitlines()]
            marked = [line for line in lines if line.endswith("<br>")]
            texts = [line.removesuffix("<br>").removesuffix(" (a warning)").strip("`").strip() for line in marked]
            entries.append(Entry(texts, "\n".join(line for line in lines if line not in marked)))
        groups[title] = before.strip(), entries
    return head.strip(), groups


def rewritten(page: str, known: list[Message]) -> str:
    """The page with the messages that are known, and the explanations that it has."""
    head, groups = parsed(page)
    by_text = {message.text: message for message in known}
    entries = [entry for _, found in groups.values() for entry in found]
    gone = [text for entry in entries for text in entry.texts if text not in by_text]
    new = [text for text in by_text if not any(text in entry.texts for entry in entries)]
    for text in list(new):
        if close := get_close_matches(text, gone, n=1):
            gone.remove(close[0])
            new.remove(text)
            entries = [Entry([text if old == close[0] else old for old in e.texts], e.explanation) for e in entries]
    entries += [Entry([text], UNEXPLAINED) for text in new]
    parts = [head]
    for title in GROUPS:
        before, _ = groups.get(title, ("", []))
        parts.append(f"## {title}" + (f"\n\n{before}" if before else ""))
        items = []
        for entry in entries:
            own = [by_text[text] for text in entry.texts if text in by_text and group(by_text[text]) == title]
            if own:
                lines = [*map(shown, own), *entry.explanation.splitlines()]
                items.append("- " + "\n  ".join(lines))
        parts.append("\n".join(items))
    return "\n\n".join(parts) + "\n"


def shown(message: Message) -> str:
    """A message as a line of the page."""
    quoted = f"`` {message.text} ``" if "`" in message.text else f"`{message.text}`"
    return quoted + (" (a warning)" if message.warns else "") + "<br>"


def find(said: str, known: list[Message]) -> str | None:
    """Which of the messages was raised: the one with most words of its own, be it inside of another or in a list."""
    inside = said.splitlines() if "\n" in said else said.split(": ", 1)[1:]
    found = [message.text for message in known if pattern(message.text).fullmatch(" ".join(said.split()))]
    found += [text for part in inside if (text := find(part.strip(), known))]
    return max(found, key=lambda text: len(HOLE.sub("", text)), default=None)


def pattern(text: str) -> re.Pattern[str]:
    """What a message looks like at run time."""
    return re.compile(".*?".join(map(re.escape, HOLE.split(text))))


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8"), messages(ROOT / "metakd")), "utf-8")
