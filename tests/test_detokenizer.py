"""Pieces of text: joined they are the whole, and no stop string leaks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import cycle
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chat_tokenizers import byte_level, sentence_piece
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.engine.detokenizer import Detokenizer, decode
from radixkv.engine.sampling import Sampler
from radixkv.engine.token_bytes import TokenBytes
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


def streamed(
    tokenizer: object, ids: list[int], stops: tuple[str, ...] = (), token_bytes: TokenBytes | None = None
) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stops, token_bytes=token_bytes)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return "".join([*pieces, detokenizer.flush()]), detokenizer


@pytest.mark.parametrize(
    ("stop", "text"), [("<|im_end|>", "hello"), ("o<|im_end|>", "hell"), ("<|im_end|>\n", "hello world")]
)
def test_a_stop_string_may_hold_special_tokens(stop: str, text: str) -> None:
    tokenizer = byte_level("<|im_end|>")
    whole = "hello<|im_end|> world<|im_end|>\nagain"
    ids = tokenizer(whole).input_ids
    for token_bytes in (None, TokenBytes.of(tokenizer)):
        got, detokenizer = streamed(tokenizer, ids, ("zzz", stop), token_bytes)
        assert got == detokenizer.text == text
        assert detokenizer.stopped


def test_text_of_a_special_token_that_is_spelled_out_is_no_special_token() -> None:
    tokenizer = byte_level("<|im_end|>")
    ids = tokenizer("a <|im_", add_special_tokens=False).input_ids + tokenizer("end|> b").input_ids
    assert streamed(tokenizer, ids, ("<|im_end|>",))[0] == "a <|im_end|> b"


def test_an_invalid_byte_takes_the_byte_tokens_before_it_along() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.convert_tokens_to_ids(["<0x04>", "<0xD1>"])
    assert streamed(tokenizer, ids)[0] == decode(tokenizer, ids) == "\ufffd\ufffd"


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once() -> None:
    tokenizer = sentence_piece()
    text, detokenizer = streamed(tokenizer, tokenizer.convert_tokens_to_ids(["h", "<0x0A>", "<0xD1>"]), ("\n",))
    assert (text, detokenizer.stopped) == ("h", True)


@pytest.mark.parametrize("num_streams", [200, pytest.param(3000, marks=pytest.mark.stress)])
def test_random_streams_join_to_the_text_of_all_ids(num_streams: int) -> None:
    random = Random(0)
    for tokenizer in (sentence_piece(), byte_level("<|im_end|>")):
        num_bytes = [i for i, t in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if "<0x" in t]
        for _ in range(num_streams):
            pool = num_bytes if num_bytes and random.random() < 0.5 else range(len(tokenizer))
            ids = random.choices(pool, k=random.randint(1, 12)) + random.choices(range(len(tokenizer)), k=3)
            assert streamed(tokenizer, ids)[0] == decode(tokenizer, ids), ids


@pytest.mark.parametrize("num_streams", [200, pytest.param(3000, marks=pytest.mark.stress)])
def test_the_bytes_of_tokens_make_the_text_that_decoding_makes(num_streams: int) -> None:
    random = Random(0)
    tokenizer = deepcopy(byte_level("<|im_end|>"))
    tokenizer.add_tokens(
        ["two words", "\u4f60\u597d", "\u00e9\u0120"]
    )  # not of the letters that stand for bytes, and of them
    token_bytes = TokenBytes.of(tokenizer)
    assert token_bytes is not None
    bytes_alone = tokenizer.convert_tokens_to_ids(pre_tokenizers.ByteLevel.alphabet())
    for _ in range(num_streams):
        pool = bytes_alone if random.random() < 0.5 else range(len(tokenizer) + 2)  # two ids beyond the vocabulary
        ids = random.choices(pool, k=random.randint(1, 16))
        assert streamed(tokenizer, ids, (), token_bytes)[0] == decode(tokenizer, ids), ids


def test_each_character_comes_with_its_last_byte(demo_engine: Engine) -> None:
    tokenizer = demo_engine.tokenizer
    detokenizer = Detokenizer(tokenizer, token_bytes=TokenBytes.of(tokenizer))
    pieces = [detokenizer.push(token_id) for token_id in tokenizer("\u65e5a", add_special_tokens=False).input_ids]
    assert [piece for piece in pieces if piece] == ["\u65e5", "a"]


class OwnDecoder(PreTrainedTokenizerFast):
    """Decodes in a way of its own."""

    def _decode(self, token_ids: list[int], **options: object) -> str:  # type: ignore[override]
        return "text" * len(token_ids)


def test_tokens_of_other_tokenizers_have_no_bytes_of_their_own() -> None:
    own = OwnDecoder(tokenizer_object=byte_level("<|im_end|>").backend_tokenizer)
    changed = deepcopy(byte_level("<|im_end|>"))
    changed.decode = own.decode
    others = (None, BytesTokenizer(), sentence_piece(), own, changed)
    assert [TokenBytes.of(tokenizer) for tokenizer in others] == [None] * 5
    assert streamed(own, own("hello").input_ids[:1])[0] == streamed(changed, [5])[0] == "text"


def test_a_stop_string_that_came_too_early_ends_nothing_later() -> None:
    detokenizer = Detokenizer(BytesTokenizer(), ["ab", "abcd"], 2)
    assert "".join(detokenizer.push(byte) for byte in b"abx") == "abx"
    assert not detokenizer.stopped
