"""bench/speculation.py: small runs, and what a trace's figures mean."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv_bench.common.errors import BenchError
from radixkv_bench.speculation import command, index_cost, ranks, trace


def write_ranks(folder: Path, *words: str) -> Path:
    """Ranks of all bytes, then of `words`, each of which is two tokens before it."""
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    file = folder / "ranks.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return file


def write_trace(folder: Path, **sessions: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    at = 0
    for name, calls in sessions.items():
        records = [
            {"input": prompt, "output": answer, "session_id": name, "timestamp": at + number}
            for number, (prompt, answer) in enumerate(calls)
        ]
        at += len(records)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_ranks_make_the_tokens_that_they_name(tmp_path: Path) -> None:
    encode = ranks.load_encode(write_ranks(tmp_path, "ab", "abc", "cd"))
    assert encode("abc") == [257]
    assert encode("abcd") == [257, ord("d")], "ab first, then abc"
    assert encode("xcd é") == [ord("x"), 258, ord(" "), 0xC3, 0xA9]


@pytest.mark.parametrize("text", ["YQ==\n", "YQ== x\n", "~ 1\n", "YQ== 0\n"])
def test_wrong_ranks_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ranks").write_text(text)
    with pytest.raises(BenchError, match=r"base64|each byte"):
        ranks.load_encode(tmp_path / "ranks")


def test_a_call_that_repeats_another_takes_few_steps(tmp_path: Path) -> None:
    encode = ranks.load_encode(write_ranks(tmp_path))
    prompt, answer = "question?", "the quick brown fox jumps over a lazy dog"
    folder = write_trace(tmp_path / "trace", one=[(prompt, answer)], two=[(prompt, answer)])
    calls = trace.read_calls(folder, encode)
    shared = trace.replay(calls, 16, own_sessions=False)
    apart = trace.replay(calls, 16, own_sessions=True)
    assert shared.output_tokens == apart.output_tokens == 2 * len(answer)
    first = apart.steps // 2
    assert shared.steps == first + -(-len(answer) // 17)
    assert shared.accepted_tokens == shared.output_tokens - shared.steps
    assert shared.accepted_by["sibling"] == len(answer) - -(-len(answer) // 17)


def test_a_trace_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_trace(tmp_path / "trace", one=[("abc abc", "abc abc abc abc")])
    figures = run(monkeypatch, tmp_path, "--trace", str(folder), "--tokenizer", str(write_ranks(tmp_path)))
    assert figures["tokens_per_step_own_session"] == figures["tokens_per_step_all_sessions"] > 2
    assert "own session" in capsys.readouterr().out


def test_models_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        "--batch",
        "1,2",
        "--prompt-tokens",
        "8",
        "--output-tokens",
        "6",
        "--rounds",
        "1",
        "--index-tokens",
        "8192",
    ]
    figures = run(monkeypatch, tmp_path, "--model", "demo", *sizes, "--index-texts", "1")
    cases = [(row["batch"], row["repeats"], row["same_tokens"]) for row in figures["models"]]
    assert cases == [(1, True, True), (1, False, True), (2, True, True), (2, False, True)]
    assert figures["index"]["indexed_tokens"] == 8192


def test_the_index_is_filled_and_quotes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cost, "PROMPT_TOKENS", 64)
    monkeypatch.setattr(index_cost, "OUTPUT_TOKENS", 128)
    found = index_cost.measure(8192, 1)
    assert found["indexed_tokens"] == 8192
    assert found["mean_match_tokens"] > 5


def test_a_trace_needs_its_tokenizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["speculation", "--trace", "."])
    assert command.main() == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_lines_that_are_no_calls_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(BenchError, match=r"line 1 of .*a\.jsonl"):
        trace.read_calls(tmp_path, lambda text: [1])
    with pytest.raises(BenchError, match="has none"):
        trace.read_calls(tmp_path / "nowhere", lambda text: [1])


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "out.json"
    monkeypatch.setattr("sys.argv", ["speculation", *arguments, "--json", str(file)])
    assert command.main() == 0
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def test_calls_without_times_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n')
    calls = trace.read_calls(tmp_path, lambda text: [ord(letter) for letter in text])
    assert [call.token_ids.tolist() for call in calls] == [[97, 98], [99, 100]]
    assert {call.session for call in calls} == {"a.jsonl"}
    assert all(isinstance(call.token_ids, np.ndarray) for call in calls)
