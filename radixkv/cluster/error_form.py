"""Errors of the router, in the form of the interface that a client speaks."""

from __future__ import annotations

from radixkv.serving.errors import MESSAGES_PATH, RETRY_AFTER_S, ApiError
from radixkv.serving.streaming import event


def no_replica(why: str) -> ApiError:
    """No replica can take a request now."""
    return ApiError(503, why, code="no_replica", retry_after_s=RETRY_AFTER_S)


def replica_lost(can_ask_for_more: bool) -> ApiError:
    """The replica that wrote an answer is gone, and the answer ends here."""
    hint = "; with radixkv_continue another one would have gone on" if can_ask_for_more else ""
    return ApiError(502, f"the replica that wrote this answer was lost{hint}", code="replica_lost")


def error_event(path: str, error: ApiError, number: int) -> bytes:
    """What ends a stream that fails. Args: number: of the events that came before it."""
    if path.startswith(MESSAGES_PATH):
        return event(error.body(path), "error")
    if path.startswith("/v1/responses"):
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return event({"type": "error", "sequence_number": number, **fields}, "error")
    return event(error.body(path))
