"""Every supported family gives the same logits and the same greedy tokens as the unmodified model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from oracles import oracle_of
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention import dense_extends
from radixkv.errors import UnsupportedModelError
from radixkv.models.probe import plug_in_paged_attention
from radixkv_bench.models.small_configs import small_config
from runners import tampered_engine
from stress_cases import some_of
from tiny_models import FAMILIES, REFUSED, make_model, tiny_model

NEW_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def pairs(**families: Iterable[str]) -> pytest.MarkDecorator:
    """Each backend with the families given for it, and with all others under `stress`."""
    return pytest.mark.parametrize(
        ("backend", "family"),
        [
            pytest.param(backend, family, marks=[] if family in chosen else [pytest.mark.stress])
            for backend, chosen in families.items()
            for family in FAMILIES
        ],
    )


@pairs(numba=["llama", "gemma2", "gpt_oss", "llama4"], torch=["mistral"])  # the others: logits, below
def test_same_tokens_cold_warm_alone_and_batched(family: str, backend: str) -> None:
    model = tiny_model(family)
    prompts = random_prompts(1, [37, 41, 33, 50], shared=32)
    expected = [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]
    config = EngineConfig(page_size=4, kv_cache_tokens=512, attention_backend=backend, max_batch_tokens=64)
    engine = Engine(model, config=config)

    cold = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    warm = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    engine.reset_cache()
    batched = engine.generate(prompts, GREEDY)

    for outputs in (cold, warm, batched):
        assert [output.token_ids for output in outputs] == expected
    assert [output.cached_tokens for output in cold] == [0, 32, 32, 32]
    assert [output.cached_tokens for output in warm] == [36, 40, 32, 49]
    engine.check_invariants()


@pytest.mark.parametrize("family", some_of(FAMILIES, {"llama", "mistral", "gemma3", "mixtral"}))
def test_same_tokens_as_generate(family: str) -> None:
    model = tiny_model(family)
    unmodified = copy.deepcopy(model)
    prompt = random_prompts(2, [23], shared=0)[0]
    generated = unmodified.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    engine = Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128))
    assert engine.generate(prompt, GREEDY)[0].token_ids == generated[0, len(prompt) :].tolist()


@pairs(numba=FAMILIES, torch=["gemma2", "llama4"], reference=["gpt_oss"])
def test_logits_on_a_cached_prefix(family: str, backend: str) -> None:
    """Extends and decodes over cached pages, mixed in one batch, against the whole sequence computed at once."""
    model = tiny_model(family)
    unmodified = copy.deepcopy(model)
    prompts = random_prompts(3, [45, 45, 30], shared=28)
    with torch.inference_mode():
        expected = [unmodified(input_ids=torch.tensor([p]), use_cache=False).logits[0, -1] for p in prompts]
    seen: list[torch.Tensor] = []
    config = EngineConfig(page_size=4, kv_cache_tokens=512, attention_backend=backend)
    engine = tampered_engine(model, lambda step, compute: _keep(seen, compute()), config)
    engine.generate(prompts[0][:29], SamplingParams(max_tokens=1))
    seen.clear()
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1))
    assert [output.cached_tokens for output in outputs] == [29, 28, 28]
    for row, logits in enumerate(expected):
        torch.testing.assert_close(torch.cat(seen)[row], logits, rtol=0, atol=1e-4)


def _keep(seen: list[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    seen.append(logits)
    return logits


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba2", "Mamba2ForCausalLM .* none of its layers attends"),
        ("t5", "encoder-decoder"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_with_the_reason(family: str, reason: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model)
    assert set(REFUSED) >= {family}


def test_a_model_that_computes_something_else_on_a_flat_batch_is_refused() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.forward = _stretched_by_length(model.model.rotary_emb.forward)
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        plug_in_paged_attention(model)
    assert model.config._attn_implementation != "radixkv", "the model is as it was"


class _Leaking(torch.nn.Module):
    """A norm that lets each token of the flattened batch see a little of the one before it."""

    def __init__(self, norm: torch.nn.Module, share: float) -> None:
        super().__init__()
        self._norm, self._share = norm, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norm(hidden)
        return normed + self._share * torch.nn.functional.pad(normed, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(
    ("share", "dtype"),
    [
        (0.02, torch.bfloat16),
        (0.5, torch.float32),
        pytest.param(0.5, torch.bfloat16, marks=pytest.mark.stress),
        pytest.param(0.02, torch.float32, marks=pytest.mark.stress),
    ],
)
def test_a_model_whose_tokens_mix_outside_attention_is_refused_in_every_dtype(share: float, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    for layer in model.model.layers:
        layer.input_layernorm = _Leaking(layer.input_layernorm, share)
    with pytest.raises(UnsupportedModelError, match=r"differ from its own|change another's logits"):
        plug_in_paged_attention(model)


def _attends_otherwise(change: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Callable[[Any], None]:
    """Has the attention of the first layer called by `change`, which gets it and its arguments."""

    def tamper(model: Any) -> None:
        attention = model.model.layers[0].self_attn
        forward = attention.forward
        attention.forward = lambda **kwargs: change(forward, kwargs)

    return tamper


def _twice(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    forward(**kwargs)
    return forward(**kwargs)


def _under_a_mask(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    length = kwargs["hidden_states"].shape[1]
    return forward(**{**kwargs, "attention_mask": torch.ones(1, 1, length, length).tril().log()})


def _only_short(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    if kwargs["hidden_states"].shape[1] > 11:  # the longest sequence of the probe
        raise IndexError("a table of 11 positions")
    return forward(**kwargs)


def _drop_arguments(model: Any) -> None:
    """On the way to an attention whose config does not tell of which model it is."""
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def without_them(**kwargs: Any) -> Any:
        attention.config = copy.deepcopy(model.config)
        return forward(**{name: value for name, value in kwargs.items() if name != "radixkv"})

    attention.forward = without_them


def _name_layers(model: Any) -> None:
    model.config.layer_types = ["full_attention", "foreseeing_attention"]


UNFIT: dict[str, tuple[Callable[[Any], None], str]] = {
    "a layer without attention": (
        _attends_otherwise(lambda forward, kwargs: (torch.zeros_like(kwargs["hidden_states"]), None)),
        r"layers \[0\] of 2 run no attention through the AttentionInterface",
    ),
    "a layer that attends twice": (
        _attends_otherwise(_twice),
        "its layer 0 runs attention twice, over keys of its own",
    ),
    "a mask of its own": (_attends_otherwise(_under_a_mask), "LlamaAttention makes an attention mask of its own"),
    "arguments that are dropped": (
        _drop_arguments,
        "LlamaAttention does not hand the forward call's keyword arguments on to its attention",
    ),
    "what fails on a flat batch": (
        _attends_otherwise(_only_short),
        r"a flattened batch fails in it \(IndexError: a table of 11 positions\)",
    ),
    "layers of another kind": (_name_layers, "it has layers of the types foreseeing_attention"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_does_otherwise_is_refused_with_the_reason_and_left_as_it_was(case: str) -> None:
    tamper, reason = UNFIT[case]
    model = tiny_model("llama")
    tamper(model)
    before = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
    with pytest.raises(UnsupportedModelError, match=f"^LlamaForCausalLM.*{reason}"):
        plug_in_paged_attention(model)
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits, before)


def test_ctrl_c_amid_the_proof_leaves_the_model_as_it_was() -> None:
    def interrupted(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if "radixkv" in kwargs:
            raise KeyboardInterrupt
        return forward(**kwargs)

    model = tiny_model("llama")
    _attends_otherwise(interrupted)(model)
    before = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
    with pytest.raises(KeyboardInterrupt):
        plug_in_paged_attention(model)
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted_in_16_bit(family: str) -> None:
    assert plug_in_paged_attention(tiny_model(family).to(torch.bfloat16))


def _stretched_by_length(forward):  # type: ignore[no-untyped-def]
    return lambda hidden, position_ids: forward(hidden, position_ids * hidden.shape[1])


@pytest.mark.parametrize("family", some_of(["llama", "mistral", "gemma2", "llama4"], {"gemma2", "llama4"}))
def test_long_extends_are_cut_into_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_extends, "BLOCK_SCORES", 200)  # three to five rows a block
    model = tiny_model(family)
    prompt = random_prompts(4, [47], shared=0)[0]
    expected = oracle_of(family).continuation(prompt, NEW_TOKENS)
    engine = Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=512, attention_backend="torch"))
    engine.generate(prompt[:14], SamplingParams(max_tokens=1))
    assert engine.generate(prompt, GREEDY)[0].token_ids == expected


@pytest.mark.filterwarnings("ignore")
def test_a_window_that_only_a_mask_knows_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="window of 40 tokens does not reach"):
        plug_in_paged_attention(tiny_model("phimoe"))


def test_two_engines_on_one_model() -> None:
    model = tiny_model("llama")
    prompt = random_prompts(5, [21], shared=0)[0]
    expected = oracle_of("llama").continuation(prompt, NEW_TOKENS)
    engines = [Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128)) for _ in range(2)]
    for engine in [*engines, *engines]:
        assert engine.generate(prompt, GREEDY)[0].token_ids == expected


def test_two_engines_on_a_model_whose_images_have_an_attention_of_their_own() -> None:
    model = make_model(small_config("got_ocr2"))
    engines = [Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128)) for _ in range(2)]
    first, second = (engine.generate([7, 8, 9], GREEDY)[0].token_ids for engine in engines)
    assert first == second


def test_a_model_switched_behind_the_engines_back_fails_instead_of_lying() -> None:
    model = tiny_model("llama")
    engine = Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128))
    model.set_attn_implementation("eager")
    (output,) = engine.generate(random_prompts(5, [21], shared=0)[0], GREEDY)
    assert isinstance(output.error, UnsupportedModelError)
    assert engine.stats().cache.total_tokens == 0


def test_a_model_loaded_for_us_is_checked_all_the_same() -> None:
    model = tiny_model("llama")
    layers = plug_in_paged_attention(model)
    del model._radixkv_layers
    assert plug_in_paged_attention(model) == layers
