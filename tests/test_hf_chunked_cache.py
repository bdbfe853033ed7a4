"""`ChunkedCache` holds what `DynamicCache` holds, in buffers that move once a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.hf import ChunkedCache
from recurrent_models import RECURRENT_FAMILIES
from tiny_models import FAMILIES, REFUSED, VOCAB_SIZE, make_model, tiny_model

takes_back = pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="this transformers cannot take back columns of a window"
)

HEADS, DIM, WINDOW = 2, 4, 9
BYTES_PER_COLUMN = 2 * HEADS * DIM * 4  # K and V of one row in float32

Step = Callable[[Cache], object]


def full() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=1)


def sliding() -> MistralConfig:
    return MistralConfig(num_hidden_layers=1, sliding_window=WINDOW)


def states(num_columns: int, seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, HEADS, num_columns, DIM, generator=generator)
    return k, v


def check_layer_equals(found: Cache, expected: Cache) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    assert found.get_mask_sizes(3, 0) == expected.get_mask_sizes(3, 0)
    assert torch.equal(found.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(found.layers[0].values, expected.layers[0].values)


def inputs(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(3, VOCAB_SIZE, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: PreTrainedModel, lengths: list[int], cache: Cache, **kwargs: Any) -> list[Tensor]:
    """The tokens, and the logits of each step."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "max_new_tokens": 14, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs(lengths), past_key_values=cache, **{**settings, **kwargs})
    return [output.sequences, *output.logits]


# ------------------------------------------------------------------------------------------- same outputs


@pytest.mark.parametrize(
    ("lengths", "family"),
    [  # batches and prompts alone of the families that differ most, and of the others under `stress`
        pytest.param(lengths, family, marks=[] if family in chosen else [pytest.mark.stress])
        for lengths, chosen in (
            ([7, 30, 12], ("llama", "gemma2", "gpt_oss", "llama4")),
            ([5], ("gemma3",)),
            ([30], ("mistral", "llama4")),
        )
        for family in FAMILIES
    ],
    ids=str,
)
def test_outputs_are_those_of_a_dynamic_cache(family: str, lengths: list[int]) -> None:
    model = tiny_model(family)
    found = generate(model, lengths, ChunkedCache(model.config, chunk_tokens=4))
    expected = generate(model, lengths, DynamicCache(config=model.config))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-4, rtol=1e-4)


@takes_back
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB_SIZE + 1}],
    ids=["beams", "lookup"],
)
def test_other_ways_to_decode(family: str, kwargs: dict[str, Any]) -> None:
    model = tiny_model(family)
    found = generate(model, [20], ChunkedCache(model.config, chunk_tokens=4), **kwargs)
    expected = generate(model, [20], DynamicCache(config=model.config), **kwargs)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("config", [full, sliding])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 100])
@pytest.mark.parametrize("first", [1, WINDOW - 1, WINDOW, 40])
def test_layers_hold_and_return_the_same(config: Callable[[], Any], chunk_tokens: int, first: int) -> None:
    found, expected = ChunkedCache(config(), chunk_tokens=chunk_tokens), DynamicCache(config=config())
    for seed, num_columns in enumerate([first, 1, 1, 5, 1, 30, *[1] * 25]):
        k, v = states(num_columns, seed)
        returned, wanted = found.update(k, v, 0), expected.update(k, v, 0)
        assert all(map(torch.equal, returned, wanted))
        check_layer_equals(found, expected)


@pytest.mark.parametrize("config", [full, sliding])
def test_rows_can_be_reordered_selected_and_repeated(config: Callable[[], Any]) -> None:
    found, expected = ChunkedCache(config(), chunk_tokens=4), DynamicCache(config=config())
    steps: list[Step] = [
        lambda cache: cache.update(*states(6, 0), 0),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.update(*states(5, 1), 0),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.update(*states(1, 2, rows=4), 0),
        lambda cache: cache.batch_select_indices(torch.tensor([3])),
        lambda cache: cache.update(*states(7, 3, rows=1), 0),
    ]
    for step in steps:
        for cache in (found, expected):
            step(cache)
        check_layer_equals(found, expected)


