"""`RadixCache` gives the tokens of a call without it, skips what was computed before, and leaves nothing pinned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from hf_calls import (
    NEW_TOKENS,
    ComputedColumns,
    Rows,
    StopError,
    check_same,
    draw,
    endless,
    padded,
    picker,
    raise_after,
    run,
    tokens_without_it,
)
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.errors import ConfigError, InvalidRequestError, RadixKVError, UnsupportedModelError
from radixkv.hf import ChunkedCache, RadixCache
from radixkv.hf.call import Call
from radixkv.hf.forward_inputs import eos_token_ids
from radixkv.hf.support import check_inputs, check_positions, position_limit
from stress_cases import some_of
from tiny_models import FAMILIES, REFUSED, VOCAB_SIZE, make_model, tiny_model


def servable(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A model that never ends an output by itself."""
    return endless(tiny_model(family, seed))


@once
def shared() -> PreTrainedModel:
    """`servable()`, one for all tests that only run it: what it answers without a cache is computed once."""
    return servable()


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------- same tokens


@pytest.mark.parametrize("family", some_of([*FAMILIES, "falcon"], {"llama", "gpt_oss", "falcon"}))
def test_cold_warm_and_partly_warm_give_the_tokens_of_a_call_without_it(family: str) -> None:
    model = servable(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    head = draw(21, 1)
    first, second = head + draw(7, 2), [*head, 0, *draw(4, 3)]

    assert check_same(model, [first], cache) == (0,)
    assert check_same(model, [first], cache) == (27,)  # the last token is computed: its logits are wanted
    assert check_same(model, [second], cache) == (21,)  # to the token, in the middle of a page
    assert cache.stats().hit_rate == 48 / (28 + 28 + 26)


@pytest.mark.parametrize("family", some_of(FAMILIES, {"gemma3", "llama4"}))
def test_batches_are_computed_from_the_first_column_that_a_row_lacks(family: str) -> None:
    model = servable(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    head = draw(18, 1)
    prompts = [head + draw(2, 2), head + draw(11, 3), [5, *head[1:], 7]]
    for prompt in prompts[:2]:
        check_same(model, [prompt], cache)

    # padding 9, 0 and 10: the first row is stored up to column 28, the second too, the third from none on
    sees_padding = family == "llama4"  # its KV depends on the padding, so padded rows share with their like only
    assert check_same(model, prompts, cache) == ((0, 9, 0) if sees_padding else (1, 10, 0))
    assert check_same(model, prompts, cache) == (19, 28, 18)


def test_logits_are_those_of_a_call_without_it() -> None:
    model = servable("gemma2")
    cache = RadixCache(model, max_tokens=512)
    kwargs: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }
    inputs = padded([draw(30, 1), draw(25, 2)])
    expected = model.generate(**inputs, **kwargs)
    for _ in range(2):
        found = model.generate(**inputs, past_key_values=cache, **kwargs)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert cache.cached_tokens == (29, 24)


def test_memory_that_nobody_wrote_is_not_read() -> None:
    model = servable("gpt_oss")
    prompts = [draw(20, 1), draw(9, 2), draw(13, 3)]
    expected = run(model, prompts)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        cache = RadixCache(model, max_tokens=512, page_size=4)
        for _ in range(2):
            assert torch.equal(run(model, prompts, cache), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A model whose tokens without a cache are remembered from test to test."""
    return servable()


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_hits_are_the_longest_stored_prefix_of_each_row(page_size: int, llama: PreTrainedModel) -> None:
    model = llama
    cache = RadixCache(model, max_tokens=4000, page_size=page_size)
    stored: Rows = []
    heads = [draw(n, n) for n in (5, 9, 14)]
    for step in range(12):
        pick = picker(step)
        roots = heads + [row[: 1 + pick(len(row))] for row in stored[-4:]]
        prompts = [roots[pick(len(roots))] + draw(1 + pick(6), 100 * step + row) for row in range(1 + pick(3))]
        length = max(map(len, prompts))
        hits = [max((common_prefix(prompt, old) for old in stored), default=0) for prompt in prompts]
        ends = [length - len(prompt) + hit for prompt, hit in zip(prompts, hits, strict=True)]
        first_computed = min(*ends, length - 1)

        sequences = run(model, prompts, cache)

        assert torch.equal(sequences, tokens_without_it(model, prompts))
        assert cache.cached_tokens == tuple(max(0, first_computed - length + len(prompt)) for prompt in prompts)
        cache.check_invariants()
        for prompt, sequence in zip(prompts, sequences.tolist(), strict=True):
            stored.append(sequence[length - len(prompt) : -1])  # the last token was never fed to the model


def test_turns_of_a_conversation_compute_what_is_new() -> None:
    model = servable("mistral")
    cache = RadixCache(model, max_tokens=512)
    history: list[int] = []
    for turn in range(4):
        prompt = history + draw(5, turn)
        assert check_same(model, [prompt], cache) == (max(0, len(history) - 1),)
        history = run(model, [prompt], cache)[0].tolist()


def test_sampling_and_streaming_draw_what_they_would_without_it() -> None:
    class Collect:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    model = shared()
    cache = RadixCache(model, max_tokens=512)
    streamed = []
    for with_cache in (None, cache, cache):
        streamer = Collect()
        torch.manual_seed(7)
        sequence = run(model, [draw(20, 1)], with_cache, do_sample=True, temperature=2.0, streamer=streamer)
        assert streamer.seen == [*sequence[0].tolist(), -1]
        streamed.append(streamer.seen)
    assert streamed[0] == streamed[1] == streamed[2]
    assert cache.cached_tokens == (19,)


@pytest.mark.parametrize("family", some_of(["llama", "mistral"], {"mistral"}))
@pytest.mark.parametrize(
    ("kwargs", "cached_tokens"),
    [
        ({"num_beams": 3}, 23),
        ({"num_return_sequences": 2, "num_beams": 2}, 23),
        ({"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB_SIZE + 1}, 23),
        ({"prefill_chunk_size": 7}, 20),  # each of the chunks computes its last token
        ({"guidance_scale": 1.5}, 23),
    ],
    ids=["beams", "several beams", "prompt lookup", "chunked prefill", "guidance"],
)
def test_other_ways_to_decode(family: str, kwargs: dict[str, Any], cached_tokens: int) -> None:
    model = servable(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(8, 1) * 3
    for _ in range(2):
        check_same(model, [prompt], cache, **kwargs)
    assert set(cache.cached_tokens) == {cached_tokens}
    assert check_same(model, [prompt + draw(3, 2)], cache) == (24,)


@pytest.mark.parametrize("family", some_of(["llama", "gemma2"], {"gemma2"}))
def test_what_beams_wrote_is_reused_where_it_belongs(family: str) -> None:
    model = servable(family)
    cache = RadixCache(model, max_tokens=512, page_size=1)
    prompts = [draw(9, 1), draw(12, 2)]
    sequences = run(model, prompts, cache, num_beams=4, num_return_sequences=4, max_new_tokens=10)
    found = [check_same(model, [row[3 * (i < 4) :]], cache)[0] for i, row in enumerate(sequences.tolist())]
    assert max(found) >= 12 + 8  # whatever beam the last steps chose, the best ones went on from what is stored


def test_calls_note_what_the_layers_hold() -> None:
    call = Call(frozenset({9}))
    call.note(torch.tensor([[0, 5, 6], [7, 8, 4]]), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    call.exact_columns = 3
    call.note(torch.tensor([[9], [8]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert [row.tolist() for row in call.row_tokens()] == [[5, 6, 9], [7, 8, 4, 8]]
    assert (call.num_columns, call.num_rows, call.longest_row) == (4, 2, 4)
    assert [call.end_of_output(row, p) for row, p in zip(call.row_tokens(), call.padding, strict=True)] == [3, 4]
    call.crop(2)
    assert [row.tolist() for row in call.row_tokens()] == [[5], [7, 8]]
    assert call.exact_columns == 2
    assert call.common_prefix().tolist() == []


def test_rows_are_neither_dropped_nor_repeated() -> None:
    cache = RadixCache(servable(), max_tokens=10)
    with pytest.raises(InvalidRequestError, match="dropped"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(InvalidRequestError, match="repeated"):
        cache.batch_repeat_interleave(2)


@pytest.mark.parametrize("chunk", [None, 7, *(pytest.param(chunk, marks=pytest.mark.stress) for chunk in (4, 13))])
def test_padding_longer_than_a_chunk_and_rows_without_a_token(chunk: int | None) -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompts = [draw(14, 1), draw(2, 2), draw(9, 3), []]
    for _ in range(2):
        check_same(model, prompts, cache, prefill_chunk_size=chunk)
    assert check_same(model, [prompts[2]], cache) == (8,)
    assert check_same(model, [prompts[0]], cache) == (13,)


def test_assistants_propose_and_rejected_tokens_are_not_stored() -> None:
    model, assistant = servable(), servable(seed=1)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(20, 1)
    for _ in range(2):
        check_same(model, [prompt], cache, assistant_model=assistant, max_new_tokens=20)
    longer = run(model, [prompt], max_new_tokens=20)[0].tolist()
    assert check_same(model, [[*longer, 5]], cache)[0] >= len(longer) - 1


# ------------------------------------------------------------------------------------------- computed once


def test_a_batch_computes_its_common_prefix_once() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=512)
    computed = ComputedColumns(model)
    head = draw(40, 1)
    prompts = [head + draw(n, n) for n in (2, 5, 9)]

    run(model, prompts, cache, max_new_tokens=1)

    assert computed.total == 40 + 3 * 9
    assert cache.cached_tokens == (33, 36, 40)  # 7, 4 and 0 columns of padding
    assert torch.equal(run(model, prompts, cache), run(model, prompts))
    cache.check_invariants()


def test_padded_rows_whose_kv_depends_on_it_have_no_common_prefix() -> None:
    model = servable("llama4")
    cache = RadixCache(model, max_tokens=512)
    computed = ComputedColumns(model)
    run(model, [draw(40, 1) + draw(n, n) for n in (2, 5, 9)], cache, max_new_tokens=1)
    assert computed.total == 3 * 49


def test_sequences_of_one_prompt_compute_it_once() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=512)
    computed = ComputedColumns(model)
    run(model, [draw(40, 1)], cache, max_new_tokens=1, do_sample=True, num_return_sequences=4)
    assert computed.total == 39 + 4


def test_warm_calls_compute_the_last_token_alone() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=512)
    run(model, [draw(40, 1)], cache, max_new_tokens=1)
    computed = ComputedColumns(model)
    run(model, [draw(40, 1)], cache, max_new_tokens=1)
    assert computed.total == 1


# -------------------------------------------------------------------------------------------- room


def test_eviction_under_pressure_keeps_tokens_right_and_pages_whole() -> None:
    model = servable("gemma3")
    cache = RadixCache(model, max_tokens=60, page_size=4)
    for step in range(8):
        check_same(model, [draw(12, 1) + draw(5 + step % 3, step), draw(9, step % 5)], cache)
        stats = cache.stats()
        assert stats.stored_tokens <= stats.capacity_tokens == 60
    assert stats.evicted_tokens > 0
    assert stats.hit_tokens > 0


def test_what_was_used_last_stays() -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=64, page_size=4)
    for seed in (1, 2, 1, 3):
        run(model, [draw(20, seed)], cache, max_new_tokens=1)
    run(model, [draw(20, 4)], cache, max_new_tokens=1)  # the fourth does not fit beside the three others
    assert check_same(model, [draw(20, 1)], cache, max_new_tokens=1) == (19,)
    assert check_same(model, [draw(20, 2)], cache, max_new_tokens=1) == (4,), "all but a page made room"


def test_a_sequence_longer_than_all_pages_is_stored_in_part() -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=16, page_size=4)
    for expected in (0, 16, 16):
        assert check_same(model, [draw(30, 1)], cache) == (expected,)


def test_padding_behind_an_ended_output_is_not_stored() -> None:
    model = servable()
    prompts = [draw(6, 1), draw(9, 2)]
    end = int(run(model, prompts)[0, 9])  # the first row's first token ends it
    cache = RadixCache(model, max_tokens=512, page_size=1)
    check_same(model, prompts, cache, eos_token_id=end, pad_token_id=0)
    second_row = 9 + NEW_TOKENS - 1
    assert cache.stats().stored_tokens == 6 + 1 + second_row


def test_reset_forgets_and_frees() -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=100, page_size=16)
    assert cache.stats().pool_bytes == 0
    check_same(model, [draw(30, 1)], cache)
    assert cache.stats().pool_bytes == 7 * 16 * 2 * 2 * 2 * 8 * 4  # pages, tokens, layers, K and V, heads, dim, bytes
    cache.reset()
    assert (cache.stats().stored_tokens, cache.stats().pool_bytes) == (0, 0)
    assert check_same(model, [draw(30, 1)], cache) == (0,)


def test_too_little_memory_shows_before_there_is_an_output_to_lose() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=2**24)
    with pytest.raises(ConfigError, match="a smaller max_tokens"):
        cache.store.allocate([(torch.empty(2**12, 1, 2**12), torch.empty(2**12, 1, 2**12))])
    computed = ComputedColumns(model)
    cache.store.allocate = raise_after(0)  # type: ignore[method-assign]
    with pytest.raises(StopError):
        run(model, [draw(5, 1)], cache)
    assert computed.total == 5


def test_inference_mode_and_its_absence_share_pages() -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    with torch.inference_mode():
        check_same(model, [draw(30, 1)], cache)
    assert check_same(model, [draw(21, 1)], cache) == (20,)


# --------------------------------------------------------------------------------------- when something raises


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=200, page_size=4)
    check_same(model, [draw(20, 1)], cache)
    before = cache.stats()
    prompts = [draw(20, 1) + draw(4, 2), draw(25, 3)]

    with pytest.raises(StopError):
        run(model, prompts, cache, logits_processor=LogitsProcessorList([raise_after(3)]))
    for layer in range(2):
        hook = model.get_decoder().layers[layer].register_forward_pre_hook(raise_after(2))
        with pytest.raises(StopError):
            run(model, prompts, cache)
        hook.remove()

    cache.check_invariants()
    assert cache.stats().stored_tokens == before.stored_tokens
    assert cache.get_seq_length() == 0
    assert not model._forward_pre_hooks
    check_same(model, prompts, cache)


def test_a_common_prefix_whose_computation_raises_leaves_nothing_behind() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=200, page_size=4)
    prompts = [draw(70, 1) + draw(4, row) for row in (2, 3)]
    hook = model.get_decoder().layers[1].register_forward_pre_hook(raise_after(0))
    with pytest.raises(StopError):
        run(model, prompts, cache)
    hook.remove()
    assert cache.stats().stored_tokens == 0
    assert check_same(model, prompts, cache) == (70, 70)


# ------------------------------------------------------------------------------------- what depends on more


def stretching(rope_type: str) -> hf.PretrainedConfig:
    """A config whose rotary embeddings change beyond 40 tokens."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    if rope_type == "dynamic":
        rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
        return hf.LlamaConfig(**sizes, max_position_embeddings=40, rope_parameters=rope)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 40}
    return hf.Phi3Config(
        **sizes,
        max_position_embeddings=256,
        original_max_position_embeddings=40,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **factors},
    )


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_keys_that_change_with_the_length_are_not_reused_beyond_it(rope_type: str) -> None:
    model = endless(make_model(stretching(rope_type)))
    assert position_limit(model.config) == 40
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(60, 1)
    assert check_same(model, [prompt[:36]], cache) == (0,)  # its output reaches beyond
    assert check_same(model, [prompt[:38]], cache) == (36,)
    assert check_same(model, [prompt], cache) == (0,)
    assert check_same(model, [prompt], cache) == (0,)
    assert check_same(model, [prompt[:38]], cache) == (37,)
    other = draw(60, 2)
    assert check_same(model, [other], cache) == (0,)  # its first keys are those of a long prompt, and not stored
    assert check_same(model, [other[:30]], cache) == (0,)


