"""What Prometheus is told: the names that dashboards of vLLM know, where the meaning is the same, and our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from radixkv.cache.insight.eviction_ages import LIMITS_S, EvictionAges
from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.quotas.accounts import NamespaceUse
from radixkv.engine.drafts.speculation import SpeculationStats
from radixkv.engine.outputs import RequestOutput
from radixkv.engine.results import EngineStats
from radixkv.serving.tier_metrics import tier_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)
PATHS = ("/v1/", "/tokenize", "/detokenize", "/health", "/ready", "/metrics")
OTHER = "other"


class Metrics:
    """Counts what happened to requests, in a registry of its own, and tells what the engine holds when it is asked.

    Belongs to the event loop's thread.
    """

    def __init__(self, model_name: str) -> None:
        registry = CollectorRegistry(auto_describe=False)
        self._registry = registry
        self._engine = _EngineCollector(model_name)
        registry.register(self._engine)
        self._labels = {"model_name": model_name, "engine": "0"}
        self._answers = Counter(
            "radixkv_http_answers", "Answers by path and status.", ["path", "status"], registry=registry
        )
        self._requests = Counter(
            "radixkv_requests", "Requests that ended, by tenant and reason.", ["tenant", "reason"], registry=registry
        )
        self._tenant_tokens = Counter(
            "radixkv_tokens", "Tokens by tenant: cached, computed or generated.", ["tenant", "kind"], registry=registry
        )
        self._misses = Counter(
            "radixkv_prompts", "Prompts by why they were not cached further.", ["reason"], registry=registry
        )
        self._missed_tokens = Counter(
            "radixkv_missed_tokens", "Tokens of prompts that were not cached, by reason.", ["reason"], registry=registry
        )
        self._wanted_again = Counter(
            "radixkv_evicted_tokens_wanted_again", "Tokens of prompts that were evicted before.", registry=registry
        )
        self._wanted_after = Histogram(
            "radixkv_evicted_wanted_after_seconds",
            "Time from an eviction to a prompt that wanted its tokens.",
            registry=registry,
            buckets=SECONDS,
        )
        self._evicted_age = Histogram(
            "radixkv_evicted_unused_seconds",
            "Time from last use to eviction, of evicted tokens that were wanted again.",
            registry=registry,
            buckets=SECONDS,
        )
        self._success = self._counter("vllm:request_success", "Requests that ended well.", ["finished_reason"])
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Tokens of prompts that were cached.")
        self._cached_by = self._counter(
            "radixkv_prompt_tokens_cached", "Tokens of prompts that were cached, by where.", ["tier"]
        )
        self._generated_tokens = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._ttft_s = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token.", SECONDS)
        self._tpot_s = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a request.", SECONDS
        )
        self._total_s = self._histogram("vllm:e2e_request_latency_seconds", "Time from arrival to end.", SECONDS)
        self._queue_s = self._histogram("vllm:request_queue_time_seconds", "Time from arrival to first step.", SECONDS)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._output_size = self._histogram("vllm:request_generation_tokens", "Tokens of an output.", TOKENS)

    def observe(self, output: RequestOutput, tenant: str) -> None:
        """Count a choice that ended. The prompt counts with the first one."""
        self._requests.labels(tenant, output.finish_reason).inc()
        is_first = output.choice_index == 0
        num_prompt, num_cached = (output.prompt_tokens, output.cached_tokens) if is_first else (0, 0)
        num_generated = len(output.token_ids)
        for kind, num_tokens in (
            ("cached", num_cached),
            ("computed", num_prompt - num_cached),
            ("generated", num_generated),
        ):
            self._tenant_tokens.labels(tenant, kind).inc(num_tokens)
        labels = tuple(self._labels.values())
        self._prompt_tokens.inc(num_prompt)
        self._cached_tokens.inc(num_cached)
        if is_first:
            for tier, num_tokens in output.cached_by.items():
                self._cached_by.labels(*labels, tier).inc(num_tokens)
        self._generated_tokens.inc(num_generated)
        if output.finish_reason not in ("stop", "length"):
            return
        self._success.labels(*labels, output.finish_reason).inc()
        metrics = output.metrics
        for histogram, value in (
            (self._ttft_s, metrics.ttft_s),
            (self._tpot_s, metrics.tpot_s),
            (self._total_s, metrics.total_s),
            (self._queue_s, metrics.queue_s),
            (self._prompt_size, output.prompt_tokens),
            (self._output_size, num_generated),
        ):
            histogram.observe(value)

    def count_miss(self, explanation: Explanation) -> None:
        """Count how far a prompt was cached, and why not further."""
        self._misses.labels(explanation.reason).inc()
        self._missed_tokens.labels(explanation.reason).inc(explanation.num_tokens - explanation.cached_tokens)
        if explanation.eviction is not None and explanation.evicted_ago_s is not None:
            self._wanted_again.inc(explanation.evicted_tokens)
            self._wanted_after.observe(explanation.evicted_ago_s)
            if (unused_s := explanation.eviction.unused_s) is not None:
                self._evicted_age.observe(unused_s)

    def count_answer(self, path: str, status: int) -> None:
        """Count an answer. Paths that nobody serves count as one."""
        known = path if status != 404 and path.startswith(PATHS) else OTHER
        self._answers.labels(known if len(known) < 50 else OTHER, str(status)).inc()

    def render(self, stats: EngineStats) -> bytes:
        """The metrics as Prometheus reads them."""
        self._engine.stats = stats
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, more_labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, help, [*self._labels, *more_labels], registry=self._registry)
        return counter if more_labels else counter.labels(*self._labels.values())

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, help, [*self._labels], registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels.values())


class _EngineCollector(Collector):
    """Tells what an engine's statistics say."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of `stats`; none before there are any."""
        if self.stats is not None:
            yield from self._as_vllm(self.stats)
            yield from _ours(self.stats)
            yield from tier_metrics(self.stats.tiers)

    def _as_vllm(self, stats: EngineStats) -> Iterator[Metric]:
        cache = stats.cache
        in_use = cache.leased_pages + cache.protected_tokens // cache.page_size
        gauges = {
            "num_requests_running": ("Requests that hold pages.", stats.running),
            "num_requests_waiting": ("Requests that wait for pages.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the pages that running requests use.", in_use / cache.num_pages),
        }
        counters = {
            "prefix_cache_queries": ("Tokens that the cache was asked for.", cache.query_tokens),
            "prefix_cache_hits": ("Tokens that the cache held.", cache.hit_tokens),
            "num_preemptions": ("Times that a running request's pages were taken back.", stats.retractions),
        }
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (help, value) in metrics.items():
                metric = family(f"vllm:{name}", help, labels=["model_name", "engine"])
                metric.add_metric([self._model_name, "0"], value)
                yield metric


