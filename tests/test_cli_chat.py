"""`radixkv chat`: turns, branches, Ctrl-C, and scripts through a pipe."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_runs import SMALL, FakeTerminal, assert_one_line_error, demo_copy, run
from radixkv import Engine, SamplingParams
from radixkv.cli.chat import COMMANDS, Chat, follow_script, talk, typed_lines
from radixkv.engine.interrupts import DeferredInterrupt
from radixkv.engine.runner import ModelRunner
from radixkv.engine.session import Session
from radixkv.errors import RadixKVError

SYSTEM = "You are Romeo, a young man of the house of Montague in Verona."
PARAMS = SamplingParams(max_tokens=5)
TOO_LONG = "x" * 3000


@pytest.fixture
def chat(engine: Engine) -> Iterator[Chat]:
    engine.reset_cache()
    yield Chat(engine, PARAMS, SYSTEM)
    engine.check_invariants()
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def answers(engine: Engine, *turns: str) -> list[str]:
    """What a session says to `turns`."""
    with engine.session(system=SYSTEM) as session:
        return [session.send(turn, PARAMS).text or "" for turn in turns]


def script(*lines: str, options: tuple[object, ...] = ("--system", SYSTEM)) -> Any:
    return run("chat", *options, "--max-tokens", 5, *SMALL, stdin="".join(f"{line}\n" for line in lines))


# -------------------------------------------------------------------------------------------------------------- scripts


def test_a_script_gets_the_answers_alone_on_stdout(loaded: Engine) -> None:
    result = script("Who are you?", "", "And who am I?", "/quit", "never asked")
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{text}\n" for text in answers(loaded, "Who are you?", "And who am I?"))
    first, second = result.stderr.splitlines()
    assert " prompt tokens, 0 cached (0.0 %) · 5 new, " in first
    assert first.endswith("cut off at --max-tokens")
    assert " prompt tokens, 0 cached" not in second


def test_an_answer_that_ends_by_itself_is_not_called_cut_off(loaded: Engine) -> None:
    turn = "Who are you?"
    with loaded.session(system=SYSTEM) as session:
        stop = str(session.send(turn, SamplingParams(max_tokens=3)).text)[:4]
    result = run("chat", "--system", SYSTEM, "--stop", stop, stdin=turn)
    assert (result.exit_code, result.stdout) == (0, "\n")
    assert "cut off" not in result.stderr


def test_without_a_system_turn(loaded: Engine) -> None:
    result = script("Who are you?", options=())
    with loaded.session() as session:
        assert result.stdout == f"{session.send('Who are you?', PARAMS).text}\n"


@pytest.mark.usefixtures("loaded")
def test_a_script_ends_with_its_first_error() -> None:
    result = run("chat", "--max-tokens", 2, stdin=TOO_LONG)
    assert_one_line_error(result, "this turn failed, so it does not count: the prompt has ")
    assert result.stdout == ""


@pytest.mark.usefixtures("loaded")
def test_a_model_that_fails_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the device\nis gone")

    monkeypatch.setattr(ModelRunner, "run", fail)
    assert_one_line_error(script("Hello"), "this turn failed, so it does not count: OSError: the device is gone")


def test_models_that_cannot_chat_say_what_to_use_instead(tmp_path: Path) -> None:
    no_template = demo_copy(tmp_path / "no_template", without=["chat_template.jinja"])
    assert_one_line_error(
        run("chat", "--model", no_template, *SMALL, stdin="Hello"), "has no chat template, so it cannot chat; use `rad"
    )
    no_tokenizer = demo_copy(tmp_path / "no_tokenizer", without=["tokenizer.json", "tokenizer_config.json"])
    assert_one_line_error(
        run("chat", "--model", no_tokenizer, *SMALL, stdin="Hello"), "has no tokenizer, so it cannot chat; give token"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--system", ""], "--system: this must be a text that is not empty"),
        (["--max-tokens", "0"], "--max-tokens must be an integer of at least 1, not 0"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    assert_one_line_error(run("chat", *options, stdin="Hello"), message)


def test_help_teaches_an_example() -> None:
    text = " ".join(run("chat", "--help").stdout.replace("│", " ").split())
    assert 'radixkv chat --system "You are a citizen of Rome."' in text
    assert "Ctrl-C stops an answer" in text


# ------------------------------------------------------------------------------------------------------------- commands


def test_branches_share_their_past_and_go_their_own_ways(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    follow_script(chat, iter(["Who are you?", "/fork", "And who am I?"]))
    out = capsys.readouterr().out
    assert "this is branch 2 now, with the past of branch 1; /switch 1 goes back, /branches lists all\n" in out
    left = chat.session
    chat.take("/switch 1")
    assert capsys.readouterr().out.startswith("branch 1: 1 turn, ")
    chat.take("What is it o'clock?")
    assert left is not chat.session
    assert [message["content"] for message in left.messages if message["role"] == "user"] == [
        "Who are you?",
        "And who am I?",
    ]
    assert [message["content"] for message in chat.session.messages if message["role"] == "user"] == [
        "Who are you?",
        "What is it o'clock?",
    ]
    capsys.readouterr()
    chat.take("/branches")
    current, other = capsys.readouterr().out.splitlines()
    assert current == f'* branch 1: 2 turns, {len(chat.session.token_ids)} tokens, last "What is it o\'clock?"'
    assert other == f'  branch 2: 2 turns, {len(left.token_ids)} tokens, last "And who am I?"'


def test_reset_begins_the_branch_anew_and_hits_the_system_turn(
    chat: Chat, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.take("Who are you?")
    old = chat.session
    chat.take("/reset")
    assert old.closed
    assert chat.session.token_ids == []
    capsys.readouterr()
    hits_before = engine.stats().cache.hit_tokens
    chat.take("Who are you?")
    assert capsys.readouterr().out == f"{old.messages[-1]['content']}\n"
    assert engine.stats().cache.hit_tokens > hits_before


def test_stats_tell_of_states_if_there_are_any(
    chat: Chat, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = engine.stats()
    cache = stats.cache._replace(states=1024, free_states=1000, evictable_states=7)
    monkeypatch.setattr(engine, "stats", lambda: stats._replace(cache=cache, state_pool_bytes=1024 * 3072))
    chat.take("/stats")
    *_, states = capsys.readouterr().out.splitlines()
    assert states == "states   1,024 of recurrent layers, 3 KiB each: 1,000 free, 7 evictable"


def test_stats_tell_what_the_context_holds(chat: Chat, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("Who are you?")
    capsys.readouterr()
    chat.take("/stats")
    context, cache = capsys.readouterr().out.splitlines()
    num_tokens = len(chat.session.token_ids)
    kept = num_tokens - 1  # the last one's KV was never computed
    pages = -(-kept // 16)
    assert context.startswith(f"context  {num_tokens} tokens; the pool holds the KV of {kept} in {pages} pages, ")
    assert context.endswith(f" KiB: 0 shared, {kept} own")
    stats = engine.stats()
    assert f"pages: {stats.free_pages} free, {pages} evictable, 0 protected" in cache
    chat.take("/fork")
    capsys.readouterr()
    chat.take("/stats")
    assert capsys.readouterr().out.splitlines()[0].endswith(f": {kept} shared, 0 own")


def test_help_lists_every_command(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("/help")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/foo bar", "unknown command /foo; /help lists the commands"),
        ("/", "unknown command /; /help lists the commands"),
        ("/switch", "/switch needs the number of a branch: 1"),
        ("/switch 2", "/switch needs the number of a branch: 1"),
        ("/switch -1", "/switch needs the number of a branch: 1"),
        ("/switch ²", "/switch needs the number of a branch: 1"),
        ("/switch " + 5000 * "9", "/switch needs the number of a branch: 1"),
    ],
)
def test_wrong_commands_are_hints(chat: Chat, capsys: pytest.CaptureFixture[str], line: str, hint: str) -> None:
    chat.take(line)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert chat.session.messages == [{"role": "system", "content": SYSTEM}]


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def press_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the user press Ctrl-C when the second piece of an answer is there."""
    stream = Session.stream

    def pressed(self: Session, text: str, params: SamplingParams | None = None) -> Iterator[Any]:
        for number, chunk in enumerate(stream(self, text, params)):
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    return lambda: monkeypatch.setattr(Session, "stream", pressed)


