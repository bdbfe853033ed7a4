"""Runs the layers of a plain decoder on a few tokens as one program of compiled workers, for steps of decoding.

A step of a few tokens is bound by reading the weights. Module by module it is not: each has Python, tensors and threads
of its own to start. The program does what the modules do, rounding where they round, and is made once for each number
of tokens. Attention is part of it where the backend says how; else the program stops there in each layer.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from radixkv.attention.backend import LayerAttention
from radixkv.attention.program_plan import STAGES, LayersOperation, Pages, ProgramPlan
from radixkv.kernels import numba_arguments, numba_fused, numba_linear, numba_program
from radixkv.kernels.compiling import log_if_slow
from radixkv.kernels.numba_modes import MODES
from radixkv.kernels.numba_program import Operation, Program
from radixkv.models.paged_attention import AttentionContext
from radixkv.models.plain_decoder import Norm, PlainDecoder, find_plain_decoder
from radixkv.models.probe import difference_on_probe
from radixkv.models.skinny_linear import MAX_TOKENS, MIN_BYTES_PER_THREAD, WARM_UP_TOKENS

MAX_PROGRAMS = 128  # kept at a time
MAX_DIFFERENCE = {torch.float32: 1e-4}  # of the logits, relative to their largest
MAX_HALF_DIFFERENCE = 5e-2

logger = logging.getLogger(__name__)


class FusedDecoder:
    """Computes what `decoder` computes, for a few tokens at a time.

    Args:
        layers: each layer's attention, as the model asks for it.
    """

    def __init__(self, decoder: PlainDecoder, layers: Sequence[LayerAttention]) -> None:
        self._decoder = decoder
        self._params = tuple(layer.params for layer in layers)
        self._buffers = _Buffers(decoder, 0, 0)
        self._replays: dict[tuple[int, int, bool], _Replay] = {}
        self._wide_biases = _WideBiases(decoder)
        weight_bytes = sum(linear.weight.nbytes for layer in decoder.layers for linear in layer.linears)
        self._most_threads = 1 + weight_bytes // len(decoder.layers) // MIN_BYTES_PER_THREAD
        _compile(decoder.mode)

    def can_run(self, num_tokens: int) -> bool:
        """Whether it computes as the model would now, and sooner. O(modules)."""
        return 0 < num_tokens <= MAX_TOKENS[self._decoder.mode] and self._decoder.is_unchanged()

    def run(self, input_ids: Tensor, positions: Tensor, logits_of: Tensor, context: AttentionContext) -> Tensor:
        """As `flattened_forward`; the logits are valid until the next call."""
        replay = self._replay(len(input_ids), logits_of)
        replay.start(input_ids, positions)
        num_threads = self._num_threads()
        for layer, params in enumerate(self._params):
            replay.run_to_attention(layer, num_threads)
            replay.wide_attended.copy_(context.attend(layer, replay.q, replay.k, replay.v, params))
        return replay.finish(logits_of, num_threads)

    def run_with(
        self,
        plan: ProgramPlan,
        input_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        logits_of: Tensor,
        on_compute: Callable[[], object],
    ) -> Tensor | None:
        """The same where the attention of `plan` is part of the program; None if it cannot be.

        on_compute: called before the program runs, without the interpreter's lock, to its end.
        """
        pages = plan.pages(self._decoder.embeddings.dtype)
        if pages is None:
            return None
        replay = self._replay(len(input_ids), logits_of)
        replay.start(input_ids, positions)
        replay.put_attention(pages, slots, plan.operations(replay.wide_q, replay.wide_attended, self._params))
        on_compute()
        return replay.finish(logits_of, self._num_threads())

    def _num_threads(self) -> int:
        return min(torch.get_num_threads(), self._most_threads)

    def _replay(self, num_tokens: int, logits_of: Tensor) -> _Replay:
        num_logits = len(logits_of)
        rows = logits_of.numpy()
        picks = num_logits != num_tokens or bool((rows[1:] < rows[:-1]).any())  # else all in order
        key = num_tokens, num_logits, picks
        if key in self._replays:
            self._wide_biases.refresh()
            return self._replays[key]
        if not self._buffers.have_room(num_tokens, num_logits):
            self._replays.clear()
            self._buffers = self._buffers.grown_for(num_tokens, num_logits)
        elif len(self._replays) >= MAX_PROGRAMS:
            self._replays.clear()
        self._wide_biases.refresh()
        replay = self._replays[key] = _Replay(self._decoder, self._buffers, self._wide_biases, *key)
        return replay


@torch.inference_mode()
def fuse(model: PreTrainedModel, layers: Sequence[LayerAttention]) -> FusedDecoder | None:
    """What runs `model`'s layers on few tokens; None where they are not known, or compute something else."""
    decoder = find_plain_decoder(model)
    if decoder is None or not _have_one_shape(decoder, layers):
        return None
    fused = FusedDecoder(decoder, layers)
    difference = difference_on_probe(model, fused.run)
    if not difference <= MAX_DIFFERENCE.get(model.dtype, MAX_HALF_DIFFERENCE):
        logger.warning(
            "%s does not compute what its class does (its logits differ by %.1e), so its own modules run",
            type(model).__name__,
            difference,
        )
        return None
    return fused


