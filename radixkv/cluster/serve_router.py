"""The request router of the replicas' deployment under Ray Serve.

The choice is made before, by `Fleet.choose` in the ingress: there the prompt is known, and what each replica holds; and
a choice can be made anew when a replica is lost. What is left to do here is to hand each call to the replica that it is
for, and to tell the ingress which replicas there are. Ray's interface for this is alpha: see `RAY_VERSIONS`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from radixkv.cluster.replica_link import ReplicaLostError
from radixkv.cluster.serve_call import AddressedCall


class ChosenReplicaRouter(RequestRouter):  # type: ignore[misc, unused-ignore]  # ray has no types
    """Sends each `AddressedCall` to its replica; one whose replica is gone fails with ReplicaLostError."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the request is for, alone."""
        everyone = [list(candidate_replicas)]
        if pending_request is None:
            return everyone
        pending_request.routing_context.should_backoff = True  # else Serve asks again at once, and for ever
        name = _addressee(pending_request)
        if name is None:
            return everyone
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if chosen:
            return [chosen]
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaLostError(f"the replica {name} runs no more"))
        return everyone  # Serve looks at them, and sees that the request is settled

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take note of the replicas that run now."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Take note of one that does not."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        from radixkv.cluster.roster import ROSTER  # here: Serve pickles this class with what its module holds

        ROSTER.set([replica_id.unique_id for replica_id in self.curr_replicas])


def _addressee(pending_request: PendingRequest) -> str | None:
    call: Any = pending_request.args[0] if pending_request.args else None
    return call.replica if isinstance(call, AddressedCall) else None
