"""Plugs paged attention into unchanged Hugging Face decoders.

transformers lets an attention function be registered by name, and decoders pass it their queries, keys and values,
their options (scaling, sliding window, soft cap, sinks) and the keyword arguments of the forward call. So a batch is
flattened to `input_ids [1, tokens]`, and a context rides along as the keyword `radixkv`. Where a model drops the
keyword on its way (StableLM), its attention finds the context of the forward pass that runs it in a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radixkv.attention.backend import AttentionParams, AttentionPlan
from radixkv.errors import UnsupportedModelError

INTERFACE_NAME = "radixkv"


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """As `model.set_attn_implementation`, which does nothing in models that it takes to know no interface."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


class AttentionContext(Protocol):
    """Receives every attention call of one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Attention of the flattened batch.

        q is [tokens, num_q_heads, k_head_dim], k and v are [tokens, num_kv_heads, head_dim].
        Returns: [tokens, num_q_heads, v_head_dim].
        """
        ...

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        """Attention of the flattened batch where one head's k serves all queries, and its first part is the values.

        q is [tokens, num_q_heads, k_head_dim], k is [tokens, 1, k_head_dim].
        Returns: [tokens, num_q_heads, latent_dim].
        """
        ...


class Adjustment(Protocol):
    """Changes what layers ask of attention, for one batch."""

    def params(self, layer: int, q: Tensor, params: AttentionParams) -> AttentionParams:
        """What the layer asks, where the model asks `params` of the queries q."""
        ...


class PagedContext:
    """Writes the new KV to its slots and lets the backend read the pages.

    Args:
        plan: of the batch.
        num_layers: of the model.
    """

    def __init__(self, plan: AttentionPlan, num_layers: int, adjustment: Adjustment | None = None) -> None:
        self._plan = plan
        self._num_layers = num_layers
        self._adjustment = adjustment
        self._attended: set[int] = set()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self._plan.store_kv(layer, k, v)
        self._attended.add(layer)
        if self._adjustment is not None:
            params = self._adjustment.params(layer, q, params)
        return self._plan.attend(layer, q, params)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        return self.attend(layer, q, k, k[..., :latent_dim], params)

    def check_complete(self) -> None:
        """Raise UnsupportedModelError unless every layer attended over the pages."""
        if len(self._attended) != self._num_layers:
            raise UnsupportedModelError(
                f"{len(self._attended)} of {self._num_layers} layers attended over the pages: somebody set another "
                "attention implementation on the engine's model; give each its own instance"
            )


class _NoContextError(UnsupportedModelError):
    """The attention of a model that serves an engine was called by something else than an engine."""

    def __init__(self, module: str, before: str) -> None:
        super().__init__(
            "this model, or one with the same config object, serves a radixkv Engine, and only the engine can call it; "
            f"load another instance for generate() or forward(), or call model.set_attn_implementation({before!r}) "
            "once the engine is no longer used"
        )
        self.module = module


class _Pass(NamedTuple):
    """A forward pass of ours, and the configs of the model that it runs."""

    context: AttentionContext
    configs: tuple[PretrainedConfig, ...]


_CURRENT: ContextVar[_Pass | None] = ContextVar("radixkv_forward_pass", default=None)  # each thread has its own


@contextmanager
def _running(model: PreTrainedModel, context: AttentionContext) -> Iterator[None]:
    token = _CURRENT.set(_Pass(context, (model.config, model.config.get_text_config())))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_context(module: nn.Module, config: PretrainedConfig, before: str = "sdpa") -> AttentionContext:
    """The context of the forward pass that runs `module`, where none reached it as a keyword.

    Args:
        config: that `module` has of its model.
        before: another attention implementation that the model has, for the error.

    Raises: UnsupportedModelError if no engine runs that model in this thread.
    """
    current = _CURRENT.get()
    if current is None or not any(own is config for own in current.configs):
        raise _NoContextError(type(module).__name__, before)
    return current.context


class FlattenedPositions:
    """Stands in for a cache that keeps nothing, and says how far each flattened token is from its place.

    Llama 4 takes the position of row i as `get_seq_length() + i` where it tunes the attention temperature, so a
    tensor of the differences gives each token its own.
    """

    def __init__(self, positions: Tensor) -> None:
        self._differences = positions - torch.arange(len(positions), dtype=torch.int64, device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """How far each flattened token is from its place."""
        return self._differences

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep nothing."""
        return key_states, value_states


def flattened_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    logits_of: Tensor,
    context: AttentionContext,
    past_key_values: FlattenedPositions | None = None,
) -> Tensor:
    """One forward pass over a flattened batch.

    Args:
        input_ids, positions: int64 [tokens]
        logits_of: int64 [n], the rows whose logits are wanted
        past_key_values: what stands in for transformers' cache, where layers ask it for states.

    Returns: logits, [n, vocab_size].
    """
    if past_key_values is None and getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        past_key_values = FlattenedPositions(positions)
    cache = {} if past_key_values is None else {"past_key_values": past_key_values}
    try:
        with _running(model, context):
            output = model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logits_of,
                radixkv=context,
                **cache,
            )
    except _NoContextError as error:
        raise UnsupportedModelError(
            f"{error.module} does not hand the forward call's keyword arguments on to its attention"
        ) from None
    logits: Tensor = output.logits[0]
    return logits


def _attention_function(
    module: nn.Module,
    query: Tensor,  # [1, num_q_heads, tokens, k_head_dim]
    key: Tensor,  # [1, num_kv_heads, tokens, k_head_dim]
    value: Tensor,  # [1, num_kv_heads, tokens, v_head_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    radixkv: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. Returns [1, tokens, num_q_heads, v_head_dim] and no weights."""
    config: PretrainedConfig = module.config
    if radixkv is None:
        radixkv = current_context(module, config)
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} makes an attention mask of its own")
    layer: int = module.layer_idx  # type: ignore[assignment]
    params = AttentionParams(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=sliding_window,
        chunk_size=_chunk_size(config, layer),
        softcap=softcap,
        sinks=s_aux,
    )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return radixkv.attend(layer, q, k, v, params)[None], None


def _chunk_size(config: PretrainedConfig, layer: int) -> int | None:
    # the one option that reaches attention through the mask alone, which a registered function does not get
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None


ALL_ATTENTION_FUNCTIONS.register(INTERFACE_NAME, _attention_function)
