"""Settings: frozen, validated when made; resolving "auto" makes a new config, so what ran can be printed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from radixkv.errors import ConfigError

SchedulePolicy = Literal["lpm", "fcfs"]
KV_CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
MAX_COUNT = 2**31 - 1  # slots and positions are int32
SCHEDULE_POLICIES: tuple[SchedulePolicy, ...] = ("lpm", "fcfs")


def _check_at_least(config: object, minimum: int, *names: str) -> None:
    """Raise ConfigError unless each named field is None or an int of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be an integer, not {value!r}")
        if value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a `PrefixCache`.

    Attributes:
        num_pages: pages in the pool.
        page_size: tokens a page.
        policy: name of the eviction policy.
    """

    num_pages: int
    page_size: int = 16
    policy: str = "lru"

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "num_pages", "page_size")
        if self.num_pages * self.page_size > 2**31 - 1:
            raise ConfigError(
                f"{self.num_pages} pages of {self.page_size} tokens are more slots than int32 can count (2**31 - 1); "
                "make the pool smaller"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an `Engine`. "auto" and None are resolved against the model and the machine.

    Attributes:
        dtype: of weights, activations and KV: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", …
        page_size: tokens a page. Prefixes are shared to the token at any size.
        kv_cache_tokens: size of the KV pool in tokens; None sizes it by `mem_fraction`.
        window_cache_tokens: of how many tokens layers that see a window (sliding or chunked attention) keep KV; what no
            request sees any more there makes room. None takes half of `kv_cache_tokens`, as many if no layer sees
            everything, and what one request needs at least. `kv_cache_tokens` lets every layer keep everything.
        window: StreamingLLM (Xiao et al., 2023): every layer sees the last `window` tokens and the first `sinks` alone,
            at the positions that they have among these, and generation runs on in constant memory. Layers with a window
            of their own keep it.
        sinks: first tokens that stay in sight beside `window`; 4 serve most models.
        mem_fraction: share of the memory that is free after the model is loaded which the KV pool may take;
            None means 0.85 on a GPU and 0.4 on the CPU.
        kv_cache_dtype: what the pool keeps KV as: "auto" (`dtype`), "fp8_e4m3", "fp8_e5m2", "int8" or "int4".
        attention_backend: "auto" or the name of a registered backend.
        eviction_policy: order in which unused prefixes go: "lru", "lfu", "slru", "fifo", "priority", "ttl", "cost" or
            "adaptive".
        schedule_policy: "lpm" (longest cached prefix first, with bounded ageing) or "fcfs".
        max_batch_tokens: tokens computed in one step at most; longer prompts are computed in chunks.
        max_running_requests: requests that hold pages at one time at most; None takes 256, or `max_batch_tokens` if
            that is less.
        max_context_tokens: prompt and output of one request at most; None takes the model's own limit.
        max_skips: under "lpm", how many later arrivals may overtake a waiting request before it goes first.
        cuda_graphs: whether a GPU replays steps of decodes as CUDA graphs; None does where backend and model can.
        prefix_cache: False computes every prompt from its first token (to measure what the cache brings).
        seed: from which requests without a seed of their own draw theirs.
    """

    dtype: str = "auto"
    device: str = "auto"
    page_size: int = 16
    kv_cache_tokens: int | None = None
    mem_fraction: float | None = None
    window_cache_tokens: int | None = None
    window: int | None = None
    sinks: int = 0
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    eviction_policy: str = "lru"
    schedule_policy: SchedulePolicy = "lpm"
    max_batch_tokens: int = 2048
    max_running_requests: int | None = None
    max_context_tokens: int | None = None
    max_skips: int = 64
    cuda_graphs: bool | None = None
    prefix_cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dtype", "device", "attention_backend", "eviction_policy"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, not {getattr(self, name)!r}")
        for name in ("page_size", "max_batch_tokens", "sinks", "max_skips", "seed"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} must be an integer, not None")
        for name in ("prefix_cache", "cuda_graphs"):
            if getattr(self, name) not in (True, False, *([None] if name == "cuda_graphs" else [])):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        _check_at_least(
            self,
            1,
            "page_size",
            "kv_cache_tokens",
            "window_cache_tokens",
            "window",
            "max_batch_tokens",
            "max_running_requests",
            "max_context_tokens",
        )
        _check_at_least(self, 0, "sinks", "max_skips", "seed")
        if self.sinks and self.window is None:
            raise ConfigError(f"sinks={self.sinks} stay in sight beside a window; set window, too")
        if self.window is not None and self.cuda_graphs:
            raise ConfigError(f"window={self.window} does not run in CUDA graphs; leave out cuda_graphs or window")
        if self.mem_fraction is not None and not isinstance(self.mem_fraction, int | float):
            raise ConfigError(f"mem_fraction must be a number, not {self.mem_fraction!r}")
        if self.mem_fraction is not None and not 0 < self.mem_fraction <= 1:
            raise ConfigError(f"mem_fraction must lie in (0, 1], not {self.mem_fraction}")
        if self.mem_fraction is not None and self.kv_cache_tokens is not None:
            raise ConfigError("kv_cache_tokens and mem_fraction both set the pool's size; give one of them")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache_dtype!r}"
            )
        if self.schedule_policy not in SCHEDULE_POLICIES:
            raise ConfigError(
                f"schedule_policy must be one of {', '.join(SCHEDULE_POLICIES)}, not {self.schedule_policy!r}"
            )
        for name in ("max_running_requests", "max_context_tokens", "kv_cache_tokens", "max_batch_tokens", "page_size"):
            value = getattr(self, name)
            if value is not None and value > MAX_COUNT:
                raise ConfigError(f"{name} must be at most {MAX_COUNT}, not {value}")
        if (self.max_running_requests or 1) > self.max_batch_tokens:
            raise ConfigError(
                f"max_running_requests ({self.max_running_requests}) must not exceed max_batch_tokens "
                f"({self.max_batch_tokens}): every running request may need a token in each step"
            )

    @classmethod
    def from_keywords(cls, keywords: dict[str, object]) -> EngineConfig:
        """A config from `keywords`; an unknown name is a ConfigError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(known)}")
        return cls(**keywords)  # type: ignore[arg-type]
