"""Finds out whether a model runs on paged attention, and what its layers keep, by running it once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from radixkv.attention.backend import AttentionParams, LayerAttention
from radixkv.errors import UnsupportedModelError
from radixkv.kernels.torch_reference import dense_attention, visible_mask
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.latent_pool import LatentKV
from radixkv.memory.state_pool import StatePool
from radixkv.models.kept_states import KeptStates
from radixkv.models.latent_attention import absorb_projections, expand_again, why_not_latent
from radixkv.models.older_families import replace_own_attention, restore_own_attention
from radixkv.models.paged_attention import INTERFACE_NAME, AttentionContext, flattened_forward, set_implementation
from radixkv.models.recurrent.chunk_probe import takes_chunks
from radixkv.models.recurrent.finding import find_recurrent_modules, keeps_states
from radixkv.models.recurrent.forward import recurrent_forward
from radixkv.models.recurrent.modules import RecurrentModules
from radixkv.models.recurrent.split_step import StateSpan

PROBE_LENGTHS = (11, 5)  # two sequences in one batch, of different lengths
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits, relative to their largest
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
RECURRENT_LAYER_TYPES = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "attention", "mlp", "moe"}
PROBE_STEPS = ((6, 4), (4, 1), (1, 0))  # in which the two are computed again where layers keep states
MAX_HALF_DIFFERENCE = 0.3  # in 16 bit, where a router of experts may decide otherwise over rounding
MAX_LEAK = 2e-3  # in 16 bit, where a row of a product does not depend on the others
MAX_EXPERTS_DIFFERENCE = 5e-2  # but an expert's product has other rows
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class _ProbeContext:
    """Computes attention over the flattened sequences themselves, and notes what each layer keeps."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.layers: dict[int, LayerAttention] = {}
        self._past: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # k and v, by layer and sequence
        self.go_on(lengths)

    def go_on(self, lengths: tuple[int, ...]) -> None:
        """Get ready for the next tokens of the sequences, `lengths` of each; none of a sequence that is not run."""
        self._lengths = lengths
        self._noted: set[int] = set()
        self._kept = KeptStates()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self._note(layer, LayerKV(num_kv_heads=k.shape[1], k_head_dim=k.shape[2], v_head_dim=v.shape[2]), q, params)
        self.layers[layer] = self._kept.keep(layer, self.layers[layer], k, v)
        return self._attention(layer, q, k, v, params)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        self._note(layer, LatentKV.of(latent_dim=latent_dim, rope_dim=k.shape[2] - latent_dim), q, params)
        return self._attention(layer, q, k, k[..., :latent_dim], params)

    def _note(self, layer: int, kv: LayerKV, q: Tensor, params: AttentionParams) -> None:
        if layer in self._noted:
            raise UnsupportedModelError(f"its layer {layer} runs attention twice, over keys of its own each time")
        self._noted.add(layer)
        self.layers[layer] = LayerAttention(kv, q.shape[1], params)

    def _attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        outputs = []
        parts = zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True)
        for sequence, (own_q, own_k, own_v) in enumerate(parts):
            if (layer, sequence) in self._past:
                past_k, past_v = self._past[layer, sequence]
                own_k, own_v = torch.cat([past_k, own_k]), torch.cat([past_v, own_v])
            self._past[layer, sequence] = own_k, own_v
            positions = torch.arange(len(own_k) - len(own_q), len(own_k), dtype=torch.int64, device=q.device)
            visible = visible_mask(
                positions, len(own_k), sliding_window=params.sliding_window, chunk_size=params.chunk_size
            )
            outputs.append(
                dense_attention(
                    own_q,
                    own_k,
                    own_v,
                    visible,
                    scale=params.scale,
                    softcap=params.softcap,
                    sinks=params.sinks,
                    bias=None if params.key_bias is None else params.key_bias.between(positions, len(own_q)),
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
        set_implementation(model, before)
    sequences = [_probe_ids(length, config.vocab_size).to(model.device) for length in PROBE_LENGTHS]
    expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[:, -1] for ids in sequences])
    recurrent = _recurrent_modules(model, sequences[0])
    try:
        set_implementation(model, INTERFACE_NAME)
        absorb_projections(model)
        replace_own_attention(model, before)
        if recurrent is not None:
            recurrent.plug_in()
        context = _ProbeContext(PROBE_LENGTHS)
        found = _run(model, sequences, context, recurrent)
        _check(model, context, found, expected, recurrent)
        if recurrent is not None:
            _check_continued(model, sequences, expected, recurrent)
        if found.dtype not in MAX_DIFFERENCE:
            _check_isolation(model, sequences, found, recurrent)
    except BaseException as error:
        set_implementation(model, before)
        expand_again(model)
        if recurrent is not None:
            recurrent.unplug()
        restore_own_attention(model)
        if not isinstance(error, Exception):
            raise
        if isinstance(error, UnsupportedModelError) and not str(error).startswith(type(model).__name__):
            raise _unsupported(model, str(error)) from error
        if isinstance(error, UnsupportedModelError):
            raise
        # whatever a model of unknown code does with what it was given
        raise _unsupported(model, f"a flattened batch fails in it ({type(error).__name__}: {error})") from error
    layers = tuple(layer for _, layer in sorted(context.layers.items()))
    if recurrent is not None:
        numbers = recurrent.number_attention_layers(sorted(context.layers))
        layers = tuple(layer if layer.reads is None else replace(layer, reads=numbers[layer.reads]) for layer in layers)
    model._radixkv_layers, model._radixkv_recurrent = layers, recurrent
    return layers


