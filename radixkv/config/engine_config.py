"""The settings of an engine: frozen; resolving "auto" makes a new config, so what ran can be printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from radixkv.config.endpoints import check_endpoint
from radixkv.config.limits import MAX_COUNT
from radixkv.config.setting import Setting, check_settings, described, setting_fields
from radixkv.errors import ConfigError

SchedulePolicy = Literal["lpm", "fcfs"]
SCHEDULE_POLICIES: tuple[SchedulePolicy, ...] = get_args(SchedulePolicy)
GB = 1_000_000_000  # bytes of a gigabyte in settings
TierWrites = Literal["through", "selective", "back"]
Speculate = Literal["off", "cache"]
KV_CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "fp4")


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an `Engine`, checked when they are made.

    "auto" and None are resolved against the model and the machine; `engine.config` shows what they became.
    """

    dtype: Annotated[
        str,
        Setting("Data type of weights, activations and KV: auto (the checkpoint's own), float32, bfloat16 or float16."),
    ] = "auto"
    device: Annotated[str, Setting("Where the model runs: auto (CUDA if there is one), cpu, cuda, cuda:1, …")] = "auto"
    page_size: Annotated[
        int,
        Setting(
            "Tokens in a page. Prefixes are shared to the token at any size.",
            unit="tokens",
            minimum=1,
            maximum=MAX_COUNT,
        ),
    ] = 16
    kv_cache_tokens: Annotated[
        int | None,
        Setting(
            "Size of the KV pool, in tokens.",
            unit="tokens",
            minimum=1,
            maximum=MAX_COUNT,
            unset="as `mem_fraction` says",
        ),
    ] = None
    mem_fraction: Annotated[
        float | None,
        Setting(
            "Share of the memory that is free after the model is loaded that the KV pool takes.",
            unit="share",
            above=0,
            maximum=1,
            unset="0.85 on a GPU, 0.4 on the CPU",
        ),
    ] = None
    window_cache_tokens: Annotated[
        int | None,
        Setting(
            "Size of the KV pool, in tokens, of layers that see a window (sliding or chunked attention); KV that no "
            "request sees any more makes room there. The value of `kv_cache_tokens` lets these layers keep everything, "
            "too.",
            unit="tokens",
            minimum=1,
            unset="half of `kv_cache_tokens`, or all of it if no layer sees everything; never less than one request "
            "needs",
        ),
    ] = None
    state_slots: Annotated[
        int | None,
        Setting(
            "States of recurrent layers that there is room for: two of each running request, and those that the cache "
            "keeps. A hit ends where a state was kept.",
            unit="states",
            minimum=3,
            maximum=MAX_COUNT,
            unset="as many as fit in a third of the memory for KV, or in as much again as `kv_cache_tokens` take, "
            "48 at least; at most 4 for each running request",
        ),
    ] = None
    state_interval_tokens: Annotated[
        int,
        Setting(
            "Prefills of models with recurrent layers stop at multiples of it, where a state is kept.",
            unit="tokens",
            minimum=1,
            maximum=MAX_COUNT,
        ),
    ] = 1024
    window: Annotated[
        int | None,
        Setting(
            "StreamingLLM (Xiao et al. 2023): every layer sees this number of last tokens and the first `sinks`, at "
            "their positions among these, and output goes on beyond the model's context in constant memory. Layers "
            "with a window of their own keep it.",
            unit="tokens",
            minimum=1,
            unset="no window",
        ),
    ] = None
    sinks: Annotated[
        int,
        Setting("First tokens that stay in sight beside `window`; 4 serve most models.", unit="tokens", minimum=0),
    ] = 0
    kv_cache_dtype: Annotated[
        str, Setting("Data type in which the pool keeps KV; auto takes `dtype`.", choices=KV_CACHE_DTYPES)
    ] = "auto"
    attention_backend: Annotated[
        str,
        Setting(
            "Kernels of attention: auto, flashinfer, flashinfer_mla, latent, numba, triton, torch or reference; or the "
            "name under which you registered a backend."
        ),
    ] = "auto"
    long_extends: Annotated[
        str | None,
        Setting(
            "How the numba backend computes prompts from 256 new tokens on: kernel (ours, on the pages in place) or "
            "dense (torch's product, on KV that is gathered first).",
            choices=("kernel", "dense"),
            unset="the faster one; where it is not known, both are timed once on this machine",
        ),
    ] = None
    eviction_policy: Annotated[
        str,
        Setting("Which unused prefixes go first: lru, lfu, slru, fifo, priority, ttl, cost or adaptive."),
    ] = "lru"
    schedule_policy: Annotated[
        SchedulePolicy,
        Setting(
            "Order of waiting requests: lpm (longest cached prefix first, with bounded ageing) or fcfs (first come, "
            "first served)."
        ),
    ] = "lpm"
    max_batch_tokens: Annotated[
        int,
        Setting(
            "Tokens computed in one step at most; longer prompts are computed in chunks.",
            unit="tokens",
            minimum=1,
            maximum=MAX_COUNT,
        ),
    ] = 2048
    max_running_requests: Annotated[
        int | None,
        Setting(
            "Requests that hold pages at one time at most.",
            unit="requests",
            minimum=1,
            maximum=MAX_COUNT,
            unset="256, or `max_batch_tokens` if that is less",
        ),
    ] = None
    max_context_tokens: Annotated[
        int | None,
        Setting(
            "Tokens of one request at most, prompt and output together.",
            unit="tokens",
            minimum=1,
            maximum=MAX_COUNT,
            unset="the model's own limit",
        ),
    ] = None
    max_skips: Annotated[
        int,
        Setting(
            "Under lpm, the number of later arrivals that may overtake a waiting request before it goes first.",
            unit="requests",
            minimum=0,
        ),
    ] = 64
    cuda_graphs: Annotated[
        bool | None,
        Setting("Whether a GPU replays steps of decodes as CUDA graphs.", unset="yes, where backend and model can"),
    ] = None
    fused_layers: Annotated[
        bool,
        Setting(
            "Whether the CPU computes the layers of Llama, Qwen 2, Qwen 3 and Mistral on few tokens in one compiled "
            "program; False runs the model's own modules."
        ),
    ] = True
    speculate: Annotated[
        Speculate,
        Setting(
            "Whether tokens are guessed and checked several at a time: off, or cache (guesses from the request's own "
            "text and from what the cache holds of its namespace). Outputs are the same."
        ),
    ] = "off"
    prefix_cache: Annotated[
        bool,
        Setting("False computes every prompt from its first token, to measure what the cache brings."),
    ] = True
    disk_cache: Annotated[
        str | None,
        Setting(
            "Folder in which KV outlives the pool and the process: prefixes that were evicted, or computed before a "
            "restart, are loaded from there where that is faster than computing them. One engine at a time owns it.",
            unset="KV is kept in the pool alone",
        ),
    ] = None
    disk_cache_gb: Annotated[float, Setting("Size of `disk_cache` at most.", unit="GB", above=0, maximum=1_000_000)] = (
        16.0
    )
    host_cache_gb: Annotated[
        float | None,
        Setting(
            "Size of the host memory that keeps KV below the pool of a GPU. On the CPU the pool is host memory itself.",
            unit="GB",
            above=0,
            maximum=1_000_000,
            unset="none",
        ),
    ] = None
    shared_cache: Annotated[
        str | None,
        Setting(
            "Address of a Valkey or Redis server through which engines load what others computed, as in "
            "redis://host:6379/0.",
            unset="nothing is shared",
        ),
    ] = None
    tier_writes: Annotated[
        TierWrites,
        Setting(
            "When pages go down to `disk_cache`, `host_cache_gb` and `shared_cache`: through (as soon as they are "
            "computed), selective (when a request finds them a second time) or back (when they are evicted, and when "
            "the engine is closed)."
        ),
    ] = "through"
    tier_write_mb_s: Annotated[
        float | None,
        Setting(
            "Rate of writing to each tier at most; what comes faster than its queue can hold is dropped.",
            unit="MB/s",
            above=0,
            maximum=1_000_000,
            unset="no bound",
        ),
    ] = None
    warm_start_share: Annotated[
        float,
        Setting(
            "Share of the pool that is filled with the hottest prefixes of `disk_cache` after the start, while nothing "
            "else needs the pages.",
            unit="share",
            minimum=0,
            maximum=1,
        ),
    ] = 0.5
    kv_events: Annotated[
        str | None,
        Setting(
            "ZeroMQ address at which events say what is cached, as in tcp://127.0.0.1:5557; port 0 takes a free one. "
            "The events hold the tokens of all prompts, and whoever reaches the address can read them.",
            unset="no events",
        ),
    ] = None
    kv_events_replay: Annotated[
        str | None,
        Setting(
            "ZeroMQ address that answers requests for past events and snapshots.", unset="the port after `kv_events`"
        ),
    ] = None
    kv_events_topic: Annotated[str, Setting("First frame of each message of `kv_events`.")] = ""
    seed: Annotated[int, Setting("Source of the seeds of requests that have none of their own.", minimum=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.sinks and self.window is None:
            raise ConfigError(f"sinks={self.sinks} needs a window to stand beside; set window, too")
        if self.window is not None and self.cuda_graphs:
            raise ConfigError(f"window={self.window} does not run in CUDA graphs; leave out cuda_graphs or window")
        if self.mem_fraction is not None and self.kv_cache_tokens is not None:
            raise ConfigError("kv_cache_tokens and mem_fraction both set the pool's size; give one of them")
        if not self.prefix_cache and (self.disk_cache or self.host_cache_gb or self.shared_cache):
            raise ConfigError(
                "disk_cache, host_cache_gb and shared_cache need the prefix cache; leave out prefix_cache=False"
            )
        if self.kv_events is None and (self.kv_events_replay is not None or self.kv_events_topic):
            raise ConfigError("kv_events_replay and kv_events_topic need kv_events; set it, too")
        for name in ("kv_events", "kv_events_replay"):
            if (endpoint := getattr(self, name)) is not None:
                check_endpoint(name, endpoint)
        if (self.max_running_requests or 1) > self.max_batch_tokens:
            raise ConfigError(
                f"max_running_requests ({self.max_running_requests}) must not exceed max_batch_tokens "
                f"({self.max_batch_tokens}): every running request may need a token in each step"
            )

    @property
    def running_limit(self) -> int:
        """`max_running_requests`, or what it is where it is not set."""
        return self.max_running_requests or min(256, self.max_batch_tokens)

    @classmethod
    def from_keywords(cls, keywords: dict[str, object]) -> EngineConfig:
        """A config from `keywords`. Raises: ConfigError, which lists the settings, for an unknown name."""
        known = [field.name for field in setting_fields(cls)]
        for name in keywords:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(known)}")
        return cls(**keywords)  # type: ignore[arg-type]
