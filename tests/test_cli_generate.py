"""`radixkv generate`: texts, JSON, streams, prompts from everywhere, and errors of one line."""

from __future__ import annotations

import doctest
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_runs import (
    PREAMBLE,
    SMALL,
    TEXTS,
    FakeTerminal,
    assert_one_line_error,
    demo_copy,
    run,
    write_lines,
)
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.cli import display
from radixkv.cli import prompts as cli_prompts
from radixkv.cli.common import EngineOptions, SamplingOptions
from radixkv.cli.display import excerpt
from radixkv.engine.executor import Executor
from radixkv.engine.runner import ModelRunner
from radixkv.engine.span import Span

TOKENS = 6
IDS = [646, 1124, 31, 544, 74]


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[RequestOutput]:
    """What the engine itself gives for `TEXTS` and `IDS`, each alone."""
    params = SamplingParams(max_tokens=TOKENS)
    return [engine.generate([prompt], params)[0] for prompt in [*TEXTS, IDS]]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    rows = [*({"prompt": text, "id": 7} for text in TEXTS), {"token_ids": IDS}]
    return write_lines(tmp_path / "prompts.jsonl", ["", *map(json.dumps, rows)])


def generate(*arguments: object, stdin: str | bytes | None = None, max_tokens: int = TOKENS) -> Any:
    result = run("generate", *arguments, "--max-tokens", max_tokens, *SMALL, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


# --------------------------------------------------------------------------------------------------------------- output


@pytest.mark.usefixtures("loaded")
def test_json_has_a_line_for_each_prompt_and_prefixes_are_shared(jsonl: Path, expected: list[RequestOutput]) -> None:
    result = generate("--file", jsonl, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == [*TEXTS, None]
    for name in ("text", "token_ids", "prompt_tokens", "finish_reason"):
        assert [row[name] for row in rows] == [getattr(output, name) for output in expected]
    assert sorted(row["cached_tokens"] for row in rows) == [
        0,
        0,
        0,
        26,
    ]  # one of the two with the preamble goes first, and the other one shares all of it
    assert all(row["error"] is None for row in rows)
    assert all(0 <= row["queue_s"] <= row["ttft_s"] <= row["total_s"] for row in rows)


@pytest.mark.usefixtures("loaded")
def test_one_text_is_printed_bare_and_its_cost_goes_to_stderr(expected: list[RequestOutput]) -> None:
    result = generate(TEXTS[0])
    assert result.stdout == f"{expected[0].text}\n"
    assert result.stderr.count("\n") == 1
    assert f"{expected[0].prompt_tokens} prompt tokens, 0 cached (0.0 %) · {TOKENS} new, " in result.stderr
    assert "tokens/s · TTFT " in result.stderr


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_several_texts_stand_under_headings(options: list[str], tmp_path: Path, expected: list[RequestOutput]) -> None:
    file = write_lines(tmp_path / "prompts.txt", ["\ufeff" + TEXTS[1], "", "  ", TEXTS[2]])
    result = generate(TEXTS[0], "--file", file, *options)
    headings = [f"==> {i}: {excerpt(text)} <==" for i, text in enumerate(TEXTS, start=1)]
    parts = [f"{heading}\n{output.text}\n" for heading, output in zip(headings, expected[:3], strict=True)]
    assert result.stdout == "\n".join(parts)
    prompt_tokens = sum(output.prompt_tokens for output in expected[:3])
    assert f"3 prompts · {prompt_tokens} prompt tokens, 26 cached" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("loaded")
def test_a_stream_is_the_text_in_pieces(monkeypatch: pytest.MonkeyPatch, expected: list[RequestOutput]) -> None:
    pieces: list[str] = []
    stream = Engine.stream

    def recorded(*arguments: Any) -> Any:
        for chunk in stream(*arguments):
            pieces.append(chunk.text)
            yield chunk

    monkeypatch.setattr(Engine, "stream", recorded)
    assert generate(TEXTS[0], "--stream").stdout == f"{expected[0].text}\n"
    assert len([piece for piece in pieces if piece]) > 1


def test_a_model_without_tokenizer_takes_ids_and_gives_ids(tmp_path: Path, expected: list[RequestOutput]) -> None:
    model = demo_copy(tmp_path / "bare", without=["tokenizer.json", "tokenizer_config.json"])
    file = write_lines(tmp_path / "ids.jsonl", [json.dumps({"token_ids": IDS})])
    ids = " ".join(map(str, expected[3].token_ids))
    assert generate("--file", file, "--model", model).stdout == f"{ids}\n"
    assert generate("--file", file, "--model", model, "--stream").stdout == f"{ids}\n"
    assert json.loads(generate("--file", file, "--model", model, "--json").stdout)["text"] is None
    assert_one_line_error(run("generate", "text", "--model", model, *SMALL), "no tokenizer")


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.usefixtures("loaded")
def test_stdin_is_a_prompt_without_its_final_line_break(expected: list[RequestOutput]) -> None:
    assert generate(stdin=f"{TEXTS[0]}\n").stdout == f"{expected[0].text}\n"
    row = json.loads(generate("--json", stdin="two\n\nlines\n\n").stdout)
    assert row["prompt"] == "two\n\nlines\n"


@pytest.mark.usefixtures("loaded")
def test_stdin_is_not_read_beside_other_prompts(expected: list[RequestOutput]) -> None:
    assert generate(TEXTS[0], stdin="else").stdout == f"{expected[0].text}\n"


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", FakeTerminal("text"))
    with pytest.raises(ValueError, match="there is no prompt; give one"):
        cli_prompts.from_stdin()


# ------------------------------------------------------------------------------------------------------------- sampling


def test_a_seed_makes_sampling_repeatable(engine: Engine) -> None:
    options = ["--temperature", 1.2, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--seed", 5]
    params = SamplingParams(max_tokens=12, temperature=1.2, top_p=0.9, top_k=50, min_p=0.01, seed=5)
    text = engine.generate([TEXTS[0]], params)[0].text
    assert generate(TEXTS[0], *options, max_tokens=12).stdout == f"{text}\n"
    assert generate(TEXTS[0], *options[:-1], 6, max_tokens=12).stdout != f"{text}\n"


def test_without_a_seed_every_run_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter([1, 2])
    monkeypatch.setattr("secrets.randbits", lambda _: next(seeds))
    first, second = (generate(TEXTS[0], "--temperature", 2, max_tokens=12).stdout for _ in range(2))
    assert first != second


@pytest.mark.usefixtures("loaded")
def test_a_stop_text_ends_the_output(expected: list[RequestOutput]) -> None:
    text = expected[0].text
    assert text is not None
    stop = text[3:5]
    row = json.loads(generate(TEXTS[0], "--stop", "never", "--stop", stop, "--json").stdout)
    assert (row["text"], row["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_the_defaults_are_the_librarys() -> None:
    assert SamplingOptions().params(128) == SamplingParams()
    assert EngineConfig(**EngineOptions().settings) == EngineConfig()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "this is not valid JSON"),
        ("[" * 100_000, "this is not valid JSON"),
        ('"text"', "a row must be an object, not str"),
        ("[]", "a row must be an object, not list"),
        ("{}", 'needs either "prompt" or "token_ids"; this one has no fields'),
        ('{"text": "a"}', "this one has 'text'"),
        ('{"prompt": "a", "token_ids": [1]}', "this one has 'prompt', 'token_ids'"),
        ('{"prompt": ""}', "a text that is not empty, not ''"),
        ('{"prompt": null}', "a text that is not empty, not None"),
        ('{"prompt": ["a"]}', "a text that is not empty"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"token_ids": []}', '"token_ids" must be a list'),
        ('{"token_ids": "12"}', '"token_ids" must be a list'),
        ('{"token_ids": [1, 2.5]}', "2.5 at position 1"),
        ('{"token_ids": [true]}', "not bool"),
        ('{"token_ids": [1, -1]}', "token id -1 at position 1"),
        ('{"token_ids": [4294967296]}', "token id 4294967296 at position 0"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    file = write_lines(tmp_path / "bad.jsonl", ['{"prompt": "good"}', "", row, '{"prompt": "good"}'])
    result = run("generate", "--file", file)
    assert_one_line_error(result, message)
    assert f"{file}, line 3: " in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("options", [[], ["--stream"]])
@pytest.mark.parametrize(
    ("row", "message"),
    [({"token_ids": [5, 99999]}, "token id 99999 at position 1"), ({"prompt": "long " * 3000}, "the prompt has ")],
)
def test_a_prompt_that_the_model_cannot_serve_is_named(
    tmp_path: Path, row: dict[str, Any], message: str, options: list[str]
) -> None:
    file = write_lines(tmp_path / "bad.jsonl", ['{"prompt": "good"}', json.dumps(row)])
    result = run("generate", "--file", file, *SMALL, *options)
    assert_one_line_error(result, message)
    assert f"{file}, line 2: " in result.stderr
    assert result.stdout == ""


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    assert_one_line_error(run("generate", "--file", tmp_path / "none.txt"), "cannot be read: No such file")
    assert_one_line_error(run("generate", "--file", tmp_path), "cannot be read")
    assert_one_line_error(run("generate", "--file", write_lines(tmp_path / "empty.txt", ["", " "])), "holds no prompts")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert_one_line_error(run("generate", "--file", tmp_path / "binary.txt"), "is not valid UTF-8 text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give one as an argument, with --file or on stdin"),
        ([""], "prompt 1: this must be a text that is not empty"),
        (["good", "bad\udcff"], "prompt 2: this is not valid Unicode"),
        (["a", "--stream", "--json"], "give one of them"),
        (["a", "--max-tokens", -1], "--max-tokens must be an integer of at least 0, not -1"),
        (["a", "--temperature", -1], "--temperature must be a number of at least 0, not -1.0"),
        (["a", "--top-p", 0], "--top-p must be a number in (0, 1], not 0.0"),
        (["a", "--stop", ""], "--stop must be text, or a list of texts, none of them empty"),
        (["a", "--page-size", 0], "--page-size must be an integer in [1, 2147483647], not 0"),
        (["a", "--schedule-policy", "best"], "--schedule-policy must be one of lpm, fcfs"),
        (["a", "--kv-cache-tokens", 64, "--mem-fraction", 0.5], "both set the pool's size"),
        (["a", "--model", "/no/such/model"], "/no/such/model"),
        (["a", "--attention-backend", "magic"], "unknown attention backend 'magic'"),
        (["a", "--dtype", "int3"], "dtype must be"),
        (["a", "--bogus"], "No such option"),
    ],
)
def test_bad_arguments(arguments: list[object], message: str) -> None:
    result = run("generate", *arguments, stdin="")
    assert_one_line_error(result, message)
    assert result.stdout == ""


def test_stdin_that_is_no_text() -> None:
    assert_one_line_error(run("generate", stdin=b"\xff\xfe"), "stdin is not valid text")


def test_a_pool_larger_than_the_memory_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Engine:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")

    monkeypatch.setattr(Engine, "from_pretrained", full)
    assert_one_line_error(run("generate", "a"), "set a smaller --kv-cache-tokens")


def test_an_error_of_torch_that_is_no_lack_of_memory_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Engine:
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(Engine, "from_pretrained", fails)
    assert str(run("generate", "a").exception) == "expected scalar type Float but found Half"


def test_outputs_that_the_context_cuts_off_are_counted() -> None:
    small, limit = ("--kv-cache-tokens", 32, "--attention-backend", "torch"), "the context ends at 32 tokens"
    for prompts, max_tokens, told in (
        (["JULIET:"], 60, f" · {limit}\n"),
        (["JULIET:", "ROMEO:"], 60, f" · 2 cut off · {limit}\n"),
        (["JULIET:", "ROMEO:"], 2, ""),
    ):
        result = run("generate", *prompts, "--max-tokens", max_tokens, *small)
        assert result.exit_code == 0, result.output
        assert result.stderr.endswith(told), (prompts, max_tokens)
        assert (limit in result.stderr) is bool(told), (prompts, max_tokens)


@pytest.mark.usefixtures("loaded")
def test_whoever_reads_no_more_is_no_failure_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_reads(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("radixkv.cli.generate.typer.echo", nobody_reads)
    result = run("generate", "a", "--stream", "--max-tokens", 2, *SMALL)
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.usefixtures("loaded")
def test_a_request_that_fails_is_told_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Executor._accept

    def fail_second(self: Executor, span: Span, *rest: Any) -> None:
        if span.request.tokenizer.decode(span.request.prompt_ids).endswith(TEXTS[1]):
            raise OSError("the device\nis gone")
        accept(self, span, *rest)

    monkeypatch.setattr(Executor, "_accept", fail_second)
    result = run("generate", *TEXTS, "--json", "--max-tokens", 2, *SMALL)
    assert_one_line_error(result, "1 of 3 prompts failed; prompt 2: OSError: the device is gone")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["finish_reason"] for row in rows] == ["length", "error", "length"]
    assert rows[1]["error"] == "OSError: the device\nis gone"
    streamed = run("generate", *TEXTS, "--stream", "--max-tokens", 2, *SMALL)
    assert_one_line_error(streamed, "prompt 2 failed: OSError: the device is gone")


@pytest.mark.usefixtures("loaded")
def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelRunner, "run", interrupted)
    result = run("generate", "a", *SMALL)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


# --------------------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize(("num_prompts", "shown"), [(1, False), (3, True)])
def test_many_prompts_have_a_progress_bar_on_a_terminal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, num_prompts: int, shown: bool
) -> None:
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    batch = cli_prompts.from_arguments(TEXTS[:num_prompts])
    outputs = cli_prompts.run(engine, batch, SamplingParams(max_tokens=2))
    assert len(outputs) == num_prompts
    assert (f"{num_prompts}/{num_prompts}" in terminal.getvalue()) == shown
    assert (terminal.getvalue() != "") == shown


def test_the_examples_of_the_display_functions_are_true() -> None:
    result = doctest.testmod(display)
    assert result.attempted > 0
    assert result.failed == 0


def test_help_teaches_examples_and_groups_the_options() -> None:
    text = " ".join(run("generate", "--help").stdout.replace("│", " ").split())
    for part in ("[OPTIONS] [PROMPT]...", 'radixkv generate "ROMEO: " --stream', "Sampling", "Model and cache", "demo"):
        assert part in text


@pytest.mark.stress  # starts a process, as the test of `serve` does
def test_the_entry_point_keeps_its_streams_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from radixkv.cli import main; main()", "generate", "--json", "-n", "2", *SMALL],
        input=PREAMBLE * 200,  # longer than the tokenizer's own limit, of which transformers would warn
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("preparing the ")]  # said once, at first
    assert len(lines) == 1
    assert lines[0].startswith("radixkv: error: stdin: the prompt has ")
