"""Finds out whether a model runs on paged attention, and what its layers keep, by running it once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from radixkv.attention.backend import AttentionParams, LayerAttention
from radixkv.errors import UnsupportedModelError
from radixkv.kernels.torch_reference import dense_attention, visible_mask
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.latent_pool import LatentKV
from radixkv.models.kept_states import KeptStates
from radixkv.models.latent_attention import absorb_projections, expand_again, why_not_latent
from radixkv.models.paged_attention import INTERFACE_NAME, AttentionContext, flattened_forward

PROBE_LENGTHS = (11, 5)  # two sequences in one batch, of different lengths
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits, relative to their largest
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
MAX_HALF_DIFFERENCE = 0.3  # in 16 bit, where a router of experts may decide otherwise over rounding
MAX_LEAK = 2e-3  # in 16 bit, where a row of a product does not depend on the others
MAX_EXPERTS_DIFFERENCE = 5e-2  # but an expert's product has other rows
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class _ProbeContext:
    """Computes attention over the flattened sequences themselves, and notes what each layer keeps."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self._lengths = lengths
        self._kept = KeptStates()
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self._note(layer, LayerKV(num_kv_heads=k.shape[1], k_head_dim=k.shape[2], v_head_dim=v.shape[2]), q, params)
        self.layers[layer] = self._kept.keep(layer, self.layers[layer], k, v)
        return self._attention(q, k, v, params)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        self._note(layer, LatentKV.of(latent_dim=latent_dim, rope_dim=k.shape[2] - latent_dim), q, params)
        return self._attention(q, k, k[..., :latent_dim], params)

    def _note(self, layer: int, kv: LayerKV, q: Tensor, params: AttentionParams) -> None:
        if layer in self.layers:
            raise UnsupportedModelError(f"its layer {layer} runs attention twice, over keys of its own each time")
        self.layers[layer] = LayerAttention(kv, q.shape[1], params)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        outputs = []
        for own_q, own_k, own_v in zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True):
            positions = torch.arange(len(own_q), dtype=torch.int64, device=q.device)
            visible = visible_mask(
                positions, len(own_q), sliding_window=params.sliding_window, chunk_size=params.chunk_size
            )
            outputs.append(
                dense_attention(
                    own_q, own_k, own_v, visible, scale=params.scale, softcap=params.softcap, sinks=params.sinks
                )
            )
        return torch.cat(outputs)


