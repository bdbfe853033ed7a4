"""Which replica stored which response: it alone can go on from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import quote

from radixkv.cluster.callers import KEY_HEADERS
from radixkv.cluster.fleet import Fleet, Member
from radixkv.cluster.replica_link import Headers, ReplicaCall, ReplicaLostError

RESPONSES_PATH = "/v1/responses"


async def holder_of(fleet: Fleet, response_id: str, headers: Headers) -> str | None:
    """The replica that stored a response of the one who asks; None if there is none any more. Asks all side by side."""
    keys = [(name, value) for name, value in headers if name in KEY_HEADERS]
    members = [member for member in fleet.members.values() if member.state in ("up", "draining")]
    call = ReplicaCall("GET", f"{RESPONSES_PATH}/{quote(response_id, safe='')}", keys)
    found = await asyncio.gather(*[_has(member, call) for member in members])
    return _first([member.link.name for member, has in zip(members, found, strict=True) if has])


async def _has(member: Member, call: ReplicaCall) -> bool:
    try:
        answer = await member.link.send(call)
        await answer.read()
    except ReplicaLostError:
        return False
    return answer.status == 200


def _first(names: Sequence[str]) -> str | None:
    return names[0] if names else None
