"""bench/shared_prompt.py: its workloads, its oracle, its arithmetic, and one small run of everything."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radixkv.engine.prompts_in_progress import WORTH_WAITING_TOKENS
from radixkv_bench.common import corpus, models
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.runners import Answer, Usage
from radixkv_bench.shared_prompt import command as shared_prompt
from radixkv_bench.shared_prompt import job, measure, oracle, prompts_file, workloads
from radixkv_bench.shared_prompt.measure import Round
from radixkv_bench.shared_prompt.workloads import Request, Workload

TINY = "hidden=32,layers=2,heads=2,kv_heads=1,vocab=2048"


def encode(text: str) -> list[int]:
    """A tokenizer that takes no time: a character a token."""
    return [ord(character) % 251 for character in text]


def built(name: str, **sizes: int) -> Workload:
    return workloads.build(name, workloads.sizes(name, sizes), encode)


def answered(workload: Workload) -> dict[int, list[int]]:
    """An answer for each request that no other has."""
    return {n: [1000 + n] * workload.output_tokens for n in range(len(workload.requests))}


def prompts(workload: Workload) -> list[list[int]]:
    return [workload.prompt(number, answered(workload)) for number in range(len(workload.requests))]


# -- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["few-shot", "document"])
def test_requests_share_exactly_the_prefix(name: str) -> None:
    workload = built(name, requests=5, prefix_tokens=70, suffix_tokens=80, output_tokens=3)
    asked = prompts(workload)
    assert [len(prompt) for prompt in asked] == [150] * 5
    assert len({tuple(prompt[:70]) for prompt in asked}) == 1
    assert len({tuple(prompt[70:]) for prompt in asked}) == 5
    assert workload.waves == [[0, 1, 2, 3, 4]]
    assert workload.prompt_tokens == 750
    assert workload.longest_tokens == 153
    assert workload.unshared_tokens == 5 * 153


def test_few_shot_is_text_a_reader_would_recognise() -> None:
    text = "".join(map(chr, built("few-shot", requests=1, prefix_tokens=400, suffix_tokens=100).requests[0].tokens))
    assert text.startswith("Answer each question about Python's standard library")
    assert text.count("\nQ: What does textwrap.") >= 1
    assert text.endswith("\nQ: What does this function do?\nA:")


def test_conversations_grow_by_answer_and_question() -> None:
    workload = built("multi-turn", sessions=3, turns=4, prefix_tokens=10, suffix_tokens=40, output_tokens=5)
    assert workload.waves == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    outputs, asked = answered(workload), prompts(workload)
    for session in range(3):
        history = asked[session]
        assert len(history) == 50
        assert history[:10] == asked[0][:10]
        for turn in range(1, 4):
            number = 3 * turn + session
            before = history + outputs[number - 3]
            assert asked[number][: len(before)] == before
            assert len(asked[number]) == len(before) + 40
            history = asked[number]
    questions = {request.tokens[-40:] for request in workload.requests}
    assert len(questions) == 12
    assert workload.longest_tokens == 10 + 4 * (40 + 5)
    assert workload.unshared_tokens == 3 * workload.longest_tokens
    assert workload.prompt_tokens == sum(map(len, asked))


def test_tree_branches_from_each_answered_state() -> None:
    workload = built("tree", depth=3, branching=2, prefix_tokens=20, suffix_tokens=40, output_tokens=2)
    assert [len(wave) for wave in workload.waves] == [2, 4, 8]
    parents = [request.parent for request in workload.requests]
    assert parents == [None, None, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    outputs, asked = answered(workload), prompts(workload)
    for number, parent in enumerate(parents):
        before = asked[parent] + outputs[parent] if parent is not None else asked[0][:20]
        assert asked[number][: len(before)] == before
        assert len(asked[number]) == len(before) + 40


def test_none_shares_nothing() -> None:
    asked = prompts(built("none", requests=6, suffix_tokens=50))
    assert oracle.best_hits([(prompt, [0]) for prompt in asked], page_size=8).hit_tokens == 0


def test_workloads_are_the_same_every_time() -> None:
    assert built("tree", depth=2, branching=2) == built("tree", depth=2, branching=2)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("fewshot", {}, "unknown workload 'fewshot'; the workloads are few-shot, multi-turn"),
        ("few-shot", {"turns": 3}, "--turns means nothing for the workload few-shot"),
        ("few-shot", {"requests": 0}, "--requests must be at least 1, not 0"),
        ("multi-turn", {"prefix_tokens": -1}, "--prefix-tokens must be at least 0, not -1"),
    ],
)
def test_wrong_sizes_are_named(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        built(name, **sizes)


def test_more_questions_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    few = list(islice(corpus.functions(), 20))
    monkeypatch.setattr(corpus, "functions", lambda: iter(few))
    with pytest.raises(BenchError, match="no more distinct questions of 1 tokens"):
        built("few-shot", requests=100, prefix_tokens=0, suffix_tokens=1)


def test_more_text_than_there_is() -> None:
    with pytest.raises(BenchError, match="ask for fewer requests or shorter ones"):
        corpus.take(iter(range(5)), 6)


# -- prompts files ---------------------------------------------------------------------------------------------------


def read(path: Path, rows: int = 10) -> Workload:
    return prompts_file.read(path, encode, rows=rows, output_tokens=2)


def test_rows_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "abc", "task_id": 1},
        {"turns": ["one", "two"], "category": "writing"},
        {"token_ids": [5, 6]},
        {"input": "def", "session_id": "x", "timestamp": 3},
        {"input_tok_ids": [7], "output_toks": 9},
        {"question": "why?", "answer": "so"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    workload = read(file)
    assert workload.waves == [[0, 1, 2, 3, 4, 5], [6]]
    assert [request.parent for request in workload.requests] == [None] * 6 + [1]
    expected = ["abc", "\n\nUser: one\n\nAssistant:", None, "def", None, "Q: why?\nA:", "\n\nUser: two\n\nAssistant:"]
    for request, text in zip(workload.requests, expected, strict=True):
        assert text is None or list(request.tokens) == encode(text)
    assert [workload.requests[i].tokens for i in (2, 4)] == [(5, 6), (7,)]
    assert len(read(file, rows=2).requests) == 3


def test_compressed_rows(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write('{"prompt": "abc"}\n')
    assert read(file).requests == (Request(None, tuple(encode("abc"))),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"', "line 2: not JSON"),
        ("[1, 2]", "line 2: a row must be an object, not list"),
        ('{"text": "x"}', "line 2: a row needs one of the fields .*; this one has text"),
        ('{"prompt": ""}', "line 2: 'prompt' must be a text that is not empty"),
        ('{"turns": ["a", 1]}', "line 2: 'turns' must be a list of texts"),
        ('{"token_ids": []}', "line 2: 'token_ids' must be a list of token ids"),
        ('{"token_ids": [1, -2]}', "line 2: 'token_ids' holds -2 at position 1"),
        ('{"token_ids": [true]}', "line 2: 'token_ids' holds True at position 0"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(BenchError, match=message):
        read(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot read"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BenchError, match="holds no prompts"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "plain.gz").write_text("{}")
    with pytest.raises(BenchError, match="cannot read"):
        read(tmp_path / "plain.gz")


# -- the oracle ------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(st.lists(st.tuples(ids, ids), max_size=8), st.integers(1, 4))
def test_best_hits_against_comparing_all_pairs(served: list[tuple[list[int], list[int]]], page_size: int) -> None:
    hits, kept = 0, list[list[int]]()
    for prompt, answer in served:
        longest = 0
        for sequence in kept:
            common = 0
            while common < min(len(prompt) - 1, len(sequence)) and prompt[common] == sequence[common]:
                common += 1
            longest = max(longest, common)
        hits += longest // page_size * page_size
        kept.append(prompt + answer[:-1])
    assert oracle.best_hits(served, page_size) == (sum(len(prompt) for prompt, _ in served), hits)


def test_best_hits_where_states_are_kept() -> None:
    preamble = list(range(20))
    asked = [([*preamble, 100 + number, 7], [8, 9]) for number in range(4)]
    assert oracle.best_state_hits(asked, 100) == (4 * 22, 2 * 20)  # the third and fourth: the second computes it again
    assert oracle.best_state_hits(asked, 8) == (4 * 22, 16 + 2 * 20)
    follow_up = ([*asked[0][0], 8, 5, 6], [1])  # the answer's last token was not fed
    assert oracle.best_state_hits([asked[0], follow_up], 100).hit_tokens == 23
    assert oracle.best_state_hits([asked[0], asked[0], asked[0]], 100).hit_tokens == 21


def test_best_hits_by_hand() -> None:
    history = list(range(8))
    hits = oracle.best_hits([(history, [8, 9]), (history, [8]), ([*history, 8, 9, 10, 11], [0])], page_size=4)
    assert hits == (28, 0 + 4 + 8)  # of the same prompt again its last page is computed, for the logits
    assert hits.rate == 12 / 28
    assert oracle.best_hits([], page_size=4).rate == 0


def test_distinct_tokens_counts_each_page_once() -> None:
    assert oracle.distinct_tokens([list(range(10)), [*range(8), 99], list(range(8))], page_size=4) == 8 + 4 + 4


# -- measuring -------------------------------------------------------------------------------------------------------


class EchoRunner:
    """Answers with the length of the prompt, and remembers what it was asked."""

    def __init__(self, name: str, log: list[str], wrong_at: int | None = None) -> None:
        self.name, self._log, self._wrong_at = name, log, wrong_at
        self.prompts: list[list[int]] = []

    def reset(self) -> None:
        self.prompts = []

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        self._log.append(self.name)
        self.prompts += prompts
        answers = [[len(prompt) % 100] * output_tokens for prompt in prompts]
        if self._wrong_at is not None:
            answers[0][self._wrong_at] += 1
        return [Answer(answer, 0.25, 0.5) for answer in answers]

    def usage(self) -> Usage:
        return Usage(sum(map(len, self.prompts)), 0, 10)


def test_answers_feed_the_next_wave() -> None:
    chain = Workload("chain", (Request(None, (1, 2)), Request(None, (3,)), Request(0, (4,))), output_tokens=2)
    runner = EchoRunner("echo", [])
    waves: list[None] = []
    done = measure.play(chain, runner, lambda: waves.append(None))
    assert runner.prompts == [[1, 2], [3], [1, 2, 2, 2, 4]]
    assert done.outputs == {0: [2, 2], 1: [1, 1], 2: [5, 5]}
    assert done.ttft_s_by_wave == [[0.25, 0.25], [0.25]]
    assert len(waves) == 2


def test_rounds_are_interleaved_there_and_back() -> None:
    log: list[str] = []
    runners = [EchoRunner("a", log), EchoRunner("b", log)]
    one = Workload("one", (Request(None, (1,)),), output_tokens=1)
    played = measure.interleave(one, runners, 3, on_play=lambda name, number: None, on_wave=lambda: None)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert [len(rounds) for rounds in played.values()] == [3, 3]


def test_the_first_difference_is_found() -> None:
    two = Workload("two", (Request(None, (1,)), Request(None, (1, 2))), output_tokens=4)
    rounds = [[measure.play(two, EchoRunner(name, [], wrong), lambda: None)] for name, wrong in (("a", None), ("b", 3))]
    played = dict(zip("ab", rounds, strict=True))
    assert list(measure.disagreements(played, "a")) == [("a", "b", 0, 3, 1, 2)]
    assert list(measure.disagreements({"a": rounds[0]}, "a")) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], quantile: float) -> None:
    assert measure.percentile(values, quantile) == pytest.approx(float(np.quantile(values, quantile)), abs=1e-6)


def test_speedup_is_taken_within_each_round() -> None:
    def took(*seconds: float) -> list[Round]:
        return [Round(total_s, {}, [], Usage(0, 0, 0)) for total_s in seconds]

    assert measure.speedup(took(1, 10, 2), took(3, 20, 10)) == 3


# -- models ----------------------------------------------------------------------------------------------------------


def test_random_model_sizes() -> None:
    sizes = models.parse_random_model("hidden=512, layers=8,heads=8,kv_heads=2")
    assert str(sizes) == "hidden=512,layers=8,heads=8,kv_heads=2,intermediate=1408,vocab=32000,head_dim=64"
    assert models.parse_random_model("hidden=128,layers=1").heads == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden=512", "needs layers"),
        ("", "unknown size ''"),
        ("hidden=512,layers=2,depth=3", "unknown size 'depth'; the sizes are hidden, layers"),
        ("hidden=512,layers=two", "layers must be a positive integer, not 'two'"),
        ("hidden=512,layers=0", "layers must be a positive integer, not '0'"),
        ("hidden=100,layers=1,heads=3", "3 heads do not divide hidden=100"),
        ("hidden=64,layers=1,heads=4,kv_heads=3", "kv_heads=3 does not divide heads=4"),
        ("hidden=6,layers=1,heads=2", "head_dim must be even"),
    ],
)
def test_random_model_mistakes(text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        models.parse_random_model(text)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.build_random(models.parse_random_model(TINY), context_tokens=100)


def test_random_weights_are_the_same_every_time(tiny: Any) -> None:
    again = models.build_random(models.parse_random_model(TINY), context_tokens=100)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), again.parameters(), strict=True))


def test_a_twin_shares_weights_and_nothing_else(tiny: Any) -> None:
    other = models.twin(tiny)
    assert [a.data_ptr() for a in tiny.parameters()] == [b.data_ptr() for b in other.parameters()]
    other.set_attn_implementation("eager")
    assert tiny.config._attn_implementation == "sdpa"
    prompt = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        assert torch.allclose(tiny(prompt).logits, other(prompt).logits, atol=1e-5)


def test_top_two_are_the_largest_logits(tiny: Any) -> None:
    with torch.inference_mode():
        logits = tiny(torch.tensor([[7, 8, 9]])).logits[0, -1]
    best = models.top_two(tiny, [7, 8, 9])
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    assert (best.first, best.second) == (order[0], order[1])
    assert best.gap == pytest.approx(float(logits[order[0]] - logits[order[1]]))


# -- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["shared_prompt.py", *arguments])
    return shared_prompt.main()


RUN_FIELDS = {
    "total_s",
    "total_s_by_round",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p50_s_by_turn",
    "requests",
    "prompt_tokens",
    "output_tokens",
    "computed_tokens",
    "cached_tokens",
    "peak_kv_bytes",
}


BASELINES = ["radixkv-nocache", "hf-generate", "hf-generate-batch"]


@pytest.mark.parametrize(
    ("workload", "baselines"), [("few-shot", BASELINES), ("multi-turn", BASELINES[:1]), ("none", BASELINES[:1])]
)
def test_everything_once(workload: str, baselines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "few-shot": ["--requests", "3", "--prefix-tokens", "40"],
        "multi-turn": ["--sessions", "2", "--turns", "3", "--prefix-tokens", "16"],
        "none": ["--requests", "3"],
    }[workload]
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    common = ["--suffix-tokens", "20", "--output-tokens", "3", "--rounds", "1", "--random-model", TINY]
    files = ["--json", str(file), "--plot", str(picture)]
    chosen = [] if baselines == BASELINES else ["--baselines", ",".join(baselines)]
    assert command(monkeypatch, "--workload", workload, *sizes, *common, *chosen, *files) == 0
    report = json.loads(file.read_text())
    assert list(report) == ["runs", "speedup", "tokens_equal", "hit_rate", "best_hit_rate", "config"]
    assert list(report["runs"]) == ["radixkv", *baselines]
    assert list(report["speedup"]) == baselines
    assert report["tokens_equal"] is True
    # to the token, but that a request does not wait for another one's prefix to spare less than 16 tokens
    prompt_tokens, num_requests = (report["runs"]["radixkv"][name] for name in ("prompt_tokens", "requests"))
    lacking = (report["best_hit_rate"] - report["hit_rate"]) * prompt_tokens
    assert 0 <= lacking < WORTH_WAITING_TOKENS * num_requests
    assert (report["hit_rate"] > 0.2) == (workload != "none")
    for run in report["runs"].values():
        assert set(run) == RUN_FIELDS
        assert 0 < run["ttft_p50_s"] <= run["ttft_p95_s"] <= run["total_s"]
        positions = run["prompt_tokens"] + run["output_tokens"] - run["requests"]
        assert run["computed_tokens"] + run["cached_tokens"] == positions
        assert run["peak_kv_bytes"] > 0
    assert report["runs"]["radixkv-nocache"]["cached_tokens"] == 0
    assert picture.stat().st_size > 1000


def test_a_prompts_file_with_few_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, prompts_path = tmp_path / "out.json", tmp_path / "mine.jsonl"
    prompts_path.write_text('{"token_ids": [1, 2, 3]}\n{"turns": ["a", "b"]}\n')
    options = ["--rounds", "1", "--output-tokens", "2", "--random-model", TINY, "--baselines", "hf-generate"]
    assert command(monkeypatch, "--prompts", str(prompts_path), *options, "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert list(report["runs"]) == ["radixkv", "hf-generate"]
    assert report["runs"]["radixkv"]["requests"] == 3


def test_differing_tokens_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def echoes(task: object, settings: object) -> list[EchoRunner]:
        return [EchoRunner("radixkv", []), EchoRunner("hf-generate", [], wrong_at=1)]

    monkeypatch.setattr(job, "make_runners", echoes)
    file = tmp_path / "out.json"
    options = ["--requests", "2", "--prefix-tokens", "8", "--suffix-tokens", "8", "--random-model", TINY]
    assert command(monkeypatch, *options, "--output-tokens", "2", "--json", str(file)) == 1
    error = capsys.readouterr().err
    assert "at token 1 of request 0 hf-generate gives 17 and radixkv gives 16; the unmodified model alone" in error
    assert json.loads(file.read_text())["tokens_equal"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "fewshot"], "unknown workload 'fewshot'"),
        (["--requests", "many"], "--requests"),
        (["--no-such-option"], "--no-such-option"),
        (["--rounds", "0"], "--rounds must be at least "),
        (["--baselines", "vllm"], "unknown baseline 'vllm'"),
        (["--workload", "tree", "--prompts", "x.jsonl"], "--workload and --prompts"),
        (["--model", "demo", "--random-model", "hidden=8,layers=1"], "--model and --random-model"),
        (["--model", "./no/such/model"], "./no/such/model"),
        (["--random-model", "layers=1"], "needs hidden"),
        (["--random-model", "hidden=32,layers=1,vocab=10", "--requests", "1"], "the model knows only ids below 10"),
        (["--prefix-tokens", "5000"], "the model's context ends at 4096"),
        (["--kv-cache-tokens", "64", "--random-model", TINY], "64"),
        (["--json", "no/such/dir/x"], "no/such/dir"),
        (["--plot", "picture.doc"], "picture.doc must name an image format"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("shared_prompt: ")
    assert message in error
    assert "\n" not in error
