"""bench/radix_tree.py: the trees that it measures, its arithmetic, and one small run of everything."""

from __future__ import annotations

import gc
import json
import sys
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from radixkv import RadixTree
from radixkv.replay.simulation import replay_trace
from radixkv.replay.traces import Request
from radixkv_bench.common.errors import BenchError
from radixkv_bench.tree import command as bench
from radixkv_bench.tree import growth as tree_growth
from radixkv_bench.tree import memory as tree_memory
from radixkv_bench.tree import report as tree_plot
from radixkv_bench.tree.growth import GrownTree, Growth, Probed, Shape, Stock, num_systems
from radixkv_bench.tree.memory import CopyRace, Metadata
from radixkv_bench.tree.report import Report, Target
from radixkv_bench.tree.tail import measure_tails


def ignore(steps: int) -> None:
    """Progress that nobody looks at."""


def sequences(tree: RadixTree) -> dict[bytes, bytes]:
    """The tokens and pages from the root to each leaf, gathered without the tree's help."""
    found: dict[bytes, bytes] = {}
    stack = [(root, b"", b"") for depth, root in tree.nodes() if not depth]
    while stack:
        node, tokens, pages = stack.pop()
        if not node.children:
            found[tokens] = pages
        stack += [(child, tokens + child.key, pages + bytes(child.pages)) for child in node.children.values()]
    return found


# -- timing ----------------------------------------------------------------------------------------------------------


def test_only_the_second_half_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def call(seconds: float) -> float:
        nonlocal now_s
        now_s += seconds
        return -seconds

    monkeypatch.setattr(tree_growth, "CLOCK", lambda: now_s)
    arguments = [(100.0,), (100.0,), (1.0,), (2.0,)]
    assert tree_growth.seconds_a_call(call, arguments) == 1.5
    results: deque[float] = deque()
    assert tree_growth.seconds_a_call(call, arguments, results) == 1.5
    assert list(results) == [-100, -100, -1, -2]


def test_growth_is_taken_within_each_round() -> None:
    growth = tree_growth.growth_of(Shape.FLAT, "x", [10, 100, 1000], {10: [1, 2, 4], 100: [5, 5, 5], 1000: [3, 4, 4]})
    assert growth == Growth(Shape.FLAT, "x", [10, 100, 1000], [2e6, 5e6, 4e6], ratio=2)


# -- grown trees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 32])
@pytest.mark.parametrize("shape", Shape)
def test_trees_have_the_shape_they_are_named_for(shape: Shape, page_size: int) -> None:
    built: list[int] = []
    grown = GrownTree(shape, 300, page_size, Stock(310), built.append)
    grown.tree.check_invariants()
    depths = [depth for depth, node in grown.tree.nodes() if not node.children]
    assert depths == [1 if shape is Shape.FLAT else 2] * 300
    assert len(list(grown.tree.nodes())) == 1 + 300 + num_systems(shape, 300)
    assert set(sequences(grown.tree)) == {grown.prompt(row).tobytes() for row in range(300)}
    assert [grown.tree.match_prefix(grown.prompt(row)).node for row in range(300)] == grown.nodes
    assert grown.tree.peek(grown.prompt(300)) == (0 if shape is Shape.FLAT else 256)
    assert sum(built) == 300


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", Shape)
def test_measuring_leaves_the_tree_as_it_was(shape: Shape, page_size: int) -> None:
    grown = GrownTree(shape, 200, page_size, Stock(300), ignore)
    before = sequences(grown.tree)
    rows = np.random.default_rng(1).integers(0, 200, 20)
    operations: list[str] = []
    for measures, _ in tree_growth.stages(rounds=2):
        for number, measure in enumerate(measures * 2):
            operations += measure(grown, rows, number % 2)
            grown.tree.match_prefix([])  # merges what the last match cut
            grown.tree.check_invariants()
            assert sequences(grown.tree) == before
    assert set(operations) == set(tree_growth.OPERATIONS)
    nodes = [grown.tree.match_prefix(grown.prompt(row)).node for row in range(200)]
    assert nodes == grown.nodes


def test_probes_of_which_nothing_stays() -> None:
    unprobed, *probed = tree_growth.probe(200, page_size=16, rounds=1, on_round=ignore)
    assert (unprobed.nodes, unprobed.max_depth, unprobed.mean_depth) == (tree_growth.PROBED_PROMPTS, 1, 1)
    for row in probed:
        if row.probes not in tree_growth.LASTING:
            assert (row.nodes, row.max_depth, row.mean_depth) == (unprobed.nodes, 1, 1)


# -- paths, bytes and requests ---------------------------------------------------------------------------------------


def test_paths_have_as_many_edges_as_pieces() -> None:
    races = tree_memory.race_copies([1024, 2048], page_size=16, rounds=1, on_round=ignore)
    assert [(race.tokens, race.edges) for race in races] == [(1024, 1), (1024, 2), (2048, 1), (2048, 4)]
    paths = tree_memory.Paths(2048, 512, 16)
    for (prompt,) in paths.arguments[: tree_memory.NUM_PATHS]:
        found = paths.tree.match_prefix(prompt)
        assert (found.length, len(found.page_runs)) == (2048, 4)