def _ours(stats: EngineStats) -> Iterator[Metric]:
    cache = stats.cache
    pages = GaugeMetricFamily("radixkv_pool_pages", "Pages of the KV pool, by what they hold.", labels=["state"])
    cached = GaugeMetricFamily("radixkv_cached_tokens", "Room for tokens in cached pages.", labels=["state"])
    for state, value in (
        ("free", cache.free_pages),
        ("leased", cache.leased_pages),
        ("cached", cache.total_tokens // cache.page_size),
    ):
        pages.add_metric([state], value)
    for state, value in (("evictable", cache.evictable_tokens), ("protected", cache.protected_tokens)):
        cached.add_metric([state], value)
    yield from (pages, cached)
    if cache.states:
        yield from _states(stats)
    estimates = GaugeMetricFamily(
        "radixkv_estimated_hit_rate", "Hit rate of this traffic in pools of other sizes.", labels=["factor"]
    )
    for estimate in cache.estimated_hit_rates:
        estimates.add_metric([f"{estimate.factor:g}"], estimate.hit_rate)
    yield estimates
    yield _namespaces(cache.namespaces)
    for name, help, value in (
        ("radixkv_cache_query_tokens", "Tokens that the cache was asked for.", cache.query_tokens),
        ("radixkv_cache_hit_tokens", "Tokens that the cache held.", cache.hit_tokens),
        ("radixkv_cache_copied_tokens", "Tokens found in pages that are shared in part.", cache.copied_tokens),
        ("radixkv_cache_evicted_tokens", "Tokens that made room for others.", cache.evicted_tokens),
        (
            "radixkv_cache_broken_promise_tokens",
            "Evicted tokens that were to be kept longer.",
            cache.broken_promise_tokens,
        ),
        ("radixkv_steps", "Batches that ran.", stats.steps),
        ("radixkv_computed_tokens", "Tokens that went through the model.", stats.computed_tokens),
        ("radixkv_generated_tokens", "Tokens of outputs.", stats.generated_tokens),
        (
            "radixkv_forced_tokens",
            "Generated tokens that were the only ones a grammar allowed: no step was spent on each.",
            stats.forced_tokens,
        ),
        ("radixkv_retractions", "Times that a running request's pages were taken back.", stats.retractions),
        ("radixkv_sampled_steps", "Steps that gave a request tokens, one or several.", stats.sampled_steps),
    ):
        yield CounterMetricFamily(name, help, value=value)
    if stats.speculation is not None:
        yield from _drafts(stats.speculation)
    yield GaugeMetricFamily("radixkv_pool_bytes", "Size of the KV pool.", value=stats.pool_bytes)
    yield _eviction_ages(cache.eviction_ages)


def _states(stats: EngineStats) -> Iterator[Metric]:
    cache = stats.cache
    states = GaugeMetricFamily(
        "radixkv_states", "States of recurrent layers that there is room for, by what they hold.", labels=["state"]
    )
    for state, value in (
        ("free", cache.free_states),
        ("evictable", cache.evictable_states),
        ("leased", cache.states - cache.free_states - cache.evictable_states),
    ):
        states.add_metric([state], value)
    yield states
    yield CounterMetricFamily(
        "radixkv_states_taken_back", "States that the cache lost for others' sake.", value=cache.states_taken_back
    )
    yield GaugeMetricFamily("radixkv_state_pool_bytes", "Size of the pool of states.", value=stats.state_pool_bytes)


def _drafts(stats: SpeculationStats) -> Iterator[Metric]:
    drafted = CounterMetricFamily(
        "radixkv_drafted_tokens", "Tokens that were guessed and checked, by source.", labels=["source"]
    )
    accepted = CounterMetricFamily("radixkv_accepted_tokens", "Guessed tokens that were right.", labels=["source"])
    for source in stats.sources:
        drafted.add_metric([source.source], source.drafted_tokens)
        accepted.add_metric([source.source], source.accepted_tokens)
    yield from (drafted, accepted)
    yield CounterMetricFamily("radixkv_drafting_seconds", "Time spent on guessing.", value=stats.drafting_s)


def _namespaces(uses: Sequence[NamespaceUse]) -> Metric:
    """Those with a quota, by name; the name of all others together is empty."""
    metric = GaugeMetricFamily(
        "radixkv_namespace_tokens",
        "Tokens of the pool that a namespace with a quota is guaranteed, uses, and of these can be evicted.",
        labels=["namespace", "state"],
    )
    for use in uses:
        name = "" if use.namespace is None else use.namespace.extra_key or ""
        for state, value in (
            ("guaranteed", use.guaranteed_tokens),
            ("used", use.used_tokens),
            ("evictable", use.evictable_tokens),
        ):
            metric.add_metric([name, state], value)
    return metric


def _eviction_ages(ages: EvictionAges) -> Metric:
    """A histogram of tokens: so its median is the age of the median token."""
    limits = [*(str(float(limit)) for limit in LIMITS_S), "+Inf"]
    return HistogramMetricFamily(
        "radixkv_eviction_age_seconds",
        "Time from last use to eviction, of all evicted tokens.",
        buckets=list(zip(limits, accumulate(ages.tokens), strict=True)),
        sum_value=ages.total_s,
    )
