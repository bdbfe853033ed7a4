"""What the cases of bench/tiers.py have in common: sizes, prompts, settings, and the time to a first token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.tiers.prefix_load import MEASURED_TOKENS

Figures: TypeAlias = dict[str, float]
RESTARTS = 4  # of a store that lies in memory, and as many of one that does not; in a round, which computes once
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are. `vocab_size` is the model's."""

    prompt_tokens: int
    sessions: int
    turns: int
    turn_tokens: int
    new_tokens: int
    rounds: int
    vocab_size: int
    page_size: int = 16

    def prompt(self, seed: int, num_tokens: int | None = None) -> list[int]:
        """Random ids, the same for the same seed."""
        random = np.random.default_rng(seed)
        ids: list[int] = random.integers(3, self.vocab_size, num_tokens or self.prompt_tokens).tolist()
        return ids


def settings_of(sizes: Sizes, kv_cache_tokens: int, **tier: Any) -> EngineConfig:
    """Settings of an engine with room for so many tokens, and a few pages more."""
    return EngineConfig(
        page_size=sizes.page_size,
        kv_cache_tokens=kv_cache_tokens + 4 * sizes.page_size,
        warm_start_share=0.0,
        disk_cache_gb=16.0,
        **tier,
    )


def get_going(engine: Engine, sizes: Sizes, number: int) -> None:
    """Compute a short prompt, another for each `number`: the first steps of any engine take longer.

    It must not be stored yet: an engine that has computed nothing leaves some of its first long load to be computed.
    """
    (output,) = engine.generate(sizes.prompt(2000 + number, 64), ONE)
    assert output.cached_tokens == 0, output.cached_by


def first_token_s(engine: Engine, prompt: list[int], source: str | None = None) -> float:
    """Seconds to the first token of `prompt`; `source` is where it must be found."""
    (output,) = engine.generate(prompt, ONE)
    least = len(prompt) - 1 - MEASURED_TOKENS  # which a new engine may compute, to learn how long that takes
    assert source is None or output.cached_by.get(source, 0) >= least, output.cached_by
    return output.metrics.ttft_s


def files_of(folder: Path) -> list[Path]:
    """The files in `folder`, at any depth."""
    return [path for path in folder.rglob("*") if path.is_file()]


def drop_from_memory(folder: Path) -> None:
    """Ask the system to forget what it keeps of files in memory."""
    for path in files_of(folder):
        with _opened(path) as file:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)