def test_other_models_have_no_limit() -> None:
    assert position_limit(tiny_model("llama").config) is None


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", ["mamba2", "deepseek_v32", "t5"])
def test_models_that_keep_something_else_are_refused(family: str) -> None:
    reason = r"none of its layers keeps keys|needs a Dynamic|is an encoder-decoder"
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        RadixCache(make_model(REFUSED[family]()), max_tokens=100)
    assert "\n" not in str(caught.value)


def test_models_whose_tokens_see_later_ones_are_refused() -> None:
    config = FAMILIES["gemma3"]()
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match="tokens after them"):
        RadixCache(make_model(config), max_tokens=100)


def test_models_that_ignore_their_cache_are_refused() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=100)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "past_key_values": None}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="was given 5 columns and wrote"):
        run(model, [draw(5, 1)], cache)
    hook.remove()
    check_same(model, [draw(5, 1)], cache)


def fails_with_a_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs["past_key_values"] is not None:
        raise AttributeError("no attribute\n'key_cache'")
    return kwargs


def places_by_the_length_of_the_call(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "position_ids": kwargs["position_ids"] * kwargs["input_ids"].shape[1]}


def places_padded_rows_by_the_length_of_the_call(kwargs: dict[str, Any]) -> dict[str, Any]:
    mask = kwargs["attention_mask"]
    return kwargs if mask is None or mask.all() else places_by_the_length_of_the_call(kwargs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fails_with_a_cache, r"a forward pass with a cache fails \(AttributeError: no attribute 'key_cache'\)$"),
        (
            places_by_the_length_of_the_call,
            "a prompt computed in two parts gets other logits than one computed at once$",
        ),
        (places_padded_rows_by_the_length_of_the_call, "a padded prompt computed in two parts gets other logits than"),
    ],
)
def test_models_that_do_otherwise_with_a_cache_are_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    model = servable()
    hook = model.model.register_forward_pre_hook(lambda module, args, kwargs: (args, change(kwargs)), with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match=f"^LlamaForCausalLM cannot reuse prefixes: {reason}"):
        run(model, [draw(5, 1)], RadixCache(model, max_tokens=100))
    hook.remove()
    check_same(model, [draw(5, 1)], RadixCache(model, max_tokens=100))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda model: setattr(model, "_is_stateful", True),
            "a recurrent state outside of the layers of transformers'",
        ),
        (
            lambda model: setattr(model.config, "add_cross_attention", True),
            "it attends to other inputs than its tokens",
        ),
        (lambda model: setattr(model, "can_generate", lambda: False), "it does not generate, or its forward"),
    ],
)
def test_models_that_say_that_they_are_of_another_kind_are_refused(
    spoil: Callable[[PreTrainedModel], None], reason: str
) -> None:
    model = servable()
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        RadixCache(model, max_tokens=100)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "a RadixCache needs input_ids"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask of shape"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask of shape"),
        ({"token_type_ids": torch.zeros(1, 3)}, "KV depends on token_type_ids too; leave token_type_ids out"),
    ],
)
def test_inputs_that_tell_more_than_tokens_are_refused(inputs: dict[str, Any], message: str) -> None:
    right = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3), "logits_to_keep": 1}
    check_inputs(right)
    with pytest.raises(InvalidRequestError, match=message):
        check_inputs({**right, **inputs})


