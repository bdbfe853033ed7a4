"""A replica that is reached through a handle of Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextvars import Context
from typing import Any

from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLostError
from radixkv.cluster.serve_call import AddressedCall, AnswerHead


class ServeLink:
    """A way to one replica of a deployment."""

    def __init__(self, name: str, handle: Any) -> None:
        """Args: handle: of the deployment, with `stream=True`."""
        self.name = name
        self.host = "127.0.0.1"  # replicas name the host that their events come from
        self._handle = handle

    async def send(self, call: ReplicaCall) -> ReplicaAnswer:
        """Send a request, and wait for the head of its answer. Raises: ReplicaLostError."""
        pieces = self._pieces(call)
        try:
            head = await anext(pieces)
        except StopAsyncIteration as error:
            raise ReplicaLostError(f"{self.name} gave no answer") from error
        assert isinstance(head, AnswerHead), head
        return ReplicaAnswer(head.status, head.headers, pieces)

    async def close(self) -> None:
        """Nothing: the handle is shared."""

    async def _pieces(self, call: ReplicaCall) -> AsyncGenerator[Any]:
        """The head, and then the body. Whatever fails is the replica: its application answers errors itself."""
        # In a context of its own: calls within one request share an id there, and of those that are made side by side
        # Serve's request routers lose all but one.
        response = Context().run(self._handle.answer.remote, AddressedCall(self.name, call))
        is_whole = False
        try:
            async for piece in response:
                yield piece
            is_whole = True
        except Exception as error:
            raise ReplicaLostError(f"{self.name}: {type(error).__name__}: {error}") from error
        finally:
            if not is_whole:
                response.cancel()