@pytest.fixture(scope="module")
def prompts() -> list[tree_growth.Ints]:
    return tree_memory.synthetic_prompts(60_000)


def test_metadata_of_a_full_cache(prompts: list[tree_growth.Ints]) -> None:
    rows = tree_memory.measure_metadata(prompts, 30_000, (1, 16), ignore)
    assert [(row.page_size, row.page_ids) for row in rows] == [
        (page_size, page_ids) for page_size in (1, 16) for page_ids in ("consecutive", "scattered")
    ]
    for row in rows:
        assert 20_000 < row.tokens <= 30_000
        assert 4 <= row.key_bytes_per_token < 4.05, "a leaf whose end went keeps its key for a time"
        own = row.key_bytes_per_token + row.page_bytes_per_token
        assert own + 100 * row.nodes / row.tokens < row.bytes_per_token < own + 2000 * row.nodes / row.tokens
        if row.page_ids == "scattered":
            assert 3.8 / row.page_size <= row.page_bytes_per_token <= 4 / row.page_size, (
                "it may have a window on others"
            )
        else:
            assert row.page_bytes_per_token < 4 / row.page_size


def test_prompts_without_a_whole_page(prompts: list[tree_growth.Ints]) -> None:
    with pytest.raises(BenchError, match="the longest prompt has 7 tokens and fills no page of 16"):
        tree_memory.measure_metadata([prompts[0][:7]], 30_000, (1, 16), ignore)


def test_replay_hits_what_the_engine_would(prompts: list[tree_growth.Ints]) -> None:
    requests = [Request.of_tokens(prompt) for prompt in prompts]
    steps: list[int] = []
    for row in tree_memory.replay(prompts, 30_000, (1, 16), rounds=2, on_round=steps.append):
        replayed = replay_trace(requests, "lru", 30_000, row.page_size)
        assert 0 < row.hit_rate == pytest.approx(replayed.hit_rate, abs=0.02)
        assert list(row.us) == ["match", "lock", "evict", "insert", "unlock"]
        assert all(us > 0 for us in row.us.values())
    assert sum(steps) == 4


# -- targets ---------------------------------------------------------------------------------------------------------


def some_report() -> Report:
    growth = [
        Growth(shape, operation, [1000, 10**6], [1.0, 10.0**6], ratio=3.0)
        for shape in Shape
        for operation in (tree_growth.INSERT, tree_growth.LOCK)
    ]
    nodes = {tree_growth.NO_PROBES: 10, "match": 15, tree_growth.BRANCHES: 20}
    return Report(
        growth,
        memcpy=[CopyRace(8192, 8192, 6, 2, ratio=3.0), CopyRace(8192, 512, 8, 2, ratio=4.0)],
        probes=[Probed(probes, number, 1, 1, 1, 1) for probes, number in nodes.items()],
        metadata=[Metadata(16, "scattered", 10**6, 2, 5.5, 4, 0.25)],
        replay=[],
        config={},
    )


def test_targets() -> None:
    report = some_report()
    assert report.targets() == {
        "insert of 64 tokens: shared tree, largest to smallest": Target(3.0, 2.0),
        "insert of 64 tokens: tenants tree, largest to smallest": Target(3.0, 2.0),
        "insert of 64 tokens: flat tree, largest to smallest": Target(3.0, 2.0),
        "match of 8192 tokens in one edge to a copy": Target(3.0, 3.0),
        "nodes after probes (match) to none": Target(1.5, 1.0),
        "bytes a token at page size 16, scattered page ids": Target(5.5, 5.0),
    }
    assert [target["met"] for target in report.as_dict()["targets"].values()] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_missed_targets_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tree_plot.print_tables(some_report(), Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 90, "a title is the longest line"
    assert next(line for line in lines if line.startswith(" insert")).split()[-3:] == ["≤", "2", "missed"]
    assert not next(line for line in lines if line.startswith(" lock")).split()[-1].endswith("missed")
    assert "1 of 6 targets met." in lines
    assert "missed: nodes after probes (match) to none: 1.50, not ≤ 1" in lines


# -- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["radix_tree.py", *arguments])
    return bench.main()


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))


def write_trace(path: Path) -> Path:
    """Conversations in Mooncake's format: a system prompt of one block, and a block more each turn."""
    fresh = count(1)
    with path.open("w") as lines:
        for _ in range(5):
            blocks = [0]
            for _ in range(4):
                blocks.append(next(fresh))
                lines.write(json.dumps({"timestamp": 0, "input_length": 512 * len(blocks) - 100, "hash_ids": blocks}))
                lines.write("\n")
    return path


SMALL = ["--quick", "--leaves", "200,100", "--rounds", "2", "--probes", "50"]


