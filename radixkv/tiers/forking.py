"""What a forked child does with the stores of its parent: it leaves them alone."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class LeftToParent(Protocol):
    """What has files open, and a lock on them, that belong to the process that opened them."""

    def let_go_in_child(self) -> None:
        """Close the child's copies of the files, and change nothing."""
        ...


_known: WeakSet[LeftToParent] = WeakSet()  # of this process; a fork can be told of in no other way


def leave_to_parent(opened: LeftToParent) -> None:
    """Have `let_go_in_child` called in every child that is forked while `opened` lives."""
    _known.add(opened)


def _let_go_in_child() -> None:
    for opened in list(_known):
        opened.let_go_in_child()


os.register_at_fork(after_in_child=_let_go_in_child)
