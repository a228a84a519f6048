"""Functions of another package, replaced by ours while somebody needs it. An interrupt at any line leaves nothing that harms."""

from __future__ import annotations

import functools
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
    is_on: bool = False


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
        first = once = None
        for owner in owners:
            found = getattr(owner, name, None)
            if found is None or (first is not None and found is not first):
                continue
            if once is None:
                first, once = found, self._once(name, found, replacement)
            place = _Place(owner, name, found, once, found)
            self._places.append(place)
            self._first.setdefault(name, place)

    def _once(self, name: str, pristine: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        """Return the replacement; called again by somebody whom it has called through, it is the function as it was at first."""

        @functools.wraps(replacement)
        def once(*args: Any, **kwargs: Any) -> Any:
            return (pristine if name in self._active() else replacement)(*args, **kwargs)

        return once

    def _active(self) -> set[str]:
        found: set[str] = self._calling.__dict__.setdefault("names", set())
        return found

    def put_on(self) -> None:
        """Put every replacement in its place; not over somebody who has wrapped ours, and calls it."""
        for place in self._places:
            current = getattr(place.owner, place.name)
            if current is not place.replacement and (not place.is_on or current is place.pristine):
                place.original = current
                setattr(place.owner, place.name, place.replacement)
            place.is_on = True

    def take_off(self) -> None:
        """Put back what was there."""
        for place in self._places:
            if getattr(place.owner, place.name) is place.replacement:
                setattr(place.owner, place.name, place.original)
            place.is_on = False

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call what a replacement of ours stands for: what somebody else had put there before us, or what was there at first."""
        place, active = self._first[name], self._active()
        if name in active or place.original is place.pristine:
            return place.pristine(*args, **kwargs)
        active.add(name)
        try:
            return place.original(*args, **kwargs)
        finally:
            active.discard(name)

    def pristine(self, name: str) -> Callable[..., Any]:
        """Return the function as it was at first."""
        return self._first[name].pristine  # type: ignore[no-any-return]
