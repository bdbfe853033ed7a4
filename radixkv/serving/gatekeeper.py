"""What every request passes before it reaches its route: its key, its size, admission, and the shape of errors."""

from __future__ import annotations

from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixkv.serving.errors import ApiError, as_api_error
from radixkv.serving.live_page import PAGE_PATHS
from radixkv.serving.service import Service
from radixkv.serving.streaming import ClientGoneError

CLIENT_GONE = 499  # nginx's number for it; nobody receives it
OPEN_PATHS = frozenset({"/health", "/ready", *PAGE_PATHS})
ADMITTED_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/cache/prewarm",
        "/tokenize",
        "/detokenize",
    }
)
"""Paths whose requests are counted, limited, and refused while the server drains."""


class Gatekeeper:
    """ASGI middleware that lets requests in, and turns every error into an answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._serve(scope, receive, answer)
        except ClientGoneError:
            answer.status = CLIENT_GONE
        except Exception as error:
            api_error = as_api_error(error)
            if answer.status is None:
                await api_error.response(_path(scope))(scope, receive, answer)
        finally:
            self._service.metrics.count_answer(_path(scope), answer.status or CLIENT_GONE)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        path, headers = _path(scope), Headers(scope=scope)
        tenant = self._service.keys.tenant_of(_key(headers))
        if tenant is None and path not in OPEN_PATHS:
            raise ApiError(401, "this server needs a key; send it as Authorization: Bearer KEY", code="invalid_api_key")
        scope.setdefault("state", {})["tenant"] = tenant
        limited = _LimitedBody(receive, self._service.config.max_body_bytes)
        limited.check_announced(headers.get("content-length"))
        admitted = scope["method"] == "POST" and path in ADMITTED_PATHS and tenant is not None
        with self._service.admission.enter(tenant) if admitted and tenant else nullcontext():
            await self._app(scope, limited, answer)


class _Answer:
    """Sends, and knows the status of the answer; None before it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class _LimitedBody:
    """Receives a body of at most `max_bytes`."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def check_announced(self, length: str | None) -> None:
        """Raises: ApiError if the body will be too large."""
        if length is not None and length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._max_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body may have {self._max_bytes} bytes", code="request_too_large")


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _key(headers: Headers) -> str | None:
    """The key that a request carries: as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" and token else headers.get("x-api-key")
    return None if key is None else key.encode("latin-1").decode("utf-8", "surrogateescape")  # headers are bytes
