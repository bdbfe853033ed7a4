"""What was found out about one family."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from radixkv.errors import RadixKVError


class Outcome(StrEnum):
    """What became of a family; the last two must never occur."""

    SERVED = "served"
    LIMITED = "served, with a limit"
    REFUSED = "refused"
    UNTRIED = "not tried"  # no small model of it could be made here
    FAILED = "FAILED"  # crashed, ran out of time, or raised what is no error of radixkv's
    WRONG = "WRONG"  # other tokens or logits than the unmodified model's


MUST_NOT_BE = (Outcome.FAILED, Outcome.WRONG)


@dataclass(frozen=True, slots=True)
class Finding:
    """An outcome and why.

    Attributes:
        reason: why a family is not served, in the error's own words; which answer is wrong.
        limits: what a family that is served has to do without.
        layers: their kinds, as the config names them.
        backend: of attention, that "auto" took.
    """

    outcome: Outcome
    reason: str = ""
    limits: tuple[str, ...] = ()
    layers: str = ""
    backend: str = ""


def in_a_line(error: BaseException) -> str:
    """What an error says, with its name unless it is one of radixkv's, which speak for themselves."""
    words = " ".join(str(error).split())
    return words if isinstance(error, RadixKVError) else f"{type(error).__name__}: {words}"