def test_ends_of_outputs_are_known_in_every_form_that_generate_takes() -> None:
    model = servable()
    for given, known in (
        (7, {7}),
        ([7, 8], {7, 8}),
        (torch.tensor([7, 8]), {7, 8}),
        (torch.tensor(7), {7}),
        (None, set()),
    ):
        assert eos_token_ids(model, {"eos_token_id": given}) == known
    model.generation_config.eos_token_id = [3, 4]
    assert eos_token_ids(model, {}) == {3, 4}
    assert eos_token_ids(model, {"generation_config": hf.GenerationConfig(eos_token_id=9)}) == {9}


def refused_calls() -> dict[str, tuple[str, Callable[[PreTrainedModel, RadixCache], Any]]]:
    inputs = padded([draw(6, 1), draw(9, 2)])
    right = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    positions = torch.arange(9)[None] + 1
    return {
        "embeddings": (
            "inputs_embeds",
            lambda model, cache: model.generate(
                inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
                past_key_values=cache,
                max_new_tokens=1,
            ),
        ),
        "no cache": ("use_cache=False", lambda model, cache: run(model, [[5, 6]], cache, use_cache=False)),
        "positions": (
            "position_ids",
            lambda model, cache: model.generate(
                **inputs, position_ids=positions, past_key_values=cache, max_new_tokens=1
            ),
        ),
        "the last token alone": (
            "it has 9, not 1; to continue an output .* pass all its tokens",
            lambda model, cache: model.generate(
                inputs["input_ids"][:, -1:],
                attention_mask=torch.ones_like(inputs["input_ids"]),
                past_key_values=cache,
                max_new_tokens=1,
            ),
        ),
        "the last tokens alone, by name": (
            "it has 9, not 2; to continue an output",
            lambda model, cache: model.generate(
                input_ids=inputs["input_ids"][:, -2:],
                attention_mask=inputs["attention_mask"],
                past_key_values=cache,
                max_new_tokens=1,
            ),
        ),
        "the last token and its position": (
            "pass all tokens of the sequence from the first on",
            lambda model, cache: model.generate(
                inputs["input_ids"][:, -1:],
                position_ids=torch.tensor([[8], [8]]),
                past_key_values=cache,
                max_new_tokens=1,
            ),
        ),
        "right padding": (
            "row 1 .* on the left",
            lambda model, cache: model.generate(**right, past_key_values=cache, max_new_tokens=1),
        ),
        "right padding in chunks": (
            "row 1 .* on the left",
            lambda model, cache: model.generate(**right, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=2),
        ),
        "outside generate": (
            "learns which tokens",
            lambda model, cache: model(input_ids=inputs["input_ids"], past_key_values=cache),
        ),
        "another model": ("learns which tokens", lambda model, cache: run(servable(seed=1), [[5, 6]], cache)),
        "another cached model": (
            "the model it was made with",
            lambda model, cache: run(RadixCache(servable(seed=1), max_tokens=9)._model, [[5, 6]], cache),
        ),
        "a call within a call": (
            "another call",
            lambda model, cache: run(
                model,
                [[5, 6]],
                cache,
                logits_processor=LogitsProcessorList([lambda ids, scores: run(model, [[7]], cache)]),
            ),
        ),
        "reset within a call": (
            "while generate uses it",
            lambda model, cache: run(
                model, [[5, 6]], cache, logits_processor=LogitsProcessorList([lambda ids, scores: cache.reset()])
            ),
        ),
    }