@torch.inference_mode()
def plug_in_paged_attention(model: PreTrainedModel) -> tuple[LayerAttention, ...]:
    """Switch `model` to paged attention and prove on two short sequences that it still computes the same.

    Returns: each layer's attention, in order.
    Raises: UnsupportedModelError that says why the model cannot be served; the model is as before then.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(model, "it is an encoder-decoder, and only decoders are served")
    if (reason := why_not_latent(model)) is not None:
        raise _unsupported(model, reason)
    before = model.config._attn_implementation
    known: tuple[LayerAttention, ...] | None = getattr(model, "_radixkv_layers", None)
    plugged_in = config._attn_implementation == INTERFACE_NAME  # whatever the part that reads images has
    if plugged_in and known is not None:  # another engine has this model, and may be running it
        return known
    _give_own_configs(model)
    if plugged_in:  # asked for when the model was loaded
        before = "eager"
        model.set_attn_implementation(before)
    sequences = [_probe_ids(length, config.vocab_size).to(model.device) for length in PROBE_LENGTHS]
    expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[:, -1] for ids in sequences])
    try:
        model.set_attn_implementation(INTERFACE_NAME)
        absorb_projections(model)
        context = _ProbeContext(PROBE_LENGTHS)
        found = _run(model, sequences, context)
        _check(model, context, found, expected)
        if found.dtype not in MAX_DIFFERENCE:
            _check_isolation(model, sequences, found)
    except BaseException as error:
        model.set_attn_implementation(before)
        expand_again(model)
        if not isinstance(error, Exception):
            raise
        if odd := sorted(set(getattr(config, "layers_block_type", None) or []) - {"attention"}):
            raise _unsupported(
                model, f"it has layers of the types {', '.join(odd)}, which keep a state that pages do not hold"
            ) from error
        if isinstance(error, UnsupportedModelError) and not str(error).startswith(type(model).__name__):
            raise _unsupported(model, str(error)) from error
        if isinstance(error, UnsupportedModelError):
            raise
        # whatever a model of unknown code does with what it was given
        raise _unsupported(model, f"a flattened batch fails in it ({type(error).__name__}: {error})") from error
    layers = tuple(layer for _, layer in sorted(context.layers.items()))
    model._radixkv_layers = layers
    return layers


@torch.inference_mode()
def difference_on_probe(
    model: PreTrainedModel, run: Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]
) -> float:
    """How far the logits of `run` are from those of `model`, which is plugged in, relative to the largest.

    Args:
        run: as `flattened_forward` without its model; gets four tokens of two sequences.
    """
    lengths = (3, 1)
    sequences = [_probe_ids(length, model.config.get_text_config().vocab_size).to(model.device) for length in lengths]
    expected = _run(model, sequences, _ProbeContext(lengths))
    found = _run_by(run, sequences, _ProbeContext(lengths))
    return float((found - expected).abs().max() / expected.abs().max())


def _give_own_configs(model: PreTrainedModel) -> None:
    """Replace the config objects of `model` by copies: transformers keeps the attention implementation in them.

    Other models may share them, and some may run in an engine at this moment.
    """
    copies: dict[int, Any] = {}  # one memo, so that parts of a config stay parts of its copy
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))


def _run(model: PreTrainedModel, sequences: list[Tensor], context: _ProbeContext) -> Tensor:
    return _run_by(partial(flattened_forward, model), sequences, context)


def _run_by(run: Callable[..., Tensor], sequences: list[Tensor], context: _ProbeContext) -> Tensor:
    device = sequences[0].device
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64, device=device)
    positions = torch.cat([torch.arange(len(ids), dtype=torch.int64, device=device) for ids in sequences])
    return run(torch.cat(sequences), positions, lengths.cumsum(0) - 1, context)


def _check(model: PreTrainedModel, context: _ProbeContext, found: Tensor, expected: Tensor) -> None:
    if not context.layers:
        raise _unsupported(
            model, "its attention does not go through transformers' AttentionInterface, so nothing can be plugged in"
        )
    # LongCat-Flash has two attentions in a layer, and numbers them through
    num_layers = max(model.config.get_text_config().num_hidden_layers, 1 + max(context.layers))
    missing = sorted(set(range(num_layers)) - set(context.layers))
    if missing:
        raise _unsupported(
            model,
            f"layers {missing} of {num_layers} run no attention through the AttentionInterface "
            "(recurrent or convolutional layers keep a state that pages do not hold)",
        )
    if len({layer.kv.is_latent for layer in context.layers.values()}) > 1:
        raise _unsupported(model, "some of its layers keep latents (MLA) and others keys and values")
    _check_limits(model, context)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= MAX_DIFFERENCE.get(expected.dtype, MAX_HALF_DIFFERENCE):
        raise _unsupported(
            model, f"its logits on a flattened batch differ from its own by {difference:.1e} of their size"
        )


def _check_isolation(model: PreTrainedModel, sequences: list[Tensor], found: Tensor) -> None:
    """Refuse what looks alike in 16 bit only because rounding hides it: logits that other tokens have a part in.

    The tokens of one sequence are changed, and the logits of the other must stay.
    """
    config = model.config.get_text_config()
    has_experts = any(getattr(config, name, None) for name in EXPERT_FIELDS)
    limit = MAX_EXPERTS_DIFFERENCE if has_experts else MAX_LEAK
    for changed in range(len(sequences)):
        others = [(ids + 1) % config.vocab_size if i == changed else ids for i, ids in enumerate(sequences)]
        again = _run(model, others, _ProbeContext(PROBE_LENGTHS))
        kept = [i for i in range(len(sequences)) if i != changed]
        difference = float((again[kept] - found[kept]).abs().max() / found.abs().max())
        if not difference <= limit:
            raise _unsupported(
                model, f"tokens of one sequence of a flattened batch change another's logits, by {difference:.1e}"
            )


def _check_limits(model: PreTrainedModel, context: _ProbeContext) -> None:
    """Refuse limits of sight that the attention function is not told of, and that two short prompts never meet."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    unknown = sorted(set(layer_types) - KNOWN_LAYER_TYPES)
    if unknown:
        raise _unsupported(model, f"it has layers of the types {', '.join(unknown)}")
    window = getattr(config, "sliding_window", None)
    slides = not layer_types or "sliding_attention" in layer_types
    has_window = any(layer.params.sliding_window is not None for layer in context.layers.values())
    if window and slides and not has_window:
        raise _unsupported(model, f"its sliding window of {window} tokens does not reach its attention function")


def _probe_ids(length: int, vocab_size: int) -> Tensor:
    return torch.arange(1, length + 1, dtype=torch.int64, device="cpu") * 7919 % vocab_size


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} does not run on paged attention: {why}")
