"""A store on disk against one file of the same bytes."""

from __future__ import annotations

import os
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from radixkv.cache.page_keys import page_key, root_key
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.fingerprint import Fingerprint
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts

PAGE_SIZE = 16
FINGERPRINT = Fingerprint(
    weights="bench", dtype="float32", kv_dtype="auto", layout="bench", page_size=PAGE_SIZE, model="none"
)
Step = Callable[[], None]
FACTS = PageFacts(0.0, 0, 0, None, (None, None))


def measure(folder: Path | None, payload_bytes: int, total_bytes: int, batch_bytes: int, rounds: int) -> dict[str, Any]:
    """All figures for one size of pages: medians over `rounds`, in GB/s, and the ratios to the bare file."""
    num_pages, batch = max(total_bytes // payload_bytes, 1), max(batch_bytes // payload_bytes, 1)
    pages = _chain(num_pages, payload_bytes)
    batches = [pages[start : start + batch] for start in range(0, num_pages, batch)]
    seconds: dict[str, list[float]] = {}
    opened_s, found_s = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            bare, kv = Path(place) / "bare", Path(place) / "kv"
            capacity = num_pages * (payload_bytes + 512) * 17 // 16 + (1 << 20)
            store = DiskStore(kv, FINGERPRINT, payload_bytes, capacity)
            with bare.open("wb", buffering=0) as file:
                steps = [(partial(_write_file, file.fileno(), part), partial(store.write, part)) for part in batches]
                ends = partial(os.fdatasync, file.fileno()), store.flush
                _time("write", [*steps, ends], seconds)
            store.close()
            begun = time.perf_counter()
            store = DiskStore(kv, FINGERPRINT, payload_bytes, capacity)
            opened_s.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            found = store.find(root_key(None, None), b"".join(page.tokens for page in pages))
            found_s.append(time.perf_counter() - begun)
            assert len(found) == num_pages
            wanted = [found[start : start + batch] for start in range(0, num_pages, batch)]
            with bare.open("rb", buffering=0) as file:
                steps = [
                    (partial(_read_file, file.fileno(), payload_bytes, len(part)), partial(_read_store, store, part))
                    for part in wanted
                ]
                _drop_from_page_cache([bare, *kv.rglob("payloads")])
                _time("cold read", steps, seconds)
                file.seek(0)
                _time("warm read", steps, seconds)
            store.close()
    all_bytes = num_pages * payload_bytes
    return {
        "payload_bytes": payload_bytes,
        "pages": num_pages,
        "gb_per_s": {name: all_bytes / median(times) / 1e9 for name, times in seconds.items()},
        "ratios": {
            name: median(
                file / ours for file, ours in zip(seconds[f"{name} file"], seconds[f"{name} store"], strict=True)
            )
            for name in ("write", "cold read", "warm read")
        },
        "open_s": median(opened_s),
        "find_us_per_page": median(found_s) / num_pages * 1e6,
    }


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="A store on disk against one file of the same bytes, in order", box=box.SIMPLE)
    for heading in ("page", "what", "file, GB/s", "store, GB/s", "store ÷ file"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for result in results:
        for name, ratio in result["ratios"].items():
            speeds = [f"{result['gb_per_s'][f'{name} {side}']:.2f}" for side in ("file", "store")]
            table.add_row(f"{result['payload_bytes'] >> 10} KiB", name, *speeds, f"{100 * ratio:.0f} %")
    console.print(table)
    for result in results:
        console.print(
            f"{result['payload_bytes'] >> 10} KiB: {result['pages']:,} pages opened in "
            f"{1000 * result['open_s']:.0f} ms, found in {result['find_us_per_page']:.1f} µs each"
        )


def _chain(num_pages: int, payload_bytes: int) -> list[NewPage]:
    """A sequence of pages, their payloads cut from a few random ones."""
    source = os.urandom(payload_bytes + 4096)
    key, pages = root_key(None, None), []
    for number in range(num_pages):
        tokens = array("i", range(number, number + PAGE_SIZE)).tobytes()
        start = number % 4096
        pages.append(NewPage(key, tokens, source[start : start + payload_bytes], FACTS))
        key = page_key(key, tokens)
    return pages


def _time(name: str, steps: Sequence[tuple[Step, Step]], seconds: dict[str, list[float]]) -> None:
    """Time the steps of both sides, file and store, in turns, so that what else the machine does slows both alike."""
    spent = [0.0, 0.0]
    for number, pair in enumerate(steps):
        for side in (0, 1) if number % 2 else (1, 0):
            begun = time.perf_counter()
            pair[side]()
            spent[side] += time.perf_counter() - begun
    seconds.setdefault(f"{name} file", []).append(spent[0])
    seconds.setdefault(f"{name} store", []).append(spent[1])


def _write_file(file: int, pages: Sequence[NewPage]) -> None:
    for page in pages:
        os.write(file, page.payload)


def _read_file(file: int, payload_bytes: int, count: int) -> None:
    """Read on in a file; as many pages are in memory at a time as the store is asked for at a time."""
    payloads = [os.read(file, payload_bytes) for _ in range(count)]
    assert len(payloads[-1]) == payload_bytes


def _read_store(store: DiskStore, pages: Sequence[FoundPage]) -> None:
    assert None not in store.read(pages)


def _drop_from_page_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
