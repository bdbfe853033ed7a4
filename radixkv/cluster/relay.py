"""One request on its way: to the replica that is chosen, and to others if that one is lost."""

from __future__ import annotations

import json
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from starlette.types import Send

from radixkv.cluster.answer_so_far import AnswerSoFar
from radixkv.cluster.error_form import error_event, no_replica, replica_lost
from radixkv.cluster.events_in import is_comment, whole_events
from radixkv.cluster.fleet import Asked, Fleet
from radixkv.cluster.replica_link import Headers, ReplicaAnswer, ReplicaCall, ReplicaLostError
from radixkv.cluster.route_metrics import RouteMetrics
from radixkv.cluster.router.routing import Choice
from radixkv.errors import NoReplicaError
from radixkv.serving.errors import ApiError
from radixkv.serving.wire import to_json

logger = logging.getLogger(__name__)


class Journey(NamedTuple):
    """What is to be relayed.

    Attributes:
        path: without the query.
        why_unknown: why the prompt is not known; empty if it is.
        is_routed: whether it computes a prompt, and counts as queued work.
        only: the replica that alone can answer; None if all can.
        continues: whether another replica is to go on with a stream that breaks off.
    """

    call: ReplicaCall
    path: str
    asked: Asked
    is_routed: bool = True
    why_unknown: str = ""
    only: str | None = None
    continues: bool = False


class _TurnedAwayError(Exception):
    """A replica takes no more requests; its answer goes to the client if no other one does."""

    def __init__(self, answer: ReplicaAnswer, body: bytes) -> None:
        super().__init__()
        self.answer, self.body = answer, body


class Relay:
    """Relays one request, and sends its answer.

    Until the client has an event that is no comment, another replica can take over without a trace; nothing else is
    sent before that. Afterwards the answer goes on at another one if the client asked for it, or ends with an error.
    """

    def __init__(self, fleet: Fleet, metrics: RouteMetrics, journey: Journey, send: Send) -> None:
        self._fleet, self._metrics, self._journey, self._send = fleet, metrics, journey, send
        self._so_far = AnswerSoFar() if journey.continues else None
        self._has_head = self._has_content = False
        self._num_events = 0
        self._began_at = time.monotonic()

    async def run(self) -> None:
        """Answer. Raises: ApiError if no replica takes the request, and nothing was sent yet."""
        tried: set[str] = set()
        turned_away: _TurnedAwayError | None = None
        while True:
            asked = replace(self._journey.asked, id=self._fleet.new_id()) if tried else self._journey.asked
            try:
                choice = self._choose(asked, tried)
            except NoReplicaError as error:
                if turned_away is not None and not self._has_head:
                    await self._send_whole(turned_away.answer, turned_away.body, None)
                    return
                await self._fail(no_replica(str(error)))
                return
            tried.add(choice.replica)
            try:
                await self._try(choice, asked)
                return
            except _TurnedAwayError as error:
                turned_away = error
                self._metrics.retries.labels("turned_away").inc()
            except ReplicaLostError as error:
                self._fleet.lost(choice.replica, str(error))
                self._metrics.retries.labels("lost").inc()
                if self._has_content and not self._may_go_on():
                    await self._fail(replica_lost(self._so_far is None))
                    return
                if self._has_content:
                    self._metrics.continued.inc()
            finally:
                if self._journey.is_routed:
                    self._fleet.finished(asked.id)

    def _choose(self, asked: Asked, tried: set[str]) -> Choice:
        """Raises: NoReplicaError."""
        only = self._journey.only
        if only is not None and only in tried:
            raise NoReplicaError(known=1, draining=0)
        if self._journey.is_routed:
            others = () if only is None else self._fleet.members.keys() - {only}
            choice = self._fleet.choose(asked, tried.union(others))
            self._metrics.chosen(choice)
            return choice
        return Choice(only or self._fleet.next_but(tried), 0, "any will do")

    def _may_go_on(self) -> bool:
        so_far = self._so_far
        return so_far is not None and so_far.can_go_on and bool(so_far.ids)

    async def _try(self, choice: Choice, asked: Asked) -> None:
        """Raises: ReplicaLostError, _TurnedAwayError."""
        answer = await self._fleet.link(choice.replica).send(self._call())
        self._metrics.requests.labels(choice.replica, str(answer.status)).inc()
        if answer.status == 503:
            body = await answer.read()
            self._fleet.drains(choice.replica)
            raise _TurnedAwayError(answer, body)
        if answer.is_event_stream and answer.status == 200:
            await self._stream(answer, choice, asked)
            return
        body = await answer.read()  # when its prompt was computed is not known: it says nothing of the replica's speed
        await self._send_whole(answer, body, choice)

    def _call(self) -> ReplicaCall:
        """The request; if the client has a part of the answer, for what follows it."""
        if self._so_far is not None:
            self._so_far.begin_again()
        if self._so_far is None or not self._has_content:
            return self._journey.call
        body = json.loads(self._journey.call.body)
        return self._journey.call.with_body(to_json({**body, "radixkv_output_ids": self._so_far.ids}))

    async def _stream(self, answer: ReplicaAnswer, choice: Choice, asked: Asked) -> None:
        has_computed = False
        async with aclosing(answer.chunks) as chunks, aclosing(whole_events(chunks)) as events:
            async for event in events:
                sent = event if self._so_far is None else self._so_far.take(event)
                if self._journey.is_routed and not has_computed and not is_comment(event):
                    has_computed = True
                    self._fleet.computed(asked.id)
                if sent is not None:
                    await self._send_event(answer, choice, sent)
        if not self._has_head:
            await self._send_head(answer, choice)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, answer: ReplicaAnswer, choice: Choice, event: bytes) -> None:
        if not self._has_head:
            await self._send_head(answer, choice)
        if not is_comment(event):
            if not self._has_content:
                self._metrics.first_token.observe(time.monotonic() - self._began_at)
            self._has_content = True
            self._num_events += 1
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def _send_head(self, answer: ReplicaAnswer, choice: Choice | None) -> None:
        self._has_head = True
        headers = [*answer.headers, *self._explained(choice)]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def _send_whole(self, answer: ReplicaAnswer, body: bytes, choice: Choice | None) -> None:
        if self._has_head:  # comments went out before another replica took over
            await self._fail(ApiError(answer.status, "the replica that took over refused the request"))
            return
        await self._send_head(answer, choice)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _fail(self, error: ApiError) -> None:
        """End with an error. Raises: it, if nothing was sent yet."""
        if not self._has_head:
            raise error
        event = error_event(self._journey.path, error, self._num_events)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    def _explained(self, choice: Choice | None) -> Headers:
        """Headers that tell who answers, and why."""
        if choice is None:
            return []
        if not self._journey.is_routed:
            return [(b"x-radixkv-replica", _header(choice.replica))]
        if self._journey.only is not None:
            why = "it alone has what the request asks for"
        elif self._journey.why_unknown:
            why = f"by load alone: {self._journey.why_unknown}; {choice.explain()}"
        else:
            why = choice.explain()
        return [
            (b"x-radixkv-replica", _header(choice.replica)),
            (b"x-radixkv-route", _header(why)),
        ]


def _header(text: str) -> bytes:
    """`text` as the value of a header: one line of ASCII."""
    return "; ".join(" ".join(line.split()) for line in text.splitlines()).encode("ascii", "replace")[:1000]
