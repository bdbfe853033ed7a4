"""Finds out, by running a model on a few tokens, whether the KV of a prefix may be reused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from radixkv.errors import RadixKVError, UnsupportedModelError
from radixkv.hf.chunk_buffer import ByteMeter
from radixkv.hf.chunked_cache import ChunkedLayer
from radixkv.hf.recurrent_layers import batch_states, kv_layers_of, layers_of_call, state_shapes
from radixkv.memory.state_pool import StateShape
from radixkv.models.recurrent.chunk_probe import takes_chunks
from radixkv.models.recurrent.finding import find_recurrent_modules, keeps_states

NUM_TOKENS = 12
SPLIT = 7  # the tokens before it come from the cache
NUM_CHANGED = 4  # last tokens, which no earlier one may see
NUM_PADDING = 3
MAX_LEAK = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative to the largest value, at equal shapes
MAX_HALF_LEAK = 2e-3
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # at other shapes, which round otherwise
MAX_HALF_DIFFERENCE = 0.3  # in 16 bit, where a router of experts may decide otherwise over rounding


class _Run(NamedTuple):
    """What a model computed.

    logits: of the last column.
    kv: K and V of each layer, [1, heads, columns, dim].
    shapes, states: of recurrent layers, after the last column.
    """

    logits: Tensor
    kv: list[tuple[Tensor, Tensor]]
    shapes: tuple[StateShape, ...]
    states: list[Tensor]


class ProbedPrefixes(NamedTuple):
    """What a model that can reuse prefixes does.

    sees_columns: whether KV depends on how many columns of padding come before the tokens.
    states: K and V of a few tokens in each layer, each [heads, tokens, dim], as examples of their shapes.
    state_shapes: what recurrent layers keep of a sequence; empty for a model without them.
    """

    sees_columns: bool
    states: list[tuple[Tensor, Tensor]]
    state_shapes: tuple[StateShape, ...]


def probe_prefixes(model: PreTrainedModel) -> ProbedPrefixes:
    """Prove that a prefix computed earlier gives the logits of a prompt computed at once.

    Tokens, positions and masks are those that `generate` passes. Five forward passes over at most 15 tokens, and one
    more where layers keep states, with some of each class of these layers alone.

    Raises: UnsupportedModelError if prefixes cannot be reused; it says why.
    """
    with _as_in_generate(model):
        try:
            return _probe(model)
        except (RadixKVError, MemoryError):
            raise
        except Exception as error:  # whatever a model of unknown code does with a cache of another kind
            reason = " ".join(str(error).split())
            raise _unsupported(
                model, f"a forward pass with a cache fails ({type(error).__name__}: {reason})"
            ) from error


def _probe(model: PreTrainedModel) -> ProbedPrefixes:
    ids = _ordinary_ids(model.config)
    real = torch.ones_like(ids)
    dtype = model.dtype
    max_leak = MAX_LEAK.get(dtype, MAX_HALF_LEAK)
    max_difference = MAX_DIFFERENCE.get(dtype, MAX_HALF_DIFFERENCE)

    whole = _run(model, ids, real)
    others = torch.cat([ids[:, :-NUM_CHANGED], ids[:, :NUM_CHANGED]], dim=1)
    if _difference(_run(model, others, real), whole, slice(0, NUM_TOKENS - NUM_CHANGED)) > max_leak:
        raise _unsupported(
            model,
            "its tokens see the tokens after them, so a prefix alone has other KV (is_decoder=True may be missing)",
        )
    if whole.shapes:
        _check_chunks(model, ids)
    split = _run(model, ids, real, SPLIT)
    if max(_difference(split, whole), _after_all(split, whole)) > max_difference:
        raise _unsupported(model, "a prompt computed in two parts gets other logits than one computed at once")

    blank = torch.zeros_like(ids[:, :NUM_PADDING])
    padding = ids[:, :NUM_PADDING] if whole.shapes else blank  # embedded as zeros, token 0 may leave no trace in states
    padded_ids, padded_mask = torch.cat([padding, ids], dim=1), torch.cat([blank, real], dim=1)
    padded = _run(model, padded_ids, padded_mask)
    padded_split = _run(model, padded_ids, padded_mask, NUM_PADDING + SPLIT)
    after_padding = slice(NUM_PADDING, None)
    difference = max(_difference(padded_split, padded, after_padding), _after_all(padded_split, padded))
    if difference > max_difference:
        raise _unsupported(model, "a padded prompt computed in two parts gets other logits than one computed at once")
    without_padding = padded._replace(kv=[(k[:, :, after_padding], v[:, :, after_padding]) for k, v in padded.kv])
    sees_columns = _difference(without_padding, whole) > max_difference
    if whole.shapes and (sees_columns or _after_all(padded, whole) > max_difference):
        raise _unsupported(model, "the states of its recurrent layers depend on the padding before the tokens")
    return ProbedPrefixes(sees_columns, [(k[0], v[0]) for k, v in whole.kv], whole.shapes)


def _check_chunks(model: PreTrainedModel, ids: Tensor) -> None:
    """Refuse recurrent layers that begin anew with each chunk of more than one token.

    In 16 bit, and where states fade quickly, outputs tell little of it.
    """
    found = find_recurrent_modules(model, ids[0].to(model.get_input_embeddings().weight.device))
    takes = takes_chunks(found, ids.shape[1])
    if not all(takes):
        name = type(found[takes.index(False)].module).__name__
        raise _unsupported(
            model,
            f"its {name} starts from nothing where more than one token follows a stored state; an Engine serves it",
        )


def _run(model: PreTrainedModel, ids: Tensor, mask: Tensor, split: int | None = None) -> _Run:
    """Forward passes over the columns before and from `split` on; over all at once if it is None."""
    cache = _new_cache(model)
    device = model.get_input_embeddings().weight.device
    ids, mask = ids.to(device), mask.to(device)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    is_padded = not bool(mask.all())
    num_columns = ids.shape[1]
    output = None
    for first, last in pairwise([0, num_columns] if split is None else [0, split, num_columns]):
        own = {"position_ids": positions[:, first:last]} if takes_positions else {}
        output = model(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last] if is_padded else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **own,
        )
    assert output is not None, "there are columns"
    layers = kv_layers_of(cache.layers)
    written = {layer.get_seq_length() for layer in layers} or {0}
    if written != {num_columns}:
        raise _unsupported(model, f"it was given {num_columns} columns and wrote {sorted(written)} to its cache")
    shapes = state_shapes(cache.layers)
    kv = [layer.parts() for layer in layers]
    return _Run(output.logits[:, -1], kv, shapes, batch_states(cache.layers, shapes))


def _new_cache(model: PreTrainedModel) -> Cache:
    if keeps_states(model):
        return Cache(layers=layers_of_call(model.config, 16, ByteMeter()))
    return Cache(layer_class_to_replicate=partial(ChunkedLayer, 16, ByteMeter()))


def _after_all(found: _Run, expected: _Run) -> float:
    """The largest difference of the logits and of the states."""
    states = zip(found.states, expected.states, strict=True)
    return max(_relative(found.logits, expected.logits), *(_relative(own, other) for own, other in states), 0.0)


def _difference(found: _Run, expected: _Run, columns: slice = slice(None)) -> float:
    """The largest difference of K or V in any layer in these columns."""
    return max(
        _relative(own[:, :, columns], other[:, :, columns])
        for pair, other_pair in zip(found.kv, expected.kv, strict=True)
        for own, other in zip(pair, other_pair, strict=True)
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for NaN."""
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 and difference == difference else float("inf")


def _ordinary_ids(config: PretrainedConfig) -> Tensor:
    """Different ids, [1, NUM_TOKENS], without those that the config gives a meaning, such as padding or images."""
    text_config = config.get_text_config()
    special: set[int] = set()
    for own in (config, text_config):
        for name, value in vars(own).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list | tuple) else [value])
    candidates = (i * 7919 % text_config.vocab_size for i in range(1, text_config.vocab_size + 1))
    found = list(dict.fromkeys(token for token in candidates if token not in special))[:NUM_TOKENS]
    return torch.tensor([(found * NUM_TOKENS)[:NUM_TOKENS]], dtype=torch.int64, device="cpu")


@contextmanager
def _as_in_generate(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; the modes of the modules come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():  # buffers made in inference mode would stay so
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot reuse prefixes: {why}")
