"""The cases of bench/tiers.py: each returns its figures as ratios of runs that are interleaved in one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from transformers import PreTrainedModel

from radixkv import Engine, RequestOutput, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.tiers.page_store import FoundPage, PageStore
from radixkv_bench.tiers.processes import killed, shared
from radixkv_bench.tiers.workload import (
    ONE,
    RESTARTS,
    Figures,
    Sizes,
    drop_from_memory,
    files_of,
    first_token_s,
    get_going,
    settings_of,
)


def restart(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """The first token of a prompt: computed, loaded by the next engine on the same path, and found in the pool."""
    computed, again, found, read = [], [], [], []
    loaded: list[float] = []
    dropped: list[float] = []
    for number in range(sizes.rounds):
        prompt = sizes.prompt(number)
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(sizes, 2 * sizes.prompt_tokens, disk_cache=folder)
            with Engine(model, None, settings) as engine:
                engine.generate(sizes.prompt(1000 + number), ONE)
                computed.append(first_token_s(engine, prompt))
                engine.flush_tiers()
            for turn in range(2 * RESTARTS):
                is_dropped = turn % 2 == 1
                if is_dropped:
                    drop_from_memory(Path(folder))
                with Engine(model, None, settings) as engine:
                    get_going(engine, sizes, 2 * RESTARTS * number + turn)
                    (dropped if is_dropped else loaded).append(first_token_s(engine, prompt, "disk"))
                    found.append(first_token_s(engine, prompt, "pool"))
                    engine.reset_cache()
                    again.append(first_token_s(engine, prompt, "disk"))
            read.append(_read_s(Path(folder)))
    pool_s = median(found)
    page_bytes = _page_bytes(model, sizes)
    num_bytes = sizes.prompt_tokens // sizes.page_size * page_bytes
    loads = {"loading": loaded, "loading again": again}
    return {
        "computed_s": median(computed),
        "loaded_s": median(loaded),
        "loaded_from_medium_s": median(dropped),
        "found_s": pool_s,
        "loaded / computed": median(loaded) / median(computed),
        "loaded / found": median(loaded) / pool_s,
        "loaded again / found": median(again) / pool_s,
        "loaded_from_medium / computed": median(dropped) / median(computed),
        "loaded_from_medium / found": median(dropped) / pool_s,
        "reading_the_files_mb_s": median(read),
        **{
            f"{name} / reading": _mb_s(num_bytes, median(times) - pool_s) / median(read)
            for name, times in loads.items()
        },
    }


def working_set(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """Conversations that take turns in a pool a tenth of what they need, with and without a disk below, and in one
    that holds them all.
    """
    tokens = sizes.sessions * sizes.turns * (sizes.turn_tokens + sizes.new_tokens)
    longest = sizes.turns * (sizes.turn_tokens + sizes.new_tokens) + sizes.new_tokens
    small = max(tokens // 10, longest + 2 * sizes.page_size)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "unbounded": settings_of(sizes, 2 * tokens),
            "small": settings_of(sizes, small),
            "small with disk": settings_of(sizes, small, disk_cache=folder),
        }
        seconds, hit_rates = {}, {}
        for name, settings in kinds.items():
            with Engine(model, None, settings) as engine:
                engine.generate(sizes.prompt(999, 64), ONE)
                started_at = time.perf_counter()
                outputs = list(_converse(engine, sizes))
                seconds[name] = time.perf_counter() - started_at
            prompt_tokens = sum(output.prompt_tokens for output in outputs)
            hit_rates[name] = sum(output.cached_tokens for output in outputs) / prompt_tokens
    return {
        "working_set_tokens": tokens,
        "pool_tokens": small,
        **{f"hit rate, {name}": rate for name, rate in hit_rates.items()},
        "throughput, with disk / without": seconds["small"] / seconds["small with disk"],
        "throughput, with disk / unbounded": seconds["unbounded"] / seconds["small with disk"],
    }


def idle_cost(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """Prompts of which nothing is stored: the time of all with a tier against without one, and the steps of decodes
    while pages are written. The share of the engine's own time that copies for the tier took is told, too.
    """
    seconds: dict[str, list[float]] = {"none": [], "through": [], "selective": [], "back": []}
    steps: dict[str, list[float]] = {}
    params = SamplingParams(max_tokens=sizes.new_tokens * 4, ignore_eos=True)
    with ExitStack() as opened:
        engines = {}
        for name in seconds:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            tier = {} if name == "none" else {"disk_cache": folder, "tier_writes": name}
            engine = Engine(model, None, settings_of(sizes, 2 * sizes.prompt_tokens, **tier))
            engines[name] = opened.enter_context(engine)
            engine.generate(sizes.prompt(999), params)  # the first steps of any engine take longer
            steps[name] = _timed_steps(engine)
        for number in range(3 * sizes.rounds):
            for name, engine in engines.items():
                engine.reset_cache()
                started_at = time.perf_counter()
                engine.generate(sizes.prompt(number), params)
                seconds[name].append(time.perf_counter() - started_at)
        busy = {name: engine.stats().tiers_busy_s for name, engine in engines.items()}
    figures = {}
    for name in ("through", "selective", "back"):
        figures[f"time, {name} / without"] = median(seconds[name]) / median(seconds["none"])
        figures[f"share of the engine's time, {name}"] = busy[name] / sum(seconds[name])
        figures[f"p99 of steps, {name} / without"] = _p99(steps[name]) / _p99(steps["none"])
    return figures


def throttled(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """A disk slower than computing: after how many requests it is left alone, and what it costs from then on."""
    prompts = [sizes.prompt(number) for number in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(sizes, 8 * sizes.prompt_tokens, disk_cache=folder, tier_writes="through")
        parts = assemble(model, None, settings)
        throttle = Throttle(parts.stores[0])
        plain = Engine(model, None, settings_of(sizes, 8 * sizes.prompt_tokens))
        with Engine.from_parts(replace(parts, stores=(throttle,))) as engine, plain:
            compute_s = [first_token_s(engine, prompt) for prompt in prompts]
            plain.generate(prompts[0], ONE)
            engine.flush_tiers()
            throttle.page_s = 3 * median(compute_s) / (sizes.prompt_tokens / sizes.page_size)
            recognised_after, slow, without = 0, [], []
            for number in range(24):
                engine.reset_cache()
                plain.reset_cache()
                prompt = prompts[number % len(prompts)]
                was_slow = engine.stats().tiers[0].is_slow
                seconds = first_token_s(engine, prompt)
                if was_slow:
                    slow.append(seconds)
                    without.append(first_token_s(plain, prompt))
                else:
                    recognised_after = number + 1
    return {
        "requests until it is left alone": recognised_after,
        "time from then on / without": median(slow) / median(without) if slow else float("nan"),
    }


CASES: dict[str, Callable[[PreTrainedModel, Sizes], Figures]] = {
    "restart": restart,
    "killed": killed,
    "working-set": working_set,
    "idle-cost": idle_cost,
    "throttled": throttled,
    "shared": shared,
}


class Throttle:
    """A store whose pages take `page_s` seconds each to read."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self.page_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        """As the store's, later."""
        time.sleep(self.page_s * len(pages))
        return self._store.read(pages)


