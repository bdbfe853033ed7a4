"""Knows what is cached by listening alone, for comparison with what a tree holds."""

from __future__ import annotations

import numpy as np

from radixkv import Event, RadixTree, WindowPages
from radixkv.cache.events import Cleared, Medium, Removed, Stored
from radixkv.cache.page_keys import prompt_keys
from strategies import dump

Held = list[tuple[bytes, int]]
"""(page key, page id), sorted."""


class EventMirror:
    """Replays events into sets of page keys, one for each medium."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._pages: dict[Medium, dict[bytes, int]] = {"pool": {}, "window": {}}

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        pages = self._pages[event.medium]
        if isinstance(event, Cleared):
            pages.clear()
            return
        keys, numbers = event.run.page_keys, event.run.pages.tolist()
        assert len(keys) == len(numbers) == -(-len(event.run.tokens) // event.run.page_size)
        for key, page in zip(keys, numbers, strict=True):
            if isinstance(event, Stored):
                assert key not in pages, "stored twice"
                pages[key] = page
            else:
                assert pages.pop(key) == page, "another page was removed than was stored"

    def held(self, medium: Medium = "pool") -> Held:
        return sorted(self._pages[medium].items())

    @property
    def told(self) -> list[str]:
        """The events in short."""
        return [event.cause if isinstance(event, Removed) else type(event).__name__.lower() for event in self.events]


def held_by(tree: RadixTree, windows: WindowPages | None = None) -> Held:
    """The same, read from the tree; with `windows` of the pages alone that have a window page."""
    found = [
        (key, page)
        for (namespace, tokens), state in dump(tree).items()
        for key, page in zip(
            prompt_keys(np.array(tokens, np.int32), tree.page_size, extra_key=namespace[0], cache_salt=namespace[1])[
                -len(state.pages) :
            ],
            state.pages,
            strict=True,
        )
    ]
    return sorted((key, page) for key, page in found if windows is None or windows.has(np.array([page]))[0])