@pytest.mark.parametrize("case", refused_calls())
def test_calls_that_cannot_be_served_are_refused(case: str, caplog: pytest.LogCaptureFixture) -> None:
    message, call = refused_calls()[case]
    model = shared()
    cache = RadixCache(model, max_tokens=100)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        call(model, cache)
    assert "\n" not in str(caught.value)
    assert check_same(model, [draw(9, 3)], cache) == (0,)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10, "page_size": 0}, "page_size"),
        ({"max_tokens": 10, "policy": "best"}, "best"),
        ({"max_tokens": 10, "chunk_tokens": 1.5}, "chunk_tokens"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        RadixCache(servable(), **settings)


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(RadixKVError, match="not LlamaConfig"):
        RadixCache(FAMILIES["llama"](), max_tokens=10)


# ---------------------------------------------------------------------------------------------- the model


def test_other_caches_and_copies_of_the_model_are_served_as_before() -> None:
    model = servable()
    cache = RadixCache(model, max_tokens=100)
    expected = run(model, [draw(9, 1)])
    assert torch.equal(run(model, [draw(9, 1)], past_key_values=DynamicCache(config=model.config)), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(run(twin, [draw(9, 1)]), type(twin).generate(twin, **padded([draw(9, 1)]), max_new_tokens=6))
    assert not torch.equal(run(twin, [draw(9, 1)]), expected)
    assert check_same(model, [draw(9, 1)], cache) == (0,)


@pytest.mark.filterwarnings("ignore")
def test_a_bert_that_is_no_decoder_is_refused() -> None:

    config = hf.BertConfig(
        vocab_size=211,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=False,
    )
    with pytest.raises(UnsupportedModelError, match="its tokens see the tokens after them"):
        RadixCache(hf.BertLMHeadModel(config), max_tokens=100)


# ------------------------------------------------------------- decoders that place or mask tokens in their own way

BERT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 514,
}
FROM_ONE = ["roberta", "xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "roberta-prelayernorm", "xmod"]
FROM_ZERO = ["bert", "megatron-bert", "electra", "rembert", "ernie", "bert-generation", "roformer"]


def bert(model_type: str, *, is_decoder: bool = True) -> PreTrainedModel:
    more: dict[str, Any] = {"embedding_size": 32} if model_type in ("electra", "roformer") else {}
    more |= {"input_embedding_size": 32, "output_embedding_size": 32} if model_type == "rembert" else {}
    more |= {"default_language": "en_XX"} if model_type == "xmod" else {}
    config = hf.CONFIG_MAPPING[model_type](**BERT_SIZES, is_decoder=is_decoder, **more)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(12)  # so that positions and neighbours decide which token comes next
    return endless(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", some_of([*FROM_ONE, *FROM_ZERO], {"roberta", "bert", "roformer"}))
def test_rows_that_share_a_prefix_get_their_tokens_wherever_positions_begin(model_type: str) -> None:
    model = bert(model_type)
    cache = RadixCache(model, max_tokens=1000)
    head = draw(80, 1)
    few = {"max_new_tokens": 3}
    assert check_same(model, [head + draw(3, 2), head + draw(3, 3)], cache, **few) == (80, 80)
    assert check_same(model, [head + draw(5, 4)], cache, **few) == (80,)
    check_same(model, [head + draw(5, 4), head[:60] + draw(3, 5)], cache, **few)  # with padding
    check_same(model, [head + draw(9, 6)], cache, **few)


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_that_was_stored_in_other_columns_is_not_reused_where_columns_place_tokens() -> None:
    model = bert("roformer")
    cache = RadixCache(model, max_tokens=1000, page_size=4)
    short, long = draw(30, 1), draw(41, 2)
    assert check_same(model, [short, long], cache) == (0, 0)  # the first row's keys lie 11 columns later
    assert check_same(model, [short], cache) == (0,)
    assert check_same(model, [short, long], cache) == (29, 40)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", some_of([*FROM_ONE, *FROM_ZERO], {"roberta", "bert", "megatron-bert"}))
def test_berts_that_are_no_decoders_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="its tokens see the tokens after them"):
        RadixCache(bert(model_type, is_decoder=False), max_tokens=100)


@pytest.mark.filterwarnings("ignore")
def test_a_bert_of_small_weights_is_refused_too() -> None:
    config = hf.MegatronBertConfig(**BERT_SIZES)
    with pytest.raises(UnsupportedModelError, match="its tokens see the tokens after them"):
        RadixCache(hf.AutoModelForCausalLM.from_config(config), max_tokens=100)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = servable().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    RadixCache(model, max_tokens=100)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------- settings of the process around a call


@pytest.mark.parametrize(
    ("modes", "made_in"),
    [
        ((False, True), True),
        ((True, False, True), False),
        pytest.param((False, True), False, marks=pytest.mark.stress),
        pytest.param((True, False, True), True, marks=pytest.mark.stress),
    ],
)
def test_calls_in_and_outside_of_inference_mode_share_prefixes(made_in: bool, modes: tuple[bool, ...]) -> None:
    model = servable("mistral")
    prompts = [draw(30, 1), draw(21, 2)]
    expected = run(model, prompts)
    with torch.inference_mode(made_in):
        cache = RadixCache(model, max_tokens=256, page_size=4)
    for step, mode in enumerate(modes):
        with torch.inference_mode(mode):
            assert torch.equal(run(model, prompts, cache), expected)
        assert cache.cached_tokens == ((29, 20) if step else (0, 0))
        with torch.inference_mode(not mode):
            run(model, [prompts[0][:10] + draw(step + 2, 3)], cache)  # copies a page that the other mode wrote
    cache.check_invariants()


@pytest.mark.parametrize(
    "default",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.stress) for dtype in (torch.float16, torch.float64))],
)
def test_the_default_dtype_of_the_process_changes_nothing(default: torch.dtype) -> None:
    model = servable("gemma2")
    prompts = [draw(80, 1) + draw(n, 2) for n in (3, 5)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        expected = run(model, prompts)
        cache = RadixCache(model, max_tokens=512, page_size=4)
        for _ in range(2):
            assert torch.equal(run(model, prompts, cache), expected)
        assert torch.equal(run(model, prompts, past_key_values=ChunkedCache(model.config, chunk_tokens=4)), expected)
        assert {k.dtype for k, _ in cache.store.like(1)} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


def test_the_default_device_of_the_process_changes_nothing() -> None:
    model = servable()
    inputs = padded([draw(80, 1) + draw(n, 2) for n in (3, 5)])
    kwargs: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = model.generate(**inputs, **kwargs)
    with torch.device("meta"):
        cache = RadixCache(model, max_tokens=512, page_size=4)
    call = Call(frozenset())
    with torch.device("meta"):  # generate itself makes tensors on the default device, so its parts are called here
        call.note(inputs["input_ids"], inputs["attention_mask"])
        assert call.padding == [2, 0]
        check_positions(torch.tensor([[0, 0, 0], [0, 1, 2]], device="cpu"), 0, call.padding)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **kwargs), expected)
    with torch.device("meta"):
        keys, values = cache.store.like(1)[0]
        tokens = np.array(inputs["input_ids"][1].tolist(), dtype=np.int32)
        states = [(torch.empty(2, 9, 8, device="cpu"), torch.empty(2, 9, 8, device="cpu")) for _ in range(2)]
        cache.store.load(tokens[:9], None, 0, states)
    assert keys.device == values.device == torch.device("cpu")


