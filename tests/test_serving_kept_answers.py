"""Answers whose text comes back: their own ids are used if the server keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from http_server import Running, new_demo_engine, running
from radixkv.serving.kept_answers import KeptAnswers

ASK: Any = {"model": "demo", "max_tokens": 24, "temperature": 1.0}
USER: Any = {"role": "user", "content": "But, soft! what light through yonder window breaks?"}
MORE: Any = {"role": "user", "content": "And then?"}
SEEDS = range(3)


@pytest.fixture(scope="module")
def keeping() -> Iterator[Running]:
    with running(new_demo_engine(), keep_answer_ids=True) as server:
        yield server


def lost_tokens(server: Running, **more: Any) -> list[int]:
    """How many tokens of the first turn, all of which are in the cache, the second one does not find."""
    client, lost = server.openai(), []
    for seed in SEEDS:
        first = client.chat.completions.create(messages=[USER], seed=seed, **ASK)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        second = client.chat.completions.create(messages=[USER, said, MORE], max_tokens=1, model="demo", **more)
        computed = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last one was not fed again
        lost.append(computed - second.usage.prompt_tokens_details.cached_tokens)
    return lost


def test_a_kept_answer_costs_no_hits(server: Running, keeping: Running) -> None:
    assert any(lost > 1 for lost in lost_tokens(server)), "some of these answers are tokenised otherwise"
    assert all(lost <= 1 for lost in lost_tokens(keeping))  # an answer that was cut off misses its end mark
    keeping.check_idle()


def test_a_prompt_of_kept_ids_is_the_text_that_the_template_renders(server: Running, keeping: Running) -> None:
    client = keeping.openai()
    for seed in SEEDS:
        messages = [USER]
        for turn in range(3):
            answer = client.chat.completions.create(messages=messages, seed=10 * seed + turn, **ASK)
            messages = [*messages, {"role": "assistant", "content": answer.choices[0].message.content}, MORE]
        texts = []
        for asked in (server, keeping):
            tokens = asked.http().post("/tokenize", json={"messages": messages}).json()["tokens"]
            texts.append(asked.http().post("/detokenize", json={"tokens": tokens}).json()["prompt"])
        assert texts[0] == texts[1]


def test_kept_answers_are_used_for_anthropic_and_explained(keeping: Running) -> None:
    client = keeping.anthropic()
    asked: Any = {"model": "demo", "max_tokens": 24}
    for _ in SEEDS:
        first = client.messages.create(messages=[USER], **asked)
        said = {"role": "assistant", "content": first.content[0].text}
        body = {"messages": [USER, said, MORE]}
        explained = keeping.http().post("/v1/cache/explain", json=body).json()["cached_tokens"]
        second = client.messages.create(messages=body["messages"], model="demo", max_tokens=1).usage
        assert second.cache_read_input_tokens == explained
        usage = first.usage
        prompt = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        assert explained >= prompt + usage.output_tokens - 2


def test_a_salt_divides_what_is_kept(keeping: Running) -> None:
    client, differing = keeping.openai(), 0
    for seed in SEEDS:
        first = client.chat.completions.create(messages=[USER], seed=seed, **ASK, extra_body={"cache_salt": "a"})
        said = {"role": "assistant", "content": first.choices[0].message.content}
        asked: Any = {"model": "demo", "messages": [USER, said, MORE], "max_tokens": 1}
        own, other = (
            client.chat.completions.create(**asked, extra_body={"cache_salt": salt}).usage.prompt_tokens
            for salt in ("a", "b")
        )
        differing += own != other
    assert differing, "only those with the salt see that it was tokenised otherwise"


class Letters:
    """A tokenizer of letters; 0 is a special token, and 1000 stands for "ab"."""

    all_special_ids = (0,)

    def decode(self, ids: Any, **_: object) -> str:
        return "".join({0: "<end>", 1000: "ab"}.get(int(i)) or chr(int(i)) for i in ids)


def ids_of(text: str) -> NDArray[np.int32]:
    return np.array([ord(letter) for letter in text], np.int32)


def add(store: KeptAnswers, owner: tuple[str, str | None], prompt: str, answer: str, ids: list[int]) -> bool:
    return store.add(owner, prompt, ids_of(prompt), answer, ids)


def test_the_longest_conversation_of_the_owner_is_found() -> None:
    store, me = KeptAnswers(Letters()), ("me", None)
    assert add(store, me, "q", "ab", [1000, 0])
    assert add(store, me, "qab r", "ab", [1000])
    for text, characters in (("qab", 3), ("qab r", 3), ("qab rab", 7), ("qab rabc", 7), ("qac", None), ("q", None)):
        kept = store.find(me, text)
        assert (None if kept is None else kept.characters) == characters
        assert kept is None or Letters().decode(kept.ids) == text[:characters]
    assert store.find(("other", None), "qab") is None
    assert store.find(("me", "salt"), "qab") is None


def test_ids_that_say_something_else_are_not_kept() -> None:
    store, me = KeptAnswers(Letters()), ("me", None)
    assert not add(store, me, "q", "a", [1000]), "cut at a stop text"
    assert not add(store, me, "q", "aa", [97, 0, 97]), "a special token within"
    assert not add(store, me, "q", "\ufffd", [0xFFFD]), "bytes that are no character"
    assert not add(store, me, "q", "", [0])
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_store_is_bounded_and_forgets_what_was_not_used() -> None:
    store, me = KeptAnswers(Letters(), max_entries=2), ("me", None)
    for question in ("1", "2"):
        add(store, me, question, "ab", [1000])
    assert store.find(me, "1ab") is not None
    add(store, me, "3", "ab", [1000])
    assert [store.find(me, f"{question}ab") is not None for question in "123"] == [True, False, True]
    size = store.num_bytes
    add(store, me, "3", "ab", [97, 98])
    assert (len(store), store.num_bytes) == (2, size + 4), "the last one counts"
    add(store, me, "x" * 100, "ab", [1000])
    small = KeptAnswers(Letters(), max_bytes=16)
    assert add(small, me, "1", "ab", [1000])
    add(small, me, "x" * 10, "ab", [1000])
    assert (len(small), small.num_bytes) == (0, 0)
    assert small.find(me, "1ab") is None