def _converse(engine: Engine, sizes: Sizes) -> Iterator[RequestOutput]:
    """Conversations side by side: each turn goes on from all before it."""
    params = SamplingParams(max_tokens=sizes.new_tokens, ignore_eos=True)
    histories: list[list[int]] = [[] for _ in range(sizes.sessions)]
    for turn in range(sizes.turns):
        for number, history in enumerate(histories):
            history += sizes.prompt(100 * turn + number, sizes.turn_tokens)
            (output,) = engine.generate(history, params)
            history += output.token_ids
            yield output


def _timed_steps(engine: Engine) -> list[float]:
    """The durations of the steps of decodes that the engine runs from now on, in seconds."""
    durations: list[float] = []
    step = engine.step

    def timed() -> None:
        computed = engine.stats().computed_tokens
        started_at = time.perf_counter()
        step()
        seconds = time.perf_counter() - started_at
        if engine.stats().computed_tokens == computed + 1:
            durations.append(seconds)

    engine.step = timed  # type: ignore[method-assign]
    return durations


def _p99(durations: Sequence[float]) -> float:
    return quantiles(durations, n=100)[98]


def _page_bytes(model: PreTrainedModel, sizes: Sizes) -> int:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return int(values * model.dtype.itemsize * sizes.page_size)


def _mb_s(num_bytes: int, seconds: float) -> float:
    return num_bytes / 1e6 / max(1e-9, seconds)


def _read_s(folder: Path) -> float:
    """MB a second of reading the largest file in order, as it lies in memory."""
    path = max(files_of(folder), key=lambda path: path.stat().st_size)
    buffer = bytearray(4 << 20)
    num_bytes = 0
    started_at = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            num_bytes += count
    return num_bytes / 1e6 / (time.perf_counter() - started_at)