def test_a_cache_that_is_made_inside_the_call_is_refused_with_the_way_out() -> None:
    model = servable()
    with pytest.raises(InvalidRequestError, match="make it before the call"):
        model.generate(**padded([draw(9, 1)]), past_key_values=RadixCache(model, max_tokens=100), max_new_tokens=1)


def test_an_output_is_continued_by_all_its_tokens() -> None:
    model = shared()
    cache = RadixCache(model, max_tokens=200, page_size=4)
    sequence = run(model, [draw(20, 1)], cache)
    longer = run(model, [draw(20, 1)], max_new_tokens=2 * NEW_TOKENS)
    assert torch.equal(run(model, sequence.tolist(), cache), longer)
    assert cache.cached_tokens == (20 + NEW_TOKENS - 1,)
    assert check_same(model, sequence[:, -1:].tolist(), cache) == (0,)  # one token begins a sequence of its own


# ------------------------------------------------------------------------------------------- engines beside it


def engine(model: PreTrainedModel) -> Engine:
    return Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=256))


@pytest.mark.parametrize("family", some_of(["llama", "deepseek_v2"], {"deepseek_v2"}))
def test_a_model_that_serves_an_engine_is_refused_and_comes_back(family: str) -> None:
    model = servable(family)
    expected = run(model, [draw(20, 1)])
    cache = RadixCache(model, max_tokens=100)
    engine(model)
    with pytest.raises(
        UnsupportedModelError, match=r"it, or a model .* serves a radixkv Engine; load another instance"
    ):
        RadixCache(model, max_tokens=100)
    for own in (None, cache):
        with pytest.raises(
            UnsupportedModelError, match=r"serves a radixkv Engine, and only the engine .* load another"
        ):
            run(model, [draw(20, 1)], own)
    with pytest.raises(UnsupportedModelError, match=r"model\.set_attn_implementation\('sdpa'\)"):
        model(torch.tensor([[5, 6, 7]]))
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, [draw(20, 1)]), expected)
    for own in (cache, RadixCache(model, max_tokens=100)):
        assert torch.equal(run(model, [draw(20, 1)], own), expected)


