"""bench/layouts.py: the arena, what fits, what is watched, against dull arithmetic; and one small run of everything."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv_bench.common import models
from radixkv_bench.common.errors import BenchError
from radixkv_bench.layouts import command as layouts
from radixkv_bench.layouts import kinds
from radixkv_bench.layouts import memory as layout_memory
from radixkv_bench.layouts import report as layout_report
from radixkv_bench.layouts import runs as layout_runs
from radixkv_bench.layouts import traffic as layout_traffic
from radixkv_bench.layouts.arena import Arena, Block
from radixkv_bench.layouts.kinds import CHUNKED, CONTIGUOUS, LAYOUTS, PAGED, RADIX, STATIC, Asked
from radixkv_bench.layouts.runs import Job, Measured, Settings
from radixkv_bench.layouts.traffic import Request, Sizes, Traffic, TurnLengths

TINY = "hidden=32,layers=2,heads=2,kv_heads=1,vocab=2048"
TOKEN_BYTES = 2 * 2 * 16 * 4  # two layers, K and V, a head of 16, float32
SIZES = Sizes(sessions=4, turns=2, system_tokens=21, turn_tokens=9, output_tokens=4, running=2)


def encode(text: str) -> list[int]:
    """A tokenizer that takes no time: a character a token."""
    return [ord(character) % 251 for character in text]


# -- arena -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 99)), max_size=60))
def test_arena_against_a_row_of_bytes(actions: list[tuple[bool, int, int]]) -> None:
    arena, blocks, row = Arena(), list[Block](), np.zeros(1000, bool)
    for frees, num_bytes, which in actions:
        if frees and blocks:
            block = blocks.pop(which % len(blocks))
            arena.free(block)
            row[block.start : block.end] = False
        else:
            expected = best_place(row, num_bytes)
            block = arena.alloc(num_bytes)
            assert block == Block(expected, num_bytes)
            assert not row[block.start : block.end].any()
            row[block.start : block.end] = True
            blocks.append(block)
        assert arena.held_bytes == row.sum()
        assert arena.end == (row.nonzero()[0][-1] + 1 if row.any() else 0)
        holes = holes_of(row)
        assert arena.hole_bytes == sum(size for _, size in holes)
        assert arena.hole_bytes_smaller_than(4) == sum(size for _, size in holes if size < 4)


def holes_of(row: np.ndarray) -> list[tuple[int, int]]:
    """(start, size) of each run of free bytes before the last byte that is held."""
    held = [-1, *row.nonzero()[0].tolist()]
    return [(before + 1, after - before - 1) for before, after in pairwise(held) if after - before > 1]


def best_place(row: np.ndarray, num_bytes: int) -> int:
    fitting = [(size, start) for start, size in holes_of(row) if size >= num_bytes]
    end = int(row.nonzero()[0][-1]) + 1 if row.any() else 0
    return min(fitting)[1] if fitting else end


def test_a_limited_arena_is_full_when_neither_a_hole_nor_its_end_has_room() -> None:
    arena = Arena(limit_bytes=10)
    low, _, _ = arena.alloc(3), arena.alloc(4), arena.alloc(2)
    arena.free(low)
    assert [arena.fits(num_bytes) for num_bytes in (1, 3, 4)] == [True, True, False]


# -- traffic ---------------------------------------------------------------------------------------------------------


def test_sessions_come_and_go() -> None:
    sizes = Sizes(sessions=5, turns=2, running=1)
    line = layout_traffic.build(sizes, encode).line()
    served = []
    while (request := line.pop()) is not None:
        served.append(request)
        line.answered(request)
    assert served[:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]  # two are open for each that runs
    assert sorted(served) == [(session, turn) for session in range(5) for turn in range(2)]


def test_prompts_are_the_sessions_so_far() -> None:
    traffic = layout_traffic.build(SIZES, encode)
    answers = {Request(1, 0): [7, 8]}
    prompt = traffic.prompt(Request(1, 1), answers)
    assert prompt == [*traffic.system, *traffic.asked[Request(1, 0)], 7, 8, *traffic.asked[Request(1, 1)]]
    assert len(traffic.prompt(Request(1, 0), {})) == 21 + traffic.lengths[1][0].asked


def test_lengths_are_ragged_and_the_same_every_time() -> None:
    sizes = Sizes(sessions=400, turns=1, turn_tokens=20, output_tokens=10)
    turns = [layout_traffic.session_lengths(sizes).__next__() for _ in range(2)]
    assert turns[0] == turns[1]
    asked = [lengths[0].asked for lengths, _ in zip(layout_traffic.session_lengths(sizes), range(400), strict=False)]
    assert min(asked) >= 1
    assert max(asked) == 80
    assert 15 < np.mean(asked) < 25


# -- what fits -------------------------------------------------------------------------------------------------------

GROWTHS = kinds.growths(static_tokens=50, chunk_tokens=8)


def fits(name: str, requests: list[Asked], memory_bytes: int) -> int:
    return kinds.contiguous_fit(GROWTHS[name], iter(requests), [3, 3], memory_bytes)


def test_fits_by_hand() -> None:
    requests = [Asked(20, 20), Asked(10, 17), Asked(40, 41), Asked(1, 1)]
    assert fits(STATIC, requests, 2 * 50 * 6) == 2
    assert fits(STATIC, requests, 3 * 50 * 6 - 1) == 2
    assert fits(CHUNKED, requests, 24 * 6 + 24 * 6 - 1) == 1
    assert fits(CHUNKED, [Asked(24, 24), Asked(10, 16), Asked(40, 40)], (24 + 16) * 6) == 2
    assert fits(CONTIGUOUS, [Asked(20, 20), Asked(17, 17)], 37 * 6) == 2
    assert fits(CONTIGUOUS, [Asked(20, 20), Asked(10, 17)], 37 * 6) == 1  # old and new of what grows lie side by side
    assert fits(CONTIGUOUS, [Asked(20, 20)], 20 * 6 - 1) == 0
    # pages of 4: 5, 5 and 11 of them
    assert kinds.paged_fit(iter(requests), 4, 6, 10 * 24) == 2
    assert kinds.paged_fit(iter(requests), 4, 6, 21 * 24 - 1) == 2
    assert kinds.paged_fit(iter(requests), 4, 6, 21 * 24) == 3
    # of a system prompt of 9 tokens two pages are shared: 2 + 3, + 3, + 9
    assert kinds.radix_fit(iter(requests[:3]), 9, 4, 6, 17 * 24) == 3
    assert kinds.radix_fit(iter(requests[:3]), 9, 4, 6, 17 * 24 - 1) == 2
    assert kinds.radix_fit(iter(requests[:3]), 9, 4, 6, 24) == 0


def test_requests_to_fill_a_memory_with_are_those_of_the_workload() -> None:
    lengths = ([TurnLengths(3, 2), TurnLengths(4, 1)], [TurnLengths(5, 6), TurnLengths(1, 2)])
    traffic = Traffic(SIZES, (0,) * 10, lengths, {})
    asked = kinds.endless_requests(traffic)
    assert [next(asked) for _ in range(3)] == [(13, 14), (22, 23), (13, 14)]


# -- what is watched -------------------------------------------------------------------------------------------------


def test_slots_of_a_page_that_several_read_count_once() -> None:
    spans = [SequenceSpan(4, 7, np.array([5, 9], np.int32)), SequenceSpan(0, 11, np.array([5, 2, 3], np.int32))]
    assert layout_memory.filled_slots(build_metadata(spans, page_size=4)) == 4 + 3 + 4 + 3


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(SIZES, Settings(rounds=1, page_size=4, chunk_tokens=8, memory_mb=0.1), models.parse_random_model(TINY))


@pytest.fixture(scope="module")
def measured(job: Job) -> dict[str, Measured]:
    from rich.console import Console

    return job.run(Console(quiet=True))


def test_all_layouts_give_the_same_tokens(job: Job, measured: dict[str, Measured]) -> None:
    assert list(measured) == list(LAYOUTS)
    assert list(layout_runs.differences(measured)) == []
    for request, answer in measured[RADIX].answers.items():
        assert len(answer) == job.traffic.output_tokens(request)
    assert len(measured[RADIX].answers) == 8
    assert job.token_bytes == TOKEN_BYTES


def test_differences_are_found(measured: dict[str, Measured]) -> None:
    (request, answer), *rest = sorted(measured[PAGED].answers.items())
    wrong = measured[PAGED]._replace(answers={request: [*answer[:-1], answer[-1] + 1], **dict(rest)})
    assert list(layout_runs.differences({CONTIGUOUS: measured[CONTIGUOUS], PAGED: wrong})) == [
        (CONTIGUOUS, PAGED, request, len(answer) - 1)
    ]


def steps_of(traffic: Traffic) -> list[list[tuple[int, int]]]:
    """(prompt, tokens cached) of each running request after each step, in a server of one request a place."""
    line, running, steps = traffic.line(), dict[Request, int](), []
    while True:
        while len(running) < traffic.sizes.running and (request := line.pop()) is not None:
            running[request] = 0
        if not running:
            return steps
        running = {request: steps_run + 1 for request, steps_run in running.items()}
        steps.append([(prompt_tokens(traffic, r), prompt_tokens(traffic, r) + n - 1) for r, n in running.items()])
        for request in [r for r, n in running.items() if n == traffic.output_tokens(r)]:
            del running[request]
            line.answered(request)


def prompt_tokens(traffic: Traffic, request: Request) -> int:
    turns = traffic.lengths[request.session]
    return len(traffic.system) + sum(map(sum, turns[: request.turn])) + turns[request.turn].asked


@pytest.mark.parametrize("name", [CONTIGUOUS, STATIC, CHUNKED])
def test_tensors_hold_and_copy_what_arithmetic_says(name: str, job: Job, measured: dict[str, Measured]) -> None:
    growth = kinds.growths(job.static_tokens, chunk_tokens=8)[name]
    memory, steps = measured[name].memory, steps_of(job.traffic)
    for snapshot, running in zip(memory.steps, steps, strict=True):
        live = sum(tokens for _, tokens in running) * TOKEN_BYTES
        assert snapshot.repeated == (len(running) - 1) * 21 * TOKEN_BYTES
        assert snapshot.needed + snapshot.repeated == live
        assert snapshot.internal == sum(growth.capacity(tokens) - tokens for _, tokens in running) * TOKEN_BYTES
        assert snapshot.kept == 0
    copied = sum(
        tokens - 1
        for running in steps
        for prompt, tokens in running
        if tokens > prompt and growth.capacity(tokens) != growth.capacity(tokens - 1)
    )
    assert memory.copied_bytes == copied * TOKEN_BYTES
    most = max(sum(growth.capacity(tokens) for _, tokens in running) for running in steps)
    assert most * TOKEN_BYTES <= memory.peak_bytes <= (most + job.static_tokens) * TOKEN_BYTES
    assert memory.footprint_bytes >= memory.peak_bytes
    assert max(snapshot.external for snapshot in memory.steps) <= memory.footprint_bytes
    assert (memory.footprint_bytes == memory.peak_bytes) or name != STATIC


def test_equal_tensors_leave_no_hole_that_is_too_small(measured: dict[str, Measured]) -> None:
    assert measured[STATIC].memory.mean()["external"] == 0


def test_pages_hold_what_arithmetic_says(job: Job, measured: dict[str, Measured]) -> None:
    paged, radix = measured[PAGED].memory, measured[RADIX].memory
    for snapshot in paged.steps:
        assert 0 <= snapshot.internal <= 2 * 3 * TOKEN_BYTES  # less than a page for each of two requests
        assert snapshot.repeated in (0, 21 * TOKEN_BYTES)
        assert snapshot.external == snapshot.kept == 0
    for snapshot in radix.steps:
        assert snapshot.internal >= 0
        assert 0 <= snapshot.repeated < 4 * TOKEN_BYTES  # of the page that the system prompt fills in part
    assert paged.copied_bytes == 0
    assert 0 < radix.copied_bytes < 4 * TOKEN_BYTES * len(job.traffic.asked)
    assert radix.peak_bytes < paged.peak_bytes <= measured[CONTIGUOUS].memory.peak_bytes + 6 * TOKEN_BYTES
    assert radix.mean()["kept"] > 0
    assert measured[STATIC].fit <= measured[CONTIGUOUS].fit <= measured[PAGED].fit < measured[RADIX].fit


# -- report and command ----------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["layouts.py", *arguments])
    return layouts.main()


SMALL = ["--sessions", "2", "--turns", "2", "--system-tokens", "10", "--turn-tokens", "6", "--output-tokens", "2"]


def test_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--rounds", "1", "--memory-mb", "0.1", "--random-model", TINY, "--json", str(file), "--plot", str(picture)]
    assert command(monkeypatch, *SMALL, *more) == 0
    report = json.loads(file.read_text())
    assert list(report) == ["layouts", "tokens_equal", "config"]
    assert list(report["layouts"]) == list(LAYOUTS)
    assert report["tokens_equal"] is True
    for name, one in report["layouts"].items():
        assert list(one["mean_bytes"]) == ["needed", "repeated", "internal", "external", "kept"]
        assert one["output_tokens_per_s"] > 0
        assert one["footprint_bytes"] >= one["peak_bytes"] > 0
        assert 0 <= one["wasted_share"] < 1
        assert name in capsys_text(capsys, report)
    assert report["config"]["kv_bytes_per_token"] == TOKEN_BYTES
    assert picture.stat().st_size > 1000


def capsys_text(capsys: pytest.CaptureFixture[str], report: dict[str, Any]) -> str:
    from rich.console import Console

    layout_report.print_table(report, Console(width=80))
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines()[1:10])
    return text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sessions", "0"], "--sessions must be at least "),
        (["--system-tokens", "-1"], "--system-tokens must be at least "),
        (["--rounds", "0"], "--rounds must be at least "),
        (["--memory-mb", "0"], "--memory-mb must be a number above 0, not 0"),
        (["--static-tokens", "5"], "--static-tokens 5 is less than the longest request"),
        (["--static-tokens", "5000"], "a cache of 5000 tokens is more than the model's context of 4096"),
        (["--model", "demo", "--random-model", TINY], "--model and --random-model"),
        (["--random-model", "hidden=32,layers=1,vocab=10"], "the model knows only ids below 10"),
        (["--json", "no/such/dir/x"], "no/such/dir"),
        (["--plot", "picture.doc"], "picture.doc must name an image format"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *SMALL, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("layouts: ")
    assert message in error
    assert "\n" not in error


def test_windows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def windowed(*_: object) -> object:
        from transformers import MistralConfig, MistralForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        return MistralForCausalLM(MistralConfig(vocab_size=2048, num_hidden_layers=1, sliding_window=8, **sizes))

    monkeypatch.setattr(models, "build_random", windowed)
    with pytest.raises(BenchError, match="only a window"):
        Job(SIZES, Settings(), models.parse_random_model(TINY))