def _have_one_shape(decoder: PlainDecoder, layers: Sequence[LayerAttention]) -> bool:
    """Whether all layers have heads alike, without sinks, and positions turn whole heads."""
    shapes = {tuple(linear.weight.shape for linear in layer.linears) for layer in decoder.layers}
    kinds = {(layer.num_q_heads, layer.kv) for layer in layers}
    if len(shapes) != 1 or len(kinds) != 1 or len(layers) != len(decoder.layers):
        return False
    kv = layers[0].kv
    rotated = decoder.rotary(decoder.embeddings[None, :1], torch.zeros(1, 1, dtype=torch.int64, device="cpu"))[0]
    return (
        kv.k_head_dim == kv.v_head_dim == decoder.head_dim == rotated.shape[-1]
        and not any(layer.params.sinks is not None for layer in layers)
        and decoder.head.weight.shape[1] == decoder.hidden_size
    )


class _WideBiases:
    """The biases of linear layers in float32, which is how the kernel adds them."""

    def __init__(self, decoder: PlainDecoder) -> None:
        linears = [linear for layer in decoder.layers for linear in layer.linears] + [decoder.head]
        self._biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self._wide = [bias.detach().float() for bias in self._biases]
        self._by_address = {bias.data_ptr(): wide for bias, wide in zip(self._biases, self._wide, strict=True)}

    def refresh(self) -> None:
        """Follow changes of the biases in place."""
        if self._wide and self._biases[0].dtype != torch.float32:  # those are the biases themselves
            torch._foreach_copy_(self._wide, self._biases)

    def address(self, linear: nn.Linear) -> int:
        """That of a layer's bias; 0 if it has none."""
        return 0 if linear.bias is None else self._by_address[linear.bias.data_ptr()].data_ptr()


class _Buffers:
    """What programs of up to so many tokens and rows of logits read and write, one program at a time."""

    def __init__(self, decoder: PlainDecoder, num_tokens: int, num_logits: int) -> None:
        self._decoder, self._num_tokens, self._num_logits = decoder, num_tokens, num_logits
        layer, dtype = decoder.layers[0], decoder.embeddings.dtype

        def rows(count: int, width: int) -> Tensor:
            return torch.empty(count, width, dtype=dtype, device="cpu")

        self.hidden, self.normed, self.mixed = (rows(num_tokens, decoder.hidden_size) for _ in range(3))
        self.q, self.k, self.v, self.gate, self.up = (
            rows(num_tokens, linear.weight.shape[0]) for linear in (layer.q, layer.k, layer.v, layer.gate, layer.up)
        )
        self.attended = rows(num_tokens, layer.o.weight.shape[1])
        self.wide_q, self.wide_attended = self.q.float(), self.attended.float()  # the same tensors if they are float32
        self.cos, self.sin = (rows(num_tokens, decoder.head_dim) for _ in range(2))
        self.slots = torch.empty(num_tokens, dtype=torch.int64, device="cpu")
        self.picked = rows(num_logits, decoder.hidden_size)
        self.logits = rows(num_logits, decoder.head.weight.shape[0])

    def have_room(self, num_tokens: int, num_logits: int) -> bool:
        """Whether they suffice for a program."""
        return num_tokens <= self._num_tokens and num_logits <= self._num_logits

    def grown_for(self, num_tokens: int, num_logits: int) -> _Buffers:
        """Others, with room for these and for all that there was room for; in powers of two, so that few are made."""
        needed = max(num_tokens, self._num_tokens), max(num_logits, self._num_logits)
        return _Buffers(self._decoder, *(1 << (number - 1).bit_length() for number in needed))


