"""Answers of the router that tell of all replicas, side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.responses import Response

from radixkv.cluster.fleet import Fleet
from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLostError
from radixkv.cluster.route_metrics import RouteMetrics
from radixkv.serving.errors import ApiError
from radixkv.serving.metrics import CONTENT_TYPE
from radixkv.serving.wire import JsonAnswer

SUMMED = ("query_tokens", "hit_tokens", "evicted_tokens", "retractions")


class Gathered(NamedTuple):
    """The answers of all replicas to one request, by replica; of those that gave none, why."""

    bodies: dict[str, bytes]
    troubles: dict[str, str]


async def gather(fleet: Fleet, call: ReplicaCall) -> Gathered:
    """Ask every replica that can be reached. Raises: ApiError, as one of them says, if none answers as it should."""
    members = [member for member in fleet.members.values() if member.state in ("up", "draining")]
    answers = await asyncio.gather(*[_ask(fleet, member.link.name, call) for member in members])
    bodies: dict[str, bytes] = {}
    troubles = {name: member.trouble for name, member in fleet.members.items() if member not in members}
    refused: tuple[int, bytes] | None = None
    for member, found in zip(members, answers, strict=True):
        if isinstance(found, str):
            troubles[member.link.name] = found
        elif found[0] != 200:
            refused = found
            troubles[member.link.name] = f"status {found[0]}"
        else:
            bodies[member.link.name] = found[1]
    if not bodies and refused is not None:
        raise _as_error(*refused)
    return Gathered(bodies, troubles)


async def stats(fleet: Fleet, call: ReplicaCall) -> Response:
    """`/v1/cache/stats`: the sums, and each replica's own."""
    found = await gather(fleet, call)
    replicas = {name: json.loads(body) for name, body in found.bodies.items()}
    total: dict[str, Any] = {name: sum(one[name] for one in replicas.values()) for name in SUMMED}
    total["hit_rate"] = total["hit_tokens"] / total["query_tokens"] if total["query_tokens"] else 0.0
    for part in ("pool", "cached_tokens", "requests"):
        total[part] = _summed([one[part] for one in replicas.values()])
    if states := [one["states"] for one in replicas.values() if "states" in one]:  # of models with recurrent layers
        total["states"] = _summed(states)
    if replicas:
        total["pool"]["page_size"] = next(iter(replicas.values()))["pool"]["page_size"]
    return JsonAnswer({**total, "replicas": replicas, "missing": found.troubles})


def _summed(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each figure over all rows, which have the same."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows) for name in names}


async def flush(fleet: Fleet, call: ReplicaCall) -> Response:
    """`/v1/cache/flush`, at every replica."""
    found = await gather(fleet, call)
    replicas = {name: json.loads(body) for name, body in found.bodies.items()}
    total: dict[str, Any] = {}
    for one in replicas.values():
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return JsonAnswer({**total, "replicas": replicas, "missing": found.troubles})


async def metrics(fleet: Fleet, own: RouteMetrics, call: ReplicaCall) -> Response:
    """`/metrics`: the router's own, and those of all replicas with a label `replica`."""
    found = await gather(fleet, call)
    texts = {name: body.decode() for name, body in found.bodies.items()}
    return Response(own.render(texts), media_type=CONTENT_TYPE)


async def server_info(fleet: Fleet, call: ReplicaCall) -> Response:
    """`/server_info`: what each replica says of itself, and how it is."""
    found = await gather(fleet, call)  # refuses those whom the replicas refuse
    caller = next((json.loads(body)["caller"] for body in found.bodies.values()), None)
    info = fleet.info
    shared = {} if info is None else {"model": info.model, "page_size": info.page_size, "vocab_size": info.vocab_size}
    return JsonAnswer({"router": True, **shared, "replicas": fleet.rows(), "caller": caller})


def health(fleet: Fleet, *, ready: bool) -> Response:
    """Whether the router lives; with `ready`, whether a replica takes requests."""
    states: Mapping[str, str] = {name: member.state for name, member in fleet.members.items()}
    is_fine = bool(fleet.up())
    status = {True: "ready" if ready else "ok", False: "no replica takes requests"}[is_fine]
    return JsonAnswer({"status": status, "replicas": states}, 200 if is_fine else 503)


async def overview(fleet: Fleet, call: ReplicaCall) -> Response:
    """`/route/replicas`: a row for each replica, in the order of their numbers, for the page."""
    found = await gather(fleet, replace(call, target="/v1/cache/stats"))  # for administrators, as it is there
    rows = []
    for number, (name, member) in enumerate(fleet.members.items()):
        own = json.loads(found.bodies[name]) if name in found.bodies else None
        rows.append(
            {
                "number": number,
                "replica": name,
                "state": member.state,
                "trouble": member.trouble or None,
                "queued_s": fleet.queued_s(name),
                "hit_rate": None if own is None else own["hit_rate"],
                "requests": None if own is None else own["requests"],
            }
        )
    info = fleet.info
    return JsonAnswer({"model": None if info is None else info.model, "replicas": rows})


async def _ask(fleet: Fleet, name: str, call: ReplicaCall) -> tuple[int, bytes] | str:
    try:
        answer: ReplicaAnswer = await fleet.link(name).send(call)
        return answer.status, await answer.read()
    except ReplicaLostError as error:
        fleet.lost(name, str(error))
        return str(error)


def _as_error(status: int, body: bytes) -> ApiError:
    try:
        error = json.loads(body)["error"]
        return ApiError(status, error["message"], param=error.get("param"), code=error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ApiError(status, "the replicas refuse this")
