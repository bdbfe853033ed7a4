"""`WaitingQueue` against a dull list: order, ageing, and how much one step looks up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from prompts import random_ids
from radixkv import EngineConfig, PrefixCache, SamplingParams
from radixkv.cache.watch import PrefixWatch
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.prompts_in_progress import WORTH_WAITING_TOKENS
from radixkv.engine.request import Request
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.waiting_queue import LPM_WINDOW, MOST_REFRESHED, WaitingQueue
from radixkv.memory.req_to_token import ReqToTokenPool

PAGE = 4


def make_request(request_id: int, prompt: list[int], retractions: int = 0) -> Request:
    return Request(
        id=request_id,
        prompt_ids=np.array(prompt, np.int32),
        params=SamplingParams(),
        cache_options=CacheOptions(),
        max_new_tokens=8,
        stop_ids=frozenset(),
        generator=None,
        tokenizer=None,
        detokenizer=None,
        retractions=retractions,
    )


def make_config(**settings: object) -> ResolvedConfig:
    config = EngineConfig(
        dtype="float32",
        device="cpu",
        page_size=PAGE,
        kv_cache_tokens=4096 * PAGE,
        max_batch_tokens=64,
        max_running_requests=4,
        max_context_tokens=256,
    )
    return ResolvedConfig.of(config, **{"attention_backend": "torch", "max_skips": 3, **settings})


def share(cache: PrefixCache, ids: list[int]) -> None:
    with cache.acquire(ids) as lease:
        lease.commit(ids)


@dataclass
class DullQueue:
    """The same by its definition: a list, a counter for each request, and a look at every prompt each time."""

    cache: PrefixCache
    max_skips: int
    requests: list[Request] = field(default_factory=list)
    skips: dict[int, int] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.requests.sort(key=lambda r: r.id)
        self.skips[request.id] = 0

    def remove(self, request: Request) -> None:
        self.requests.remove(request)

    def admitted(self, request: Request) -> None:
        self.remove(request)
        for older in self.requests:
            self.skips[older.id] += older.id < request.id

    def candidates(self) -> list[Request]:
        def rank(request: Request) -> tuple[int, int]:
            if request.retractions or self.skips[request.id] >= self.max_skips:
                return 0, 0
            return 1, -self.cache.peek(request.token_ids[:-1])

        return sorted(self.requests, key=rank)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_a_dull_queue(seed: int) -> None:
    rng = random.Random(seed)
    cache = PrefixCache(64, PAGE, copy_page=lambda *_: None)
    queue, dull = WaitingQueue(make_config(), cache), DullQueue(cache, 3)
    heads = [random_ids(i, 24) for i in range(4)]
    next_id = 0
    for _ in range(300):
        if rng.random() < 0.5 and len(queue) < MOST_REFRESHED:
            prompt = rng.choice(heads)[: PAGE * rng.randint(1, 6)] + random_ids(next_id, PAGE * 2)
            request = make_request(next_id, prompt, retractions=int(rng.random() < 0.05))
            next_id += 1
            queue.add(request)
            dull.add(request)
        if rng.random() < 0.3:
            share(cache, rng.choice(heads)[: PAGE * rng.randint(1, 6)])
        if rng.random() < 0.05:
            cache.reset()
        expected = dull.candidates()
        assert [r.id for r in queue] == sorted(r.id for r in expected)
        found = list(queue.candidates())
        pages = {r.id: cache.peek(r.token_ids[:-1]) // PAGE for r in found}
        urgent = sum(bool(r.retractions) or dull.skips[r.id] >= 3 for r in expected)
        assert [r.id for r in found[:urgent]] == [r.id for r in expected[:urgent]]
        assert [pages[r.id] for r in found[urgent:]] == [pages[r.id] for r in expected[urgent:]]
        assert all(queue.cached_tokens(r) == cache.peek(r.token_ids[:-1]) for r in found)
        if found and rng.random() < 0.4:
            chosen = rng.choice(found[:3])
            leave = "admitted" if rng.random() < 0.8 else "remove"
            getattr(queue, leave)(chosen)
            getattr(dull, leave)(chosen)


def test_a_step_looks_up_a_bounded_number_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(4096, PAGE)
    head = random_ids(1, 4 * PAGE)
    queue = WaitingQueue(make_config(), cache)
    requests = [make_request(i, head + random_ids(i, 8)) for i in range(LPM_WINDOW + 50)]
    for request in requests:
        queue.add(request)
    looked_up = []
    refresh = PrefixWatch.refresh
    monkeypatch.setattr(PrefixWatch, "refresh", lambda self: looked_up.append(self) or refresh(self))

    def lookups_of_a_step() -> int:
        looked_up.clear()
        assert len(list(queue.candidates())) == LPM_WINDOW
        return len(looked_up)

    steps = LPM_WINDOW // MOST_REFRESHED
    assert [lookups_of_a_step() for _ in range(steps + 1)] == [MOST_REFRESHED] * steps + [0], "then nothing changes"
    share(cache, random_ids(2, 40))
    assert lookups_of_a_step() == 0, "it changed elsewhere"
    share(cache, head)
    assert [lookups_of_a_step() for _ in range(steps + 1)] == [MOST_REFRESHED] * steps + [0]
    assert {queue.known_tokens(request) for request in requests[:LPM_WINDOW]} == {4 * PAGE}


def test_a_request_that_comes_late_with_an_old_id_was_not_overtaken_before() -> None:
    queue = WaitingQueue(make_config(max_skips=1), PrefixCache(64, PAGE))
    first, late, young = (make_request(i, random_ids(i, 8)) for i in (0, 1, 2))
    queue.add(first)
    queue.add(young)
    queue.admitted(young)
    queue.add(late)
    assert list(queue.candidates()) == [first, late]
    newest = make_request(3, random_ids(3, 8))
    queue.add(newest)
    queue.admitted(newest)
    queue.remove(first)
    assert list(queue.candidates()) == [late]


def test_prompts_in_progress_hold_back_only_their_own_namespace() -> None:
    cache = PrefixCache(256, PAGE, copy_page=lambda *_: None)
    config = make_config(max_batch_tokens=8, max_running_requests=8)
    scheduler = Scheduler(config, cache, ReqToTokenPool(max_requests=8, max_tokens=256, page_size=PAGE))
    prompt = random_ids(1, 60)
    scheduler.add(make_request(0, prompt))
    (span,) = scheduler.next_batch()
    scheduler.computed(span)
    same, other = make_request(1, [*prompt[:50], 7, 8]), make_request(2, [*prompt[:50], 7, 8])
    other.cache_options = CacheOptions(extra_key="tenant")
    scheduler.add(same)
    scheduler.add(other)
    while same.cached_tokens is None or other.cached_tokens is None:
        for span in scheduler.next_batch():
            scheduler.computed(span)
            if span.samples:
                span.request.append(1)
    assert same.cached_tokens > 50 - WORTH_WAITING_TOKENS
    assert other.cached_tokens == 0
    for request in list(scheduler.running):
        request.finish("abort")
        scheduler.release(request)


def test_a_setting_that_was_not_resolved_is_found() -> None:
    with pytest.raises(AssertionError, match="max_running_requests was not resolved"):
        ResolvedConfig.of(EngineConfig(), max_context_tokens=16, kv_cache_tokens=16)
