"""`python bench/cluster.py`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from radixkv_bench.cluster.drive import Answered, hit_rate, over_http
from radixkv_bench.cluster.fleets import RunningFleet, ray_fleet, routed_fleet
from radixkv_bench.cluster.sessions import Sizes, Turn, sessions_of

FLEETS: dict[str, Callable[[int, Sequence[str]], AbstractContextManager[RunningFleet]]] = {
    "ray": ray_fleet,
    "route": routed_fleet,
}
KILL_AT, ADD_AT, AFTER = 0.45, 0.5, 0.75  # of all requests
SETTINGS: dict[str, Any] = {"dtype": "float32", "attention_backend": "torch", "kv_cache_tokens": 131072}


def measure(face: str, turns: Sequence[Sequence[Turn]], num_replicas: int) -> dict[str, Any]:
    """What became of the requests of `turns`."""
    one = [Answered(turn, turn.answer, turn.cached_tokens) for of_turn in turns for turn in of_turn]
    total = sum(map(len, turns))
    kill_at, after = int(KILL_AT * total), int(AFTER * total)
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with FLEETS[face](num_replicas, flags) as fleet:
        began = time.monotonic()
        found = over_http(fleet.address, turns, {kill_at: fleet.kill_one, int(ADD_AT * total): fleet.add_one})
        seconds = time.monotonic() - began
    lost = [answered for answered in found if answered.trouble]
    before = hit_rate(found[:kill_at]) / hit_rate(one[:kill_at])
    again = hit_rate(found[after:]) / hit_rate(one[after:])
    shares = Counter(answered.replica for answered in found[:kill_at])
    return {
        "face": face,
        "replicas": num_replicas,
        "requests": total,
        "lost": len(lost),
        "first_trouble": lost[0].trouble if lost else None,
        "wrong": sum(not answered.is_right for answered in found) - len(lost),
        "hit_rate_before": hit_rate(found[:kill_at]),
        "hit_rate_between": hit_rate(found[kill_at:after]),
        "hit_rate_after": hit_rate(found[after:]),
        "one_engine_before": hit_rate(one[:kill_at]),
        "one_engine_between": hit_rate(one[kill_at:after]),
        "one_engine_after": hit_rate(one[after:]),
        "share_before": before,
        "share_after": again,
        "requests_by_replica_before": sorted(shares.values(), reverse=True),
        "replicas_seen": len({answered.replica for answered in found if not answered.trouble}),
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and say by the exit status whether nothing was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", default="ray,route", help="ray, route, or both")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    faces = options.faces.split(",")
    if not set(faces) <= FLEETS.keys():
        parser.error(f"--faces must be of {', '.join(FLEETS)}; got {options.faces}")
    turns = sessions_of(options.sessions, options.turns, Sizes(), SETTINGS)
    rows = [measure(face, turns, options.replicas) for face in faces]
    for row in rows:
        _print(row)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["lost"] == row["wrong"] == 0 for row in rows) else 1


def _print(row: dict[str, Any]) -> None:
    where = {"ray": "Ray Serve", "route": "radixkv route"}[row["face"]]
    print(f"{where}, {row['replicas']} replicas, {row['requests']:,} requests in {row['seconds']:.0f} s")
    print(f"  lost {row['lost']}, other than the unmodified model's {row['wrong']}")
    if row["first_trouble"]:
        print(f"  first trouble: {row['first_trouble']}", file=sys.stderr)
    for when in ("before", "after"):
        print(
            f"  hit rate {when:6} {row[f'hit_rate_{when}']:.1%}, one engine {row[f'one_engine_{when}']:.1%}: "
            f"{row[f'share_{when}']:.1%} of it"
        )
    missing, whole = row["hit_rate_between"], row["one_engine_between"]
    print(f"  hit rate while one was missing or cold {missing:.1%}, one engine {whole:.1%}")
    by_replica = ", ".join(map(str, row["requests_by_replica_before"]))
    print(f"  requests by replica before: {by_replica}; replicas that answered in all: {row['replicas_seen']}")
