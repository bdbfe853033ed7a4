"""Feeds the live page: one look at the engine serves all who watch, and none is taken while nobody does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.namespace import Namespace
from radixkv.engine.async_engine import AsyncEngine
from radixkv.serving.errors import RETRY_AFTER_S, ApiError
from radixkv.serving.live_view import (
    EngineView,
    EngineViewer,
    LiveNode,
    MayRead,
    Miss,
    changed,
    live_nodes,
    miss_row,
    node_row,
    summary,
)
from radixkv.serving.streaming import event

MIN_INTERVAL_S = 1.0
MAX_LOOKING = 0.01  # share of the engine's time that looks may take
MAX_PREPARING = 0.05  # share of one CPU's time that it may take to make them ready
MAX_WATCHERS = 16
MAX_MISSES = 50
NODES_AN_EVENT = 500
MAX_TEXTS = 50_000


class _State(NamedTuple):
    """What can be shown: a look at the engine, made ready to be sent."""

    nodes: Mapping[int, LiveNode]
    summary: Mapping[str, Any]
    misses: Sequence[Miss]


class LiveFeed:
    """Tells any number of pages what the engine holds, as it changes. Belongs to the event loop's thread.

    The engine's thread is asked between steps, at most once in `min_interval_s` and for no more than 1 % of its time;
    the rest is done in other threads. A page that reads slowly skips states.
    """

    def __init__(self, engine: AsyncEngine, model_name: str, *, min_interval_s: float = MIN_INTERVAL_S) -> None:
        self._engine = engine
        self._model_name = model_name
        self._min_interval_s = min_interval_s
        self._viewer = EngineViewer()
        self._misses: deque[Miss] = deque(maxlen=MAX_MISSES)
        self._texts: dict[bytes, str | None] = {}
        self._state: _State | None = None
        self._view: EngineView | None = None
        self._looking = asyncio.Lock()
        self._next_look_at = 0.0
        self._closing = asyncio.Event()
        self._num_watchers = 0

    @property
    def num_watchers(self) -> int:
        """Pages that are being fed."""
        return self._num_watchers

    def note_miss(self, explanation: Explanation, namespace: Namespace) -> None:
        """Remember a prompt that was not cached to its end."""
        if explanation.cached_tokens < explanation.num_tokens:
            self._misses.append(Miss(time.time(), namespace, explanation))

    def close(self) -> None:
        """End all streams. Idempotent."""
        self._closing.set()

    async def events(self, may_read: MayRead) -> AsyncGenerator[bytes]:
        """What a page is sent: everything, and then what changes. Raises: ApiError if too many pages are being fed.

        may_read: whether the page may show the text of what is cached in a namespace.
        """
        with self._watching():
            shown: _State | None = None
            while (state := await self._state_after(shown)) is not None:
                new, gone = changed(state.nodes, {} if shown is None else shown.nodes)
                for first in range(0, len(new), NODES_AN_EVENT):
                    yield await asyncio.to_thread(self._nodes_event, new[first : first + NODES_AN_EVENT], may_read)
                yield await asyncio.to_thread(self._state_event, state, gone, may_read)
                shown = state

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self._num_watchers >= MAX_WATCHERS:
            raise ApiError(
                429,
                f"at most {MAX_WATCHERS} live pages may be open, and they are; close one",
                code="too_many_pages",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_watchers += 1
        try:
            yield
        finally:
            self._num_watchers -= 1

    async def _state_after(self, shown: _State | None) -> _State | None:
        """A state that differs from the one that was `shown`, as soon as there is one; None once the feed is closed."""
        while not self._closing.is_set():
            async with self._looking:
                if time.monotonic() >= self._next_look_at:
                    await self._look()
            if self._state is not shown:
                return self._state
            await self._wait(self._next_look_at - time.monotonic())
        return None

    async def _wait(self, seconds: float) -> None:
        """Wait so long, or until the feed is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        """Ask the engine, and keep the answer if it differs from what is known."""
        while (view := await self._engine.observe(self._viewer.look)) is None:
            pass
        begun_at = time.monotonic()
        state = await asyncio.to_thread(self._made_ready, view, tuple(self._misses))
        ready_s = time.monotonic() - begun_at
        pause_s = max(self._min_interval_s, view.look_s / MAX_LOOKING, ready_s / MAX_PREPARING)
        self._next_look_at = time.monotonic() + pause_s
        if state != self._state:
            self._state = state
        self._view = view

    def _made_ready(self, view: EngineView, misses: Sequence[Miss]) -> _State:
        before = self._state
        if before is not None and self._view is not None and view.tree is self._view.tree:
            nodes = before.nodes
        else:
            nodes = live_nodes(view, {} if before is None else before.nodes)
        return _State(nodes, summary(view, nodes), misses)

    # -- in other threads --------------------------------------------------------------------------------------------

    def _nodes_event(self, nodes: Sequence[LiveNode], may_read: MayRead) -> bytes:
        rows = [node_row(node, self._text(node.first_ids) if may_read(node.namespace) else None) for node in nodes]
        return event({"nodes": rows}, "nodes")

    def _state_event(self, state: _State, gone: Sequence[int], may_read: MayRead) -> bytes:
        misses = [miss_row(miss, self._decoded, may_read=may_read(miss.namespace)) for miss in reversed(state.misses)]
        head = {"now": round(time.time(), 1), "model": self._model_name, "gone": gone}
        return event({**head, **state.summary, "misses": misses}, "state")

    def _text(self, token_ids: bytes) -> str | None:
        """The text of tokens, which are likely to be asked for again."""
        if token_ids not in self._texts:
            if len(self._texts) >= MAX_TEXTS:
                self._texts.clear()
            self._texts[token_ids] = self._decoded(np.frombuffer(token_ids, np.int32).tolist())
        return self._texts.get(token_ids)

    def _decoded(self, token_ids: Sequence[int]) -> str | None:
        tokenizer = self._engine.tokenizer
        return None if tokenizer is None else str(tokenizer.decode(list(token_ids)))
