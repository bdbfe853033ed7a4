"""Conversations: exact ids, prefix hits from turn to turn, forks, and nothing pinned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, SamplingParams
from radixkv.engine.step_input import StepInput
from radixkv.errors import (
    ClosedError,
    InvalidRequestError,
    InvalidTokenIdsError,
    MissingChatTemplateError,
    MissingTokenizerError,
    PromptTooLongError,
)

MakeEngine = Callable[..., Engine]
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


def test_turns_extend_the_exact_ids(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    with engine.session() as session:
        for turn in range(4):
            session.append(random_ids(turn, 10))
            before = session.token_ids
            output = session.generate(SHORT)
            assert output.token_ids == oracle.continuation(before, 6)
            assert session.token_ids == before + output.token_ids
            assert output.cached_tokens == max(0, len(before) - 11)


def test_an_idle_session_holds_nothing_and_is_recomputed(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(kv_cache_tokens=64)
    session = engine.session()
    session.append(random_ids(0, 30))
    session.generate(SHORT)
    assert engine.stats().protected_pages == 0
    engine.generate(random_ids(1, 63), SamplingParams(max_tokens=1))
    assert session.kv_usage().tokens == 0, "evicted by somebody who needed the room"
    session.append([9])
    before = session.token_ids
    output = session.generate(SHORT)
    assert output.cached_tokens == 0
    assert output.token_ids == oracle.continuation(before, 6)


def test_forks_share_and_part(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    trunk = engine.session()
    trunk.append(random_ids(0, 34))
    trunk.generate(SHORT)
    left, right = trunk.fork(), trunk.fork()
    left.append([5, 6, 7])
    right.append([8, 9, 10])
    # of the trunk's 40 tokens the last one's KV was missing; the left branch computes it for the right one
    for branch, cached_tokens in ((left, 39), (right, 40)):
        before = branch.token_ids
        output = branch.generate(SHORT)
        assert output.cached_tokens == cached_tokens
        assert output.token_ids == oracle.continuation(before, 6)
    assert left.token_ids != right.token_ids
    usage = left.kv_usage()
    assert usage.context_tokens == 34 + 6 + 3 + 6
    assert (usage.tokens, usage.shared_tokens, usage.own_tokens) == (48, 40, 8)
    assert usage.pages == 12
    assert usage.num_bytes == 48 * engine.kv_bytes_per_token


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_forks_share_to_the_token_at_every_page_size(
    make_engine: MakeEngine, oracle: GreedyOracle, page_size: int
) -> None:
    engine = make_engine(page_size=page_size)
    trunk = engine.session()
    trunk.append(random_ids(0, 21))
    trunk.generate(SHORT)
    branches = [trunk.fork() for _ in range(3)]
    for number, (branch, cached_tokens) in enumerate(zip(branches, (26, 27, 27), strict=True)):
        branch.append(random_ids(10 + number, 3))
        before = branch.token_ids
        output = branch.generate(SHORT)
        assert output.cached_tokens == cached_tokens
        assert output.token_ids == oracle.continuation(before, 6)
    assert engine.stats().protected_pages == 0
    for branch in branches:
        usage = branch.kv_usage()
        assert usage[:3] == (36, 35, -(-35 // page_size))
        assert (usage.shared_tokens, usage.own_tokens) == (27, 8)
    assert engine.stats().cache.copied_tokens == 26 % page_size + 2 * (27 % page_size)


def test_a_conversation_is_kept_as_long_as_it_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=128)
    kept, other = engine.session(keep_for_s=1000), engine.session()
    branch = kept.fork()
    for number, session in enumerate((branch, other)):
        session.append(random_ids(number, 30))
        session.generate(SHORT)
    engine.generate(random_ids(9, 80), SamplingParams(max_tokens=1))
    assert (branch.kv_usage().tokens, other.kv_usage().tokens) == (35, 12)


def test_usage_counts_what_a_closed_branch_left_as_shared(make_engine: MakeEngine) -> None:
    engine = make_engine()
    trunk = engine.session()
    trunk.append(random_ids(0, 32))
    with trunk.fork() as branch:
        branch.append(random_ids(1, 8))
        branch.generate(SHORT)
    trunk.append(random_ids(2, 8))
    trunk.generate(SHORT)
    assert trunk.kv_usage().shared_tokens == 32, "the branch is closed, and its KV still cached"
    engine.reset_cache()
    assert trunk.kv_usage()[1:] == (0, 0, 0, 0, 0, 0)


def test_sessions_of_other_namespaces_share_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    a, b = engine.session(extra_key="a"), engine.session(extra_key="b")
    for session in (a, b):
        session.append(random_ids(0, 32))
        assert session.generate(SHORT).cached_tokens == 0
        assert session.kv_usage().shared_tokens == 0


def test_a_broken_off_turn_leaves_the_conversation_as_it_was(make_engine: MakeEngine) -> None:
    steps: list[StepInput] = []

    def fails_later(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        steps.append(step)
        if [one.request_ids for one in steps].count((1,)) > 2:
            raise RuntimeError("a worn bit")
        return compute()

    engine = make_engine(around=fails_later)
    session = engine.session()
    session.append(random_ids(0, 12))
    session.generate(SHORT)
    before = session.token_ids
    with pytest.raises(RuntimeError, match="worn"):
        session.generate(SHORT)
    assert session.token_ids == before
    assert engine.stats().running == 0


def test_closed_sessions_refuse(make_engine: MakeEngine) -> None:
    with make_engine().session() as session:
        session.append([5])
    for use in (
        lambda: session.append([5]),
        session.generate,
        session.fork,
        session.kv_usage,
        lambda: session.send("x"),
    ):
        with pytest.raises(ClosedError):
            use()
    session.close()


def test_a_session_says_how_long_it_is(make_engine: MakeEngine) -> None:
    session = make_engine().session()
    session.append([5, 6])
    assert repr(session) == "Session(2 tokens, 0 messages)"
    session.close()
    assert repr(session) == "Session(2 tokens, 0 messages, closed)"


def test_bad_input(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequestError, match="user_special_tokens must be 'allow' or 'text', not 'strip'"):
        make_engine(kv_cache_tokens=64).session(user_special_tokens="strip")  # type: ignore[arg-type]
    session = make_engine(kv_cache_tokens=64).session()
    with pytest.raises(InvalidRequestError, match="empty"):
        session.generate(SHORT)
    with pytest.raises(MissingTokenizerError):
        session.append("text")
    with pytest.raises(MissingTokenizerError):
        session.send("text")
    session.append(random_ids(0, 70))
    with pytest.raises(PromptTooLongError):
        session.generate(SHORT)


# -- chat, with the demo model's tokenizer and template --------------------------------------------------------------


def test_chat_renders_as_the_template_would(demo_engine: Engine) -> None:
    tokenizer = demo_engine.tokenizer
    with demo_engine.session(system="You are a citizen.") as chat:
        chat.send("Who are you?", SamplingParams(max_tokens=200))
        answer = chat.messages[-1]["content"]
        chat.send("Where is the king?", SamplingParams(max_tokens=1))
        messages = [
            {"role": "system", "content": "You are a citizen."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Where is the king?"},
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(chat.token_ids[:-1]) == rendered
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("max_tokens", [5, 60])  # an answer cut off, and one that ended its turn
def test_history_is_never_tokenised_again(demo_engine: Engine, max_tokens: int) -> None:
    with demo_engine.session() as chat:
        params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=0)
        chat.send("What news?", params)
        past = chat.token_ids
        chat.send("And then?", params)
        assert chat.token_ids[: len(past)] == past
        text = demo_engine.tokenizer.decode(chat.token_ids)
        assert text.count("<|end|><|end|>") == 0, "a turn is closed once"


def test_streaming_a_turn(demo_engine: Engine) -> None:
    params = SamplingParams(max_tokens=20)
    with demo_engine.session() as chat:
        branch = chat.fork()
        chunks = list(chat.stream("What news?", params))
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].output.text
        assert [i for chunk in chunks for i in chunk.token_ids] == chunks[-1].output.token_ids
        assert branch.send("What news?", params).token_ids == chunks[-1].output.token_ids


def test_a_stream_closed_early_is_no_turn(demo_engine: Engine) -> None:
    with demo_engine.session() as chat:
        stream = chat.stream("What news?", SamplingParams(max_tokens=20, ignore_eos=True))
        next(stream)
        stream.close()
        assert chat.token_ids == []
        assert chat.messages == []
        assert demo_engine.stats().running == 0


def test_without_a_template_append_and_generate_remain(demo_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_engine.tokenizer, "chat_template", None)
    with demo_engine.session() as chat:
        with pytest.raises(MissingChatTemplateError, match=r"session\.append"):
            chat.send("What news?")
        chat.append("ROMEO:\n")
        assert chat.generate(SHORT).text


def test_a_template_that_refuses_is_a_request_error(demo_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_engine.tokenizer, "chat_template", "{{ raise_exception('users only') }}")
    with demo_engine.session() as chat, pytest.raises(InvalidRequestError, match="users only"):
        chat.send("What news?")


def test_the_system_turn_comes_with_the_first_send(demo_engine: Engine) -> None:
    with demo_engine.session(system="You are a citizen.") as chat:
        chat.append("ACT I\n")
        chat.send("Who are you?", SHORT)
        text = demo_engine.tokenizer.decode(chat.token_ids)
        assert text.startswith("ACT I\n<|begin|><|system|>You are a citizen.<|end|><|user|>Who are you?")
        chat.send("And who am I?", SHORT)
        assert demo_engine.tokenizer.decode(chat.token_ids).count("You are a citizen.") == 1


def test_an_aborted_turn_is_no_turn(demo_engine: Engine) -> None:
    with demo_engine.session() as chat:
        stream = chat.stream("What news?", SamplingParams(max_tokens=20, ignore_eos=True))
        demo_engine.abort(next(stream).request_id)
        assert [chunk.output.finish_reason for chunk in stream] == ["abort"]
        assert chat.token_ids == []


def test_appended_ids_are_checked_at_once(make_engine: MakeEngine) -> None:
    session = make_engine().session()
    with pytest.raises(InvalidTokenIdsError, match="not in the vocabulary"):
        session.append([10**6])
    assert session.token_ids == []


def test_a_turn_may_hold_any_text(demo_engine: Engine) -> None:
    with demo_engine.session() as chat:
        chat.send("one", SHORT)
        chat.send("say \u241fanswer\u241f twice", SHORT)
        assert "<|user|>say \u241fanswer\u241f twice<|end|>" in demo_engine.tokenizer.decode(chat.token_ids)


def test_what_was_added_after_an_answer_belongs_to_it(demo_engine: Engine) -> None:
    with demo_engine.session() as chat:
        chat.send("one", SHORT)
        chat.append(" and more")
        chat.generate(SHORT)
        past = demo_engine.tokenizer.decode(chat.token_ids)
        chat.send("two", SHORT)
        text = demo_engine.tokenizer.decode(chat.token_ids)
        closed = past if past.endswith("<|end|>") else past + "<|end|>"
        assert text.startswith(closed + "<|user|>two<|end|><|assistant|>")
        assert text.count("<|begin|>") == 1
