"""What Prometheus is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from http_server import SMALL, Running, new_demo_engine, running
from radixkv import AsyncEngine, Engine, SamplingParams
from radixkv.engine.drafts.speculation import SourceStats, SpeculationStats
from radixkv.serving.metrics import Metrics

DASHBOARD = Path(__file__).resolve().parents[1] / "docs" / "grafana-dashboard.json"
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


def test_what_the_cache_gave_up_is_told() -> None:
    small_engine = new_demo_engine(kv_cache_tokens=512)
    with running(small_engine) as server:
        for number in range(8):
            prompt = f"Scene {number}. " + "Enter two gentlemen, and speak. " * 8
            body = {"prompt": prompt, "max_tokens": 1, "prompt_cache_options": {"ttl": "30m"}}
            assert server.http().post("/v1/completions", json=body).status_code == 200
        values = scraped(server)
    evicted = values["radixkv_cache_evicted_tokens_total", ()]
    assert evicted > 0
    assert 0 < values["radixkv_cache_broken_promise_tokens_total", ()] <= evicted
    assert values["radixkv_eviction_age_seconds_count", ()] == evicted
    assert values["radixkv_eviction_age_seconds_bucket", ("+Inf",)] == evicted
    assert values["radixkv_eviction_age_seconds_sum", ()] > 0


def test_what_is_loaded_after_a_restart_is_told(tmp_path: Path) -> None:
    settings = {**SMALL, "disk_cache": str(tmp_path / "kv"), "disk_cache_gb": 0.1, "warm_start_share": 0.0}
    body = {"prompt": "Enter two gentlemen, and speak. " * 8, "max_tokens": 1}
    with Engine.from_pretrained("demo", **settings) as engine:
        engine.generate(body["prompt"], SamplingParams(max_tokens=1))
    with running(AsyncEngine.from_pretrained("demo", **settings)) as server:
        usage = server.http().post("/v1/completions", json=body).json()["usage"]
        values = scraped(server)
        stats = server.http().get("/v1/cache/stats").json()
        again = server.http().post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]
        message = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": "Hark!"}]}
        read = server.http().post("/v1/messages", json=message).json()["usage"]
        response = server.http().post("/v1/responses", json={"input": "Hark!", "max_output_tokens": 1}).json()["usage"]
    cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens_details"]["cached_by"] == {"pool": 0, "disk": cached_tokens}
    assert again["cached_by"] == {"pool": again["cached_tokens"]}
    assert read["cache_read_by"] == {"pool": read["cache_read_input_tokens"]}
    details = response["input_tokens_details"]
    assert details["cached_by"] == {"pool": details["cached_tokens"]}
    assert values["radixkv_prompt_tokens_cached_total", ("disk",)] == cached_tokens
    (tier,) = stats["tiers"]
    assert (tier["name"], tier["loaded_tokens"], tier["is_slow"]) == ("disk", cached_tokens, False)
    assert 0 < tier["bytes"] <= tier["capacity_bytes"] == 1e8
    assert 0 < cached_tokens == values["radixkv_tier_loaded_tokens_total", ("disk",)]
    assert values["radixkv_tier_requests_total", ("loads", "disk")] == 1
    assert values["radixkv_tier_pages_total", ("loaded", "disk")] == -(-cached_tokens // 16)
    assert 0 < values["radixkv_tier_bytes", ("disk",)] <= values["radixkv_tier_capacity_bytes", ("disk",)] == 1e8
    assert values["radixkv_tier_errors_total", ("read", "disk")] == 0


def test_the_dashboard_asks_for_what_is_exported(server: Running) -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    names = {name for expression in asked for name in re.findall(r"\b(?:vllm:|radixkv_)\w+", expression)}
    assert len(names) > 20
    server.openai().completions.create(model="demo", prompt="ROMEO:", max_tokens=2)
    text = server.http().get("/metrics").text
    exported = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    exported |= set(re.findall(r"# TYPE (\S+) (?:counter|gauge)", text))  # those that have no sample as yet
    assert names - exported == set()


def test_forced_tokens_are_counted(server: Running) -> None:
    def answer(**more: Any) -> tuple[str, int, float]:
        before = forced()
        body = {"messages": [{"role": "user", "content": "ROMEO:"}], "max_tokens": 40, "temperature": 0, **more}
        reply = server.http().post("/v1/chat/completions", json={**body, "regex": "(yes|no) (yes|no), good night!"})
        told = reply.json()
        return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"], forced() - before

    def forced() -> float:
        return float(re.search(r"(?m)^radixkv_forced_tokens_total (\S+)$", server.http().get("/metrics").text)[1])

    text, num_tokens, num_forced = answer()
    assert text.endswith(", good night!")
    assert num_forced > 3
    assert answer(speculate=False) == (text, num_tokens, 0)


def test_drafts_are_counted_by_source() -> None:
    engine = Engine.from_pretrained("demo", kv_cache_tokens=2048, speculate="cache")
    stats = engine.stats()._replace(speculation=SpeculationStats((SourceStats("own", 7, 3),), 2, 0.5), sampled_steps=9)
    text = Metrics("demo").render(stats).decode()
    assert 'radixkv_drafted_tokens_total{source="own"} 7.0' in text
    assert 'radixkv_accepted_tokens_total{source="own"} 3.0' in text
    assert "radixkv_drafting_seconds_total 0.5" in text
    assert "radixkv_sampled_steps_total 9.0" in text
    assert "drafted" not in Metrics("demo").render(stats._replace(speculation=None)).decode()
