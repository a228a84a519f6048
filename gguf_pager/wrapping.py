"""Functions of another package, replaced by ours while somebody needs it. An interrupt at any line leaves nothing that harms."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Place:
    """An attribute of a module or class, what it was before, and what stands there while it is wrapped."""

    owner: Any
    name: str
    pristine: Any
    replacement: Callable[..., Any]
    original: Any


class Wrapping:
    """Replacements and the places for them.

    `put_on` and `take_off` may be called again and again, and may be interrupted half-way: each sets only what is not as it
    shall be, and what is half done does no harm, because every replacement passes on what is none of its business.
    What somebody else has put in a place meanwhile is called through while we are on top of it, and left alone where it is
    on top of us.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._first: dict[str, _Place] = {}
        self._calling = threading.local()

    def add(self, owners: Iterable[Any], name: str, replacement: Callable[..., Any]) -> None:
        """Have a replacement for `name` in each of the owners that has it, and has the first one's."""
        first = None
        for owner in owners:
            found = getattr(owner, name, None)
            if found is not None and (first is None or found is first):
                first = found
                place = _Place(owner, name, found, replacement, found)
                self._places.append(place)
                self._first.setdefault(name, place)

    def put_on(self) -> None:
        """Put every replacement in its place."""
        for place in self._places:
            current = getattr(place.owner, place.name)
            if current is not place.replacement:
                place.original = current
                setattr(place.owner, place.name, place.replacement)

    def take_off(self) -> None:
        """Put back what was there."""
        for place in self._places:
            if getattr(place.owner, place.name) is place.replacement:
                setattr(place.owner, place.name, place.original)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call what a replacement of ours stands for.

        Somebody who wrapped our replacement, and whom we have wrapped in turn, comes back here: then it is the function as it
        was at first that is called.
        """
        place = self._first[name]
        active: set[str] = self._calling.__dict__.setdefault("names", set())
        if name in active or place.original is place.pristine:
            return place.pristine(*args, **kwargs)
        active.add(name)
        try:
            return place.original(*args, **kwargs)
        finally:
            active.discard(name)