class _Replay:
    """The program of one number of tokens and of logits, which are of all tokens in order unless it `picks` rows.

    Attributes:
        q, k, v: [tokens, heads, head_dim], what attention reads.
        wide_q: q in float32, for attention that is part of the program.
        wide_attended: float32 [tokens, heads, head_dim], what attention writes.
    """

    def __init__(
        self,
        decoder: PlainDecoder,
        buffers: _Buffers,
        biases: _WideBiases,
        num_tokens: int,
        num_logits: int,
        picks: bool,
    ) -> None:
        self._decoder, self._buffers = decoder, buffers
        self._num_tokens, self._num_logits = num_tokens, num_logits
        shape = (num_tokens, -1, decoder.head_dim)
        self.q, self.k, self.v, self.wide_q, self.wide_attended = (
            buffer[:num_tokens].view(shape)
            for buffer in (buffers.q, buffers.k, buffers.v, buffers.wide_q, buffers.wide_attended)
        )
        self._picks = picks
        maker = _OperationMaker(decoder.mode, biases, num_tokens)
        groups: list[list[Operation]] = []
        places: dict[str, list[int]] = defaultdict(list)
        for group, mark in self._groups(maker):
            places[mark].append(sum(map(len, groups)))
            groups.append(group)
        self._head_at = sum(map(len, groups)) - 1
        self._program = Program(groups)
        self._rotaries = [self._program[place].record for place in places["rotary"]]
        self._attention_at = np.array(places["attention"])
        self._nothing = numba_program.no_operation()
        self._no_records = [self._nothing.record.repeat(len(self._attention_at)) for _ in range(STAGES)]
        self._idle = set(range(STAGES))  # in which no layer does anything
        self._pages: list[Pages] | None = None  # where the program writes KV
        self._done = 0

    def _groups(self, maker: _OperationMaker) -> Iterator[tuple[list[Operation], str]]:
        b, layers = self._buffers, self._decoder.layers
        is_narrow = b.q is not b.wide_q
        yield [maker.norm(layers[0].input_norm, b.hidden, None, b.normed)], ""
        for i, layer in enumerate(layers):
            next_norm = layers[i + 1].input_norm if i + 1 < len(layers) else self._decoder.norm
            yield (
                [
                    maker.linear(layer.q, b.normed, b.q),
                    maker.linear(layer.k, b.normed, b.k),
                    maker.linear(layer.v, b.normed, b.v),
                ],
                "",
            )
            if layer.q_norm is not None and layer.k_norm is not None:
                yield [maker.head_norm(layer.q_norm, self.q), maker.head_norm(layer.k_norm, self.k)], ""
            yield [maker.rotary(self.q, self.k, self.v, b.cos, b.sin, b.slots)], "rotary"
            if is_narrow:
                yield [maker.widen(self.q, self.wide_q)], ""
            yield [numba_program.no_operation(), numba_program.no_operation()], "attention"
            yield [numba_program.no_operation()], "merge"
            if is_narrow:
                yield [maker.narrow(self.wide_attended, b.attended)], ""
            yield [maker.linear(layer.o, b.attended, b.mixed)], ""
            yield [maker.norm(layer.mlp_norm, b.hidden, b.mixed, b.normed)], ""
            yield [maker.linear(layer.gate, b.normed, b.gate), maker.linear(layer.up, b.normed, b.up)], ""
            yield [maker.gate(b.gate, b.up, layer.gate.weight.shape[0])], ""
            yield [maker.linear(layer.down, b.gate, b.mixed)], ""
            yield [maker.norm(next_norm, b.hidden, b.mixed, b.normed)], ""
        last = b.picked if self._picks else b.normed
        yield [maker.linear(self._decoder.head, last, b.logits, self._num_logits)], ""

    def start(self, input_ids: Tensor, positions: Tensor) -> None:
        """Set the hidden states and the angles of the tokens, both [tokens]."""
        b, n = self._buffers, self._num_tokens
        torch.index_select(self._decoder.embeddings, 0, input_ids, out=b.hidden[:n])
        cos, sin = self._decoder.rotary(b.hidden[None, :n], positions[None])
        b.cos[:n].copy_(cos[0])
        b.sin[:n].copy_(sin[0])
        self._done = 0

    def run_to_attention(self, layer: int, num_threads: int) -> None:
        """Compute up to the queries, keys and values of a layer."""
        if self._pages is not None:
            self._write_into([Pages.none()] * len(self._rotaries))
            self._attend_by([])
            self._pages = None
        self._run_to(int(self._attention_at[layer]), num_threads)

    def put_attention(self, pages: list[Pages], slots: Tensor, operations: list[LayersOperation]) -> None:
        """Let the program write KV into `pages` and attend by `operations`, this time."""
        self._buffers.slots[: self._num_tokens].copy_(slots)
        if pages != self._pages:
            self._write_into(pages)
            self._pages = pages
        self._attend_by(operations)

    def _write_into(self, pages: list[Pages]) -> None:
        for record, layer_pages in zip(self._rotaries, pages, strict=True):
            for name, value in layer_pages._asdict().items():
                record[name] = value

    def _attend_by(self, operations: list[LayersOperation]) -> None:
        num_layers = len(self._attention_at)
        stages = {operation.stage for operation in operations}
        filled = {operation.stage for operation in operations if len(operation.layers) == num_layers}
        for stage in set(range(STAGES)) - self._idle - filled:
            self._program.exchange_all(self._attention_at + stage, self._nothing.worker, self._no_records[stage])
        self._idle = set(range(STAGES)) - stages
        for layers, stage, worker, records in operations:
            self._program.exchange_all(self._attention_at[layers] + stage, worker, records)

    def _run_to(self, place: int, num_threads: int) -> None:
        self._program.run(num_threads, self._done, place)
        self._done = place

    def finish(self, logits_of: Tensor, num_threads: int) -> Tensor:
        """Compute what is left. Returns: logits [n, vocab_size]."""
        b, n = self._buffers, self._num_logits
        if self._picks:
            self._run_to(self._head_at, num_threads)
            torch.index_select(b.normed[: self._num_tokens], 0, logits_of, out=b.picked[:n])
        self._run_to(len(self._program), num_threads)
        return b.logits[:n]


