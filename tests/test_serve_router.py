"""The request router of Ray Serve, and the application that it gets: with Ray's package, but no cluster."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

import radixkv.cluster
from radixkv.cluster.replica_link import ReplicaCall, ReplicaLostError
from radixkv.cluster.roster import ROSTER
from radixkv.cluster.serve_call import AddressedCall
from radixkv.errors import ConfigError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'radixkv[cluster]'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # ray declares fields as pydantic 1 did
]


class FakeReplica:
    """What a request router sees of a replica."""

    replica_id: Any

    def __init__(self, name: str) -> None:
        self.replica_id = SimpleNamespace(unique_id=name)


def choose(names: list[str], addressee: str | None) -> tuple[list[list[str]], Any]:
    """What the request router of the replicas answers, and the request."""
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    from radixkv.cluster.serve_router import ChosenReplicaRouter

    async def main() -> tuple[list[list[str]], Any]:
        router = ChosenReplicaRouter.__new__(ChosenReplicaRouter)
        call = AddressedCall(addressee, ReplicaCall("GET", "/"))
        metadata = RequestMetadata(request_id="1", internal_request_id="1")
        request = PendingRequest(args=[call], kwargs={}, metadata=metadata)
        ranks = await router.choose_replicas([FakeReplica(name) for name in names], request)  # type: ignore[misc]
        request.future.done() and request.future.exception()
        return [[replica.replica_id.unique_id for replica in rank] for rank in ranks], request

    return asyncio.run(main())


def test_the_request_router_obeys_the_choice() -> None:
    assert choose(["a", "b", "c"], "b")[0] == [["b"]]
    ranks, request = choose(["a", "b"], None)
    assert ranks == [["a", "b"]]
    assert not request.future.done()
    assert request.routing_context.should_backoff


def test_a_request_for_a_replica_that_is_gone_fails_at_once() -> None:
    ranks, request = choose(["a", "b"], "c")
    assert ranks == [["a", "b"]], "so that Serve looks at the request again, and sees that it is settled"
    assert isinstance(request.future.exception(), ReplicaLostError)


def test_the_request_router_says_which_replicas_there_are() -> None:
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID
    from ray.serve.request_router import ReplicaID

    from radixkv.cluster.serve_router import ChosenReplicaRouter

    deployment = DeploymentID("replicas", "radixkv")

    class Running(FakeReplica):
        def __init__(self, name: str) -> None:
            self.replica_id = ReplicaID(name, deployment)

        async def get_queue_len(self, *, deadline_s: float) -> int:
            return 0

    async def main() -> None:
        router = ChosenReplicaRouter(deployment, DeploymentHandleSource.REPLICA)
        replicas = [Running("a"), Running("b")]
        router.update_replicas(replicas)
        assert ROSTER.names == {"a", "b"}
        await asyncio.sleep(0)
        router.on_replica_actor_died(replicas[0].replica_id)
        assert ROSTER.names == {"b"}
        router.update_replicas(replicas[1:])
        assert ROSTER.names == {"b"}

    try:
        asyncio.run(main())
    finally:
        ROSTER.set(())


def test_settings_become_an_application() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    given = {"model": "demo", "replicas": "2", "max_replicas": 4, "page_size": "8", "port": "9000"}
    app = call_user_app_builder_with_args_if_necessary(radixkv.cluster.app, given)  # as `serve run` does
    assert type(app).__name__ == "Application"
    for settings, message in (
        ({"replica": 2}, "unknown setting 'replica'; the settings are model, replicas, "),
        ({"replicas": "none"}, "replicas must be an integer"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be at least replicas; got 2 and 3"),
        ({"disk_cache": "kv"}, "share a tier with shared_cache"),
        ({"api_keys": "keys.toml"}, "set replica_key to one of an administrator"),
    ):
        with pytest.raises(ConfigError, match=message):
            radixkv.cluster.app(settings)
