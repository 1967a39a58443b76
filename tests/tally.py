"""What happens in virtual passes, counted where the library does not put it back."""

from typing import Any


class Tally:
    """A list out of reach: objects with slots are not looked into."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, value: Any) -> None:
        self.seen.append(value)