@takes_back
@pytest.mark.parametrize("config", [full, sliding])
def test_columns_can_be_taken_back(config: Callable[[], Any]) -> None:
    found, expected = ChunkedCache(config(), chunk_tokens=4), DynamicCache(config=config())
    for cache in (found, expected):
        cache.activate_past_recording()
    for seed, (added, removed) in enumerate([(5, 2), (4, 0), (6, 5), (9, None), (9, 8), (1, 0), (30, None), (3, 3)]):
        k, v = states(added, seed)
        returned, wanted = found.update(k, v, 0), expected.update(k, v, 0)
        assert all(map(torch.equal, returned, wanted))
        for cache in (found, expected):
            if removed is not None:
                cache.crop(-removed)
        check_layer_equals(found, expected)


def test_a_window_that_has_moved_on_does_not_come_back() -> None:
    cache = ChunkedCache(sliding(), chunk_tokens=4)
    cache.update(*states(20, 0), 0)
    with pytest.raises(UnsupportedModelError, match="3 tokens cannot be taken back from a sliding window of 9"):
        cache.crop(-3)


def test_a_reset_cache_begins_anew() -> None:
    for config in (full(), sliding()):
        found, expected = ChunkedCache(config, chunk_tokens=4), DynamicCache(config=config)
        found.update(*states(20, 0), 0)
        found.reset()
        assert (found.num_bytes, found.get_seq_length()) == (0, 0)
        for cache in (found, expected):
            cache.update(*states(6, 1, rows=3), 0)
        check_layer_equals(found, expected)


# ------------------------------------------------------------------------------------------------ counters


def test_a_layer_moves_once_a_chunk() -> None:
    cache = ChunkedCache(full(), chunk_tokens=8)
    held, copies = [], []
    for seed in range(20):
        cache.update(*states(1, seed, rows=1), 0)
        held.append(cache.num_bytes // BYTES_PER_COLUMN)
        copies.append(cache.copies)
        assert cache.wasted_bytes == cache.num_bytes - (seed + 1) * BYTES_PER_COLUMN
    assert held == [8] * 8 + [16] * 8 + [24] * 4
    assert copies == [0] * 8 + [1] * 8 + [2] * 4
    assert cache.peak_bytes == (16 + 24) * BYTES_PER_COLUMN  # both buffers of the last move


def test_a_window_keeps_its_size_after_a_long_prompt() -> None:
    cache = ChunkedCache(sliding(), chunk_tokens=5)
    cache.update(*states(50, 0, rows=1), 0)
    for seed in range(40):
        cache.update(*states(1, seed, rows=1), 0)
        assert cache.num_bytes == (WINDOW - 1 + 5) * BYTES_PER_COLUMN
        assert cache.wasted_bytes == 5 * BYTES_PER_COLUMN
    assert cache.copies == 1 + 7  # out of the prompt's buffer, then with the 6th, 11th, …, 36th token


def test_two_layers_and_rows_count_together() -> None:
    cache = ChunkedCache(LlamaConfig(num_hidden_layers=2), chunk_tokens=4)
    for layer in range(2):
        cache.update(*states(3, layer, rows=5), layer)
    assert cache.num_bytes == cache.peak_bytes == 2 * 5 * 4 * BYTES_PER_COLUMN
    assert cache.wasted_bytes == 2 * 5 * BYTES_PER_COLUMN


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("make_config", [REFUSED["mamba2"], RECURRENT_FAMILIES["qwen3_next"], REFUSED["t5"]])
def test_what_is_no_kv_is_refused(make_config: Callable[[], PretrainedConfig]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs a|is an encoder-decoder"):
        ChunkedCache(make_model(make_config()).config)


@pytest.mark.parametrize("chunk_tokens", [0, -1, 2.0, True])
def test_chunks_are_whole_tokens(chunk_tokens: Any) -> None:
    with pytest.raises(ConfigError, match="chunk_tokens"):
        ChunkedCache(full(), chunk_tokens=chunk_tokens)


def test_it_is_made_for_a_config() -> None:
    with pytest.raises(ConfigError, match=r"a cache is made for a model.s config"):
        ChunkedCache(None)
