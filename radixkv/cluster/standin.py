"""Stand-ins."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from radixkv.cache.token_ids import common_tokens


class NoReplicaError(Exception): ...


@dataclass(frozen=True)
class RouteRequest:
    request_id: str
    prompt_tokens: int
    held: Mapping[str, int]
    expected_output_tokens: int | None = None


@dataclass(frozen=True)
class ReplicaCost:
    replica: str
    queued_s: float
    compute_s: float
    price_s: float
    total_s: float


@dataclass(frozen=True)
class Choice:
    replica: str
    cached_tokens: int
    costs: tuple[ReplicaCost, ...]

    def explain(self) -> str:
        return f"{self.replica} holds {self.cached_tokens}"


class CostRouter:
    def __init__(self) -> None:
        self.loads: dict[str, int] = {}
        self.at: dict[str, str] = {}

    def add_replica(self, name: str, now: float) -> None:
        self.loads.setdefault(name, 0)

    def remove_replica(self, name: str) -> None:
        self.loads.pop(name, None)

    drain = remove_replica

    def choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Choice:
        names = [n for n in self.loads if n not in exclude]
        if not names:
            raise NoReplicaError("no replica")
        name = min(names, key=lambda n: request.prompt_tokens - request.held.get(n, 0) + 100 * self.loads[n])
        self.loads[name] += 1
        self.at[request.request_id] = name
        return Choice(
            name,
            request.held.get(name, 0),
            tuple(ReplicaCost(n, 0.0, 0.0, 0.0, 0.0) for n in names),
        )

    def computed(self, request_id: str, now: float) -> None: ...

    def finished(self, request_id: str, now: float) -> None:
        name = self.at.pop(request_id, "")
        if name in self.loads:
            self.loads[name] -= 1


class ReplicaIndex:
    def __init__(self, page_size: int, *, max_pages: int = 0) -> None:
        self.known: dict[tuple[str, bytes], list[np.ndarray]] = {}

    def lookup(self, tokens, key: bytes) -> dict[str, int]:
        out: dict[str, int] = {}
        for (name, k), seqs in self.known.items():
            if k == key:
                out[name] = max(common_tokens(tokens, s) for s in seqs)
        return {n: v for n, v in out.items() if v}

    def expect(self, replica: str, tokens, key: bytes, now: float) -> None:
        self.known.setdefault((replica, key), []).append(tokens)

    def drop_replica(self, replica: str) -> None:
        for at in [at for at in self.known if at[0] == replica]:
            del self.known[at]