class _OperationMaker:
    """Makes the operations of a program for `num_tokens` tokens."""

    def __init__(self, mode: str, biases: _WideBiases, num_tokens: int) -> None:
        self._mode, self._biases, self._num_tokens = mode, biases, num_tokens

    def linear(self, layer: nn.Linear, x: Tensor, out: Tensor, num_tokens: int | None = None) -> Operation:
        num_tokens = self._num_tokens if num_tokens is None else num_tokens
        weight = layer.weight
        record = numba_arguments.LINEAR.make(
            counter=0,
            weight=weight.data_ptr(),
            input=x.data_ptr(),
            bias=self._biases.address(layer),
            output=out.data_ptr(),
            num_tokens=num_tokens,
            out_features=weight.shape[0],
            row_bytes=weight.shape[1] * weight.element_size(),
        )
        return Operation(numba_linear.linear_worker(self._mode, num_tokens), record)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, out: Tensor) -> Operation:
        """Of hidden states, which become x + added."""
        return self._norm(norm, x, added, out, self._num_tokens)

    def head_norm(self, norm: Norm, x: Tensor) -> Operation:
        """Of each head of x [tokens, heads, head_dim], in place."""
        return self._norm(norm, x, None, x, x.shape[0] * x.shape[1])

    def _norm(self, norm: Norm, x: Tensor, added: Tensor | None, out: Tensor, num_rows: int) -> Operation:
        record = numba_arguments.NORM.make(
            counter=0,
            input=x.data_ptr(),
            added=0 if added is None else added.data_ptr(),
            weight=norm.weight.data_ptr(),
            output=out.data_ptr(),
            num_rows=num_rows,
            size=len(norm.weight),
            eps=norm.eps,
            unused=0,
        )
        return Operation(numba_fused.norm_worker(self._mode), record)

    def gate(self, gate: Tensor, up: Tensor, width: int) -> Operation:
        record = numba_arguments.GATE.make(
            counter=0,
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            output=gate.data_ptr(),
            num_values=self._num_tokens * width,
        )
        return Operation(numba_fused.gate_worker(self._mode), record)

    def widen(self, x: Tensor, wide: Tensor) -> Operation:
        return Operation(numba_fused.widen_worker(self._mode), self._cast(x, wide))

    def narrow(self, wide: Tensor, x: Tensor) -> Operation:
        return Operation(numba_fused.narrow_worker(self._mode), self._cast(x, wide))

    def _cast(self, x: Tensor, wide: Tensor) -> NDArray[np.void]:
        return numba_arguments.CAST.make(counter=0, narrow=x.data_ptr(), wide=wide.data_ptr(), num_values=wide.numel())

    def rotary(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Operation:
        record = numba_arguments.ROTARY.make(
            counter=0,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=slots.data_ptr(),
            num_tokens=self._num_tokens,
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            v_dim=v.shape[2],
            **Pages.none()._asdict(),
        )
        return Operation(numba_fused.rotary_worker(self._mode), record)


def _compile(mode: str) -> None:
    """Compile what programs are made of, or load it from disk, so that no request waits for it."""
    with log_if_slow("the kernels of decoder layers"):
        numba_program.program_worker()
        numba_program.no_operation()
        for worker in (numba_fused.norm_worker, numba_fused.gate_worker, numba_fused.rotary_worker):
            worker(mode)
        if MODES[mode].dtype != "float32":
            numba_fused.widen_worker(mode)
            numba_fused.narrow_worker(mode)
        for num_tokens in WARM_UP_TOKENS:
            if num_tokens <= MAX_TOKENS[mode]:
                numba_linear.linear_worker(mode, num_tokens)
