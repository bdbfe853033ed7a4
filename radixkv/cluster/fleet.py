"""The replicas that there are, how they are, and which of them gets a request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from radixkv.cluster.held_prefixes import HeldPrefixes
from radixkv.cluster.replica_info import ReplicaInfo
from radixkv.cluster.replica_link import Headers, ReplicaCall, ReplicaLink, ReplicaLostError, json_of
from radixkv.cluster.router.cost import CostRouter
from radixkv.cluster.router.routing import Choice, RouteRequest
from radixkv.errors import ConfigError, NoReplicaError
from radixkv.serving.generation import Ids

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 5.0
State: TypeAlias = Literal["new", "up", "draining", "down", "refused"]


@dataclass(slots=True, eq=False)
class Member:
    """A replica: the way to it, and how it was when it was asked last.

    `new` ones have not answered yet; `draining` ones finish what they have; `refused` ones serve something else.
    """

    link: ReplicaLink
    state: State = "new"
    info: ReplicaInfo | None = None
    trouble: str = ""  # why it is not up


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is to be routed.

    Attributes:
        prompts: the ids of each prompt; empty if they are not known.
        namespace_key: the root key of its namespace; None if that is not known.
        guessed_tokens: of its prompts, where they are not known.
    """

    id: str
    prompts: Sequence[Ids]
    namespace_key: bytes | None
    guessed_tokens: int = 1
    expected_output_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Of all prompts, at least 1."""
        return max(1, sum(map(len, self.prompts)) or self.guessed_tokens)


class Fleet:
    """Keeps router and index in step with the replicas that are up.

    Invariant: exactly the members that are `up` are the router's candidates. Belongs to the event loop's thread.
    """

    def __init__(
        self,
        router: CostRouter,
        *,
        headers: Headers = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """headers: of the router's own requests, such as its key."""
        self.router = router
        self.prefixes: HeldPrefixes | None = None  # once a replica has said how large its pages are
        self.members: dict[str, Member] = {}
        self._headers = headers
        self._clock = clock
        self._ids, self._turns = itertools.count(), itertools.count()

    def new_id(self) -> str:
        """An id for a request, or for another try of it."""
        return f"r{next(self._ids)}"

    @property
    def info(self) -> ReplicaInfo | None:
        """What all replicas serve; None before one has answered."""
        return next((m.info for m in self.members.values() if m.info is not None and m.state != "refused"), None)

    def up(self) -> list[Member]:
        """The replicas that take requests."""
        return [member for member in self.members.values() if member.state == "up"]

    def next_but(self, exclude: Collection[str]) -> str:
        """A replica that takes requests: each in turn. Raises: NoReplicaError."""
        names = [member.link.name for member in self.up() if member.link.name not in exclude]
        if not names:
            draining = sum(member.state == "draining" for member in self.members.values())
            raise NoReplicaError(known=len(self.members), draining=draining)
        return names[next(self._turns) % len(names)]

    def link(self, name: str) -> ReplicaLink:
        """The way to a replica. Raises: ReplicaLostError if it has left."""
        member = self.members.get(name)
        if member is None:
            raise ReplicaLostError(f"{name} has left")
        return member.link

    def join(self, link: ReplicaLink) -> None:
        """Know a replica; it gets requests once `check` found it up."""
        self.members.setdefault(link.name, Member(link))

    def leave(self, name: str) -> None:
        """Forget a replica. What runs there may end there."""
        if (member := self.members.pop(name, None)) is not None:
            self._take_out(member)

    def close(self) -> None:
        """End what listens to events. Idempotent."""
        if self.prefixes is not None:
            self.prefixes.close()

    async def check_all(self) -> None:
        """`check` every replica, side by side."""
        await asyncio.gather(*[self.check(name) for name in list(self.members)])

    async def keep_checking(self, every_s: float, prepare: Callable[[], object]) -> None:
        """`check` all replicas again and again, until it is cancelled; a fault in one look is logged, and not the end.

        prepare: called after each look, in a thread, for what takes long and must be there for the next request.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.check_all()
                await asyncio.to_thread(prepare)
            except Exception:
                logger.exception("the replicas could not be looked at")

    async def check(self, name: str) -> None:
        """Find out how a replica is."""
        member = self.members.get(name)
        if member is None:
            return
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                ready, _ = await self._get(member, "/ready")
                if ready == 503:
                    self.drains(name)
                    return
                if member.state == "up" and ready == 200:
                    return
                info = await self._info_of(member)
        except TimeoutError:
            self.lost(name, f"no answer in {CHECK_TIMEOUT_S:.0f} s")
        except ReplicaLostError as error:
            self.lost(name, str(error))
        except ConfigError as error:
            self._refuse(member, str(error))
        else:
            self._take_in(member, info)

    def lost(self, name: str, why: str) -> None:
        """A replica cannot be reached: what was queued there no longer counts."""
        member = self.members.get(name)
        if member is not None and member.state != "down":
            logger.warning("the replica %s is out: %s", name, why)
            self._take_out(member)
            member.state, member.trouble = "down", why

    def drains(self, name: str) -> None:
        """A replica takes nothing new, and finishes what it has."""
        member = self.members.get(name)
        if member is not None and member.state != "draining":
            if member.state == "up":
                self.router.drain(name)
            member.state, member.trouble = "draining", "it finishes what it has"

    def held(self, asked: Asked) -> dict[str, int]:
        """For each replica that holds something of the prompts, how many tokens. O(prompt)."""
        if self.prefixes is None or asked.namespace_key is None:
            return {}
        held: dict[str, int] = {}
        for prompt in asked.prompts:
            for name, tokens in self.prefixes.lookup(prompt, asked.namespace_key, self._clock()).items():
                held[name] = held.get(name, 0) + min(tokens, len(prompt) - 1)
        return held

    def choose(self, asked: Asked, exclude: Collection[str] = ()) -> Choice:
        """Where a request goes; from now on it counts as queued there. Raises: NoReplicaError."""
        now = self._clock()
        request = RouteRequest(asked.id, asked.num_tokens, self.held(asked), asked.expected_output_tokens)
        choice = self.router.choose(request, now, exclude)
        if self.prefixes is not None and asked.namespace_key is not None:
            for prompt in asked.prompts:
                self.prefixes.expect(choice.replica, prompt, asked.namespace_key, now)
        return choice

    def would_choose(self, asked: Asked) -> Choice:
        """As `choose`, but nothing is sent and nothing counts."""
        request = RouteRequest(asked.id, asked.num_tokens, self.held(asked))
        return self.router.would_choose(request, self._clock())

    def queued_s(self, name: str) -> float | None:
        """How long what is queued at a replica will take, in seconds; None if it is not up."""
        member = self.members.get(name)
        return self.router.queued_s(name, self._clock()) if member is not None and member.state == "up" else None

    def computed(self, request_id: str) -> None:
        """The first token of a request has come."""
        self.router.computed(request_id, self._clock())

    def finished(self, request_id: str) -> None:
        """A request has ended, however it did."""
        self.router.finished(request_id, self._clock())

    def _take_in(self, member: Member, info: ReplicaInfo) -> None:
        name = member.link.name
        if self.members.get(name) is not member:
            return
        if self.prefixes is None:
            self.prefixes = HeldPrefixes(info.page_size, has_events=info.events is not None)
        if member.state == "draining":  # it did, and is another process now, or was told to stay
            self.router.remove_replica(name)
        member.state, member.info, member.trouble = "up", info, ""
        self.prefixes.follow(name, member.link.host, info.events)
        self.router.add_replica(name, self._clock())

    def _take_out(self, member: Member) -> None:
        name = member.link.name
        if member.state in ("up", "draining"):
            self.router.remove_replica(name)
        if self.prefixes is not None:
            self.prefixes.drop(name)

    def _refuse(self, member: Member, why: str) -> None:
        if member.trouble != why:
            logger.warning("the replica %s is not used: %s", member.link.name, why)
        if member.state in ("up", "draining"):
            self._take_out(member)
        member.state, member.trouble = "refused", why

    async def _info_of(self, member: Member) -> ReplicaInfo:
        """Raises: ReplicaLostError; ConfigError if it does not fit the others."""
        name = member.link.name
        status, body = await self._get(member, "/server_info")
        if status in (401, 403):
            raise ConfigError("it needs a key; give the router one that it knows")
        if status != 200:
            raise ConfigError(f"/server_info answers with status {status}; is it a radixkv server?")
        info = ReplicaInfo.of(name, json_of(body))
        others = [m.info for m in self.members.values() if m.info is not None and m.state == "up" and m is not member]
        if others:
            info.check_same(name, others[0])
        return info

    async def _get(self, member: Member, target: str) -> tuple[int, bytes]:
        answer = await member.link.send(ReplicaCall("GET", target, self._headers))
        return answer.status, await answer.read()

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each replica, as JSON."""
        return [
            {
                "replica": name,
                "state": member.state,
                "trouble": member.trouble or None,
                "events_are_current": None if self.prefixes is None else self.prefixes.is_current(name),
                "info": None if member.info is None else dict(member.info.whole),
            }
            for name, member in self.members.items()
        ]
