"""A command that has to wait for its turn."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forked import Forked, succeeded


@contextmanager
def waiting_for(lock: Path, start: Callable[[], Forked]) -> Iterator[None]:
    """Within the block this process works under a lock and the one that `start` begins waits; then that succeeds."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = start()
        other.wait_for(lambda: other.stderr.is_file() and "is at it" in other.stderr.read_text(), "waiting")
        yield
        fcntl.flock(held, fcntl.LOCK_UN)  # the other one, a fork, has the file open as well
    succeeded(other.wait())
