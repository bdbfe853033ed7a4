"""What Prometheus is told of a router, and of its replicas side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from radixkv.cluster.fleet import Fleet
from radixkv.cluster.router.routing import Choice
from radixkv.serving.metrics import SECONDS

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{)?", re.MULTILINE)


class RouteMetrics:
    """Counts what a router did. Belongs to the event loop's thread."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "radixkv_route_requests", "Answers of replicas, by status.", ["replica", "status"], registry=registry
        )
        self.retries = Counter(
            "radixkv_route_retries", "Requests that had to go on to another replica.", ["reason"], registry=registry
        )
        self.continued = Counter(
            "radixkv_route_continued", "Streams that another replica went on with.", registry=registry
        )
        self.unknown = Counter("radixkv_route_unknown_prompts", "Requests routed by load alone.", registry=registry)
        self.cached_tokens = Counter(
            "radixkv_route_expected_cached_tokens",
            "Tokens of prompts that the chosen replica was believed to hold.",
            ["replica"],
            registry=registry,
        )
        self.first_token = Histogram(
            "radixkv_route_first_token_seconds",
            "Time to the first event of a stream, tries at replicas that were lost among it.",
            registry=registry,
            buckets=SECONDS,
        )
        self._queued = Gauge(
            "radixkv_route_queued_seconds",
            "Work that the router believes to be queued, when it chose last.",
            ["replica"],
            registry=registry,
        )
        self._up = Gauge(
            "radixkv_route_replica_up", "Whether a replica takes requests.", ["replica"], registry=registry
        )

    def chosen(self, choice: Choice) -> None:
        """Take note of a choice."""
        self.cached_tokens.labels(choice.replica).inc(choice.cached_tokens)
        for cost in choice.costs:
            self._queued.labels(cost.replica).set(cost.queued_s)

    def render(self, of_replicas: Mapping[str, str]) -> str:
        """All metrics as text. Args: of_replicas: those of each replica, as it gave them."""
        self._up.clear()
        for name, member in self._fleet.members.items():
            self._up.labels(name).set(member.state == "up")
        return generate_latest(self._registry).decode() + side_by_side(of_replicas)


def side_by_side(texts: Mapping[str, str]) -> str:
    """The metrics of several replicas as those of one process, each with a label `replica`. O(texts).

    >>> print(side_by_side({"a": "# HELP x A.\\n# TYPE x gauge\\nx 1.0\\n", "b": 'x{y="z"} 2.0\\n'}), end="")
    # HELP x A.
    # TYPE x gauge
    x{replica="a"} 1.0
    x{replica="b",y="z"} 2.0
    """
    heads: dict[str, list[str]] = {}  # of each family: what is said of it
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        label = f'replica="{_escaped(replica)}"'
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if line not in known and len(known) < 2:
                    known.append(line)
            elif line and not line.startswith("#"):
                name = _SAMPLE.match(line)
                if name is None:
                    continue
                if not family or not name[1].startswith(family):
                    family = name[1]
                rest = line[name.end() :]
                labelled = f"{name[1]}{{{label},{rest}" if name[2] else f"{name[1]}{{{label}}}{rest}"
                samples.setdefault(family, []).append(labelled)
    lines = [line for family in samples for line in [*heads.get(family, ()), *samples[family]]]
    return "\n".join([*lines, ""]) if lines else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