def recurrent_modules(model: PreTrainedModel) -> RecurrentModules | None:
    """Those of a model that `plug_in_paged_attention` was called with; None if none of its layers keeps a state."""
    found: RecurrentModules | None = model._radixkv_recurrent
    return found


def _recurrent_modules(model: PreTrainedModel, ids: Tensor) -> RecurrentModules | None:
    """Those of a model that runs as ever."""
    if not keeps_states(model):
        return None
    try:
        found = find_recurrent_modules(model, ids)
        return RecurrentModules(found, takes_chunks(found, len(ids))) if found else None
    except Exception as error:  # whatever a model of unknown code does with transformers' own cache
        raise _unsupported(model, f"its layers keep states in a way of their own ({_one_line(error)})") from error


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


def _run(
    model: PreTrainedModel, sequences: list[Tensor], context: _ProbeContext, recurrent: RecurrentModules | None = None
) -> Tensor:
    if recurrent is None:
        return _run_by(partial(flattened_forward, model), sequences, context)
    pool = StatePool(recurrent.shapes, 2, model.device)
    return _run_step(model, recurrent, pool, sequences, (0, 0), context)


def _run_step(
    model: PreTrainedModel,
    recurrent: RecurrentModules,
    pool: StatePool,
    tokens: list[Tensor],
    firsts: Sequence[int],
    context: _ProbeContext,
) -> Tensor:
    """The last logits of each of `tokens`, the next ones of sequences of which so many came before.

    Slot i of `pool` holds the state of sequence i.
    """
    device = model.device
    ends = list(accumulate(len(part) for part in tokens))
    spans = [
        StateSpan(last - len(part), last, slot if first else None, slot)
        for slot, (part, first, last) in enumerate(zip(tokens, firsts, ends, strict=True))
    ]
    positions = torch.cat(
        [
            torch.arange(f, f + len(part), dtype=torch.int64, device=device)
            for f, part in zip(firsts, tokens, strict=True)
        ]
    )
    rows = torch.tensor(ends, dtype=torch.int64, device=device) - 1
    step = recurrent.step(pool, spans)
    return recurrent_forward(model, recurrent, step, torch.cat(tokens), positions, rows, context)


def _check_continued(
    model: PreTrainedModel, sequences: list[Tensor], expected: Tensor, recurrent: RecurrentModules
) -> None:
    """Refuse a model that does not go on from its states as if it had never stopped."""
    pool = StatePool(recurrent.shapes, len(sequences), model.device)
    context = _ProbeContext(PROBE_LENGTHS)
    firsts = [0] * len(sequences)
    found = torch.empty_like(expected)
    for lengths in PROBE_STEPS:
        parts = [ids[f : f + num] for ids, f, num in zip(sequences, firsts, lengths, strict=True) if num]
        context.go_on(lengths[: len(parts)])
        found[: len(parts)] = _run_step(model, recurrent, pool, parts, firsts[: len(parts)], context)
        firsts = [first + num for first, num in zip(firsts, lengths, strict=True)]
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= MAX_DIFFERENCE.get(expected.dtype, MAX_HALF_DIFFERENCE):
        raise _unsupported(
            model, f"its logits differ by {difference:.1e} of their size after its layers went on from their states"
        )


