"""Builds the parts of an engine for a model, and resolves its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionNeeds, ChoosesExtends, LayerAttention, choose_backend
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.config import EngineConfig
from radixkv.engine.drafts.cache_drafter import CacheDrafter
from radixkv.engine.drafts.drafter import Drafter
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.gpu_sampling import DeviceSampler, sampling_kernels
from radixkv.engine.graphs import make_graphs
from radixkv.engine.intake import ContextLimit, Intake
from radixkv.engine.kv_memory import KVMemory, Pool, make_kv_memory
from radixkv.engine.recurrent_states import RecurrentStates
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.runner import ModelRunner, Runner
from radixkv.engine.sampling import Sampler
from radixkv.engine.step_times import StepTimes
from radixkv.engine.tier_stores import asks_for_tiers, hash_weights, make_stores
from radixkv.errors import ConfigError
from radixkv.memory.state_pool import StatePool
from radixkv.models.fused_decoder import FusedDecoder, fuse
from radixkv.models.loader import eos_token_ids, max_context_tokens
from radixkv.models.probe import plug_in_paged_attention, recurrent_modules
from radixkv.models.recurrent.modules import RecurrentModules
from radixkv.models.skinny_linear import speed_up_linears
from radixkv.models.streaming import MAX_CONTEXT_TOKENS, Streaming
from radixkv.publish.requirements import PACKAGES as EVENT_PACKAGES
from radixkv.tiers.page_store import PageStore


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineParts:
    """The collaborators of an engine. Exchange some of them by `dataclasses.replace`, for instance the runner in tests.

    Attributes:
        config: the settings that the parts were made with.
        model, tokenizer: as they were given; the model's attention runs on pages from now on.
        pool, cache: the tensors of the KV, and which page of them holds what.
        kv_bytes_per_token: size of the KV of a token that every layer keeps.
        runner: computes a step.
        sampler, device_sampler: choose tokens; on the CPU there is no device sampler.
        limit: the most tokens of a request.
        vocab_size: ids that the model has embeddings for.
        eos_ids: ids that end an output.
        states: the tensors of the states of recurrent layers; None without such layers.
        speculation: guesses tokens, which steps then check; None to go without.
        stores: of pages below the pool, the fastest first; the core closes them.
        clock: seconds, by which the speed of loads is measured and their time runs out.
        step_times: how long steps of decodes take, as they are measured.
    """

    config: ResolvedConfig
    model: PreTrainedModel
    tokenizer: Any | None
    pool: Pool
    cache: PrefixCache
    kv_bytes_per_token: int
    runner: Runner
    sampler: Sampler
    device_sampler: DeviceSampler | None
    limit: ContextLimit
    vocab_size: int
    eos_ids: frozenset[int]
    stores: tuple[PageStore, ...] = ()
    speculation: Speculation | None = None
    states: StatePool | None = None
    clock: Callable[[], float] = time.monotonic
    step_times: StepTimes = field(default_factory=StepTimes)

    def new_intake(self) -> Intake:
        """What makes requests for a core over these parts; each core needs one of its own."""
        return Intake(
            self.tokenizer,
            vocab_size=self.vocab_size,
            eos_ids=self.eos_ids,
            limit=self.limit,
            seed=self.config.seed,
            most_pool_tokens=self.cache.most_tokens,
        )


def assemble(
    model: PreTrainedModel,
    tokenizer: Any | None = None,
    config: EngineConfig | None = None,
    *,
    weight_files: Sequence[Path] = (),
    drafter: Drafter | None = None,
) -> EngineParts:
    """The parts of an engine for `model`, on its device and in its dtype.

    The model's attention runs on pages from now on; on the CPU its linear layers take few tokens through our kernel.

    Args:
        weight_files: what `model` was loaded from, and nothing was changed since; without them its tensors are hashed
            if a store below the pool needs to know which weights these are.
        drafter: guesses tokens, whatever `config.speculate` says.

    Raises: UnsupportedModelError, UnsupportedBackendError, ConfigError; TierError if a store below the pool cannot be
        opened; MissingPackageError if `kv_events` needs a package.
    """
    if isinstance(model, str | PathLike):
        raise ConfigError(f"model must be a loaded model, not {model!r}; to load one, use from_pretrained({model!r})")
    config = config or EngineConfig()
    if config.kv_events is not None:
        EVENT_PACKAGES.check()
    weights = ""
    if asks_for_tiers(config):
        if config.window is not None:
            raise ConfigError(
                "disk_cache, host_cache_gb and shared_cache are not for window=: all layers see a window then, so "
                "that pages alone hold nothing, and KV differs from the model's own; leave one of them out"
            )
        weights = hash_weights(model, weight_files, config)  # before anything is laid out anew
    layers = plug_in_paged_attention(model.eval())
    recurrent = recurrent_modules(model)
    if recurrent is not None:
        _check_recurrent(config, drafter)
    laid_out = _lay_out(model, layers, config)
    memory = _make_memory(model, laid_out, recurrent, config)
    limit = _context_limit(laid_out.context_tokens, config, memory)
    resolved = _resolve(config, model, memory, limit)
    runner = _make_runner(model, laid_out, recurrent, memory, resolved)
    vocab_size = model.config.get_text_config().vocab_size
    if drafter is None and config.speculate == "cache":
        drafter = CacheDrafter(memory.cache)
    step_times = StepTimes()
    stores = make_stores(config, model, memory.pool, weights, memory.states)
    return EngineParts(
        config=resolved,
        model=model,
        tokenizer=tokenizer,
        pool=memory.pool,
        cache=memory.cache,
        kv_bytes_per_token=memory.bytes_per_token,
        runner=runner,
        sampler=Sampler(),
        device_sampler=DeviceSampler(sampling_kernels(), model.device, config.seed) if _on_gpu(model) else None,
        limit=limit,
        vocab_size=vocab_size,
        eos_ids=eos_token_ids(model),
        stores=stores,
        speculation=None if drafter is None else Speculation(drafter, vocab_size, times=step_times),
        step_times=step_times,
        states=memory.states,
    )


class _LaidOutModel(NamedTuple):
    """What became of a model's layers: those with attention, their programs, and how they see a window of tokens.

    `context_tokens` is the most tokens that the model was made for, None without a limit.
    """

    layers: tuple[LayerAttention, ...]
    fused: FusedDecoder | None
    streaming: Streaming | None
    context_tokens: int | None


def _lay_out(model: PreTrainedModel, layers: tuple[LayerAttention, ...], config: EngineConfig) -> _LaidOutModel:
    """Take the faster ways through the model, and let `layers` see the window of `config`. Raises: ConfigError."""
    speed_up_linears(model)
    fused = fuse(model, layers) if config.fused_layers else None
    context_tokens = max_context_tokens(model.config)
    if config.window is None:
        return _LaidOutModel(layers, fused, None, context_tokens)
    streaming = Streaming(model, layers, window=config.window, sinks=config.sinks, limit=context_tokens)
    if not any(layer.params.sliding_window is None for layer in streaming.layers):
        context_tokens = MAX_CONTEXT_TOKENS
    return _LaidOutModel(streaming.layers, fused, streaming, context_tokens)


def _make_memory(
    model: PreTrainedModel, laid_out: _LaidOutModel, recurrent: RecurrentModules | None, config: EngineConfig
) -> KVMemory:
    """A backend that can serve the model, and the pools that it reads. Raises: as `assemble`."""
    needs = AttentionNeeds(
        laid_out.layers, config.page_size, model.dtype, model.device, config.kv_cache_dtype, config.long_extends
    )
    return make_kv_memory(
        choose_backend(config.attention_backend, needs),
        needs,
        config,
        context_tokens=laid_out.context_tokens,
        scratch_pages=int(_on_gpu(model)),  # CUDA graphs pad batches with a page that the cache does not know
        state_shapes=() if recurrent is None else recurrent.shapes,
    )


def _make_runner(
    model: PreTrainedModel,
    laid_out: _LaidOutModel,
    recurrent: RecurrentModules | None,
    memory: KVMemory,
    resolved: ResolvedConfig,
) -> ModelRunner:
    """What computes steps of the model, with graphs where all of a step can be captured."""
    states = None
    if recurrent is not None:
        assert memory.states is not None, "it has shapes of states"
        states = RecurrentStates(model, recurrent, memory.states)
    graphs = None
    if _on_gpu(model) and laid_out.streaming is None and states is None:
        graphs = make_graphs(model, memory.backend, resolved, scratch_page=memory.sizes.num_pages)
    return ModelRunner(model, memory.backend, graphs, laid_out.streaming, laid_out.fused, states)


def _on_gpu(model: PreTrainedModel) -> bool:
    return str(model.device.type) == "cuda"


def _check_recurrent(config: EngineConfig, drafter: Drafter | None) -> None:
    """Raise ConfigError for what a state does not allow."""
    if drafter is not None or config.speculate != "off":
        raise ConfigError(
            "speculate and drafter are not for models with recurrent layers: what a rejected draft left in their state "
            "cannot be taken back"
        )
    if config.window is not None:
        raise ConfigError("window is not for models with recurrent layers: their state has no window")
    if asks_for_tiers(config) and config.tier_writes == "back":
        raise ConfigError(
            'tier_writes must be "through" or "selective" for models with recurrent layers, not "back": states are '
            "given up before the pages that they belong to"
        )


def _context_limit(context_tokens: int | None, config: EngineConfig, memory: KVMemory) -> ContextLimit:
    """The smallest of the limits that model, settings and pool set."""
    pool_tokens = memory.sizes.num_pages * config.page_size
    limits = {
        "as the model was made": context_tokens,
        "as max_context_tokens says": config.max_context_tokens,
        "as the KV pool has room for": pool_tokens,
    }
    tokens, reason = min((limit, why) for why, limit in limits.items() if limit is not None)
    return ContextLimit(tokens, reason, ", or raise kv_cache_tokens" if tokens == pool_tokens else "")


def _resolve(config: EngineConfig, model: PreTrainedModel, memory: KVMemory, limit: ContextLimit) -> ResolvedConfig:
    num_pages, num_window_pages = memory.sizes
    return ResolvedConfig.of(
        config,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        kv_cache_tokens=num_pages * config.page_size,
        window_cache_tokens=None if num_window_pages is None else num_window_pages * config.page_size,
        state_slots=None if memory.states is None else memory.states.num_slots,
        attention_backend=memory.backend.name,
        long_extends=memory.backend.long_extends if isinstance(memory.backend, ChoosesExtends) else None,
        max_running_requests=config.running_limit,
        max_context_tokens=limit.tokens,
    )
