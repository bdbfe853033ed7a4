"""What goes wrong, as clients are told: one shape on OpenAI's routes and our own, Anthropic's on its routes.

No answer and no log line holds a traceback or a prompt.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from radixkv.errors import (
    ClosedError,
    EngineFailedError,
    InvalidRequestError,
    InvalidSamplingParamsError,
    InvalidTokenIdsError,
    PromptTooLongError,
    QueueFullError,
    RadixKVError,
    TokenIdsTypeError,
)
from radixkv.serving.wire import JsonAnswer

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MESSAGES_PATH = "/v1/messages"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: what was wrong, what is allowed and what was given.
        param: the field of the request that is wrong; None if it is none of them.
        code: a word for programs; None if the status says it all.
        retry_after_s: when to try again; None if that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """OpenAI's word for the status."""
        return _TYPES.get(self.status, "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer, besides those that each answer has."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self, path: str) -> dict[str, Any]:
        """The answer to a request for `path`."""
        if path.startswith(MESSAGES_PATH):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JsonAnswer:
        """The answer, as a response."""
        return JsonAnswer(self.body(path), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong, in its field `param`."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of `error`. What nobody foresaw is logged, without its message: it may hold a prompt."""
    match error:
        case ApiError():
            return error
        case RequestValidationError() | ValidationError():  # the latter of a body that is made of another
            return _of_validation(error.errors())
        case HTTPException(__cause__=ApiError() as cause):  # FastAPI makes one of what reading a body raises
            return cause
        case HTTPException():
            return ApiError(error.status_code, _phrase(error.status_code))
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S)
        case ClosedError():
            return shutting_down()
        case EngineFailedError():
            return ApiError(503, "the engine has failed; the server must be started anew", code="engine_failed")
        case InvalidSamplingParamsError():
            return bad_request(str(error), str(error).partition(" ")[0])
        case PromptTooLongError():
            return bad_request(str(error), "prompt", "context_length_exceeded")
        case InvalidRequestError() | InvalidTokenIdsError() | TokenIdsTypeError():
            return bad_request(str(error), "prompt")
    log_unforeseen(error)
    return ApiError(500, "the server failed in this request; its log says where", code="internal_error")


def shutting_down() -> ApiError:
    """The server takes no more requests."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=RETRY_AFTER_S)


def log_unforeseen(error: BaseException) -> None:
    """Log the kind and the place of `error`, not its message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-4:]))
    kind = type(error).__name__
    logger.error("a request failed: %s%s at %s", "" if isinstance(error, RadixKVError) else "unforeseen ", kind, places)


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body must be JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    param = param_of(first["loc"])
    return bad_request(f"{param or 'the body'}: {_lower(first['msg'])}", param)


def param_of(location: Sequence[str | int]) -> str | None:
    """The field at `location`, as `messages[0].content`; None for the body as a whole.

    >>> param_of(("body", "messages", 0, "content", "str"))
    'messages[0].content'
    """
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in _NO_FIELDS:
            text += f".{part}" if text else part
    return text or None


_NO_FIELDS = {"body", "query", "path", "header", "str", "int", "float", "bool", "list", "dict", "none"}


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _phrase(status: int) -> str:
    return {404: "there is nothing at this path", 405: "this path does not take this method"}.get(
        status, "the request cannot be served"
    )
