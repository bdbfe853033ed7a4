"""What `radixkv size` was asked and what follows from it: as figures by name, and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from radixkv.cli.display import note
from radixkv.memory.kv_shape import IndexedLayerKV, KVShape, LayerKV, kv_budget_bytes
from radixkv.memory.savings import Alternative, alternatives
from radixkv.memory.sizing import LayerConfig
from radixkv.memory.state_share import num_states_in, share_of_states
from radixkv.memory.state_sizing import LayerState

STATES_OF_A_STEP = 2  # of each running request: one it reads and one it writes
QUANTISED_WITH = {"fp8": "", "int8": " + a scale a vector", "int4": " + a scale and a zero", "fp4": " + a scale for 16"}


@dataclass(frozen=True, slots=True)
class SizeReport:
    """What `size` was asked, and what follows from it. A figure whose question was not asked is None.

    `states` are what recurrent layers keep, in a model of `model_dtype`; () where there are none, or where
    `uncounted_states` says why they are not known. `running_limit` requests may run at one time.
    """

    model: str
    model_type: str | None
    layers: tuple[LayerConfig, ...]
    states: tuple[LayerState, ...]
    uncounted_states: str | None
    dtype: str
    model_dtype: str
    running_limit: int
    seq_len: int | None
    batch: int | None
    memory_bytes: int | None
    weights_bytes: int
    reserve: float
    unplaced_window: int | None

    @property
    def shape(self) -> KVShape:
        return KVShape(tuple(layer.kv for layer in self.layers))

    @property
    def bytes_per_token(self) -> int:
        return self.shape.bytes_per_token(self.dtype)

    @property
    def bytes_per_sequence(self) -> int | None:
        return None if self.seq_len is None else self.shape.bytes_per_sequence(self.seq_len, self.dtype)

    @property
    def bytes_per_batch(self) -> int | None:
        if self.seq_len is None or self.batch is None:
            return None
        return self.shape.bytes_per_batch(self.batch, self.seq_len, self.dtype)

    @property
    def budget_bytes(self) -> int | None:
        if self.memory_bytes is None:
            return None
        return kv_budget_bytes(self.memory_bytes, self.weights_bytes, self.reserve)

    @property
    def bytes_per_state(self) -> int | None:
        """Of one sequence, however long it is: 0 where no layer keeps a state, None where it is not known."""
        if self.uncounted_states is not None:
            return None
        return sum(state.num_bytes(self.model_dtype) for state in self.states)

    @property
    def state_tokens(self) -> int | None:
        """Tokens whose KV takes as much as a state, rounded up."""
        return None if self.bytes_per_state is None else -(-self.bytes_per_state // self.bytes_per_token)

    @property
    def max_states(self) -> int | None:
        """States that an engine has room for beside the KV, where nothing else is asked for."""
        if self.budget_bytes is None or self.bytes_per_state is None:
            return None
        if not self.bytes_per_state:
            return 0
        return num_states_in(share_of_states(self.budget_bytes), self.bytes_per_state, self.running_limit)

    @property
    def max_states_bytes(self) -> int | None:
        return None if self.max_states is None else self.max_states * (self.bytes_per_state or 0)

    @property
    def max_tokens(self) -> int | None:
        """Tokens that fit, beside the states."""
        return None if self._kv_bytes is None else self._kv_bytes // self.bytes_per_token

    @property
    def max_batch(self) -> int | None:
        """Sequences that fit, and have a state to read and one to write where layers keep any."""
        if self._kv_bytes is None or self.bytes_per_sequence is None:
            return None
        most = self._kv_bytes // self.bytes_per_sequence
        return min(most, self.max_states // STATES_OF_A_STEP) if self.max_states else most

    @property
    def _kv_bytes(self) -> int | None:
        """What is left for KV, beside the states."""
        return None if self.budget_bytes is None else max(0, self.budget_bytes - (self.max_states_bytes or 0))

    @property
    def kv_share(self) -> float | None:
        """KV of the batch, or of one sequence, as a share of weights and KV together."""
        kv_bytes = self.bytes_per_batch or self.bytes_per_sequence
        return kv_bytes / (self.weights_bytes + kv_bytes) if kv_bytes and self.weights_bytes else None

    @property
    def alternatives(self) -> list[Alternative]:
        return list(alternatives(self.layers, self.dtype, self.seq_len))

    def ratio(self, other: Alternative) -> float:
        """What it costs, in units of what the model costs as it is."""
        if other.bytes_per_token is not None:
            return other.bytes_per_token / self.bytes_per_token
        assert other.bytes_per_sequence is not None, "an alternative costs something"
        assert self.bytes_per_sequence is not None, "windows are compared at a length"
        return other.bytes_per_sequence / self.bytes_per_sequence

    def missing(self) -> Iterator[str]:
        """What the config does not tell, so that an alternative is left out, or states are."""
        if self.uncounted_states is not None:
            yield f"states are not counted: {self.uncounted_states}"
        if any(layer.full_heads is None for layer in self.layers):
            yield "multi-head and multi-query are left out: the config does not give all dimensions of the query heads"
        if self.unplaced_window is not None:
            yield (
                f"windows are left out: the config has one of {self.unplaced_window:,} tokens, and no layer_types that "
                "tell which layers have it"
            )

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "seq_len": self.seq_len,
            "batch": self.batch,
            "memory_bytes": self.memory_bytes,
            "weights_bytes": self.weights_bytes,
            "reserve": self.reserve,
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_sequence": self.bytes_per_sequence,
            "bytes_per_batch": self.bytes_per_batch,
            "budget_bytes": self.budget_bytes,
            "max_tokens": self.max_tokens,
            "max_batch": self.max_batch,
            "bytes_per_state": self.bytes_per_state,
            "state_tokens": self.state_tokens,
            "max_states": self.max_states,
            "max_states_bytes": self.max_states_bytes,
            "kv_share": self.kv_share,
            "alternatives": [{**other._asdict(), "ratio": self.ratio(other)} for other in self.alternatives],
            "missing": list(self.missing()),
            "num_layers": self.shape.num_layers,
            "num_kv_layers": self.shape.num_kv_layers,
            "layers": [asdict(layer.kv) for layer in self.layers],
            "windows": [layer.window for layer in self.layers],
            "num_state_layers": None if self.uncounted_states is not None else len(self.states),
            "states": [state._asdict() for state in self.states],
        }


def print_tables(report: SizeReport) -> None:
    """Print what it costs, then what it would cost otherwise, then what the config does not tell."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"KV cache of {escape(report.model)}, {report.dtype}", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column(justify="right", style="dim")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    others = Table(title="What it would cost otherwise", box=box.SIMPLE, title_justify="left")
    others.add_column()
    for heading in ("one token", *([] if report.seq_len is None else [f"{report.seq_len:,} tokens"]), "times"):
        others.add_column(heading, justify="right")
    for other in report.alternatives:
        others.add_row(*_alternative_row(report, other))
    console.print(others)
    for line in report.missing():
        note(line)


