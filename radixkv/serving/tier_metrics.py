"""What the tiers below the pool hold and do, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from radixkv.tiers.tier import TierStats


def tier_metrics(tiers: Sequence[TierStats]) -> Iterator[Metric]:
    """The metrics of `tiers`, labelled by their names; of an engine without tiers their names alone."""
    held = GaugeMetricFamily("radixkv_tier_bytes", "Bytes that a tier holds.", labels=["tier"])
    capacity = GaugeMetricFamily("radixkv_tier_capacity_bytes", "Bytes that a tier may hold.", labels=["tier"])
    slow = GaugeMetricFamily("radixkv_tier_is_slow", "Whether computing is faster than loading.", labels=["tier"])
    tokens = CounterMetricFamily(
        "radixkv_tier_loaded_tokens", "Tokens that were loaded in place of being computed.", labels=["tier"]
    )
    requests = CounterMetricFamily(
        "radixkv_tier_requests", "Requests that found more in a tier than in the pool.", labels=["tier", "outcome"]
    )
    pages = CounterMetricFamily("radixkv_tier_pages", "Pages that moved.", labels=["tier", "move"])
    errors = CounterMetricFamily("radixkv_tier_errors", "Times that a tier failed.", labels=["tier", "operation"])
    shares = {name: _shares(name) for name in ("disk", "host")}
    for tier in tiers:
        for use in tier.store.namespaces:
            name = "" if use.namespace is None else use.namespace[0] or ""
            shares[tier.name].add_metric([name, "guaranteed"], use.guaranteed_bytes)
            shares[tier.name].add_metric([name, "used"], use.used_bytes)
        held.add_metric([tier.name], tier.store.bytes)
        capacity.add_metric([tier.name], tier.store.capacity_bytes)
        slow.add_metric([tier.name], float(tier.is_slow))
        tokens.add_metric([tier.name], tier.loaded_tokens)
        for outcome in ("loads", "slower", "unavailable", "given_up", "missed"):
            requests.add_metric([tier.name, outcome], getattr(tier, outcome))
        for move, number in (
            ("loaded", tier.loaded_pages),
            ("written", tier.written_pages),
            ("dropped", tier.dropped_pages),
            ("evicted", tier.store.pages_evicted),
        ):
            pages.add_metric([tier.name, move], number)
        for operation, number in (("read", tier.read_errors), ("write", tier.write_errors)):
            errors.add_metric([tier.name, operation], number)
    yield from (held, capacity, slow, tokens, requests, pages, errors, *shares.values())


def _shares(tier: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(
        f"radixkv_namespace_{tier}_bytes",
        f"Bytes of the {tier} tier that a namespace with a share is guaranteed, and uses.",
        labels=["namespace", "state"],
    )
