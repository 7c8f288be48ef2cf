"""How long to wait for Kaggle, and what to believe meanwhile: the one place for both.

patience.wait_for(check, "kernel a/b", 3600)   polls; failures that may pass are borne for minutes, not tries
patience.look(check, "dataset a/b")            an absence is believed only after looks over a minute or more
glance("the quota", client.kernels.quota, {})  a look that is only a look never stops the job
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from lib.kaggle_api.errors import KaggleError, NotDone, Unauthorized
from lib.project import InputError

T = TypeVar("T")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds. ALIGN_<NAME> in the environment overrides a field (slow lines)."""

    connect_seconds: float = 15.0
    timeout_seconds: float = 60.0  # of silence, not of the whole transfer
    tries: int = 5  # of one call that may be repeated
    retry_seconds: float = 1.0  # first pause between tries, doubled each time
    retry_limit_seconds: float = 60.0
    retry_after_limit_seconds: float = 300.0  # of one call: a longer Retry-After is told to the user
    poll_seconds: float = 5.0  # first pause while waiting for Kaggle's work, grows by half each time
    poll_limit_seconds: float = 60.0
    outage_seconds: float = 900.0  # failures in a row that a wait bears, in all
    proof_seconds: float = 90.0  # of looks after which an absence is believed
    binding_seconds: float = 180.0  # in which Kaggle may not know a source that has just become ready
    pace: float = 1.0  # seconds of the clock that one of these waits takes; not of a silent line

    @classmethod
    def from_environment(cls) -> Patience:
        """The defaults, with ALIGN_TIMEOUT_SECONDS, ALIGN_TRIES, ... taken from the environment.

        Not KAGGLE_*: the official client takes every such variable for a configuration value.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            name = f"ALIGN_{field.name.upper()}"
            if name in os.environ:
                with contextlib.suppress(ValueError):
                    values[field.name] = type(getattr(cls, field.name))(os.environ[name])
                if not 0 < values.get(field.name, 0) < math.inf:
                    raise InputError(f"{name}={os.environ[name]!r} is not a number above zero")
        return cls(**values)

    def now(self) -> float:
        """Seconds since some moment, at this pace."""
        return time.monotonic() / self.pace

    def sleep(self, seconds: float) -> None:
        """Pause, at this pace."""
        time.sleep(seconds * self.pace)

    def wait_for(self, check: Callable[[], T | None], what: str, seconds: float) -> T:
        """Poll `check` with growing pauses until it returns something other than None; NotDone after the deadline.

        A KaggleError in between may pass, also the 403 or 404 of a thing that was just made, a 400 and a 5xx: it is
        borne until it has lasted for `outage_seconds`. What is final is not a KaggleError.
        """
        end, pause, outage = self.now() + seconds, self.poll_seconds, Outage(self)
        while True:
            try:
                found, asked = check(), 0.0
                outage.over()
            except KaggleError as error:
                found, asked = None, outage.bear(error)
            if found is not None:
                return found
            left = end - self.now()
            if left <= 0:
                raise outage.error or NotDone(
                    f"{what}: not done after {seconds / 60:.3g} minutes; Kaggle may still be at it"
                )
            self.sleep(min(max(pause, asked), left))
            pause = min(pause * 1.5, self.poll_limit_seconds)

    def look(self, check: Callable[[], T | None], what: str) -> T | None:
        """`check`'s first result that is not None; None only after looks over `proof_seconds`: listings lag."""
        news = News()

        def told() -> T | None:
            found = check()
            if found is None:
                news.tell(f"{what}: not shown yet, looking for {self.proof_seconds:g} s")
            return found

        try:
            return self.wait_for(told, what, self.proof_seconds)
        except NotDone:
            return None


class News:
    """Lines on stderr about what is waited for; one that says what the last one said is left out."""

    last = ""

    def tell(self, line: str) -> None:
        if line != self.last:
            print(line, file=sys.stderr, flush=True)
        self.last = line


class Outage:
    """Failures in a row of something that goes on regardless: borne as long as patience lasts."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._since = 0.0
        self.error: KaggleError | None = None

    def bear(self, error: KaggleError) -> float:
        """Take a failure; the seconds that the server asks to wait. Raises it when it can not or does not pass."""
        if isinstance(error, (Unauthorized, NotDone)):
            raise error
        now = self._patience.now()
        if self.error is None:
            self._since = now
            print(f"{error}; waiting for it to pass", file=sys.stderr, flush=True)
        self.error = error
        if now - self._since >= self._patience.outage_seconds:
            raise error.with_hint(f"; so for {(now - self._since) / 60:.0f} minutes") from None
        return error.retry_after or 0.0

    def over(self) -> None:
        """An answer came."""
        self.error = None


def glance(what: str, call: Callable[[], T], otherwise: Other) -> T | Other:
    """`call`'s result, or `otherwise` with a line that says so: the job does not depend on it."""
    try:
        return call()
    except KaggleError as error:
        print(f"{what}: not known, going on without it ({error})", file=sys.stderr)
        return otherwise
