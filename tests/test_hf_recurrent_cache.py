"""`RadixCache` of models with recurrent layers gives the tokens of a call without it, from states that it kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from hf_calls import (
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
from radixkv.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from radixkv.hf import RadixCache
from recurrent_models import INKLING, MAMBA_ALONE, RECURRENT_FAMILIES
from stress_cases import some_of
from tiny_models import make_model

NEW_TOKENS = 6
FAMILIES = {**{name: make for name, make in RECURRENT_FAMILIES.items() if name != "jamba"}, "inkling": INKLING}
DIFFERENT = {"qwen3_next", "lfm2", "falcon_h1", "nemotron_h"}  # in what they keep, and where


def recurrent(family: str = "nemotron_h", seed: int = 0) -> PreTrainedModel:
    return endless(make_model(FAMILIES[family](), seed))


def stored_states(cache: RadixCache) -> int:
    return cache.stats().stored_states


@pytest.mark.parametrize("family", some_of([*FAMILIES], DIFFERENT))
def test_cold_warm_and_partly_warm_give_the_tokens_of_a_call_without_it(family: str) -> None:
    model = recurrent(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    head = draw(70, 1)  # longer than what these layers compute at a time
    first, second, third = head + draw(7, 2), [*head, 0, *draw(4, 3)], [*head, 1, *draw(9, 4)]
    assert check_same(model, [first], cache) == (0,)
    assert check_same(model, [first], cache) == (76,), "all but its last token"
    assert check_same(model, [second], cache) == (0,), "no state was kept where it parts from the first"
    assert check_same(model, [third], cache) == (70,), "now there is one"
    assert check_same(model, [third[:75]], cache) == (70,)
    answer = tokens_without_it(model, [first])[0].tolist()
    assert check_same(model, [answer + draw(5, 5)], cache) == (len(answer) - 1,)


@pytest.mark.parametrize("family", some_of([*FAMILIES], DIFFERENT))
def test_batches_of_unequal_prompts(family: str) -> None:
    model = recurrent(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompts = [draw(11, 1), draw(30, 2), draw(17, 3)]
    assert check_same(model, prompts, cache) == (0, 0, 0)
    assert check_same(model, prompts, cache) == (10, 29, 16)
    answers = tokens_without_it(model, prompts).tolist()
    turns = [row[30 - len(prompt) :] + draw(4, 5) for row, prompt in zip(answers, prompts, strict=True)]
    ends = tuple(len(turn) - 5 for turn in turns)
    assert check_same(model, turns, cache) == ends, "all rows go on from their ends"
    assert check_same(model, [prompts[2]], cache) == (16,), "rows are found alone, too"


def test_warm_calls_compute_the_last_token_alone() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompts = [draw(11, 1), draw(30, 2)]
    run(model, prompts, cache)
    computed = ComputedColumns(model)
    run(model, prompts, cache)
    assert computed.total == 2 * NEW_TOKENS, "a column of each row a step"


def test_no_more_columns_are_computed_than_without_it() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    computed = ComputedColumns(model)
    for prompts in [[draw(70, 1) + draw(9, 2)], [draw(70, 1) + draw(4, 3)], [draw(20, 4), draw(31, 5)]]:
        before = computed.total
        run(model, prompts, cache)
        with_it = computed.total - before
        run(model, prompts)
        assert with_it == computed.total - before - with_it


def test_rows_that_lack_a_state_are_computed_alone_up_to_where_others_begin() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=1024, page_size=4)
    long, short = draw(200, 1), draw(9, 2)
    check_same(model, [long[:150]], cache)
    rows = [long[:152], short + long[:70]]
    computed = ComputedColumns(model)
    assert check_same(model, rows, cache) == (149, 76)
    with_it = 76 + 2 * 3 + 2 * (NEW_TOKENS - 1)
    assert computed.total - 2 * (152 + NEW_TOKENS - 1) == with_it


def test_rows_are_not_computed_alone_for_a_few_tokens() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    check_same(model, [draw(30, 1)], cache)
    assert check_same(model, [draw(30, 1), draw(30, 2)], cache) == (0, 0)


def test_rows_begin_where_others_are_nothing_but_padding() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    check_same(model, [draw(30, 1)], cache)
    assert check_same(model, [draw(30, 1) + draw(20, 2), draw(15, 3)], cache) == (29, 0)


@pytest.mark.parametrize(
    ("lengths", "cached"), [((4, 4, 4), (120, 120, 120)), ((4, 9, 6), (120, 125, 122))], ids=["equal", "unequal"]
)
def test_a_batch_computes_its_common_prefix_once(lengths: tuple[int, ...], cached: tuple[int, ...]) -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=1024, page_size=4)
    prompts = [draw(120, 1) + draw(length, 2 + row) for row, length in enumerate(lengths)]
    assert check_same(model, prompts, cache) == cached
    assert check_same(model, prompts, cache) == tuple(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize(
    ("kwargs", "cached_tokens"),
    [
        ({"num_beams": 3}, (29, 29, 29)),
        ({"num_beams": 2, "num_return_sequences": 2}, (29, 29)),
        ({"num_beams": 2, "eos_token_id": 5, "pad_token_id": 0}, (29, 29)),
        ({"penalty_alpha": None, "repetition_penalty": 1.5}, (29,)),
        ({"prefill_chunk_size": 11}, (7,)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("family", some_of([*FAMILIES], {"falcon_h1"}))
def test_other_ways_to_decode(family: str, kwargs: dict[str, Any], cached_tokens: tuple[int, ...]) -> None:
    model = recurrent(family)
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(30, 1)
    check_same(model, [prompt], cache, **kwargs)
    assert check_same(model, [prompt], cache, **kwargs) == cached_tokens
    check_same(model, [prompt, draw(40, 2)], cache, **kwargs)
    check_same(model, [prompt], cache)


def test_sampling_draws_what_it_would_without_it() -> None:
    model = recurrent("falcon_h1")
    cache = RadixCache(model, max_tokens=512, page_size=4)
    for _ in range(2):
        drawn = []
        for each in (cache, None):
            torch.manual_seed(3)
            drawn.append(run(model, [draw(90, 1)], each, do_sample=True, num_return_sequences=3))
        assert torch.equal(*drawn)
        cache.check_invariants()
    assert cache.cached_tokens == (89, 89, 89)


def test_prompt_lookup_takes_convolutions_back() -> None:
    model = recurrent("lfm2")
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(20, 1) * 2
    for cached in (0, 39):
        kwargs: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20}
        assert check_same(model, [prompt], cache, **kwargs) == (cached,)
    answer = tokens_without_it(model, [prompt], max_new_tokens=20)[0].tolist()
    assert check_same(model, [answer + draw(4, 2)], cache) == (59,)


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_padding_longer_than_a_chunk_and_rows_of_one_token(chunk: int | None) -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    for _ in range(2):
        check_same(model, [draw(20, 1), draw(1, 2), draw(11, 3)], cache, prefill_chunk_size=chunk)
        check_same(model, [draw(1, 4)], cache, prefill_chunk_size=chunk)


def test_rows_without_a_token_change_nothing() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    inputs = padded([draw(9, 1), draw(9, 2)])
    inputs["attention_mask"][1] = 0
    for _ in range(2):
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=4, do_sample=False))
        cache.check_invariants()


def test_padding_is_no_token_where_one_column_is_left_to_compute() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    prompt = draw(20, 1)
    check_same(model, [[*prompt[:18], 0]], cache)
    inputs = padded([prompt, draw(1, 2)])
    inputs["input_ids"][1, :19] = 7  # masked
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert cache.cached_tokens == (18, 0)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=8, do_sample=False))
    run(model, [draw(1, 2) + draw(3, 3)], cache)  # from what the second row left
    assert check_same(model, [draw(1, 2) + draw(3, 3)], cache) == (3,)


def test_a_row_that_ends_before_others_goes_on_from_its_end() -> None:
    model = recurrent()
    prompts = [draw(16, 1), draw(19, 2)]
    answers = run(model, prompts)
    end = int(answers[0, 21])  # the first row's third token ends it
    assert end not in answers[1, 19:]
    cache = RadixCache(model, max_tokens=512, page_size=4)
    check_same(model, prompts, cache, eos_token_id=end, pad_token_id=0)
    turns = [[*answers[0, 3:22].tolist(), *draw(4, 3)], [*answers[1].tolist(), *draw(4, 4)]]
    assert check_same(model, [turns[0]], cache) == (18,), "up to the token that ended it"
    assert check_same(model, [turns[1]], cache) == (24,)


def test_inference_mode_and_its_absence_share_states() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=512, page_size=4)
    with torch.inference_mode():
        check_same(model, [draw(30, 1)], cache)
    assert check_same(model, [draw(30, 1)], cache) == (29,)
    with torch.inference_mode():
        assert check_same(model, [draw(30, 1)], cache) == (29,)


# -------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize("family", some_of([*FAMILIES], {"lfm2"}))
@pytest.mark.parametrize(("max_tokens", "state_slots"), [(60, 16), (72, 3)])
def test_too_little_room_costs_hits_alone(family: str, max_tokens: int, state_slots: int) -> None:
    model = recurrent(family)
    cache = RadixCache(model, max_tokens=max_tokens, page_size=4, state_slots=state_slots)
    pick = picker(max_tokens)
    for step in range(8):
        rows: Rows = [draw(12 + 10 * pick(7), pick(2)) + draw(1 + pick(5), 7 + step) for _ in range(1 + pick(3))]
        check_same(model, rows, cache, max_new_tokens=2 + pick(4))
        check_same(model, rows[:1], cache)
        assert stored_states(cache) <= state_slots
    assert cache.stats().hit_tokens > 0


def test_a_sequence_longer_than_all_pages_keeps_the_states_that_lie_in_them() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=32, page_size=4)
    for cached in (0, 29):
        assert check_same(model, [draw(30, 1)], cache) == (cached,)
    for _ in range(2):
        assert check_same(model, [draw(50, 2)], cache) == (0,)


def test_reset_and_other_weights_forget_states() -> None:
    model = recurrent("qwen3_next")
    cache = RadixCache(model, max_tokens=100, page_size=4)
    assert cache.stats().state_bytes == 0
    check_same(model, [draw(30, 1)], cache)
    assert (stored_states(cache), cache.stats().state_slots) == (2, 16)
    assert cache.stats().state_bytes == 16 * 2 * (64 * 4 + 4 * 8 * 8) * 4  # layers, inputs of the convolution, heads
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    assert torch.equal(run(model, [draw(30, 1)], cache), run(model, [draw(30, 1)]))
    assert cache.cached_tokens == (0,)
    cache.reset()
    assert (stored_states(cache), cache.stats().state_bytes) == (0, 0)
    cache.check_invariants()


# --------------------------------------------------------------------------------------- when something raises


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=400, page_size=4)
    check_same(model, [draw(90, 1) + draw(5, 2)], cache)
    before = cache.stats()
    prompts = [draw(90, 1) + draw(9, 3), draw(99, 4)]
    with pytest.raises(StopError):
        run(model, prompts, cache, logits_processor=LogitsProcessorList([raise_after(3)]))
    for steps in range(4):  # in each part of the prompt, and in a step
        hook = model.get_decoder().layers[1].register_forward_pre_hook(raise_after(steps))
        with pytest.raises(StopError):
            run(model, prompts, cache)
        hook.remove()
    cache.check_invariants()
    assert (cache.stats().stored_tokens, stored_states(cache)) == (before.stored_tokens, before.stored_states)
    assert len(cache) == 0
    assert not model._forward_pre_hooks
    check_same(model, prompts, cache)


def test_rows_whose_computation_alone_raises_leave_nothing_behind() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=1024, page_size=4)
    prompts = [draw(120, 1) + draw(4 + row, 2 + row) for row in range(3)]
    for steps in range(2):
        hook = model.get_decoder().layers[2].register_forward_pre_hook(raise_after(steps))
        with pytest.raises(StopError):
            run(model, prompts, cache)
        hook.remove()
        cache.check_invariants()
        assert len(cache) == 0
    assert check_same(model, prompts, cache) == (120, 121, 122)


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_begin_anew_with_each_chunk_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match="its JambaMambaMixer starts from nothing"):
        RadixCache(make_model(RECURRENT_FAMILIES["jamba"]()).to(dtype), max_tokens=100)


def test_models_without_keys_and_values_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="none of its layers keeps keys and values"):
        RadixCache(make_model(MAMBA_ALONE()), max_tokens=100)


def test_states_do_not_go_to_disk(tmp_path: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="leave disk_cache out"):
        RadixCache(recurrent(), max_tokens=100, disk_cache=tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("state_slots", [2, True, 4.0])
def test_settings_out_of_range(state_slots: Any) -> None:
    with pytest.raises(ConfigError, match="state_slots"):
        RadixCache(recurrent(), max_tokens=100, state_slots=state_slots)


def test_models_whose_states_see_padding_are_refused() -> None:
    model = recurrent("qwen3_next")
    for layer in model.get_decoder().layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
            )
    with pytest.raises(UnsupportedModelError, match="depend on the padding"):
        RadixCache(model, max_tokens=100)


def test_calls_that_cannot_be_served_are_refused() -> None:
    model = recurrent()
    cache = RadixCache(model, max_tokens=100, page_size=4)
    right = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    with pytest.raises(InvalidRequestError, match="on the left"):
        model.generate(**right, past_key_values=cache, max_new_tokens=1)
    with pytest.raises(InvalidRequestError, match="cannot be dropped"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        run(model, [draw(9, 1)], cache, prompt_lookup_num_tokens=3)
    assert check_same(model, [draw(9, 1)], cache) == (0,)
