"""A sequence of compiled workers, run from its first to its last in one call: a program.

Starting threads and waiting for them costs microseconds, and far more where another process has one of the cores. So
the threads go through all operations of a program by themselves. None waits until the others have come: an operation
is over when those that began it have left it, and a thread that is kept from its core finds nothing left to do, and
catches up.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from radixkv.kernels import numba_arguments, numba_emitter, numba_words, openmp
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_emitter import I32, I64
from radixkv.kernels.numba_words import load_i64

SPINS = 2000  # about as many as a chunk of work takes; then the core goes to whoever else wants it

# Columns of a program's table, int64; a row fills a line of the cache.
FUNCTION, ARGUMENT, GROUP_END, COUNTER, ENTERED, LEFT = range(6)
ROW_BYTES = 64

ARGUMENTS = numba_arguments.PROGRAM.dtype


class Operation(NamedTuple):
    """A compiled worker of one pointer, and the record that it gets, whose `counter` the program sets."""

    worker: Any
    record: NDArray[np.void]


class Program:
    """Groups of operations, one group after another; those of one group do not depend on each other.

    Operations can be exchanged between runs. It keeps all records, and what `keep` names, alive.
    """

    def __init__(self, groups: Iterable[Sequence[Operation]]) -> None:
        operations = [(operation, group) for group in map(list, groups) for operation in group]
        whole = np.zeros(len(operations) * ROW_BYTES // 8 + 8, np.int64)
        start = -whole.ctypes.data % ROW_BYTES // 8
        self._table = whole[start : start + len(operations) * ROW_BYTES // 8].reshape(-1, ROW_BYTES // 8)
        self._address = self._table.ctypes.data
        self._moving = self._table[:, COUNTER : LEFT + 1]
        self._operations: list[Operation] = [operation for operation, _ in operations]
        self._kept: dict[int, NDArray[np.void]] = {}  # records of many operations, by the first one's place
        end = 0
        for i, (operation, group) in enumerate(operations):
            if i == end:
                end = i + len(group)
            self._table[i, GROUP_END] = end
            self.exchange(i, operation)

    def __len__(self) -> int:
        return len(self._operations)

    def __getitem__(self, place: int) -> Operation:
        return self._operations[place]

    def exchange(self, place: int, operation: Operation) -> None:
        """Put `operation` at `place`."""
        record = operation.record
        record["counter"] = self._address + place * ROW_BYTES + COUNTER * 8
        self._operations[place] = operation
        self._table[place, FUNCTION] = operation.worker.address
        self._table[place, ARGUMENT] = record.ctypes.data

    def exchange_all(self, places: NDArray[np.int64], worker: Any, records: NDArray[np.void]) -> None:
        """Put operations of one worker, with a record each, at `places`, and keep the records until the next time."""
        records["counter"] = self._address + places * ROW_BYTES + COUNTER * 8
        self._table[places, FUNCTION] = worker.address
        self._table[places, ARGUMENT] = records.ctypes.data + records.itemsize * np.arange(len(places))
        self._kept[int(places[0])] = records

    def run(self, num_threads: int, first: int = 0, last: int | None = None) -> None:
        """Run the operations [first, last), whole groups, on `num_threads` threads, this one among them."""
        last = len(self) if last is None else last
        self._moving[first:last] = 0
        arguments = numba_arguments.PROGRAM.fill(table=self._address, first=first, last=last)
        openmp.run(program_worker(), arguments.ctypes.data, num_threads)


@cache
def program_worker() -> Any:
    """The compiled worker that runs programs; it takes the address of a record of `numba_arguments.PROGRAM`."""
    sources = cache_depends_on(numba_arguments, numba_emitter, numba_words)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def program(data):
        _ = sources
        a = nb.carray(data, 1, dtype=ARGUMENTS)[0]
        run_operations(a.table, a.first, a.last)

    return program


@cache
def nothing_worker() -> Any:
    """A worker that does nothing."""

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def nothing(data):
        pass

    return nothing


def no_operation() -> Operation:
    """An operation that does nothing, to hold a place."""
    return Operation(nothing_worker(), numba_arguments.NOTHING.make(counter=0, unused=0))


@inner
def run_operations(table, first, last):
    while first < last:
        end = load_i64(table + first * ROW_BYTES, GROUP_END)
        for i in range(first, end):
            row = table + i * ROW_BYTES
            add_one(row + ENTERED * 8)
            call_worker(load_i64(row, FUNCTION), load_i64(row, ARGUMENT))
            add_one(row + LEFT * 8)
        for i in range(first, end):
            wait_until_left(table + i * ROW_BYTES)
        first = end


@inner
def wait_until_left(row):
    """Wait until every thread that began the operation has left it.

    This thread found no work left in it, so that all of it was taken by threads that had entered before. `LEFT` is read
    first: if it equals what has entered later, all had left.
    """
    spins = 0
    while True:
        left = load_atomic(row + LEFT * 8)
        if left == load_atomic(row + ENTERED * 8):
            break
        spins += 1
        if spins < SPINS:
            pause()
        else:
            give_core_away()


@intrinsic
def call_worker(typing, function, argument):
    """Call the function of one pointer at address `function`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return types.void(function, argument), codegen


@intrinsic
def add_one(typing, address):
    """Add 1 to the int64 at `address`; what this thread wrote before is seen by who reads it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def load_atomic(typing, address):
    """The int64 at `address`, and with it what the threads that changed it wrote before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(address), codegen


@intrinsic
def pause(typing):
    """Tell the processor that this thread waits in a loop."""
    machine = platform.machine()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if machine in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(function, [ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_core_away(typing):
    """Let another thread have this core, if one wants it."""
    is_posix = platform.system() != "Windows"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if is_posix:
            kind = ir.FunctionType(I32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen
