"""The ASGI application of a router: the interfaces of a server, answered by the replica that is chosen."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from radixkv.cluster import gathered
from radixkv.cluster.callers import Callers
from radixkv.cluster.error_form import no_replica
from radixkv.cluster.fleet import Asked, Fleet
from radixkv.cluster.known_prompts import KnownPrompts, PromptReader
from radixkv.cluster.relay import Journey, Relay
from radixkv.cluster.replica_link import ReplicaCall, end_to_end
from radixkv.cluster.route_metrics import RouteMetrics
from radixkv.cluster.route_page import page_files
from radixkv.cluster.router.routing import Choice
from radixkv.cluster.stored_responses import RESPONSES_PATH, holder_of
from radixkv.errors import NoReplicaError
from radixkv.serving.errors import ApiError, as_api_error
from radixkv.serving.streaming import ClientGoneError, unless_gone
from radixkv.serving.wire import JsonAnswer

ROUTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/cache/prewarm"})
"""Paths whose requests compute a prompt: they go where the cost is least."""
EXPLAIN = "/v1/cache/explain"
BYTES_PER_TOKEN = 4
"""Of a body whose prompt is not known: a guess, from which its work is guessed."""
ELSEWHERE = b"router.invalid"
"""The host that clients elsewhere ask for, as replicas hear it: to those at their own machine they show texts."""
_REPLICA = re.compile(r"^/replicas/(\d+)(/.*)$")
_RESPONSE = re.compile(rf"^{RESPONSES_PATH}/([^/]+)$")


class RouteApp:
    """Takes requests for several replicas.

    What computes a prompt goes where the router's cost is least; what tells of a whole server, to all; what only one
    replica has, to that one; all else to any.
    """

    def __init__(
        self,
        fleet: Fleet,
        make_reader: Callable[[], PromptReader | None],
        *,
        max_body_bytes: int = 16 << 20,
        is_local: bool = True,
    ) -> None:
        """Args:
        make_reader: the reader of prompts, once a replica has answered; None if there is none.
        is_local: whether the replicas may believe a client that says it is at their own machine.
        """
        self.fleet = fleet
        self.metrics = RouteMetrics(fleet)
        self._callers = Callers(fleet)
        self._make_reader = make_reader
        self._max_body_bytes = max_body_bytes
        self._is_local = is_local
        self._page = page_files()
        self._of_all: dict[tuple[str, str], Callable[[ReplicaCall], Awaitable[Response]]] = {
            ("GET", "/metrics"): lambda call: gathered.metrics(fleet, self.metrics, call),
            ("GET", "/v1/cache/stats"): lambda call: gathered.stats(fleet, call),
            ("POST", "/v1/cache/flush"): lambda call: gathered.flush(fleet, call),
            ("GET", "/server_info"): lambda call: gathered.server_info(fleet, call),
            ("GET", "/route/replicas"): lambda call: gathered.overview(fleet, call),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            call = await self._call(request)
            await unless_gone(request, self._serve(call, scope, noting))
        except ClientGoneError:
            return
        except Exception as error:
            api_error = as_api_error(error)
            if has_begun:
                raise
            await api_error.response(_path(scope))(scope, receive, send)

    async def _call(self, request: Request) -> ReplicaCall:
        """The request, whole. Raises: ApiError."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_bytes:
                raise ApiError(413, f"a body may have {self._max_body_bytes} bytes", code="request_too_large")
            parts.append(part)
        query = request.scope.get("query_string", b"").decode("latin-1")
        raw = request.scope.get("raw_path") or _path(request.scope).encode()
        root = request.scope.get("root_path", "")
        target = raw.decode("latin-1").removeprefix(root) + (f"?{query}" if query else "")
        headers = end_to_end(request.scope["headers"])
        if not self._is_local:
            headers = [(name, ELSEWHERE if name == b"host" else value) for name, value in headers]
        return ReplicaCall(request.method, target, headers, b"".join(parts))

    async def _serve(self, call: ReplicaCall, scope: Scope, send: Send) -> None:
        path = _path(scope)
        if call.method == "GET" and path in ("/health", "/ready"):
            await self._answer(gathered.health(self.fleet, ready=path == "/ready"), scope, send)
        elif call.method == "GET" and path in self._page:
            await self._answer(self._page[path].answer(), scope, send)
        elif (of_all := self._of_all.get((call.method, path))) is not None:
            await self._answer(await of_all(call), scope, send)
        elif call.method == "POST" and path == "/route/explain":
            await self._answer(await self._explained(call), scope, send)
        elif (match := _REPLICA.match(path)) is not None:
            await self._to_replica(int(match[1]), match[2], call, send)
        elif call.method == "POST" and path in ROUTED:
            await self._routed(path, call, send)
        elif (match := _RESPONSE.match(path)) is not None:
            only = await holder_of(self.fleet, match[1], call.headers)
            await self._pass(call, path, send, only)
        elif call.method == "POST" and path == EXPLAIN:
            _, asked = await self._read(path, call)
            held = self.fleet.held(asked)
            await self._pass(call, path, send, max(held, key=lambda name: held[name]) if held else None)
        else:
            await self._pass(call, path, send)

    async def _routed(self, path: str, call: ReplicaCall, send: Send) -> None:
        known, asked = await self._read(path, call)
        only = None
        if known.stored_response is not None:
            only = await holder_of(self.fleet, known.stored_response, call.headers)
        if known.prompts is None:
            self.metrics.unknown.inc()
        journey = Journey(call, path, asked, True, known.why_not, only, known.continues)
        await Relay(self.fleet, self.metrics, journey, send).run()

    async def _read(self, path: str, call: ReplicaCall) -> tuple[KnownPrompts, Asked]:
        """What a request asks for."""
        reader = self._make_reader()
        if reader is None:
            known = KnownPrompts(None, "the router has no tokenizer for this model")
        else:
            known = await reader.read(path, call.body)
        key = await self._callers.namespace_key(call.headers, known.cache_salt)
        if key is None and known.prompts is not None:
            known = replace(known, prompts=None, why_not="its namespace is not known")
        asked = Asked(self.fleet.new_id(), known.prompts or (), key, len(call.body) // BYTES_PER_TOKEN)
        return known, asked

    async def _explained(self, call: ReplicaCall) -> Response:
        """Where a request would go now, and why; its body is that of a chat, a completion or a message."""
        known, asked = await self._read(EXPLAIN, call)
        try:
            choice = self.fleet.would_choose(asked)
        except NoReplicaError as error:
            raise no_replica(str(error)) from error
        return JsonAnswer(
            {
                **_choice_object(choice),
                "prompt_tokens": known.num_tokens if known.prompts is not None else None,
                "why_unknown": known.why_not or None,
            }
        )

    async def _to_replica(self, number: int, target: str, call: ReplicaCall, send: Send) -> None:
        names = list(self.fleet.members)
        if number >= len(names):
            raise ApiError(404, f"the replicas are numbered 0 to {len(names) - 1}; got {number}")
        query = call.target.partition("?")[2]
        call = replace(call, target=target + (f"?{query}" if query else ""))
        await self._pass(call, target, send, names[number])

    async def _pass(self, call: ReplicaCall, path: str, send: Send, only: str | None = None) -> None:
        """Hand a request that computes no prompt to a replica, by default to any."""
        journey = Journey(call, path, Asked("", (), None), is_routed=False, only=only)
        await Relay(self.fleet, self.metrics, journey, send).run()

    async def _answer(self, response: Response, scope: Scope, send: Send) -> None:
        async def no_more() -> Message:
            return {"type": "http.disconnect"}

        await response(scope, no_more, send)


def _choice_object(choice: Choice) -> dict[str, Any]:
    costs = [
        {
            "replica": cost.replica,
            "queued_s": cost.queued_s,
            "compute_s": cost.compute_s,
            "price_s": cost.price_s,
            "total_s": cost.total_s,
        }
        for cost in choice.costs
    ]
    return {
        "replica": choice.replica,
        "cached_tokens": choice.cached_tokens,
        "message": choice.explain(),
        "costs": costs,
    }


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
