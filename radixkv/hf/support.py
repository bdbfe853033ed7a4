"""What a `RadixCache` can serve: a model, and the inputs of one forward call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from radixkv.errors import InvalidRequestError, UnsupportedModelError
from radixkv.hf.chunk_buffer import ByteMeter
from radixkv.hf.chunked_cache import kv_layers
from radixkv.hf.recurrent_layers import kv_layers_of, layers_of_call
from radixkv.memory.rope import length_dependent_limit
from radixkv.models.recurrent.finding import keeps_states

KNOWN_INPUTS = ("input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "logits_to_keep")


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless KV and states depend on the tokens up to them alone, and can be kept."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"a RadixCache is made for a transformers model, not {type(model).__name__}")
    config = model.config.get_text_config()
    if model.config._attn_implementation == "radixkv":
        raise _unsupported(
            model,
            "it, or a model with the same config object, serves a radixkv Engine; load another instance for the "
            "RadixCache, or call model.set_attn_implementation('sdpa') once the engine is no longer used",
        )
    _check_layers(model)
    if getattr(model, "_is_stateful", False) and not keeps_states(model):
        raise _unsupported(model, "it keeps a recurrent state outside of the layers of transformers' cache")
    if getattr(config, "cross_attention_layers", None) or getattr(config, "add_cross_attention", False):
        raise _unsupported(model, "it attends to other inputs than its tokens (cross attention)")
    if getattr(config, "use_bidirectional_attention", False) or _sees_later_tokens(model):
        raise _unsupported(model, "its tokens see the tokens after them, so a prefix alone has other KV")
    if not model.can_generate() or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise _unsupported(model, "it does not generate, or its forward() does not accept logits_to_keep")


def position_limit(config: PretrainedConfig) -> int | None:
    """How long a sequence may get before the keys of its first tokens change; None if they never do.

    Rotary embeddings that stretch with the length of the context (dynamic NTK, LongRoPE) turn all keys of a long
    prompt by other angles than those of a short one.
    """
    return length_dependent_limit(config.get_text_config())


def sees_columns(config: PretrainedConfig) -> bool:
    """Whether KV depends on the number of padding columns too: Llama 4 tunes its temperature by columns."""
    return bool(getattr(config.get_text_config(), "attn_temperature_tuning", False))


def check_inputs(kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError unless tokens are all that the KV of this forward call depends on."""
    for name, value in kwargs.items():
        if name not in KNOWN_INPUTS and (isinstance(value, Tensor) or (isinstance(value, Mapping) and value)):
            raise InvalidRequestError(
                f"a RadixCache knows prefixes by their token ids alone, and KV depends on {name} too; "
                f"leave {name} out, or generate without the cache"
            )
    if kwargs.get("use_cache") is False:
        raise InvalidRequestError("use_cache=False computes every token anew; leave it or the RadixCache out")
    if kwargs.get("input_ids") is None:
        raise InvalidRequestError("a RadixCache needs input_ids")
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise InvalidRequestError("a RadixCache needs an attention_mask of shape [batch, tokens]")


def check_prompt(inputs: object, mask: object) -> None:
    """Raise InvalidRequestError if a call of generate passes fewer tokens than its attention_mask has columns.

    Other caches hold the tokens of the call before; there, the last token alone continues an output.
    """
    if isinstance(inputs, Tensor) and isinstance(mask, Tensor) and mask.shape[-1] != inputs.shape[-1]:
        raise InvalidRequestError(
            f"attention_mask must have as many columns as input_ids; it has {mask.shape[-1]}, not {inputs.shape[-1]}; "
            "to continue an output with a RadixCache, pass all its tokens from the first on: those that it has stored "
            "are not computed again"
        )


def left_padding(attention_mask: Tensor | None, batch_size: int) -> list[int]:
    """Leading columns that each row masks. Raises: InvalidRequestError for any other mask."""
    if attention_mask is None:
        return [0] * batch_size
    real = attention_mask.bool().cpu()
    padding = (~real).sum(1)
    expected = torch.arange(real.shape[1], dtype=torch.int64, device="cpu") >= padding[:, None]
    for row in range(batch_size):
        if not torch.equal(real[row], expected[row]):
            raise InvalidRequestError(
                f"row {row} of attention_mask masks tokens after the first one; a RadixCache needs padding on the left"
            )
    return [int(columns) for columns in padding]


def check_positions(position_ids: Tensor | None, first: int, padding: list[int]) -> None:
    """Raise InvalidRequestError unless tokens are counted from 0, padding left out; `first` is the first column."""
    if position_ids is None:
        return
    columns = torch.arange(first, first + position_ids.shape[-1], dtype=torch.int64, device="cpu")
    expected = columns - torch.tensor(padding, dtype=torch.int64, device="cpu")[:, None]  # [batch, columns]
    if not ((position_ids.cpu() == expected) | (expected < 0)).all():
        raise InvalidRequestError(
            "a RadixCache needs position_ids that count each row's tokens from 0; leave position_ids out, and pass all "
            "tokens of the sequence from the first on"
        )


def _sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether attention of the decoder says that it is not causal, as that of a BERT that was not made a decoder."""
    decoder = model.get_decoder() or model
    return any(getattr(module, "is_causal", None) is False for module in decoder.modules())


def weights_state(model: PreTrainedModel) -> tuple[tuple[object, ...], ...]:
    """What changes when the parameters of `model` are replaced, moved, or written to. O(parameters), not their bytes.

    What is written through `parameter.data`, or to parameters made in inference mode, is not seen.
    """
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters())


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse layers that keep something else than KV or states, and models without any KV.

    Without states gaps are refused, too: the layers of a call are those that kept something.
    """
    if keeps_states(model) and not getattr(model.config, "is_encoder_decoder", False):
        if not kv_layers_of(layers_of_call(model.config, 1, ByteMeter())):
            raise _unsupported(
                model,
                "none of its layers keeps keys and values, and generate hands states alone over as cache_params, where "
                "no cache of another kind is taken",
            )
        return
    placeholders = [type(layer).__name__ == "DummyLayer" for layer in kv_layers(model.config)]
    if placeholders != sorted(placeholders):
        raise _unsupported(model, f"layer {placeholders.index(True)} keeps nothing per token, and later ones do")


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot reuse prefixes: {why}")
