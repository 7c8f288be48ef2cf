"""Processes that are stopped at work: at a function, at a call of the stand-in, or at random moments."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from forked import Ended, Forked, succeeded


@contextmanager
def stop_at(
    owner: object, name: str, after: bool = False, call: int = 1, number: int = signal.SIGINT
) -> Iterator[None]:
    """Within the block a process gets a signal as a call of this function begins, or `after` it has taken effect."""
    original, calls = getattr(owner, name), itertools.count(1)

    def stop(*arguments: object, **options: object) -> object:
        this = next(calls) == call
        if this and not after:
            os.kill(os.getpid(), number)
        result = original(*arguments, **options)
        if this:
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        yield


@contextmanager
def stopped_at_its_end(kernel: Any) -> Iterator[None]:
    """Within the block a run of the kernel in this process is asked to stop when nothing but its end is to be done."""
    end = kernel.Run.end

    def stopped(run: Any) -> int:
        run.stop.signal = signal.SIGTERM
        return end(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.Run, "end", stopped)
        yield


class KillAt(list):
    """The stand-in's list of calls, which kills the client at the first call of a name, before it takes effect."""

    name, victim = "", None

    def run(self, name: str, victim: Forked) -> Ended:
        """The end of a tool that is killed at the next call of this name."""
        self.victim, self.name = victim, name
        return victim.wait()

    def append(self, call: tuple[str, dict]) -> None:
        super().append(call)
        if call[0] == self.name:
            self.name = ""
            self.victim.send(signal.SIGKILL)


def kill_at_random_moments(
    calls: list, start: Callable[[], Forked], kills: int = 10, most: int = 15, once: bool = False
) -> list[int]:
    """Run a tool, killed so often at random moments of its work, then undisturbed; the stand-in's calls after each.

    A moment is a few milliseconds after one of the tool's next calls: by the clock alone, nearly all would fall into
    its start. A run that ends before its moment comes is no kill; after two of them there is nothing left to disturb,
    after one where a tool that has done its work refuses to do it `once` more.
    """
    draw, reached, ended = random.Random(0), [], 0
    while len(reached) < kills and ended < 2:
        moment, victim = len(calls) + draw.randint(1, most), start()
        while len(calls) < moment and victim.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        victim.send(signal.SIGKILL)
        code = victim.wait().returncode
        if code < 0:
            reached.append(len(calls))
        elif once:
            assert code in (0, 2)  # a killed run may have come as far as its score
            return reached
        else:
            ended += 1
    last = start().wait()
    if not (once and last.returncode == 2):
        succeeded(last)
    return [*reached, len(calls)]