@pytest.fixture
def nothing_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare full collections: they search all that the tests' process has loaded, which takes seconds."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.mark.usefixtures("nothing_collected")
def test_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture, trace = tmp_path / "out.json", tmp_path / "out.png", write_trace(tmp_path / "trace.jsonl")
    files = ["--json", str(file), "--plot", str(picture)]
    assert command(monkeypatch, *SMALL, "--trace", str(trace), "--capacity", "100000", *files) == 0
    assert gc.isenabled()
    report: dict[str, Any] = json.loads(file.read_text())
    assert list(report) == ["targets", "growth", "memcpy", "probes", "metadata", "replay", "config", "tails", "pauses"]
    assert [(row["shape"], row["operation"]) for row in report["growth"]] == [
        (shape, operation) for shape in Shape for operation in tree_growth.OPERATIONS
    ]
    assert all(row["leaves"] == [100, 200] and min(row["us"]) > 0 for row in report["growth"])
    assert {target["limit"] for target in report["targets"].values()} == {1, 2, 3, 5, 10, 1000}
    assert all(target["met"] == (target["value"] <= target["limit"]) for target in report["targets"].values())
    num_tokens = 5 * sum(512 * blocks - 100 for blocks in (2, 3, 4, 5))
    for row, page_size in zip(report["replay"], (1, 16, 64), strict=True):
        turns = sum((512 * blocks - 100) // page_size * page_size for blocks in (2, 3, 4))  # each hits the one before
        assert row["page_size"] == page_size
        assert row["hit_rate"] == pytest.approx((4 * 512 + 5 * turns) / num_tokens, abs=1e-9)
    assert picture.stat().st_size > 1000
    out, err = capsys.readouterr()
    met = sum(target["met"] for target in report["targets"].values())
    assert f"{met} of {len(report['targets'])} targets met." in out
    assert out.count("missed: ") == len(report["targets"]) - met
    assert "warning" not in err


def test_a_busy_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench, "_measure", no_measuring)
    with pytest.raises(NotMeasuredError):
        command(monkeypatch, "--quick")
    assert "warning: the load average is 1.50 on 2 cores" in capsys.readouterr().err


class NotMeasuredError(Exception):
    """What `no_measuring` raises."""


def no_measuring(*arguments: object) -> Report:
    raise NotMeasuredError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least "),
        (["--page-size", "0"], "--page-size must be at least "),
        (["--page-size", "64"], "--page-size must divide 32"),
        (["--capacity", "15"], "--capacity must be at least "),
        (["--leaves", "1000,many"], "--leaves must be numbers, comma-separated, not '1000,many'"),
        (["--leaves", "1000,1000"], "--leaves must be two sizes or more"),
        (["--leaves", "50,1000"], "of at least 100, not '50,1000'"),
        (["--leaves", "1000,1000000000000"], "GB of memory"),
        (["--trace", "no/such/trace.jsonl", "--quick"], "no/such/trace.jsonl cannot be read"),
        (["--json", "no/such/dir/x"], "no/such/dir"),
        (["--plot", "picture.doc"], "picture.doc must name an image format"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("radix_tree: ")
    assert message in error
    assert "\n" not in error


def test_a_trace_of_texts(tmp_path: Path) -> None:
    trace = tmp_path / "texts.jsonl"
    trace.write_text('{"input": "What is a radix tree?"}\n')
    with pytest.raises(BenchError, match="is a trace of texts; --trace takes one of hash_ids or token_ids"):
        tree_memory.read_prompts(trace, 10)


def test_a_trace_of_token_ids(tmp_path: Path) -> None:
    trace = tmp_path / "ids.jsonl"
    trace.write_text('{"token_ids": [3, 1, 4]}\n{"token_ids": [1, 5]}\n{"token_ids": [9]}\n')
    assert [prompt.tolist() for prompt in tree_memory.read_prompts(trace, 2)] == [[3, 1, 4], [1, 5]]


@pytest.mark.usefixtures("nothing_collected")
def test_tails_are_of_calls_timed_one_by_one_and_the_tree_keeps_its_size() -> None:
    steps: list[int] = []
    tails, pauses = measure_tails([100, 200], 16, 20, ignore, steps.append)
    assert sum(steps) == 2 * 20
    assert [(tail.leaves, tail.calls) for tail in tails] == [(100, 20)] * 7 + [(200, 20)] * 7
    assert len({tail.operation for tail in tails}) == 7
    assert all(0 < tail.median_us <= tail.p99_us <= tail.p999_us <= tail.max_us for tail in tails)
    assert [pause.leaves for pause in pauses] == [100, 200]
    assert all(0 <= tail.slow_calls <= tail.calls and 0 <= tail.waited_calls <= tail.calls for tail in tails)


@pytest.mark.stress
def test_the_slowest_calls_can_be_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tails.json"
    arguments = ["--quick", "--tails-only", "--leaves", "100,200", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["radix_tree.py", *arguments])
    assert bench.main() == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert (len(report["tails"]), report["growth"], report["memcpy"]) == (14, [], [])
    assert "200 calls of each operation" in capsys.readouterr().out
