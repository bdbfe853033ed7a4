"""`radixkv tree`: the drawing and the JSON against a dull oracle, which is a set of page-wise prefixes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_runs import PREAMBLE, SMALL, TEXTS, assert_one_line_error, demo_copy, run, write_lines
from radixkv import Engine, SamplingParams
from radixkv.cli.display import excerpt
from radixkv.cli.tree import Edge, TreeReport, nested_json
from strategies import common

PROMPTS = [*TEXTS, f"{PREAMBLE}First Citizen: You are all resolved rather to die than to famish?"]
TOKENS = 4


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.txt", PROMPTS)


@pytest.fixture(scope="module")
def sequences(engine: Engine) -> list[list[int]]:
    """Each prompt with its output, without the last token, which is never computed."""
    outputs = [engine.generate([text], SamplingParams(max_tokens=TOKENS))[0] for text in PROMPTS]
    return [[*output.prompt_token_ids, *output.token_ids][:-1] for output in outputs]


def tree(*arguments: object) -> str:
    result = run("tree", *arguments, "--max-tokens", TOKENS)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def walk(node: dict[str, Any], path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Each edge below `node`, with all tokens from the root to its end; parents first."""
    for child in node["children"]:
        below = (*path, *child["token_ids"])
        yield below, child
        yield from walk(child, below)


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)}