def _alternative_row(report: SizeReport, other: Alternative) -> Iterator[str]:
    """What it is, bytes of a token and of a sequence, and how many times those of the model as it is."""
    yield _describe_alternative(report, other)
    for size in (other.bytes_per_token, *([] if report.seq_len is None else [other.bytes_per_sequence])):
        yield "" if size is None else readable_bytes(size)
    yield f"{report.ratio(other):.3g} ×"


def _describe_alternative(report: SizeReport, other: Alternative) -> str:
    if other.kind == "dtype":
        return other.name + QUANTISED_WITH.get(other.name, "")
    if other.kind == "heads":
        heads = {layer.full_heads.num_kv_heads for layer in report.layers if layer.full_heads and layer.kv.holds_kv}
        numbers = [1] if other.name == "multi-query" else sorted(heads)
        return f"{other.name}: {_listed(numbers)} KV heads".replace(" 1 KV heads", " 1 KV head")
    windows = [layer.window for layer in report.layers if layer.window is not None]
    return f"{len(windows)} of {len(report.layers)} layers keep {_listed(sorted(set(windows)))} tokens"


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _rows(report: SizeReport) -> Iterator[tuple[str, str, str]]:
    """Label, readable figure and exact figure of each line of the table."""
    for layer, count in report.shape.groups():
        yield (f"{count} of {report.shape.num_layers} layers", *_describe(layer, report.dtype))
    yield ("one token", *_bytes(report.bytes_per_token))
    yield from _state_rows(report)
    if report.bytes_per_sequence is not None:
        yield (f"one sequence of {report.seq_len:,} tokens", *_bytes(report.bytes_per_sequence))
    if report.bytes_per_batch is not None:
        yield (f"a batch of {report.batch:,} sequences", *_bytes(report.bytes_per_batch))
    if report.kv_share is not None:
        kept = "the batch" if report.bytes_per_batch else "the sequence"
        yield (
            f"{kept}, of weights and KV",
            f"{report.kv_share:.2%}",
            f"weights {readable_bytes(report.weights_bytes)}",
        )
    if report.budget_bytes is not None:
        yield ("left for KV and states" if report.states else "memory left for KV", *_bytes(report.budget_bytes))
        if report.max_states and report.max_states_bytes is not None:
            yield ("states that fit", f"{report.max_states:,}", readable_bytes(report.max_states_bytes))
        yield ("tokens that fit", f"{report.max_tokens:,}", "")
    if report.max_batch is not None:
        yield ("largest batch", f"{report.max_batch:,}", f"sequences of {report.seq_len:,} tokens")


def _state_rows(report: SizeReport) -> Iterator[tuple[str, str, str]]:
    """What layers keep as a state, what that takes in all of them, and as how many tokens that is; nothing without."""
    if not report.states:
        return
    for state, count in Counter(report.states).items():
        size = f"{state.num_bytes(report.model_dtype):,} bytes a state"
        yield (f"{count} of {report.shape.num_layers} layers", state.kind, size)
    assert report.bytes_per_state is not None, "states are counted"
    yield ("one state", *_bytes(report.bytes_per_state))
    yield ("one state, in KV", f"{report.state_tokens:,} tokens", "")


def _describe(layer: LayerKV, dtype: str) -> tuple[str, str]:
    """What a layer keeps, and what that costs per token."""
    if not layer.holds_kv:
        return "no KV", ""
    per_token = f"{layer.bytes_per_token(dtype):,} bytes a token"
    if layer.is_latent:
        index_key = f" and an index key of {layer.index_dim}" if isinstance(layer, IndexedLayerKV) else ""
        return f"a latent of {layer.k_head_dim}{index_key}", per_token
    dims = str(layer.k_head_dim) if layer.k_head_dim == layer.v_head_dim else f"{layer.k_head_dim}/{layer.v_head_dim}"
    return f"{layer.num_kv_heads} KV heads of {dims}", per_token


def _bytes(num_bytes: int) -> tuple[str, str]:
    return readable_bytes(num_bytes), f"{num_bytes:,} bytes"


def readable_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest unit that leaves at least 1.

    >>> readable_bytes(12288), readable_bytes(70272), readable_bytes(512)
    ('12 KiB', '68.6 KiB', '512 bytes')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{num_bytes} bytes"
