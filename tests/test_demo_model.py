"""The demo model that ships in the package, read with plain transformers, and the script that trains it."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from radixkv import demo_model

MAX_BYTES = 8_000_000
SCRIPT = Path(__file__).parent.parent / "scripts" / "train_demo_model.py"
CHAT = [
    {"role": "system", "content": "You are JULIET."},
    {"role": "user", "content": "How now, who calls?\nSpeak, gentle sir."},
    {"role": "assistant", "content": "Madam, I am here."},
    {"role": "user", "content": "  Farewell. "},
]
# Words of the play that a model of its language must know, but that no short random string spells.
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and to of my is in you that not with me be your his this but for have he as thou him so will what thy her "
        "all no by do shall if are we thee on our come good now then they from sir at lord which would how more love "
        "here was hath man let them she an king or know speak say make one father death time heart",
    )
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype="auto", local_files_only=True)
    assert isinstance(loaded, LlamaForCausalLM)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_model.path(), local_files_only=True)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def written(model: LlamaForCausalLM, ids: list[int], *, max_new_tokens: int, seed: int | None = None) -> list[int]:
    """What the model writes after `ids`: greedy, or sampled if there is a seed."""
    inputs = torch.tensor([ids])
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=seed is not None,
        max_new_tokens=max_new_tokens,
    )
    return [int(token) for token in output[0, len(ids) :]]


def nats_per_token(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods; ids [T+1] → [T]."""
    with torch.inference_mode():
        logits = model(input_ids=ids[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


# ----------------------------------------------------------------------------------------------- what ships


def test_is_small_and_stored_as_float16() -> None:
    files = [file for file in demo_model.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    with safe_open(demo_model.path() / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_has_the_shape_it_promises(model: LlamaForCausalLM) -> None:
    config = model.config
    assert 2_000_000 < model.num_parameters() < 4_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    assert 2000 <= config.vocab_size <= 4096


def test_auto_dtype_is_float32(model: LlamaForCausalLM) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_ids_of_model_and_tokenizer_agree(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_readme_states_the_perplexity_and_no_path_of_a_machine() -> None:
    readme = (demo_model.path() / "README.md").read_text(encoding="utf-8")
    assert re.search(r"[Pp]erplexity.*\d", readme)
    assert "bits per byte" in readme
    assert not re.search(r"(^|[\s`(])/(home|work|root|tmp)/", readme)


# ----------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  , and ' t is . ",
        "def f(x):\n\treturn {**x, 'a': 1}  # naïve\r\n\r\n",
        "漢字かな 한국어 עברית 🙂👩‍👩‍👧 e\u0301 \u00e9 \ufeff\u2028\x00\x7f",
        SCRIPT.read_text(encoding="utf-8"),
    ],
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=20)
@given(text=st.text(max_size=100))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_text_gets_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not set(tokenizer.encode("To be, or not to be")) & set(tokenizer.all_special_ids)


# ----------------------------------------------------------------------------------------------- chat template


def test_chat_template_writes_every_turn_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    turns = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in CHAT)
    assert text == f"<|begin|>{turns}<|assistant|>"


def test_chat_template_only_appends(tokenizer: PreTrainedTokenizerFast) -> None:
    """A longer conversation starts with the ids of the shorter one, so that its prefix can be shared."""
    rendered = [
        tokenizer.apply_chat_template(CHAT[:num_turns], return_dict=False) for num_turns in range(1, len(CHAT) + 1)
    ]
    for shorter, longer in pairwise(rendered):
        assert longer[: len(shorter)] == shorter


def test_special_tokens_are_one_id_each(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer.encode(f"a{token}b"), skip_special_tokens=True) == "ab"


def test_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="not wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "Abracadabra"}])


# ----------------------------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("seed", [None, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))])
def test_writes_english_words(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int | None) -> None:
    ids = written(model, tokenizer.encode("KING RICHARD:\nMy lord,"), max_new_tokens=80, seed=seed)
    words = re.findall(r"[a-z]+", tokenizer.decode(ids).lower())
    assert len(words) >= 25
    assert sum(word in COMMON_WORDS for word in words) >= 0.3 * len(words)


def test_ends_its_turns(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    replies = [written(model, prompt, max_new_tokens=200, seed=seed) for seed in range(4)]
    ended = [reply for reply in replies if reply[-1] == tokenizer.eos_token_id]
    assert len(ended) >= 3


@pytest.mark.stress
def test_long_contexts_are_as_good_as_short_ones(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same verse is as likely far into the window as at its beginning, given a context of words."""
    seed_ids = tokenizer.encode("ROMEO:\nWhat say you, gentle friend? speak, and be brief.\n\n")
    filler = written(model, seed_ids, max_new_tokens=96, seed=3)
    repeats = -(-model.config.max_position_embeddings // len(filler))
    verse = tokenizer.encode("\n\nKING HENRY:\nThe night is dark, my lord, and we must go to the king.\n\n")
    near, far = (
        nats_per_token(model, torch.tensor((filler * count)[-room:] + verse))[-len(verse) :].mean().item()
        for count, room in ((1, 128), (repeats, model.config.max_position_embeddings - len(verse)))
    )
    assert far < near + 0.7


# ----------------------------------------------------------------------------------------------- the script


def play(num_speeches: int) -> str:
    """A dull play whose every speech differs from the one before."""
    rng = random.Random(5)
    words = re.findall(r"\w+", "the king is dead and long may he live in peace with all who love him well")
    speeches = (f"ACTOR {i % 3}:\n{' '.join(rng.choices(words, k=12))}." for i in range(num_speeches))
    return "\n\n".join(speeches) + "\n"


def test_segmenter_without_dropout_is_the_tokenizer(script: ModuleType) -> None:
    text = play(60)
    tokenizer = script.train_tokenizer(text, 300)
    segmenter = script.DropoutSegmenter(tokenizer, random.Random(0))
    unseen = text[:500] + " naïve café\n\n\tif x == 1:  return 漢"
    ids = [token for word in segmenter.words(unseen) for token in segmenter.segment(word, 0.0)]
    assert ids == tokenizer.encode(unseen).ids


def test_segmenter_with_dropout_spells_the_same_text_differently(script: ModuleType) -> None:
    text = play(60)
    tokenizer = script.train_tokenizer(text, 300)
    segmenter = script.DropoutSegmenter(tokenizer, random.Random(0))
    ids = [token for word in segmenter.words(text) for token in segmenter.segment(word, 0.5)]
    assert tokenizer.decode(ids) == text
    assert len(ids) > len(tokenizer.encode(text).ids)


def test_conversations_are_what_the_chat_template_writes(script: ModuleType) -> None:
    text = play(60)
    backend = script.train_tokenizer(text, 300)
    data = script.TrainingText(text, backend, random.Random(0))
    data.resegment(0.0)
    tokenizer = script.wrap_tokenizer(backend)
    speeches = script.parse_speeches(text)[3:7]
    roles = ["user", "assistant"] * 2
    plain = [{"role": role, "content": speech.words} for role, speech in zip(roles, speeches, strict=True)]
    system = [{"role": "system", "content": script.system_text(speeches[1].name)}]
    allowed = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in (plain, system + plain)]
    drawn = [data.conversation(3, 4) for _ in range(30)]
    assert all(ids in drawn for ids in allowed)
    assert all(ids in allowed for ids in drawn)


def test_held_out_text_is_the_last_tenth(script: ModuleType) -> None:
    text = play(200)
    training, held_out = script.split_held_out(text)
    assert training + held_out == text
    assert 0.09 * len(text) < len(held_out) < 0.13 * len(text)
    assert held_out.startswith("ACTOR")


def test_held_out_loss_counts_every_token_once(script: ModuleType, model: LlamaForCausalLM) -> None:
    """Against one plain forward, where the text fits a window; and in count where it does not."""
    ids = torch.randint(6, 2000, (700,), generator=torch.Generator().manual_seed(0))
    once = script.evaluate(model, ids.tolist(), 1, stride=512)
    assert once.num_tokens == 699
    assert once.nats == pytest.approx(nats_per_token(model, ids).sum().item(), rel=1e-4)
    repeated = script.evaluate(model, ids.tolist() * 3, 1, stride=512)
    assert repeated.num_tokens == 2099


@pytest.mark.stress
def test_script_trains_a_model_that_loads(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "BATCH_TOKENS", 256)
    monkeypatch.setattr(script, "WINDOW_SHARES", {64: 1.0})
    monkeypatch.setattr(script, "write_samples", lambda *_: None)
    text_file = tmp_path / "play.txt"
    text_file.write_text(play(400), encoding="utf-8")
    out = tmp_path / "model"
    threads = torch.get_num_threads()
    script.main([str(text_file), "--out", str(out), "--steps", "2", "--vocab-size", "300", "--threads", str(threads)])
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert model.config.vocab_size == 300
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_interrupted_training_keeps_the_best_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the first checkpoint still leaves a model and its report; before it, one line says there is none."""

    def interrupted(run: Any, _console: object) -> None:
        if checkpoints_first:
            run.checkpoint()
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Run, "train", interrupted)
    monkeypatch.setattr(script, "write_samples", lambda *_: None)
    text_file = tmp_path / "play.txt"
    text_file.write_text(play(400), encoding="utf-8")
    arguments = [str(text_file), "--out", str(tmp_path / "model"), "--vocab-size", "300"]
    arguments += ["--threads", str(torch.get_num_threads())]

    checkpoints_first = True
    script.main(arguments)
    assert "held out, plain text" in capsys.readouterr().out

    checkpoints_first = False
    with pytest.raises(SystemExit, match="before the first checkpoint"):
        script.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "0"], "epochs must be positive"), (["--vocab-size", "10"], "vocab-size must be at least")],
)
def test_script_refuses_arguments_that_cannot_work(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        script.main(["play.txt", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x80" * 9000, b"too short"])
def test_script_refuses_a_file_it_cannot_learn_from(script: ModuleType, tmp_path: Path, content: bytes) -> None:
    text_file = tmp_path / "play.txt"
    text_file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"play\.txt"):
        script.main([str(text_file)])