def test_ctrl_c_stops_an_answer_and_the_turn_does_not_count(
    chat: Chat, engine: Engine, press_ctrl_c: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = answers(engine, "Who are you?", "And who am I?")[1]
    chat.take("Who are you?")
    before = chat.session.token_ids
    handler = signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    press_ctrl_c()
    talk(chat, iter(["And who am I?", "/stats"]))
    captured = capsys.readouterr()
    shown, stats = captured.out.split("\n", maxsplit=1)
    assert 0 < len(shown) < len(whole)
    assert whole.startswith(shown)
    assert stats.startswith("context ")
    assert "stopped: this turn is not part of the conversation\n" in captured.err
    assert chat.session.token_ids == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_line_that_is_not_utf_8_is_reported_and_the_chat_goes_on() -> None:
    result = run("chat", *SMALL, "-n", "1", stdin=b"bad \xff\n/branches\r\n")
    assert result.exit_code == 0
    assert "line 1 is not valid UTF-8 (invalid start byte, byte 4); it is skipped" in result.stderr
    assert result.stdout == "* branch 1: 0 turns, 0 tokens\n"


def test_ctrl_c_ends_a_script(loaded: Engine, press_ctrl_c: Callable[[], None]) -> None:
    press_ctrl_c()
    result = script("Who are you?", "And who am I?")
    assert result.exit_code == 130
    assert result.stdout.count("\n") == 1
    assert loaded.stats().running == 0


def test_the_first_ctrl_c_is_held_and_the_second_is_not() -> None:
    def press_twice() -> None:
        with DeferredInterrupt() as interrupt:
            assert not interrupt.pressed
            signal.raise_signal(signal.SIGINT)
            assert interrupt.pressed
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_ctrl_c_that_work_is_done_with_is_forgotten() -> None:
    with DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        interrupt.pressed = False


def test_ctrl_c_with_the_last_piece_comes_too_late(
    chat: Chat, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Session.stream

    def pressed(self: Session, text: str, params: SamplingParams | None = None) -> Iterator[Any]:
        for chunk in stream(self, text, params):
            if chunk.output is not None:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    whole = answers(engine, "Who are you?")[0]
    monkeypatch.setattr(Session, "stream", pressed)
    talk(chat, iter(["Who are you?"]))
    captured = capsys.readouterr()
    assert captured.out == f"{whole}\n"
    assert "stopped" not in captured.err
    assert len(chat.session.messages) == 3


# --------------------------------------------------------------------------------------------------- at the terminal


def test_a_failed_turn_does_not_end_a_talk(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    talk(chat, iter([TOO_LONG, "Who are you?", "/quit", "never asked"]))
    captured = capsys.readouterr()
    assert "error: this turn failed, so it does not count: the prompt has " in captured.err
    assert captured.out.count("\n") == 1
    assert len(chat.session.messages) == 3
    with pytest.raises(RadixKVError, match="the prompt has"):
        follow_script(chat, iter([TOO_LONG]))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_stdout_that_cannot_be_written_ends_a_talk(chat: Chat, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "it cannot be written")

    monkeypatch.setattr("radixkv.cli.chat.typer.echo", fails)
    with pytest.raises(OSError, match=f"^.Errno {number}. it cannot be written$"):  # it is no failure of the turn
        talk(chat, iter(["Who are you?", "never asked"]))
    assert len(chat.session.messages) == 1, "the system turn"


def test_typed_lines_outlive_ctrl_c_and_end_with_ctrl_d(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str | BaseException] = [
        "first",
        KeyboardInterrupt(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "second",
        EOFError(),
    ]

    def typed_input(_: str) -> str:
        what = typed.pop(0)
        if isinstance(what, BaseException):
            raise what
        return what

    monkeypatch.setattr("builtins.input", typed_input)
    assert list(typed_lines()) == ["first", "second"]
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "Ctrl-D or /quit ends the chat" in captured.err
    assert "this line is not valid UTF-8; it is skipped" in captured.err


def test_at_a_terminal_there_is_a_greeting(
    loaded: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from radixkv.cli.app import app

    monkeypatch.setattr("sys.stdin", FakeTerminal())
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    app(["chat"], standalone_mode=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"demo, {loaded.max_context_tokens:,} tokens of context. /help lists the commands, " in captured.err


# ----------------------------------------------------------------------------------------------------- saved chats


def test_a_chat_goes_on_where_it_was_saved(loaded: Engine, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    first = script("Who are you?", options=("--system", SYSTEM, "--session", file))
    second = script("And who am I?", options=("--session", file))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert f"{first.stdout}{second.stdout}" == "".join(
        f"{text}\n" for text in answers(loaded, "Who are you?", "And who am I?")
    )
    assert f"{file}: 1 turn, " in second.stderr
    assert " prompt tokens, 0 cached" not in second.stderr
    third = script("/branches", "/reset", "Who are you?", options=("--session", file))
    assert third.stdout.startswith("* branch 1: 2 turns, ")
    assert third.stdout.endswith(first.stdout), "it begins anew with the same system turn"


def test_a_branch_is_saved_by_hand(
    chat: Chat, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.take("Who are you?")
    chat.take(f"/save {tmp_path / 'chat.json'}")
    assert capsys.readouterr().out.splitlines()[-1].startswith("saved branch 1: 1 turn, ")
    assert Session.load(engine, tmp_path / "chat.json").messages == chat.session.messages
    talk(chat, iter(["/save", f"/save {tmp_path / 'none' / 'chat.json'}", "/save ~no such user/file", "/save \0"]))
    errors = capsys.readouterr().err
    assert "/save needs the name of a file\n" in errors
    assert errors.count("error: the session cannot be saved as ") == 3


@pytest.mark.usefixtures("loaded")
def test_a_chat_that_cannot_go_on_is_a_one_line_error(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    assert_one_line_error(
        script(options=("--session", tmp_path / "none" / "chat.json")), "--session: there is no folder"
    )
    file.write_text("something else")
    assert_one_line_error(script(options=("--session", file)), "is no session of radixkv")
    assert_one_line_error(
        script(options=("--session", file, "--system", "a")), "has its own beginning; leave --system out"
    )
    assert_one_line_error(script("Hello", options=("--session", tmp_path)), "cannot be read: it is no regular file")
    assert_one_line_error(script("Hello", options=("--session", tmp_path / ("x" * 300))), "File name too long")
