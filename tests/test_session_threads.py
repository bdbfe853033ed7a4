"""Threads on one session: turns queue in order, and nothing is lost in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from chat_conversation import ScriptedEngine
from chat_templates import FAMILIES
from chat_tokenizers import byte_level
from radixkv.engine.session import Session
from radixkv.errors import ClosedError, SessionBusyError


@pytest.fixture
def session() -> Session:
    tokenizer = byte_level(*FAMILIES["chatml"].special)
    tokenizer.chat_template = FAMILIES["chatml"].template
    return ScriptedEngine(tokenizer, [f"answer {n}" for n in range(40)], "<|im_end|>").session()


def test_turns_of_several_threads_all_count(session: Session) -> None:
    barrier = threading.Barrier(4)

    def work(name: str) -> None:
        barrier.wait()
        for turn in range(5):
            session.send(f"{name}{turn}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [m["content"] for m in session.messages if m["role"] == "user"]
    assert sorted(asked) == sorted(f"{name}{turn}" for name in "abcd" for turn in range(5))
    for name in "abcd":
        assert [text for text in asked if text[0] == name] == [f"{name}{turn}" for turn in range(5)]


@pytest.mark.parametrize("use", [lambda s: s.send("two"), lambda s: s.append([70]), lambda s: s.generate()])
def test_a_thread_that_would_wait_for_itself_is_told(session: Session, use: Callable[[Session], object]) -> None:
    stream = session.stream("one")
    next(stream)
    with pytest.raises(SessionBusyError, match="not finished"):
        use(session)
    list(stream)
    use(session)
    assert session.messages[0]["content"] == "one"


def test_another_thread_waits_for_a_stream(session: Session) -> None:
    stream = session.stream("one")
    next(stream)
    thread = threading.Thread(target=session.append, args=([70],))
    thread.start()
    list(stream)
    thread.join()
    assert session.token_ids[-1] == 70
    assert len(session.messages) == 2


def test_a_fork_has_the_state_before_the_running_turn(session: Session) -> None:
    session.send("one")
    stream = session.stream("two")
    next(stream)
    branch = session.fork()
    list(stream)
    assert (len(branch.messages), len(session.messages)) == (2, 4)
    branch.send("three")


def test_a_turn_that_runs_when_the_session_is_closed_counts(session: Session) -> None:
    stream, late = session.stream("one"), session.stream("two")
    next(stream)
    session.close()
    list(stream)
    assert len(session.messages) == 2
    with pytest.raises(ClosedError):
        next(late)


def test_streams_that_were_dropped_or_never_begun_hold_nothing(session: Session) -> None:
    session.stream("never begun")
    kept = session.stream("never begun, and kept")
    dropped = session.stream("one")
    next(dropped)
    del dropped
    session.send("two")
    list(kept)
    asked = [m["content"] for m in session.messages if m["role"] == "user"]
    assert asked == ["two", "never begun, and kept"]
