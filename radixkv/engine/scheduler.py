"""Which request computes which tokens in the next step."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import numpy as np

from radixkv.cache.prefix_cache import PrefixCache
from radixkv.engine.drafts.drafted_spans import add_drafts
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.giving_way import GivingWay
from radixkv.engine.lower_tiers import LowerTiers
from radixkv.engine.prompts_in_progress import PromptsInProgress
from radixkv.engine.request import Request
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.span import Span
from radixkv.engine.step_times import StepTimes
from radixkv.engine.waiting_queue import WaitingQueue
from radixkv.errors import OutOfPagesError
from radixkv.memory.req_to_token import ReqToTokenPool

MAX_PROMPT_LOGITS = 512  # rows of logits in a step for `prompt_logprobs`: each has the size of the vocabulary

logger = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching: every step mixes decodes with chunks of prompts under a budget of tokens.

    - Running requests come first; each may need a page. On a full pool unused prefixes are evicted; when none is
      left, the running request that loses least is retracted: its pages go, its tokens stay, and it resumes later.
      Each computes a token, and those that were forced several, where that brings more tokens a second.
      Chunks are cut where window pages are short. The oldest running request is never retracted, so there is always
      progress. With quotas, `GivingWay` says whose pages a request may ask for; one that waits, and claims no more than
      its namespace is guaranteed, overtakes others on the way to pages.
    - Waiting requests are admitted by longest cached prefix ("lpm") or in order of arrival ("fcfs"). Under "lpm" a
      request that `max_skips` later ones have overtaken goes first, so none starves.
    - A waiting request that shares a longer prefix with one whose prompt is being computed waits for it and hits.
    - A request that is admitted and finds more of its prompt in a tier below the pool loads it first: it has its pages,
      and runs when what came is in them. It is the first to be retracted when pages are short.

    Invariant, proved by `check_invariants`: requests that run or load, and they alone, hold a lease and a row, where
    the lease keeps its pages.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        cache: PrefixCache,
        req_to_token: ReqToTokenPool,
        tiers: LowerTiers | None = None,
        speculation: Speculation | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        """step_times: how long steps of decodes take, which others note."""
        self._config = config
        self._cache = cache
        self._req_to_token = req_to_token
        self._tiers = LowerTiers.none() if tiers is None else tiers
        self._speculation = speculation
        self._step_times = StepTimes() if step_times is None else step_times
        self.waiting = WaitingQueue(config, cache)
        self.running: list[Request] = []  # in order of admission
        self.loading: list[Request] = []  # in order of admission
        self._giving_way = GivingWay(cache, self.running, self.loading)
        self._waits_for_load = False  # whether the last batch was empty, and a load must come first
        self.num_retractions = 0
        self._ended: list[Request] = []  # and not yet reported by `take_ended`

    @property
    def req_to_token(self) -> ReqToTokenPool:
        """The table of the running requests' pages."""
        return self._req_to_token

    def add(self, request: Request) -> None:
        """Queue a request. O(log waiting)."""
        self.waiting.add(request)
        self._waits_for_load = False

    @property
    def has_work(self) -> bool:
        """Whether `next_batch` would do something now, not only once a load has come."""
        if self._tiers.has_warm_pages:
            return True
        if not (self.running or self.waiting or self.loading):
            return False
        return not self._waits_for_load or self._tiers.have_news(self.loading)

    def find_choices(self, request_id: int) -> list[Request]:
        """The choices of the request to which that choice belongs, also if it has ended itself, that have not ended.

        O(waiting + running).
        """
        return [request for request in self.requests if request_id in request.choice_ids]

    @property
    def requests(self) -> list[Request]:
        """Requests that have not ended: those that run, those that load, then those that wait for pages."""
        return [*self.running, *self.loading, *self.waiting]

    def take_ended(self) -> list[Request]:
        """The requests that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def next_batch(self) -> list[Span]:
        """Choose the next step's tokens, take the pages they need, and retract or admit requests as that allows."""
        for request in [r for r in self.running if r.is_finished]:
            self.release(request)
        self._tiers.poll()
        self._receive()
        batch = self._fill()
        while not batch and self.running:
            self._make_way()
            batch = self._fill()
        self._waits_for_load = not batch and bool(self.loading)
        if self._speculation is not None:
            add_drafts(batch, self._speculation, self._config.max_batch_tokens)
        now = time.perf_counter()
        for span in batch:
            span.request.started_at = span.request.started_at or now
        return batch

    def _fill(self) -> list[Span]:
        self._grow_decodes()
        batch = [Span(r, r.num_computed, r.num_tokens) for r in self.running if r.num_pending == 1]
        longer = [r for r in self.running if r.num_pending > 1] if len(batch) < len(self.running) else []
        prefills = [r for r in longer if r.is_prefilling]
        budget = self._config.max_batch_tokens - len(batch)
        if len(prefills) < len(longer):
            forced = [r for r in longer if not r.is_prefilling]
            budget -= self._add_forced(batch, forced, has_prompts=bool(prefills or self.waiting))
        for request in prefills:
            if budget > 0:
                budget = self._add_chunk(batch, request, budget)
        if budget == 0 or not self.waiting or not self._req_to_token.num_free:
            return batch
        in_progress = PromptsInProgress()
        if self._config.prefix_cache:
            in_progress.add(*prefills, *(r for r in self.loading if r.is_prefilling))
        is_blocked = False
        for request in self.waiting.candidates():
            if budget == 0 or not self._req_to_token.num_free:
                break
            if is_blocked and not self._giving_way.can_claim(request, self.waiting.known_tokens(request)):
                continue
            if in_progress.will_compute(request, self.waiting.known_tokens(request)):
                continue
            cached_tokens = self.waiting.cached_tokens(request)
            if in_progress.will_compute(request, cached_tokens):
                continue
            if not self._admit(request, cached_tokens, budget):
                if self._cache.shares is None:
                    break  # nobody overtakes it on the way to free pages
                is_blocked = True  # but who claims what it is guaranteed
                continue
            if self._cache.shares is not None:  # some may have been retracted for it
                batch = [span for span in batch if span.request.lease is not None]
            if request.load is None:
                budget = self._add_chunk(batch, request, budget)
            if self._config.prefix_cache:
                in_progress.add(request)
        return batch

    def look_ahead(self, requests: list[Request]) -> list[Span] | None:
        """The step after one that computes the last token of each of `requests`, before its tokens are known.

        It is certain if they are all that run and nobody waits, and takes nobody's pages: those that the next tokens
        need must be free or evictable. It may be in vain, so requests must be able to go back.

        Returns: None if it is not certain.
        """
        if self.waiting or self.loading or len(requests) != len(self.running) or not self._cache.can_go_back:
            return None
        for request in requests:
            assert request.lease is not None, request
            try:
                if request.lease.capacity_tokens <= request.num_tokens:
                    request.lease.grow(request.num_tokens + 1)
                # the token before is being computed, and may have to be once more
                request.lease.cover(request.num_tokens - 1, request.num_tokens + 1)
            except OutOfPagesError:
                return None
        return [Span(request, request.num_tokens, request.num_tokens + 1) for request in requests]

    def computed(self, span: Span) -> None:
        """Note that the KV of `span` is in the pages now, and share it while the prompt is being computed."""
        request = span.request
        request.num_computed = span.last
        if request.lease is not None:
            request.lease.advance(span.last)
        if span.num_drafted:
            request.num_computed = request.num_tokens - 1 - request.num_forced  # what was accepted, and nothing else
            if request.lease is not None:
                request.lease.shrink(request.num_tokens)
        if span.first < len(request.prompt_ids):
            self._share(request)

    def release(self, request: Request) -> None:
        """A request ended: share what it computed and give back what it holds. Idempotent."""
        if request in self.waiting:
            self.waiting.remove(request)
            self._ended.append(request)
        if request.lease is not None:
            try:
                self._tiers.end_load(request)
                if request.finish_reason != "error":
                    self._share(request, is_end=True)
            except Exception:  # its output is whole; what it computed is forgotten
                logger.exception("what request %d computed cannot be shared", request.id)
            finally:
                self._leave(request)
                self._ended.append(request)
        if self._speculation is not None:
            self._speculation.ended(request)

    def check_invariants(self) -> None:
        """Prove the invariant of the class docstring. For tests."""
        for request in (*self.running, *self.loading):
            assert request.lease is not None, request
            assert request.row is not None, request
            assert np.shares_memory(request.lease.pages, self._req_to_token.row(request.row)), "another's row"
            assert request.num_computed <= request.lease.capacity_tokens, request
            assert request.lease.committed_tokens <= request.num_computed < request.num_tokens, request
        for request in self.waiting:
            assert request.lease is None, request
            assert request.row is None, request
        assert all((request.load is not None) == (request in self.loading) for request in self.requests), self.loading
        rows = len(self.running) + len(self.loading) + self._req_to_token.num_free
        assert rows == len(self._req_to_token.table), "a row was lost"

    # -- running requests --------------------------------------------------------------------------------------------

    def _grow_decodes(self) -> None:
        """Give pages to running requests whose newest tokens need some, and retract those that cannot have them."""
        for request in [r for r in self.running if not r.is_prefilling]:
            if request.lease is not None:  # not retracted meanwhile for another's sake
                self._grow(request)

    def _grow(self, request: Request) -> None:
        """Give `request` pages for its newest tokens, or retract it."""
        while request.lease is not None:
            try:
                if request.lease.capacity_tokens < request.num_tokens:
                    request.lease.grow(request.num_tokens)
            except OutOfPagesError:
                self._retract(self._giving_way.cheapest_for(request))
                continue
            if request.num_pending > 1:
                return  # those that were forced are computed as far as window pages go
            try:
                request.lease.cover(request.num_computed, request.num_tokens)
            except OutOfPagesError:  # of window pages, which no quota guarantees
                self._retract(self._giving_way.cheapest())
                continue
            return

    def _retract(self, request: Request) -> None:
        self._tiers.end_load(request)
        self._share(request)  # evictable now; if nobody needs the room before it resumes, nothing is lost
        self._leave(request)
        request.num_computed = 0
        request.retractions += 1
        self.num_retractions += 1
        self.add(request)

    def _add_forced(self, batch: list[Span], requests: list[Request], *, has_prompts: bool) -> int:
        """Add those that have forced tokens to compute, with as many of these as bring most tokens a second.

        Each computes one at least, as decodes do: all of them count, so a step is worth its length while that is cheap.
        Where there are prompts to compute, half of the budget is left to them. Returns: how many tokens were added.
        """
        num_rows = len(batch) + len(requests)
        num_tokens = len(batch) + sum(request.num_pending for request in requests)
        budget = self._config.max_batch_tokens // 2 if has_prompts else self._config.max_batch_tokens
        most = max(num_rows, min(num_tokens, budget))
        more = self._step_times.fastest_size(num_rows, most) - num_rows
        added = 0
        for request in requests:
            num_wanted = 1 + min(more, request.num_pending - 1)
            num_added = num_wanted - self._add_chunk(batch, request, num_wanted)
            more -= max(0, num_added - 1)
            added += num_added
        return added

    def _add_chunk(self, batch: list[Span], request: Request, budget: int) -> int:
        """Add as much of `request` as the budget and the window pages allow; returns what is left of the budget."""
        lease, first = request.lease, request.num_computed
        assert lease is not None, request
        lease.cover(first, first)  # what it has passed makes room
        last = min(request.num_tokens, first + budget, lease.coverable_tokens())
        if request.positions_for_prompt(first, last):
            taken = sum(len(span.prompt_positions) for span in batch)
            last = min(last, first + max(0, MAX_PROMPT_LOGITS - taken))
        if last <= first:
            return budget
        lease.cover(first, last)
        batch.append(Span(request, first, last))
        return budget - (last - first)

    def _make_way(self) -> None:
        """Let somebody go on where window pages lack for everybody: the cheapest is retracted, or a single one ends."""
        request = self._giving_way.cheapest()
        if len(self.running) > 1 or request in self.loading:
            self._retract(request)
            return
        assert request.lease is not None, request
        try:
            request.lease.cover(request.num_computed, request.num_computed + 1)
        except OutOfPagesError as error:  # its window pages are leased by somebody outside
            request.finish("error", error)
            self.release(request)

    # -- waiting requests --------------------------------------------------------------------------------------------

    def _has_room(self, request: Request, cached_tokens: int, budget: int) -> bool:
        """Whether its prompt fits, and a page for each running request besides: else one would be retracted soon."""
        if not self.running and not self.loading:
            return True
        return self._cache.has_room(
            request.num_tokens,
            cached_tokens=cached_tokens,
            next_tokens=min(request.num_tokens - cached_tokens, budget),
            spare_pages=self._giving_way.spare_pages(request),
            namespace=request.cache_options.namespace,
        )

    def _admit(self, request: Request, cached_tokens: int, budget: int) -> bool:
        """Start a waiting request if it fits, or if those are retracted who run on what its namespace lent them."""
        if self._has_room(request, cached_tokens, budget) and self._start(request):
            return True
        if request not in self.waiting or not self._giving_way.can_claim(request, cached_tokens):
            return False
        while request in self.waiting and not self._start(request):
            lender = self._giving_way.cheapest_beyond_quota()
            if lender is None:
                return False
            self._retract(lender)
        return request.lease is not None

    def _start(self, request: Request) -> bool:
        """Move a waiting request to the running ones, or to those that load; False if its pages cannot be had."""
        limit = len(request.findable_ids) if self._config.prefix_cache else 0
        options = request.cache_options._asdict()
        is_counted = options.pop("prefix_cache") and request.cached_tokens is None  # each once
        acquire = self._cache.acquire if is_counted else self._cache.resume
        row = self._req_to_token.alloc()
        try:
            with ExitStack() as undo:
                undo.callback(self._req_to_token.free, row)
                pages = self._req_to_token.row(row)
                lease = acquire(request.token_ids, max_cached_tokens=limit, row=pages, **options)
                undo.pop_all()
        except OutOfPagesError as error:
            if not self.running and not self.loading:  # nothing will free a page: pages are leased by somebody outside
                request.finish("error", error)
                self.release(request)
            return False
        request.lease = lease
        request.row = row
        if len(request.choice_ids) > 1:
            lease.checkpoint_at(limit)  # where the other choices begin
        request.num_computed = request.num_shared = lease.cached_tokens
        if request.cached_tokens is None:
            request.was_found(lease.cached_tokens)
        request.awaited = None
        self.waiting.admitted(request)
        loads = self._tiers.begin_load(request)
        (self.loading if loads else self.running).append(request)
        return True

    def _receive(self) -> None:
        """Take in what has been loaded; requests that wait for nothing more run."""
        for request in list(self.loading):
            try:
                if not self._tiers.receive(request):
                    continue
                self.loading.remove(request)
                self.running.append(request)
                self._share(request)
            except Exception as error:  # of this request alone, as where what it computed is shared
                request.finish("error", error)
                self.release(request)

    # -- pages -------------------------------------------------------------------------------------------------------

    def _share(self, request: Request, *, is_end: bool = False) -> None:
        """Commit what was computed, so that others can hit it, and let it go down to the tiers."""
        if self._config.prefix_cache and request.cache_options.prefix_cache:
            self._commit(request)
            (self._tiers.ends if is_end else self._tiers.shared)(request)

    def _commit(self, request: Request) -> None:
        assert request.lease is not None, request
        if request.num_computed <= request.lease.committed_tokens:
            return
        num_prompt = min(request.num_computed, len(request.prompt_ids))
        if request.num_accounted >= num_prompt:
            request.num_shared = request.lease.commit(request.computed_ids)
            return
        extra_key, cache_salt = request.cache_options.namespace
        prompt_ids = request.prompt_ids[:num_prompt]
        held_tokens, _ = self._cache.cached_path(prompt_ids, extra_key=extra_key, cache_salt=cache_salt)
        request.num_shared = request.lease.commit(request.computed_ids)
        request.wrote(held_tokens, request.num_shared)

    def _leave(self, request: Request) -> None:
        """A request runs or loads no more; what it holds is given back."""
        assert request.lease is not None, request
        self._waits_for_load = False
        (self.loading if request in self.loading else self.running).remove(request)
        assert request.row is not None, request
        request.lease.release()
        self._req_to_token.free(request.row)
        request.lease = request.row = None
