"""What goes from the ingress to a replica under Ray Serve, and through the request router between them."""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.cluster.replica_link import Headers, ReplicaCall


@dataclass(frozen=True, slots=True)
class AddressedCall:
    """A request, and the replica that it is for; None for any, which is how an ingress says that it is there."""

    replica: str | None
    call: ReplicaCall


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The first piece of a replica's answer; those that follow are of the body."""

    status: int
    headers: Headers
