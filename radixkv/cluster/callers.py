"""In which namespace a client's requests share prefixes: that of its tenant, which the replicas know by its key."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from radixkv.cache.page_keys import root_key
from radixkv.cluster.fleet import Fleet
from radixkv.cluster.replica_link import Headers, ReplicaCall, ReplicaLostError, json_of

MAX_CALLERS = 4096
KNOWN_FOR_S = 60.0
KEY_HEADERS = (b"authorization", b"x-api-key")


class Callers:
    """Asks a replica whose key a request carries, once a minute for each key. Keys are held as hashes alone."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._clock = fleet, clock
        self._known: OrderedDict[bytes, tuple[float, str | None]] = OrderedDict()

    async def namespace_key(self, headers: Headers, cache_salt: str | None) -> bytes | None:
        """The root key of the namespace of a request; None if its key is not known, or no replica can tell."""
        info = self._fleet.info
        if info is None:
            return None
        if not info.has_tenants:
            return root_key(None, cache_salt)
        keys = [(name, value) for name, value in headers if name in KEY_HEADERS]
        digest = sha256(b"\0".join(name + b"\0" + value for name, value in keys)).digest()
        known = self._known.get(digest)
        if known is None or known[0] < self._clock():
            if (asked := await self._ask(keys)) is None:
                return None
            known = self._known[digest] = (self._clock() + KNOWN_FOR_S, asked[0])
            if len(self._known) > MAX_CALLERS:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        return root_key(known[1], cache_salt)

    async def _ask(self, keys: Headers) -> tuple[str | None] | None:
        """The namespace that belongs to `keys`; None if they open nothing."""
        for member in self._fleet.up():
            try:
                answer = await member.link.send(ReplicaCall("GET", "/server_info", keys))
                body = await answer.read()
                if answer.status != 200:
                    return None
                return (json_of(body)["caller"]["namespace"],)
            except ReplicaLostError as error:
                self._fleet.lost(member.link.name, str(error))
        return None
