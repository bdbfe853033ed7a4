"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from http_server import Running, running

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def scraped(server: Running) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and label values in the order of the labels' names, without labels that every metric has."""
    text = server.http().get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, _labels(sample.labels)): sample.value for sample in samples}


def _labels(labels: dict[str, str]) -> tuple[str, ...]:
    return tuple(labels[name] for name in sorted(labels) if name not in ("model_name", "engine"))


def test_metrics_count_what_was_served(server: Running) -> None:
    client = server.openai()
    prompt = "ROMEO:\nBut, soft! what light through yonder window breaks?"
    first, second = (client.completions.create(model="demo", prompt=prompt, max_tokens=5) for _ in range(2))
    with pytest.raises(Exception, match="temperature"):
        client.completions.create(model="demo", prompt=prompt, temperature=-1)
    server.http().get("/no/such/path")
    values = scraped(server)
    assert {name for name, _ in values} >= VLLM
    prompt_tokens = first.usage.prompt_tokens + second.usage.prompt_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    generated = first.usage.completion_tokens + second.usage.completion_tokens
    assert values["vllm:prompt_tokens_total", ()] == prompt_tokens
    assert values["vllm:prompt_tokens_cached_total", ()] == cached == values["vllm:prefix_cache_hits_total", ()]
    assert values["vllm:generation_tokens_total", ()] == generated == values["radixkv_generated_tokens_total", ()]
    assert values["vllm:time_to_first_token_seconds_count", ()] == 2
    assert values["radixkv_tokens_total", ("computed", "default")] == prompt_tokens - cached
    assert values["radixkv_http_answers_total", ("/v1/completions", "200")] == 2
    assert values["radixkv_http_answers_total", ("/v1/completions", "400")] == 1
    assert values["radixkv_http_answers_total", ("other", "404")] == 1
    pages = [values["radixkv_pool_pages", (state,)] for state in ("free", "leased", "cached")]
    assert sum(pages) == 4096 / 16
    assert ("radixkv_estimated_hit_rate", ("2",)) in values
    assert values["vllm:num_requests_running", ()] == 0
