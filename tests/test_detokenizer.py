"""Pieces of text: joined they are the whole, and no stop string leaks."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.engine.detokenizer import Detokenizer, decode
from radixkv.engine.sampling import Sampler
from radixkv.models.loader import load


class BytesTokenizer:
    """A token is a byte: every character beyond ASCII takes several."""

    def decode(self, ids: list[int], **options: object) -> str:
        return bytes(ids).decode(errors="replace")


def run(text: str, stops: list[str]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(BytesTokenizer(), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(detokenizer.push(byte))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.flush()], detokenizer


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    text=st.text(alphabet="abé漢🙂", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, detokenizer = run(text, stops)
    found = [text.find(stop) for stop in stops if stop in text]
    # the stop string that is complete first ends the text, and of those the one that begins first
    ends = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
    expected = text[
        : min((text.find(stop) for stop in stops if 0 <= text.find(stop) <= ends - len(stop)), default=len(text))
    ]
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped == bool(found)
    assert not any("\ufffd" in piece for piece in pieces), "no unfinished character is given out"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    pieces, _ = run("one STOR two", ["STOP"])
    assert pieces[4:8] == ["", "", "", "STOR"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(BytesTokenizer())
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_demo_tokenizer_streams_what_it_decodes(demo_engine: Engine) -> None:
    text = "Naïve — «citizen» 漢字 🙂\n\tdef f(x): return x\n"
    ids = demo_engine.tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(demo_engine.tokenizer)
    assert (
        "".join([detokenizer.push(i) for i in ids] + [detokenizer.flush()])
        == text
        == decode(demo_engine.tokenizer, ids)
    )


@pytest.mark.parametrize("streamed", [True, False])
def test_stop_strings_end_a_request(demo_engine: Engine, streamed: bool) -> None:
    prompt = "ROMEO:\n"
    (whole,) = demo_engine.generate(prompt, SamplingParams(max_tokens=30))
    assert whole.text is not None
    stop = whole.text[8:11]
    params = SamplingParams(max_tokens=30, stop=stop)
    output = (
        list(demo_engine.stream(prompt, params))[-1].output if streamed else demo_engine.generate(prompt, params)[0]
    )
    assert output is not None
    assert output.finish_reason == "stop"
    assert output.text == whole.text[: whole.text.find(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]


class SaysIds(Sampler):
    """Chooses the given ids one after another, over and over."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = cycle(ids)

    def likeliest(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        return [next(self._ids)], [True]


def test_an_unfinished_last_character_is_in_every_kind_of_output() -> None:
    model, tokenizer = load("demo", dtype="auto", device="cpu")
    ids = tokenizer("aé日", add_special_tokens=False).input_ids[:-1]
    parts = assemble(model, tokenizer, EngineConfig(kv_cache_tokens=1024, attention_backend="torch"))
    engine = Engine.from_parts(replace(parts, sampler=SaysIds(ids)))
    texts = []
    for stop in ((), "zzz"):
        params = SamplingParams(max_tokens=len(ids), ignore_eos=True, stop=stop)
        texts.append(engine.generate("x", params)[0].text)
        texts.append("".join(chunk.text for chunk in engine.stream("x", params)))
    assert texts == ["aé\ufffd"] * 4
