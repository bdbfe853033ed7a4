"""A process that writes a disk store is killed: the store opens, all that it says is there is right."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from child_process import child_environment
from store_cases import chain, found_tokens, holding, open_store

WRITER = """
import sys
from pathlib import Path
from store_cases import chain, facts, open_store
store = open_store(Path(sys.argv[1]), int(sys.argv[2]), payload_bytes=int(sys.argv[3]))
round_number = int(sys.argv[4])
number = 0
while True:
    number += 1
    name = None if number % 3 else f"tenant {round_number} {number % 17}"
    tokens = [number % 11, number % 7, *range(9), number]
    pages = chain(tokens, facts(used_s=number, namespace=(name, None)), store.payload_bytes)
    store.write(pages)
    if number % 5 == 0:
        store.touch([(page.parent_key, page.tokens, page.facts._replace(hits=number)) for page in pages])
    if number % 19 == 0:
        store.remove(pages[1].parent_key)
    print(number, flush=True)
"""


def killed_writer(path: Path, capacity: int, payload_bytes: int, number: int, rng: random.Random) -> None:
    """Let a process write to the store, and kill it after some of its writes and a moment more."""
    arguments = [str(path), str(capacity), str(payload_bytes), str(number)]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, env=child_environment()
    )
    assert writer.stdout is not None
    with writer, writer.stdout:
        for _ in range(rng.randrange(1, 40)):
            assert writer.stdout.readline()
        for _ in range(rng.randrange(3000)):  # a moment of its own, wherever the writer is then
            pass
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL


def check_after_kills(path: Path, kills: int, seed: int) -> None:
    payload_bytes = 6000
    store = holding(path, 40, payload_bytes=payload_bytes)
    capacity = store.capacity_bytes
    store.close()
    rng = random.Random(seed)
    num_pages = 0
    for number in range(kills):
        killed_writer(path, capacity, payload_bytes, number, rng)
        store = open_store(path, capacity, payload_bytes=payload_bytes)
        store.check_invariants()
        assert store.notes == []
        assert all(item.is_right for item in store.check())
        found_tokens(store, [1, 1, *range(9), 1])
        num_pages += store.stats().pages
        assert store.stats().misses == {}
        store.write(chain([5, 5, 5, number], payload_bytes=payload_bytes))
        assert found_tokens(store, [5, 5, 5, number]) == 4
        store.check_invariants()
        store.close()
    assert num_pages > 5 * kills


def test_a_killed_writer_leaves_a_store_that_is_right(tmp_path: Path) -> None:
    check_after_kills(tmp_path / "kv", kills=6, seed=1)


@pytest.mark.stress
def test_a_writer_killed_200_times_leaves_a_store_that_is_right(tmp_path: Path) -> None:
    check_after_kills(tmp_path / "kv", kills=200, seed=2)
