"""Whether a consumer's index equals the caches, after losses and restarts on both sides."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console

from radixkv import PrefixCache
from radixkv.cache.events import Event
from radixkv.cache.page_keys import root_key
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.subscriber import KVEventSubscriber
from radixkv.publish.publisher import EventPublisher
from radixkv.publish.wire import name_of
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, size
from radixkv_bench.common.progress import counting_bar

PAGE_SIZE = 4
LOCAL = "tcp://127.0.0.1:0"
SETTLE_S = 120.0
MOST_BEHIND = 4096  # events that wait for a publisher's thread, which a real engine leaves more time


class LossySocket:
    """A PUB socket that loses messages."""

    def __init__(self, pub: Any, lost_share: float, rng: random.Random) -> None:
        self._pub, self._lost_share, self._rng = pub, lost_share, rng
        self.num_lost = self.num_sent = 0

    def send_multipart(self, frames: list[bytes]) -> None:
        """Send a message, or lose it."""
        self.num_sent += 1
        if self._rng.random() < self._lost_share:
            self.num_lost += 1
        else:
            self._pub.send_multipart(frames)


class Replica:
    """A small cache that evicts all the time, and what publishes its events."""

    def __init__(self, name: str, num_pages: int, lost_share: float, rng: random.Random) -> None:
        self.name = name
        self._num_pages, self._lost_share, self._rng = num_pages, lost_share, rng
        self.num_events = self.num_lost = self.num_sent = 0
        self.endpoint = self.replay_endpoint = LOCAL
        self._start()

    def _start(self) -> None:
        self.cache = PrefixCache(
            self._num_pages, PAGE_SIZE, copy_page=lambda source, target, num_tokens: None, diagnostics=False
        )
        self.cache.add_observer(self._count)
        self.publisher = EventPublisher(self.cache, self.endpoint, replay_endpoint=self.replay_endpoint)
        self.endpoint = self.publisher.sources.endpoint
        self.replay_endpoint = self.publisher.sources.replay_endpoint
        self._socket: Any = LossySocket(self.publisher.live, self._lost_share, self._rng)
        self.publisher.live = self._socket

    def _count(self, event: Event) -> None:
        self.num_events += 1

    def restart(self) -> None:
        """Begin anew at the same addresses, with an empty cache."""
        self.close()
        self._start()

    def commit(self) -> None:
        """Compute a prompt that begins as others do."""
        tokens = random_prompt(self._rng)
        with self.cache.acquire(tokens) as lease:
            lease.commit(tokens)
        while len(self.publisher.queue) > MOST_BEHIND:
            time.sleep(0.001)

    @property
    def names(self) -> set[int]:
        """Of all pages and tails that it holds."""
        return {name_of(key) for _, run in self.cache.cached_runs() for key in run.page_keys}

    def close(self) -> None:
        """End the publisher."""
        self.publisher.close()
        self.num_lost += self._socket.num_lost
        self.num_sent += self._socket.num_sent
        self._socket.num_lost = self._socket.num_sent = 0


def random_prompt(rng: random.Random) -> list[int]:
    """1 to 40 tokens, of which the first ones are often the same."""
    return [rng.randrange(1 + position // 3) for position in range(rng.randint(1, 40))]


@command("event_losses", plots=False)
def main(
    events: Annotated[int, size("Events of all caches together.", least=1)] = 20_000,
    replicas: Annotated[int, size("Caches, each with a publisher.", least=1)] = 4,
    pages: Annotated[int, size("Pages of each cache.", least=16)] = 512,
    lost: Annotated[float, typer.Option(min=0, max=0.9, help="Share of messages that are lost.")] = 0.01,
    restarts: Annotated[int, typer.Option(min=0, help="Of the consumer, and of the publishers.")] = 10,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN, help="Of prompts and losses.")] = 0,
) -> Outcome:
    """Let caches change at random, follow their events over real sockets, and compare page by page in the end.

    Exits with 1 if the index differs from a cache.
    """
    rng = random.Random(seed)
    caches = [Replica(f"replica-{number}", pages, lost, random.Random(rng.random())) for number in range(replicas)]
    started_at = time.perf_counter()
    subscriber = _listen(caches)
    num_restarts, totals = 0, {"gaps": 0, "snapshots": 0, "epochs": 0}
    try:
        with counting_bar(error_console()) as progress:
            bar = progress.add_task("", total=events)
            while (done := sum(cache.num_events for cache in caches)) < events:
                rng.choice(caches).commit()
                if done >= (num_restarts + 1) * events / (2 * restarts + 1):
                    num_restarts += 1
                    if num_restarts % 2:
                        _add(totals, subscriber)
                        subscriber.close()
                        subscriber = _listen(caches)
                    else:
                        rng.choice(caches).restart()
                progress.update(bar, completed=done)
        is_equal = _settle(subscriber, caches)
        _add(totals, subscriber)
        wrong_lookups = _wrong_lookups(subscriber.index, caches, rng)
        pages_held = sum(len(cache.names) for cache in caches)
        invariants_hold = _check(subscriber.index)
    finally:
        subscriber.close()
        for cache in caches:
            cache.close()
    figures = {
        "events": sum(cache.num_events for cache in caches),
        "messages": sum(cache.num_sent for cache in caches),
        "lost_messages": sum(cache.num_lost for cache in caches),
        "consumer_restarts": (num_restarts + 1) // 2,
        "publisher_restarts": num_restarts // 2,
        **totals,
        "pages_compared": pages_held,
        "is_equal": is_equal,
        "wrong_lookups": wrong_lookups,
        "seconds": time.perf_counter() - started_at,
        "config": environment(),
    }
    wrong = [] if is_equal and not wrong_lookups and invariants_hold else ["the index differs from the caches"]
    return Outcome(figures, partial(_show, figures), failures=wrong)


def _listen(caches: list[Replica]) -> KVEventSubscriber:
    """A consumer that knows nothing yet."""
    subscriber = KVEventSubscriber(ReplicaIndex(PAGE_SIZE), probe_s=0.2, answer_s=1.0)
    for cache in caches:
        subscriber.add_replica(cache.name, cache.endpoint, cache.replay_endpoint)
    return subscriber


def _settle(subscriber: KVEventSubscriber, caches: list[Replica]) -> bool:
    """Wait until the index equals the caches. Returns: False if it does not."""
    for cache in caches:
        if cache.publisher.queue.num_dropped:
            cache.commit()

    def is_equal(_: object) -> bool:
        with subscriber.lock:
            return all(subscriber.index.pages_of(cache.name) == cache.names for cache in caches)

    return subscriber.wait_for(is_equal, SETTLE_S)


def _wrong_lookups(index: ReplicaIndex, caches: list[Replica], rng: random.Random) -> int:
    """Of 1,000 prompts, those of which the index and some cache say different things."""
    namespace, wrong = root_key(None, None), 0
    for _ in range(1000):
        tokens = random_prompt(rng)
        peeked = {cache.name: cache.cache.peek(tokens) for cache in caches}
        wrong += index.lookup(tokens, namespace) != {name: held for name, held in peeked.items() if held}
    return wrong


def _check(index: ReplicaIndex) -> bool:
    index.check_invariants()
    return True


def _add(totals: dict[str, int], subscriber: KVEventSubscriber) -> None:
    for stats in subscriber.stats().values():
        totals["gaps"] += stats.num_gaps
        totals["snapshots"] += stats.num_snapshots
        totals["epochs"] += stats.num_restarts


def _show(figures: dict[str, Any], console: Console) -> None:
    console.print(
        f"{figures['events']:,} events in {figures['messages']:,} messages, {figures['lost_messages']:,} of them lost; "
        f"{figures['consumer_restarts']} restarts of the consumer, {figures['publisher_restarts']} of publishers; "
        f"{figures['gaps']:,} gaps, {figures['snapshots']:,} snapshots; {figures['seconds']:.0f} s",
        highlight=False,
    )
    verdict = "equals" if figures["is_equal"] else "DIFFERS FROM"
    console.print(
        f"the index {verdict} the caches: {figures['pages_compared']:,} pages, {figures['wrong_lookups']} of 1,000 "
        "lookups wrong",
        highlight=False,
    )
