"""stdout and stderr: text that their encoding lacks, and disks that are full."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress

OUTPUT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def accept_all_text() -> None:
    """Write characters that the encoding of stdout or stderr lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write what stdout still holds. Raises: OSError if it cannot be written."""
    if sys.stdout is not None:
        sys.stdout.flush()


def abandon_stdout() -> None:
    """Drop what stdout still holds, so that the interpreter does not fail on it again at its end."""
    with suppress(OSError, ValueError):  # a stream without a file descriptor holds nothing back
        descriptor = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
