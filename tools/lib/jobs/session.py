"""A session on Kaggle: waited for, its log followed; the sessions of the account."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.errors import KaggleError
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import News, glance

ENDED = ("complete", "error", "cancel_acknowledged")
QUEUE_SECONDS = 12 * 3600.0  # in the queue, which is no part of the session's own time
GRACE_SECONDS = 600.0  # in which Kaggle ends a session whose time is over, and shows it
LISTED = 20


def wait_for_end(client: KaggleClient, version: Version, seconds: float) -> tuple[str, str]:
    """Wait in the queue, then for the end of this very version within `seconds`; (status, failure message)."""
    news, start = News(), client.patience.now()

    def look(enough: Callable[[str], bool]) -> tuple[str, str] | None:
        status, message = client.kernels.status(version)
        news.tell(f"{version}: {status} ({(client.patience.now() - start) // 60:.0f} min)")
        return (status, message) if enough(status) else None

    begun = partial(look, lambda status: status != "queued")
    found = client.patience.wait_for(begun, f"kernel {version} in the queue", QUEUE_SECONDS)
    if found[0] in ENDED:
        return found
    start = client.patience.now()
    follower = threading.Thread(target=follow_log, args=(client, version), daemon=True)
    follower.start()
    ended = partial(look, lambda status: status in ENDED)
    found = client.patience.wait_for(ended, f"kernel {version}", seconds + GRACE_SECONDS)
    follower.join(client.patience.poll_seconds * client.patience.pace)
    return found


def follow_log(client: KaggleClient, version: Version) -> None:
    """Copy the running kernel's log to stderr; where Kaggle gives no stream the log comes at the end."""
    try:
        for text in client.kernels.log_stream(version):
            print(text, end="" if text.endswith("\n") else "\n", file=sys.stderr, flush=True)
    except KaggleError as error:
        print(f"no live log ({error}); it comes with the output", file=sys.stderr)


def sessions(client: KaggleClient) -> list[list[str | int]]:
    """[kernel, version, status, hours since its last run, what it holds] of the account's latest kernels."""
    rows: list[list[str | int]] = []
    for one in client.kernels.mine()[:LISTED]:
        status = glance(f"the status of {one.version}", partial(client.kernels.status, one.version), ("unknown", ""))[0]
        busy = status in ("queued", "running", "cancel_requested")
        holds = ("GPU slot" if one.accelerator else "CPU slot") if busy else "-"
        rows.append([one.version.ref, one.version.number, status, age(one.last_run), holds])
    return rows


def age(time: datetime | None) -> str:
    """How long ago a time (UTC) was, in hours."""
    return "-" if time is None else f"{(datetime.now(UTC) - time.replace(tzinfo=UTC)).total_seconds() / 3600:.1f}"
