"""Tokens a step on a trace: its recorded answers, as a model would give them that is a lookup of the trace."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv import PrefixCache
from radixkv.cache.namespace import SHARED, Namespace
from radixkv.engine.drafts.cache_drafter import CacheDrafter
from radixkv.engine.drafts.drafter import Text
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import read_text

PAGE_SIZE = 16


class Call(NamedTuple):
    """One recorded call of a model: int32 ids of the prompt and the answer together."""

    session: str
    at: float
    token_ids: NDArray[np.int32]
    num_prompt: int


@dataclass(slots=True)
class Replayed:
    """What the replay of a trace brought."""

    steps: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafting_s: float = 0.0
    accepted_by: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_per_step(self) -> float:
        return self.output_tokens / self.steps

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_step": self.tokens_per_step,
            "output_tokens": self.output_tokens,
            "steps": self.steps,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "accepted_by": dict(self.accepted_by),
            "drafting_us_a_token": self.drafting_s / self.output_tokens * 1e6,
        }


def read_calls(folder: Path, encode: Callable[[str], list[int]]) -> list[Call]:
    """The calls of all files of `folder` in order of time: JSON lines with `input` and `output`, and perhaps
    `timestamp` and `session_id`; without the latter each file is a session.

    Raises: BenchError.
    """
    calls: list[Call] = []
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchError(f"--trace must be a folder with files of JSON lines (*.jsonl); {folder} has none")
    for file in files:
        for number, line in enumerate(filter(str.strip, read_text(file).splitlines()), start=1):
            try:
                record = json.loads(line)
                prompt, answer = record["input"], record["output"]
            except (ValueError, KeyError, TypeError):
                raise BenchError(f"line {number} of {file} must be an object with the texts input and output") from None
            ids = encode(prompt)
            if not ids or not answer:
                continue
            session, at = str(record.get("session_id", file.name)), float(record.get("timestamp", len(calls)))
            calls.append(Call(session, at, np.array([*ids, *encode(answer)], np.int32), len(ids)))
    return sorted(calls, key=lambda call: call.at)


def replay(calls: Sequence[Call], most: int, *, own_sessions: bool) -> Replayed:
    """Serve the calls one after another from a cache that holds everything, with drafts of `most` tokens.

    Each step gives the tokens of the draft that the recorded answer begins with, and one more.

    Args:
        own_sessions: each session has a namespace of its own, so that drafts come from it alone.
    """
    num_pages = sum(-(-len(call.token_ids) // PAGE_SIZE) + 1 for call in calls)
    cache = PrefixCache(num_pages, PAGE_SIZE, copy_page=lambda *_: None)  # there is no KV
    drafter = CacheDrafter(cache)
    _warm_up(drafter)
    found = Replayed()
    for number, call in enumerate(calls):
        namespace = Namespace(call.session) if own_sessions else SHARED
        findable = call.num_prompt - 1
        with cache.acquire(call.token_ids, extra_key=namespace.extra_key, max_cached_tokens=findable) as lease:
            lease.commit(call.token_ids[: call.num_prompt])
            _answer(drafter, number, call, namespace, most, found)
            lease.commit(call.token_ids[:-1])
        drafter.ended(number)
    return found


def _answer(drafter: CacheDrafter, number: int, call: Call, namespace: Namespace, most: int, found: Replayed) -> None:
    known, ids = call.num_prompt, call.token_ids
    while known < len(ids):
        started_at = time.perf_counter()
        room = len(ids) - known - 1
        draft_ids, source = ids[:0], ""
        if room:
            (draft,) = drafter.draft([Text(number, ids[:known], call.num_prompt, namespace, min(most, room))])
            draft_ids, source = draft.token_ids, draft.source
        found.drafting_s += time.perf_counter() - started_at
        wrong = np.flatnonzero(draft_ids != ids[known : known + len(draft_ids)])
        accepted = int(wrong[0]) if len(wrong) else len(draft_ids)
        found.steps += 1
        found.output_tokens += accepted + 1
        found.drafted_tokens += len(draft_ids)
        found.accepted_tokens += accepted
        found.accepted_by[source] += accepted
        known += accepted + 1
    found.accepted_by.pop("", None)


def _warm_up(drafter: CacheDrafter) -> None:
    """Load what is compiled."""
    drafter.draft([Text(-1, np.arange(8, dtype=np.int32), 8, SHARED, 1)])
    drafter.ended(-1)
