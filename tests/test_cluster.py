"""Real replicas that die and join: under Ray Serve, and in processes behind `radixkv route`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from radixkv_bench.cluster.command import SETTINGS, measure
from radixkv_bench.cluster.sessions import Sizes, Turn, sessions_of

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'radixkv[cluster]'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # ray declares fields as pydantic 1 did
]


@pytest.fixture(scope="module")
def turns() -> list[list[Turn]]:
    return sessions_of(12, 8, Sizes(), SETTINGS)


@pytest.mark.parametrize("face", ["ray", "route"])
def test_a_replica_is_killed_and_one_added_and_nothing_is_lost_or_wrong(face: str, turns: list[list[Turn]]) -> None:
    found = measure(face, turns, 2)
    assert (found["lost"], found["wrong"]) == (0, 0), found
    assert found["share_before"] >= 0.9, found
    assert found["share_after"] >= 0.9, found
