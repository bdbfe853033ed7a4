"""`radixkv replay`: its table, JSON and picture, and errors of one line."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_runs import FakeTerminal, assert_one_line_error, run, write_lines
from radixkv import demo_model
from radixkv.cli.trace_source import load_tokenizer, progress_on_stderr, read_trace_file
from radixkv.cluster.router import new_router
from radixkv.replay.belady import measure_reuse
from radixkv.replay.fleet import Fleet, Happening
from radixkv.replay.page_numbers import number_pages
from radixkv.replay.replicas import simulate_fleet
from radixkv.replay.simulation import replay_trace
from radixkv.replay.traces import ExpandedBlocks, Request, Trace, read_trace
from stress_cases import some_of

BLOCK = 8


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """Conversations of blocks: each request continues one of three, and ends in a block of its own."""
    generator, next_id = random.Random(1), 100
    histories = [[1], [1, 2], [3]]
    rows = []
    for time in range(40):
        history = generator.choice(histories)
        history.append(next_id)
        num_tokens = BLOCK * len(history) - generator.randrange(BLOCK)
        rows.append({"timestamp": time, "input_length": num_tokens, "output_length": 1, "hash_ids": list(history)})
        next_id += 1
        if num_tokens % BLOCK:
            history.pop()
    return write_lines(tmp_path / "blocks.jsonl", map(json.dumps, rows))


def figures(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What `--json` writes."""
    out = tmp_path / "out.json"
    result = run("replay", *arguments, "--json", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert isinstance(report, dict)
    return report


def rates(report: dict[str, Any]) -> dict[tuple[str, int], float]:
    return {(row["policy"], row["capacity_tokens"]): row["hit_rate"] for row in report["results"]}


def expected_rates(
    requests: list[Request] | ExpandedBlocks,
    policies: list[str],
    capacities: list[int],
    page_size: int,
    key_tokens: int,
) -> dict[tuple[str, int], float]:
    return {
        (policy, capacity): replay_trace(requests, policy, capacity, page_size, key_tokens=key_tokens).hit_rate
        for policy in policies
        for capacity in capacities
    }


# ------------------------------------------------------------------------------------------------------------- figures


def test_json(tmp_path: Path, blocks: Path) -> None:
    report = figures(
        tmp_path, blocks, "--block-tokens", BLOCK, "--capacity-tokens", "64,128,1_000", "--policy", "lru,fifo"
    )
    trace = read_trace(blocks, block_tokens=BLOCK)
    head = {name: value for name, value in report.items() if name != "results"}
    assert head == {
        "trace": str(blocks),
        "requests": 40,
        "tokens": trace.num_tokens,
        "malformed_lines": 0,
        "keys": "block",
        "page_tokens": BLOCK,
        "ceiling": measure_reuse(trace.requests, key_tokens=BLOCK).ceiling,
    }
    assert rates(report) == expected_rates(trace.requests, ["lru", "fifo", "belady"], [64, 128, 1000], 1, BLOCK)
    assert len(report["results"]) == 9
    assert 0 < rates(report)["lru", 64] < rates(report)["belady", 64] < report["ceiling"]
    for row in report["results"]:
        assert row.keys() == {"policy", "capacity_tokens", "hit_rate", "evicted_tokens", "us_per_request"}
        assert row["us_per_request"] > 0
        assert (row["evicted_tokens"] > 0) == (row["capacity_tokens"] < 1000)


def test_blocks_as_tokens(tmp_path: Path, blocks: Path) -> None:
    options = ["--block-tokens", BLOCK, "--capacity-tokens", 100, "--policy", "belady,lru", "--keys", "token"]
    report = figures(tmp_path, blocks, *options, "--page-size", 4)
    trace = read_trace(blocks, block_tokens=BLOCK)
    assert (report["keys"], report["page_tokens"], report["tokens"]) == ("token", 4, trace.num_tokens)
    expanded = ExpandedBlocks(trace.requests, BLOCK)
    assert rates(report) == expected_rates(expanded, ["lru", "belady"], [100], 4, 1)


def test_a_limit(tmp_path: Path, blocks: Path) -> None:
    report = figures(tmp_path, blocks, "--block-tokens", BLOCK, "--capacity-tokens", 64, "--limit", 7)
    assert report["requests"] == 7


def test_token_ids(tmp_path: Path) -> None:
    rows = [{"token_ids": [1, 2, 3, 4], "output_token_ids": [5, 6, 7]}, {"token_ids": [1, 2, 3, 4, 5, 6]}]
    path = write_lines(tmp_path / "ids.jsonl", map(json.dumps, rows))
    report = figures(tmp_path, path, "--capacity-tokens", 100, "--page-size", 2)
    assert (report["keys"], report["page_tokens"]) == ("token", 2)
    assert report["ceiling"] == rates(report)["lru", 100] == 6 / 10


def test_texts(tmp_path: Path) -> None:
    text = "First Citizen: Before we proceed any further, hear me speak."
    rows = [{"input": text, "output": " All: Speak"}, {"input": text}]
    path = write_lines(tmp_path / "texts.jsonl", map(json.dumps, rows))
    for tokenizer in ("demo", demo_model.path()):
        report = figures(tmp_path, path, "--capacity-tokens", 100, "--page-size", 1, "--tokenizer", tokenizer)
        assert report["tokens"] == 2 * len(load_tokenizer("demo")(text))
        assert report["ceiling"] == 0.5


def test_the_table(blocks: Path) -> None:
    result = run("replay", blocks, "--block-tokens", BLOCK, "--capacity-tokens", "64,1000")
    assert (result.exit_code, result.stderr) == (0, "")
    trace = read_trace(blocks, block_tokens=BLOCK)
    for text in ("blocks.jsonl: 40 requests", f"{trace.num_tokens:,} tokens", "1,000", "lru", "belady", "ceiling"):
        assert text in result.stdout
    ceiling = 100 * measure_reuse(trace.requests, key_tokens=BLOCK).ceiling
    assert result.stdout.count(f"{ceiling:.1f} %") == 3  # both policies reach it with 1,000 tokens


@pytest.mark.parametrize("capacities", some_of(["64", "64,128,1000", "1000,1001,1002"], {"64,128,1000"}))
def test_the_picture(tmp_path: Path, blocks: Path, capacities: str) -> None:
    out = tmp_path / "out.png"
    options = ["--block-tokens", BLOCK, "--capacity-tokens", capacities, "--policy", "lru,fifo"]
    assert run("replay", blocks, *options, "--plot", out).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert run("replay", blocks, *options, "--plot", tmp_path / "out.svg").exit_code == 0
    svg = (tmp_path / "out.svg").read_text(encoding="utf-8")
    for label in ("lru", "fifo", "belady (optimum)", "ceiling (no limit)", "capacity, tokens"):
        assert f"<!-- {label} -->" in svg


def test_the_name_of_a_picture_may_end_in_capitals(tmp_path: Path, blocks: Path) -> None:
    out = tmp_path / "OUT.PNG"
    assert run("replay", blocks, "--block-tokens", BLOCK, "--capacity-tokens", 64, "--plot", out).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_tiers_that_differ_by_little_are_bars_of_their_own_and_those_given_twice_one(
    tmp_path: Path, blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []  # bars, and places for them

    def keep(figure: Any, *_: object, **__: object) -> None:
        (axes,) = figure.axes
        drawn.append((len(axes.patches), len({round(bar.get_y(), 3) for bar in axes.patches})))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    tiers = [option for size in (100_000, 100_008, 100_000) for option in ("--tiers", f"pool:{size}")]
    report = figures(tmp_path, blocks, "--block-tokens", BLOCK, *tiers, "--plot", tmp_path / "out.png")
    assert [row["tiers"][0]["capacity_tokens"] for row in report["results"]] == [100_000, 100_008]
    assert drawn == [(2, 2)]


def test_tiers(tmp_path: Path, blocks: Path) -> None:
    options = ["--block-tokens", BLOCK, "--tiers", "pool:64", "--tiers", "pool:64,disk:1k", "--policy", "lru,fifo"]
    report = figures(tmp_path, blocks, *options, "--tier-writes", "through,back", "--plot", tmp_path / "out.svg")
    trace = read_trace(blocks, block_tokens=BLOCK)
    assert report["ceiling"] == measure_reuse(trace.requests, key_tokens=BLOCK).ceiling
    rows = [(row["policy"], row["tier_writes"], [tier["name"] for tier in row["tiers"]]) for row in report["results"]]
    below = ["pool", "disk"]
    assert rows == [
        ("lru", "through", ["pool"]),
        ("fifo", "through", ["pool"]),
        *((policy, writes, below) for policy in ("lru", "fifo") for writes in ("through", "back")),
    ]
    alone = expected_rates(trace.requests, ["lru", "fifo"], [64, 1000], 1, BLOCK)
    for row in report["results"]:
        assert row["tiers"][0]["hit_rate"] == alone[row["policy"], 64]
        assert row["hit_rate"] == pytest.approx(sum(tier["hit_rate"] for tier in row["tiers"]))
    assert report["results"][2]["hit_rate"] == pytest.approx(alone["lru", 1000])
    svg = (tmp_path / "out.svg").read_text(encoding="utf-8")
    for label in ("pool", "disk", "ceiling (no limit)", "lru, through"):
        assert f"<!-- {label} -->" in svg


def test_the_table_of_tiers(blocks: Path) -> None:
    result = run("replay", blocks, "--block-tokens", BLOCK, "--tiers", "pool:64,disk:1k")
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("blocks.jsonl: 40 requests", "pool", "64", "disk", "1k", "so far", "written", "evicted", "ceiling"):
        assert text in result.stdout


# ------------------------------------------------------------------------------------------------------------ replicas

REPLICAS = ("--block-tokens", BLOCK, "--capacity-tokens", "160")


def test_replicas(tmp_path: Path, blocks: Path) -> None:
    report = figures(tmp_path, blocks, *REPLICAS, "--replicas", "1,4", "--router", "cost,random,threshold")
    trace = read_trace(blocks, block_tokens=BLOCK)
    alone = replay_trace(trace.requests, "lru", 160, 1, key_tokens=BLOCK).hit_rate
    assert (report["one_cache_hit_rate"], report["requests"], report["load"]) == (alone, 40, 0.6)
    assert report["ceiling"] == measure_reuse(trace.requests, key_tokens=BLOCK).ceiling
    rows = report["replicas"]
    assert [(row["replicas"], row["router"]) for row in rows] == [
        (number, router) for number in (1, 4) for router in ("cost", "random", "threshold")
    ]
    for row in rows:
        assert row["capacity_tokens"] == 160
        assert row["share_of_one_cache"] == pytest.approx(row["hit_rate"] / alone)
        assert row["max_over_mean_work"] >= 1
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
        if row["replicas"] == 1:
            assert row["hit_rate"] == alone
    fleet = Fleet(4, 160)
    again = simulate_fleet(number_pages(trace.requests, key_tokens=BLOCK), fleet, new_router("random"))
    assert rows[4]["hit_rate"] == again.hit_rate
    assert rows[4]["ttft_p99_s"] == again.ttft_percentile_s(99)


def test_replicas_of_tokens_a_load_a_shared_tier_and_incidents(tmp_path: Path, blocks: Path) -> None:
    options = ["--keys", "token", "--page-size", 4, "--replicas", 2, "--load", 0.3, "--shared-tier", "1k"]
    incidents = ["--happening", "10:join", "--happening", "20:die:0", "--happening", "5:slow:1:2.5"]
    report = figures(tmp_path, blocks, *REPLICAS, *options, *incidents)
    (row,) = report["replicas"]
    assert (report["load"], report["shared_tokens"], report["page_tokens"]) == (0.3, 1000, 4)
    trace = number_pages(ExpandedBlocks(read_trace(blocks, block_tokens=BLOCK).requests, BLOCK), 4)
    planned = [Happening(10, "join"), Happening(20, "die", 0), Happening(5, "slow", 1, 2.5)]
    again = simulate_fleet(trace, Fleet(2, 160, 1000, 0.3, happenings=planned), new_router("cost"))
    assert (row["router"], row["hit_rate"], row["ttft_p50_s"]) == ("cost", again.hit_rate, again.ttft_percentile_s(50))
    assert 0 < row["shared_hit_rate"] < row["hit_rate"]


def test_several_capacities_of_replicas(tmp_path: Path, blocks: Path) -> None:
    options = ["--block-tokens", BLOCK, "--capacity-tokens", "160,80", "--replicas", 2]
    report = figures(tmp_path, blocks, *options)
    requests = read_trace(blocks, block_tokens=BLOCK).requests
    alone = [replay_trace(requests, "lru", capacity, 1, key_tokens=BLOCK).hit_rate for capacity in (160, 80)]
    assert [row["one_cache_hit_rate"] for row in report["replicas"]] == alone
    assert report["one_cache_hit_rate"] == alone[0]


def test_the_table_and_the_picture_of_replicas(tmp_path: Path, blocks: Path) -> None:
    out = tmp_path / "out.svg"
    options = ["--replicas", "2,4", "--router", "cost,sglang-cache-aware", "--plot", out, "--shared-tier", "80"]
    result = run("replay", blocks, *REPLICAS, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    for text in (
        "blocks.jsonl: 40 requests",
        "2 × 80",
        "4 × 40",
        "sglang-cache-aware",
        "of one",
        "shared",
        "one cache",
    ):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    svg = out.read_text(encoding="utf-8")
    for label in ("one cache", "cost", "sglang-cache-aware"):
        assert f"<!-- {label} -->" in svg


# ----------------------------------------------------------------------------------------------------- malformed lines


def test_malformed_lines_are_told_of_and_skipped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ["?", '{"token_ids": [1]}', '{"token_ids": "' + "x" * 999 + '"}'])
    result = run("replay", path, "--capacity-tokens", 16, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    first, second = result.stderr.splitlines()
    assert first.startswith("radixkv: skipped: ")
    assert "line 1: this is not valid JSON" in first
    assert 'line 3: "token_ids" must be a list of token ids, not str' in second
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["malformed_lines"] == 2


def test_of_many_malformed_lines_the_first_are_told_of(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ['{"token_ids": [1]}', *["?"] * 1234])
    errors = run("replay", path, "--capacity-tokens", 16).stderr.splitlines()
    assert [error.split("line ")[1].split(":")[0] for error in errors[:-1]] == ["2", "3", "4", "5", "6"]
    assert errors[-1] == "radixkv: skipped: 1,234 malformed lines; --strict stops at the first"


def test_strict(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ['{"token_ids": [1]}', "", "?"])
    assert_one_line_error(
        run("replay", path, "--capacity-tokens", 16, "--strict"), "t.jsonl, line 3: this is not valid JSON"
    )


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity-tokens", "64,"], "--capacity-tokens must be positive numbers of tokens, comma-separated"),
        (["--capacity-tokens", "many"], "comma-separated, not 'many'"),
        (["--capacity-tokens", "0"], "comma-separated, not '0'"),
        (["--capacity-tokens", "64,-1"], "comma-separated, not '64,-1'"),
        (["--capacity-tokens", "64,7"], "a capacity of 7 tokens holds no page or block of 8"),
        ([], "give --capacity-tokens or --tiers, not neither"),
        (["--capacity-tokens", "64", "--tiers", "pool:64"], "give --capacity-tokens or --tiers, not both"),
        (["--tiers", "pool:1M,disk"], "such as pool:1M,disk:20M, not 'pool:1M,disk'"),
        (["--tiers", "disk:64"], "--tiers must begin with the pool and go downwards (pool, host, disk, shared), not "),
        (["--tiers", "pool:64,shared:64,disk:64"], "--tiers must begin with the pool and go downwards"),
        (["--tiers", "pool:64,tape:64"], "names of pool, host, disk, shared with numbers of tokens"),
        (["--tiers", "pool:64,disk:7"], "a capacity of 7 tokens holds no page or block of 8"),
        (["--tiers", "pool:64", "--policy", "belady"], "unknown eviction policy 'belady'; the policies are lru, "),
        (
            ["--tiers", "pool:64", "--tier-writes", "never"],
            "--tier-writes must be one of through, selective, back",
        ),
        (["--router", "cost"], "--router needs --replicas, the number of replicas to simulate"),
        (["--load", "0.5"], "--load needs --replicas"),
        (["--shared-tier", "1k"], "--shared-tier needs --replicas"),
        (["--decode-s", "1"], "--decode-s needs --replicas"),
        (["--replicas", "2", "--decode-s", "-1"], "decode_s must be a number of at least 0, not -1"),
        (["--happening", "5:join"], "--happening needs --replicas"),
        (["--replicas", "2", "--router", "best"], "unknown router 'best'; the routers are cost, random, round-robin"),
        (["--replicas", "0"], "--replicas must be numbers from 1 to 4,096, comma-separated, not '0'"),
        (["--replicas", "8,"], "--replicas must be numbers from 1 to 4,096, comma-separated, not '8,'"),
        (["--replicas", "many"], "--replicas must be numbers from 1 to 4,096, comma-separated, not 'many'"),
        (["--replicas", "9"], "a capacity of 7 tokens holds no page or block of 8"),
        (["--replicas", "2", "--load", "0"], "load must be a number above 0, not 0.0"),
        (["--replicas", "2", "--shared-tier", "much"], "--shared-tier must be a number of tokens, such as 20M, not 'm"),
        (["--replicas", "2", "--shared-tier", "7"], "a capacity of 7 tokens holds no page or block of 8"),
        (
            ["--replicas", "2", "--happening", "5:explode:1"],
            "such as 6000:die:3, 6000:drain:3, 6000:slow:3:4 (4 times)",
        ),
        (["--replicas", "2", "--happening", "5:slow:1:0"], "6000:slow:3:4 (4 times) or 6000:join, not '5:slow:1:0'"),
        (["--replicas", "2", "--happening", "5:die:2"], "replicas are numbered from 0 to 1; there is no 2"),
        (["--replicas", "2", "--tiers", "pool:64"], "--replicas go with --capacity-tokens and --shared-tier, not with"),
        (
            ["--replicas", "2", "--policy", "fifo"],
            "simulated replicas evict in LRU order; --replicas does not go with ",
        ),
        (["--replicas", "2", "--tier-writes", "back"], "a shared tier gets all that is computed; --replicas needs --"),
        (["--policy", "lru,mru"], "unknown eviction policy 'mru'; the policies are lru, "),
        (["--policy", ""], "unknown eviction policy ''"),
        (["--page-size", "0"], "--page-size must be an integer of at least 1, not 0"),
        (["--block-tokens", "-1"], "--block-tokens must be an integer of at least 1, not -1"),
        (["--limit", "0"], "--limit must be an integer of at least 1, not 0"),
        (["--keys", "word"], "--keys"),
        (["--tokenizer", "./no/such/place"], "no tokenizer can be loaded from './no/such/place'"),
        (["--json", "."], "--json . is a directory"),
        (["--json", "no/such/out.json"], "--json no/such/out.json: there is no directory no/such"),
        (["--plot", "no/such/out.png"], "--plot no/such/out.png: there is no directory no/such"),
        (["--plot", "out.pgf"], "--plot out.pgf must name an image format: end it with .png"),  # it needs TeX
        (["--plot", "out.doc"], "--plot out.doc must name an image format: end it with .png"),
    ],
)
def test_bad_options(blocks: Path, options: list[str], message: str) -> None:
    given = ["--block-tokens", BLOCK] if "--block-tokens" not in options else []
    if options and "--capacity-tokens" not in options and "--tiers" not in options:
        given += ["--capacity-tokens", "64"]
    assert_one_line_error(run("replay", blocks, *given, *options), message)


def test_bad_traces(tmp_path: Path, blocks: Path) -> None:
    capacity = ["--capacity-tokens", 1000]
    assert_one_line_error(run("replay", tmp_path / "missing.jsonl", *capacity), "missing.jsonl cannot be read: No such")
    assert_one_line_error(run("replay", tmp_path, *capacity), "cannot be read")
    assert_one_line_error(run("replay", write_lines(tmp_path / "empty", []), *capacity), "empty holds no requests")
    texts = write_lines(tmp_path / "texts", ['{"input": "a"}'])
    assert_one_line_error(run("replay", texts, *capacity), "give the tokenizer of the model they are meant for (--to")
    ids = write_lines(tmp_path / "ids", ['{"token_ids": [1]}'])
    message = '--keys block needs a trace of "hash_ids", not of "token_ids"'
    assert_one_line_error(run("replay", ids, *capacity, "--keys", "block"), message)
    wrong_size = run("replay", blocks, *capacity, "--strict")
    assert_one_line_error(wrong_size, "check the number of tokens a block")


def test_places_that_cannot_be_written(tmp_path: Path, blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    for option, file in (("--json", "out.json"), ("--plot", "out.png")):
        result = run("replay", blocks, "--block-tokens", BLOCK, "--capacity-tokens", 64, option, tmp_path / file)
        assert_one_line_error(result, f"{file} cannot be written: No space left on device")


def test_without_matplotlib(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("replay", blocks, "--capacity-tokens", 64, "--plot", "out.png")
    assert_one_line_error(result, "--plot needs matplotlib: pip install 'radixkv[plot]'")


# ------------------------------------------------------------------------------------------------------------ terminal


def test_bars_are_for_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "t.jsonl", ['{"token_ids": [1]}'] * 3)

    def read(stderr: io.StringIO) -> Trace:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress_on_stderr() as progress:
            return read_trace_file(path, progress, strict=True, block_tokens=BLOCK, encode=None, limit=None)[0]

    terminal, pipe = FakeTerminal(), io.StringIO()
    assert len(read(terminal).requests) == len(read(pipe).requests) == 3
    assert "reading" in terminal.getvalue()
    assert pipe.getvalue() == ""


def test_help_says_what_the_bound_is() -> None:
    text = " ".join(run("replay", "--help").stdout.replace("│", " ").split())
    for part in ("clairvoyant", "hash_ids", "token_ids", "input", "radixkv replay trace.jsonl --capacity-tokens"):
        assert part in text
