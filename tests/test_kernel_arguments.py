"""Arguments of compiled workers are filled and read by name."""

from __future__ import annotations

import numba as nb
import numpy as np
import pytest

from radixkv.kernels.numba_arguments import ATTENTION, LINEAR, MERGE, Arguments

KINDS = {"attention": ATTENTION, "merge": MERGE, "linear": LINEAR}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_field_is_found_by_its_name_whatever_the_order(kind: Arguments) -> None:
    names = kind.dtype.names or ()
    values = {name: (1 << 40) + i if kind.dtype[name] == np.int64 else i / 4 for i, name in enumerate(names)}
    record = kind.fill(**dict(reversed(values.items())))
    assert {name: record[name][0] for name in names} == values


def test_missing_and_unknown_fields_are_found() -> None:
    values = dict.fromkeys(LINEAR.dtype.names or (), 0)
    with pytest.raises(AssertionError):
        LINEAR.fill(**values, other=1)
    del values["bias"]
    with pytest.raises(KeyError, match="bias"):
        LINEAR.fill(**values, other=1)


def test_compiled_code_reads_fields_by_name() -> None:
    kind = Arguments([("size", "i8"), ("factor", "f4"), ("other", "f4"), ("last", "i8")])
    record_type = kind.dtype

    @nb.cfunc(nb.float64(nb.types.voidptr))
    def read(data):  # type: ignore[no-untyped-def]
        a = nb.carray(data, 1, dtype=record_type)[0]
        return a.size * 1000 + a.last + a.factor / 100

    record = kind.fill(last=7, other=-1.0, factor=25.0, size=3)
    assert read.ctypes(record.ctypes.data) == 3007.25
