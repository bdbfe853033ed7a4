"""The model that all runners share: loaded from a directory or hub id, or random in a size of choice."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen3_5TextConfig

from radixkv import demo_model
from radixkv_bench.common.corpus import Encode
from radixkv_bench.common.errors import BenchError


@dataclass(frozen=True)
class RandomModel:
    """Sizes of a random Llama, or of a Qwen3.5 if `recurrent` is set (float32, tied embeddings, fixed seed).

    `recurrent` is the number of recurrent layers before each one that attends; Qwen3.5 itself has 3.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int
    recurrent: int = 0

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer of a Qwen3.5."""
        attends = [place % (self.recurrent + 1) == self.recurrent for place in range(self.layers)]
        return ["full_attention" if each else "linear_attention" for each in attends]

    def config_fields(self, context_tokens: int) -> dict[str, int]:
        """The sizes as fields of a config of transformers, for sequences of `context_tokens`."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "head_dim": self.head_dim,
            "max_position_embeddings": max(2048, context_tokens),
        }

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value)


def parse_random_model(text: str) -> RandomModel:
    """`hidden=512,layers=8[,heads=8][,kv_heads=2][,intermediate=…][,vocab=…][,head_dim=…]` as sizes.

    Without heads there is one for each 64 of hidden; without kv_heads as many as heads; intermediate is 2.75 × hidden,
    rounded up to a multiple of 64; vocab is 32000. `recurrent=3` makes it a Qwen3.5, three of whose layers keep a state
    before each one that attends, with heads of the same size. Raises: BenchError that names what does not fit.
    """
    sizes = dict(_parse_size(item) for item in text.split(","))
    missing = [name for name in ("hidden", "layers") if name not in sizes]
    if missing:
        raise BenchError(f"--random-model needs {' and '.join(missing)}, as in hidden=512,layers=8")
    hidden = sizes["hidden"]
    heads = sizes.get("heads", max(1, hidden // 64))
    if "head_dim" not in sizes and hidden % heads:
        raise BenchError(f"--random-model: {heads} heads do not divide hidden={hidden}; give head_dim")
    model = RandomModel(
        hidden=hidden,
        layers=sizes["layers"],
        heads=heads,
        kv_heads=sizes.get("kv_heads", heads),
        intermediate=sizes.get("intermediate", -(-hidden * 11 // 4 // 64) * 64),
        vocab=sizes.get("vocab", 32000),
        head_dim=sizes.get("head_dim", hidden // heads),
        recurrent=sizes.get("recurrent", 0),
    )
    if model.recurrent >= model.layers:
        raise BenchError(f"--random-model: recurrent={model.recurrent} leaves none of {model.layers} layers to attend")
    if model.heads % model.kv_heads:
        raise BenchError(f"--random-model: kv_heads={model.kv_heads} does not divide heads={model.heads}")
    if model.head_dim % 2:
        raise BenchError(f"--random-model: head_dim must be even for rotary positions, not {model.head_dim}")
    return model


def _parse_size(item: str) -> tuple[str, int]:
    name, _, value = (part.strip() for part in item.partition("="))
    if name not in RandomModel.__dataclass_fields__:
        known = ", ".join(RandomModel.__dataclass_fields__)
        raise BenchError(f"--random-model: unknown size {name!r}; the sizes are {known}")
    if not value.isdecimal() or int(value) < 1:
        raise BenchError(f"--random-model: {name} must be a positive integer, not {value!r}")
    return name, int(value)


def build_random(sizes: RandomModel, context_tokens: int) -> Any:
    """A model of these sizes with random weights, that serves sequences of `context_tokens`."""
    fields = sizes.config_fields(context_tokens)
    if sizes.recurrent:
        config: Any = Qwen3_5TextConfig(
            **fields,
            tie_word_embeddings=True,
            layer_types=sizes.layer_types,
            linear_key_head_dim=sizes.head_dim,
            linear_value_head_dim=sizes.head_dim,
            linear_num_key_heads=sizes.heads,
            linear_num_value_heads=sizes.heads,
        )
    else:
        config = LlamaConfig(**fields, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def quiet_transformers() -> None:
    """Turn off the progress bars and warnings of Hugging Face's transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)


def location(name: str) -> str:
    """Where the model called `name` lies: "demo" is the one that ships with radixkv."""
    return str(demo_model.path()) if name == "demo" else name


def load(name: str) -> Any:
    """The model called `name`, unchanged, in float32 for the CPU."""
    try:
        return AutoModelForCausalLM.from_pretrained(location(name), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise BenchError(f"no model can be loaded from {name!r}: {_first_line(error)}") from None


def load_encode(name: str) -> Encode:
    """How the model called `name` turns text into ids, with no special ones added.

    Without a tokenizer there, the first text to encode is a BenchError; ids need none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(name))
    except (OSError, ValueError) as error:
        return _no_encode(f"no tokenizer can be loaded from {name!r}, give token ids: {_first_line(error)}")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def _no_encode(reason: str) -> Encode:
    def encode(text: str) -> list[int]:
        raise BenchError(reason)

    return encode


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def context_tokens(model: Any) -> int | None:
    """How many tokens a sequence of the model may have; None if its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit is not None else None


def twin(model: Any) -> Any:
    """An independent instance with the same weight tensors: what one runner changes, the others do not see.

    Its generation settings are empty: greedy, and no token ends an answer early.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    other = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    other.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return other


class TopTwo(NamedTuple):
    """The two likeliest next tokens and how far apart their logits are."""

    first: int
    second: int
    gap: float


def top_two(model: Any, ids: Sequence[int]) -> TopTwo:
    """What the unmodified `model` would go on with after `ids`, computed alone and without any cache."""
    with torch.inference_mode():
        logits = twin(model)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]  # [vocab]
    values, tokens = logits.topk(2)
    return TopTwo(int(tokens[0]), int(tokens[1]), float(values[0] - values[1]))