def check(report: dict[str, Any], sequences: list[list[int]], page_size: int) -> None:
    """Compare what was printed with the prefixes of `sequences`, all of which are cached to the token."""
    edges = list(walk(report))
    printed = {path[:end] for path, edge in edges for end in range(len(path) - edge["num_tokens"] + 1, len(path) + 1)}
    assert printed == prefixes(sequences)
    for path, edge in edges:
        assert edge["num_tokens"] == len(edge["token_ids"])
        assert edge["num_pages"] == -(-edge["num_tokens"] // page_size)
        is_tail = edge["num_tokens"] % page_size > 0
        assert not is_tail or (edge["num_pages"] == 1 and not edge["children"])
        passing = sum(tuple(ids[: len(path)]) == path for ids in sequences)
        ending = sum(
            len(path) - edge["num_tokens"] < len(ids) < len(path) and path[: len(ids)] == tuple(ids)
            for ids in sequences
        )
        assert passing <= edge["num_prompts"] <= passing + ending
        assert edge["lock_ref"] == 0
        assert edge["age"] >= 0
        first_pages = [tuple(child["token_ids"][:page_size]) for child in edge["children"]]
        assert len(set(first_pages)) == len(first_pages)
    assert report["num_nodes"] == len(edges)
    assert report["total_pages"] == sum(edge["num_pages"] for _, edge in edges)
    assert report["total_tokens"] == report["total_pages"] * page_size
    assert report["unshared_tokens"] == sum(map(len, sequences))


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_the_tree(loaded: Engine, prompts_file: Path, sequences: list[list[int]]) -> None:
    report = json.loads(tree(prompts_file, "--json"))
    check(report, sequences, page_size=16)
    prompt_tokens = sum(len(loaded.encode(text)) for text in PROMPTS)
    assert (report["model"], report["page_size"], report["num_prompts"]) == ("demo", 16, 4)
    assert report["prompt_tokens"] == prompt_tokens
    assert report["hit_rate"] == report["saved_tokens"] / prompt_tokens
    assert report["total_bytes"] == report["total_tokens"] * loaded.kv_bytes_per_token
    for _, edge in walk(report):
        assert edge["text"] == loaded.tokenizer.decode(edge["token_ids"])


def test_saved_tokens_are_what_prompts_share_with_earlier_ones(loaded: Engine, prompts_file: Path) -> None:
    report = json.loads(tree(prompts_file, "--json"))
    prompts = [loaded.encode(text).tolist() for text in PROMPTS]
    # of the last token at least the logits are computed anew, so a hit ends before it
    hits = [max(common(ids[:-1], earlier) for earlier in [[], *prompts[:i]]) for i, ids in enumerate(prompts)]
    assert report["saved_tokens"] == sum(hits) > 0


def test_to_the_token_with_pages_of_one(prompts_file: Path, sequences: list[list[int]]) -> None:
    report = json.loads(tree(prompts_file, "--json", "--page-size", 1, *SMALL))
    check(report, sequences, page_size=1)
    assert report["evicted_tokens"] == 0


@pytest.mark.usefixtures("loaded")
def test_ages_count_the_uses_since(tmp_path: Path) -> None:
    texts = [f"{name}: {PREAMBLE}" for name in ("ROMEO", "JULIET")]
    file = write_lines(tmp_path / "prompts.txt", texts)
    report = json.loads(tree(file, "--json", "--schedule-policy", "fcfs"))
    assert min(edge["age"] for _, edge in walk(report)) == 0
    assert max(edge["age"] for _, edge in walk(report)) > 0
    for _, edge in walk(report):
        assert all(child["age"] >= edge["age"] for child in edge["children"])


def test_nesting_is_written_without_recursion() -> None:
    report = TreeReport("demo", 1, 1, 1, 0, 0.0, 0, 0, 0, 0, 0, 0)
    edge = Edge(1, 1, 1, 0, 0, 1, "]}", [1])
    depths = [1, 2, 3, 3, 1, 2, 1]
    parsed = json.loads(nested_json(report, [edge._replace(depth=depth) for depth in depths]))

    def flat(node: dict[str, Any], depth: int) -> Iterator[int]:
        for child in node["children"]:
            yield depth
            yield from flat(child, depth + 1)

    assert list(flat(parsed, 1)) == depths
    assert json.loads(nested_json(report, []))["children"] == []
    deep = nested_json(report, [edge._replace(depth=depth) for depth in range(1, 5001)])
    assert deep.endswith("]}" * 5001)


# -------------------------------------------------------------------------------------------------------------- drawing


def test_the_drawing_shows_every_edge(prompts_file: Path) -> None:
    report = json.loads(tree(prompts_file, "--json", *SMALL))
    lines = tree(prompts_file, *SMALL).splitlines()
    edges = [edge for _, edge in walk(report)]
    assert lines[0] == "demo, pages of 16 tokens"
    drawn = sorted(line[line.index("── ") + 3 :].split("  ")[1] for line in lines if "── " in line)
    assert drawn == sorted(f'"{excerpt(edge["text"])}"' for edge in edges)
    shared = next(line for line in lines if " · 3 prompts" in line)
    assert shared.split("── ")[1].startswith("16 tokens · 1 page · 0 refs · age ")
    computed_tokens = report["prompt_tokens"] - report["saved_tokens"]
    assert lines[-2] == (
        f"4 prompts of {report['prompt_tokens']} tokens: {computed_tokens} computed, {report['saved_tokens']} saved by "
        f"sharing (hit rate {100 * report['hit_rate']:.1f} %)"
    )
    assert lines[-1].startswith(f"{len(edges)} nodes keep {report['total_tokens']} tokens in ")
    assert lines[-1].endswith(f"without sharing they would be {report['unshared_tokens']}")
    assert "\x1b" not in "".join(lines)


@pytest.mark.usefixtures("loaded")
def test_long_texts_are_shortened_and_escapes_visible(tmp_path: Path) -> None:
    text = "\\ ROMEO:\nO, \tshe doth teach the torches to burn bright! " * 4
    file = write_lines(tmp_path / "prompts.jsonl", [json.dumps({"prompt": text})])
    drawing = tree(file)
    assert r'"\\ ROMEO:\nO, \tshe doth teach' in drawing
    assert "…" in drawing


@pytest.mark.usefixtures("loaded")
def test_prompts_below_a_page_are_kept_too(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.txt", ["ROMEO:"])
    assert "5 tokens · 1 page · 0 refs · age 0 · 1 prompt" in tree(file)
    (edge,) = json.loads(tree(file, "--json"))["children"]
    assert (edge["num_tokens"], edge["num_pages"], edge["children"]) == (5, 1, [])


def test_a_deep_tree_is_drawn_whole(tmp_path: Path) -> None:
    rows = [json.dumps({"token_ids": list(range(10, 12 + length))}) for length in range(40)]
    file = write_lines(tmp_path / "chain.jsonl", rows)
    lines = tree(file, "--page-size", 1, *SMALL).splitlines()
    assert max(line.index("── ") for line in lines if "── " in line) >= 4 * 30
    assert not any(line.endswith("…") for line in lines)


def test_a_small_pool_tells_that_it_evicted(prompts_file: Path) -> None:
    drawing = tree(prompts_file, "--kv-cache-tokens", 48, "--attention-backend", "torch")
    assert "tokens were evicted; a larger --kv-cache-tokens keeps the whole tree" in drawing


def test_without_a_tokenizer_edges_show_ids(tmp_path: Path) -> None:
    model = demo_copy(tmp_path / "bare", without=["tokenizer.json", "tokenizer_config.json"])
    file = write_lines(tmp_path / "ids.jsonl", [json.dumps({"token_ids": list(range(100, 116))})])
    assert "[100 101 102 103 104 105 … 110 111 112 113 114 115]" in tree(file, "--model", model, *SMALL)


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(loaded: Engine, tmp_path: Path) -> None:
    assert_one_line_error(run("tree"), "Missing argument 'PROMPTS_FILE'. (see radixkv tree --help)")
    assert_one_line_error(run("tree", tmp_path / "none.jsonl"), "none.jsonl cannot be read: No such file")
    bad = write_lines(tmp_path / "bad.jsonl", ['{"prompt": "good"}', "{}"])
    assert_one_line_error(run("tree", bad), f"{bad}, line 2: a row needs")
    long = write_lines(tmp_path / "long.txt", ["good", "long " * (loaded.max_context_tokens + 1)])
    assert_one_line_error(run("tree", long), f"{long}, line 2: the prompt has ")


def test_help_teaches_an_example() -> None:
    text = " ".join(run("tree", "--help").stdout.replace("│", " ").split())
    assert "radixkv tree prompts.txt" in text
    assert "(age)" in text
