"""Ten thousand requests over all tiers leave nothing behind: no page, lease, file, map or thread, and no memory."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv_bench.common.redis_server import SERVER, running_redis
from tiny_models import served_model

NUM_HEADS = 40  # prefixes that come again, more than the pool holds and fewer than the disk does


class Held:
    """What this process holds of the system's resources."""

    def __init__(self) -> None:
        gc.collect()
        process = psutil.Process()
        self.files = process.num_fds()
        self.maps = len(process.memory_maps(grouped=False))
        self.threads = threading.active_count()
        self.bytes = process.memory_info().rss


@contextmanager
def engine_with_tiers(folder: Path) -> Iterator[Engine]:
    """A pool of 512 tokens above a disk that is too small, too, and above a server if there is one."""
    with ExitStack() as opened:
        shared = {"shared_cache": opened.enter_context(running_redis(folder)).url} if SERVER else {}
        config = EngineConfig(
            page_size=4, kv_cache_tokens=512, disk_cache=str(folder / "kv"), disk_cache_gb=0.0015, **shared
        )
        yield opened.enter_context(Engine(served_model("llama"), None, config))


def work(engine: Engine, rng: random.Random, num_requests: int) -> None:
    """Requests that share heads and end in tails of their own; some are left, and sometimes the pool is emptied."""
    done = 0
    while done < num_requests:
        prompts = [
            [*random_ids(rng.randrange(NUM_HEADS), 48)[: rng.randint(4, 48)], *random_ids(rng.randrange(500), 5)]
            for _ in range(rng.randint(1, 6))
        ]
        params = SamplingParams(max_tokens=rng.randint(1, 3), ignore_eos=True)
        if rng.random() < 0.2:
            stream = engine.stream(prompts[0], params)
            next(stream)
            stream.close()
            done += 1
        else:
            assert all(output.error is None for output in engine.generate(prompts, params))
            done += len(prompts)
        if rng.random() < 0.05:
            engine.reset_cache()


@pytest.mark.parametrize("num_requests", [100, pytest.param(10_000, marks=pytest.mark.stress)])
def test_nothing_is_left_behind(tmp_path: Path, num_requests: int) -> None:
    rng = random.Random(1)
    before = Held()
    with engine_with_tiers(tmp_path) as engine:
        work(engine, rng, num_requests // 2)
        engine.flush_tiers()
        half = Held()
        work(engine, rng, num_requests // 2)
        engine.flush_tiers()
        whole = Held()
        engine.check_invariants()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.loading, stats.cache.num_leases) == (0, 0, 0, 0)
        assert sum(tier.loaded_tokens for tier in stats.tiers) > 0
        assert stats.tiers[0].store.pages_evicted > 0 or num_requests < 1_000
        assert all(tier.read_errors == tier.write_errors == 0 for tier in stats.tiers)
        engine.reset_cache()
        assert engine.stats().free_pages == engine.stats().cache.num_pages
    after = Held()
    assert (whole.files, whole.threads) == (half.files, half.threads)
    assert (after.files, after.threads) == (before.files, before.threads)
    assert whole.maps <= half.maps + 5  # arenas of the allocator come and go
    assert whole.bytes <= half.bytes + (4 << 20) + num_requests * 200, "memory grows with the requests"
    assert not [path for path in Path(f"/proc/{os.getpid()}/fd").iterdir() if str(tmp_path) in os.path.realpath(path)]