@pytest.mark.parametrize("family", some_of(["llama", "gemma3"], {"gemma3"}))
def test_models_that_share_a_config_object_are_served_as_if_they_did_not(family: str) -> None:
    prompt = draw(20, 1)
    config = FAMILIES[family]()
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(endless(hf.AutoModelForCausalLM.from_config(config).eval()))
    first, second = models
    assert first.config is second.config
    expected = [run(model, [prompt]) for model in models]
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

    one = engine(first)
    assert one.generate(prompt, params)[0].token_ids == expected[0][0, 20:].tolist()
    assert torch.equal(run(second, [prompt]), expected[1])
    assert torch.equal(run(second, [prompt], RadixCache(second, max_tokens=100)), expected[1])
    other = engine(second)
    assert other.generate(prompt, params)[0].token_ids == expected[1][0, 20:].tolist()
    assert one.generate([*prompt, 5], params)[0].error is None


def test_a_model_made_from_the_config_of_one_that_serves_an_engine_can_serve_another() -> None:
    first = servable()
    one = engine(first)
    torch.manual_seed(1)
    second = endless(hf.AutoModelForCausalLM.from_config(first.config).eval())
    assert first.config is second.config
    with pytest.raises(UnsupportedModelError, match="this model, or one with the same config object, serves"):
        run(second, [draw(9, 1)])
    other = engine(second)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = [each.generate(draw(9, 1), params)[0] for each in (one, other)]
    for model, output in zip((first, second), outputs, strict=True):
        assert output.error is None
        model.set_attn_implementation("eager")
        assert run(model, [draw(9, 1)])[0, 9:].tolist() == output.token_ids