def _run_by(run: Callable[..., Tensor], sequences: list[Tensor], context: _ProbeContext) -> Tensor:
    device = sequences[0].device
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64, device=device)
    positions = torch.cat([torch.arange(len(ids), dtype=torch.int64, device=device) for ids in sequences])
    return run(torch.cat(sequences), positions, lengths.cumsum(0) - 1, context)


def _check(
    model: PreTrainedModel,
    context: _ProbeContext,
    found: Tensor,
    expected: Tensor,
    recurrent: RecurrentModules | None,
) -> None:
    if not context.layers and keeps_states(model):
        raise _unsupported(model, "none of its layers attends, and models that keep a state alone are not served")
    if not context.layers:
        raise _unsupported(
            model, "its attention does not go through transformers' AttentionInterface, so nothing can be plugged in"
        )
    # LongCat-Flash has two attentions in a layer, and numbers them through
    num_layers = max(model.config.get_text_config().num_hidden_layers, 1 + max(context.layers))
    missing = sorted(set(range(num_layers)) - set(context.layers))
    if missing and recurrent is None:
        raise _unsupported(
            model,
            f"layers {missing} of {num_layers} run no attention through the AttentionInterface "
            "(recurrent or convolutional layers keep a state that pages do not hold)",
        )
    if len({layer.kv.is_latent for layer in context.layers.values()}) > 1:
        raise _unsupported(model, "some of its layers keep latents (MLA) and others keys and values")
    _check_limits(model, context, recurrent)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= MAX_DIFFERENCE.get(expected.dtype, MAX_HALF_DIFFERENCE):
        raise _unsupported(
            model, f"its logits on a flattened batch differ from its own by {difference:.1e} of their size"
        )


def _check_isolation(
    model: PreTrainedModel, sequences: list[Tensor], found: Tensor, recurrent: RecurrentModules | None
) -> None:
    """Refuse what looks alike in 16 bit only because rounding hides it: logits that other tokens have a part in.

    The tokens of one sequence are changed, and the logits of the other must stay.
    """
    config = model.config.get_text_config()
    has_experts = any(getattr(config, name, None) for name in EXPERT_FIELDS)
    limit = MAX_EXPERTS_DIFFERENCE if has_experts else MAX_LEAK
    for changed in range(len(sequences)):
        others = [(ids + 1) % config.vocab_size if i == changed else ids for i, ids in enumerate(sequences)]
        again = _run(model, others, _ProbeContext(PROBE_LENGTHS), recurrent)
        kept = [i for i in range(len(sequences)) if i != changed]
        difference = float((again[kept] - found[kept]).abs().max() / found.abs().max())
        if not difference <= limit:
            raise _unsupported(
                model, f"tokens of one sequence of a flattened batch change another's logits, by {difference:.1e}"
            )


def _check_limits(model: PreTrainedModel, context: _ProbeContext, recurrent: RecurrentModules | None) -> None:
    """Refuse limits of sight that the attention function is not told of, and that two short prompts never meet."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    known = KNOWN_LAYER_TYPES if recurrent is None else KNOWN_LAYER_TYPES | RECURRENT_LAYER_TYPES
    unknown = sorted(set(layer_types) - known)
    if unknown:
        raise _unsupported(model, f"it has layers of the types {', '.join(unknown)}")
    window = getattr(config, "sliding_window", None)
    slides = not layer_types or any("sliding" in layer_type for layer_type in layer_types)
    has_window = any(layer.params.sliding_window is not None for layer in context.layers.values())
    if window and slides and not has_window:
        raise _unsupported(model, f"its sliding window of {window} tokens does not reach its attention function")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _probe_ids(length: int, vocab_size: int) -> Tensor:
    return torch.arange(1, length + 1, dtype=torch.int64, device="cpu") * 7919 % vocab_size


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} does not run on paged attention: {why}")
