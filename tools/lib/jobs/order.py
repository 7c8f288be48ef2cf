"""What a push sends: the staged folder, the sources it runs on, the time it may take; one hash for all of it.

The same order is not carried out twice: another script, another setting or a new version of a source is another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import kernel
from lib.jobs import lint
from lib.jobs.dataset import READY_MINUTES, recorded_version, wait_ready
from lib.jobs.lint import OWNER_PLACEHOLDER, refuse
from lib.jobs.session import wait_for_end
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.service import split_ref
from lib.kernel import load_script
from lib.project import KERNEL, REPO, InputError, minutes, write_file

BUILD = REPO / "build" / "kernel"
SESSION_LIMIT_MINUTES = 720.0  # Kaggle ends a session after 12 hours
NO_ACCELERATOR = "none"
SCRIPTS = ("pipeline", "embed")  # below kernel/


# ------------------------------------------------------------------------------------------------- time
@dataclass(frozen=True)
class SessionTime:
    """How long a session on Kaggle may take, in minutes; None: as long as Kaggle lets it."""

    minutes: float | None = None

    @property
    def kaggle_seconds(self) -> int | None:
        """The limit that Kaggle is asked to set."""
        return None if self.minutes is None else max(1, round(60 * self.minutes))

    @property
    def wait_seconds(self) -> float:
        """How long a running session is waited for."""
        return 60 * (self.minutes or SESSION_LIMIT_MINUTES)

    def tell(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """`overrides` with the script's own budget below the limit: starting and saving take a part of it."""
        if self.minutes is None or overrides.get("mode") == "predict":  # which has no budget to plan with
            return overrides
        budget = round(self.minutes - min(5.0, self.minutes / 5), 3)
        given = overrides.get("max_minutes", budget)
        if given > self.minutes:
            raise InputError(f"max_minutes={given:g} does not fit into --timeout-minutes {self.minutes:g}")
        return {**overrides, "max_minutes": given}


def session_time(text: str) -> SessionTime:
    """The type of the option --timeout-minutes."""
    limit = minutes(text)
    if limit > SESSION_LIMIT_MINUTES:
        raise InputError(f"--timeout-minutes {limit:g}: give at most {SESSION_LIMIT_MINUTES:g}")
    return SessionTime(limit)


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """The options of a session, which push_kernel.py, ship.py and sweep.py share; its time is `time`."""
    parser.add_argument("--accelerator", metavar="NAME", help=f"instead of the metadata's; {NO_ACCELERATOR}: CPU only")
    about = "end of the session, told to Kaggle and to the script (default and at most 720)"
    parser.add_argument(
        "--timeout-minutes", dest="time", type=session_time, default=SessionTime(), metavar="M", help=about
    )


# -------------------------------------------------------------------------------------------- the order
@dataclass(frozen=True)
class Order:
    """What a push sends, on which data, for how long; the same order is not carried out twice."""

    folder: Path  # where it is staged
    metadata: dict[str, Any]
    text: str  # the one script
    overrides: dict[str, Any]
    session_seconds: int | None
    sources: dict[str, int] = field(default_factory=dict)  # the version of everything that is attached

    @property
    def ref(self) -> str:
        """owner/slug of the kernel."""
        return self.metadata["id"]

    @property
    def content(self) -> str:
        """One hash of all that makes a difference to the run."""
        parts = [self.metadata, self.text, self.sources, self.session_seconds]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What is shown of it before it is sent."""
        about = {"metadata": self.metadata, "overrides": self.overrides, "session_seconds": self.session_seconds}
        return about | {"bytes": len(self.text.encode()), "folder": str(self.folder)}

    def new_mark(self) -> str:
        """A comment line for the script, by which one push of this order is known again."""
        return f"# order {self.content[:16]}.{secrets.token_hex(3)}"

    def any_mark(self, text: str) -> str | None:
        """The mark of some push of this order in a script."""
        found = re.search(rf"^# order {self.content[:16]}\.\w+", text, re.MULTILINE)
        return found and found[0]


# ---------------------------------------------------------------------------------------------- staging
def with_overrides(text: str, overrides: dict[str, Any]) -> str:
    """The script with its OVERRIDES line carrying `overrides`, as a readable literal in double quotes."""
    pairs = []
    for key, value in overrides.items():
        literal = json.dumps(value) if isinstance(value, str) else repr(value)
        pairs.append(f"{json.dumps(key)}: {literal}")
    line = f"OVERRIDES: dict = {{{', '.join(pairs)}}}"
    return lint.OVERRIDES_LINE.sub(lambda _: line, text)


def metadata_of(script: str) -> Path:
    """The metadata that one of the SCRIPTS is pushed with."""
    return lint.EMBED_METADATA if script == "embed" else lint.KERNEL_METADATA


def read_overrides(recipe: str | None, settings: list[str], script: str = "pipeline") -> dict[str, Any]:
    """`--recipe` and `--set` as typed values, checked by the script itself before anything is pushed."""
    module = load_script(KERNEL.with_name(f"{script}.py"))
    overrides = kernel.beside(dict(map(module.parse_setting, settings)), recipe=recipe)
    module.resolve_knobs(overrides)
    for key, value in overrides.items():
        if isinstance(value, float) and not math.isfinite(value):  # which no literal in a script is
            raise InputError(f"--set {key}={value}: give a finite number")
    return overrides


def owned_metadata(user: str | None, script: str = "pipeline") -> dict[str, Any]:
    """A script's checked metadata as `user`'s; None: as they stand, where nothing is sent."""
    path = metadata_of(script)
    refuse(lint.lint_kernel_metadata(path))
    metadata = lint.read_metadata(path)
    if user is not None:
        metadata["id"] = metadata["id"].replace(OWNER_PLACEHOLDER, user)
        if split_ref(metadata["id"])[0].lower() != user.lower():
            print(
                f"warning: {path.name} says id {metadata['id']}, but the signed-in user is {user}: Kaggle "
                f"refuses a push for another owner; write {OWNER_PLACEHOLDER} or {user} there",
                file=sys.stderr,
            )
    return metadata


def complete_metadata(
    metadata: dict[str, Any], accelerator: str | None, datasets: Sequence[str] = (), kernels: Sequence[str] = ()
) -> None:
    """Put what a push adds into its metadata: another accelerator, sources; `slug` alone is of the same owner."""
    owner, _ = split_ref(metadata["id"])
    for key, added in (("dataset_sources", datasets), ("kernel_sources", kernels)):
        full = [ref if "/" in ref else f"{owner}/{ref}" for ref in added]
        metadata[key] = [*(metadata.get(key) or []), *full]
    if accelerator == NO_ACCELERATOR:
        metadata["enable_gpu"] = False
        metadata.pop("machine_shape", None)
    elif accelerator is not None:
        metadata["machine_shape"] = accelerator


def stage(metadata: dict[str, Any], overrides: dict[str, Any], folder: Path, time: SessionTime) -> Order:
    """Write and lint the folder that is pushed: the metadata and a copy of the script with its overrides."""
    source = lint.KERNEL_METADATA.parent / metadata["code_file"]
    refuse(lint.lint_script(source))
    text = with_overrides(source.read_text(encoding="utf-8"), overrides)
    copy, described = folder / metadata["code_file"], folder / "kernel-metadata.json"
    write_file(copy, text)
    write_file(described, json.dumps(metadata, indent=1) + "\n")
    refuse(lint.lint_kernel_metadata(described) + lint.lint_secrets(copy))
    return Order(folder, metadata, text, overrides, time.kaggle_seconds)


def stage_push(
    client: KaggleClient | None, given: argparse.Namespace, overrides: dict, script: str, datasets: Sequence[str] = ()
) -> Order:
    """The same by the options of a push, with more `datasets` attached; without a `client` to be shown only."""
    metadata = owned_metadata(client.username if client else None, script)
    complete_metadata(metadata, given.accelerator, [*given.dataset, *datasets], given.kernel_source)
    return stage(metadata, overrides, BUILD, given.time)


def init_owner(user: str) -> None:
    """Write the owner into the metadata files, for those who push by hand."""
    if not user.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--init {user!r}: not a Kaggle user name; it is the last part of your profile's address")
    paths = (lint.KERNEL_METADATA, lint.EMBED_METADATA, lint.DATASET_METADATA, lint.PAIRS_METADATA)
    for path in paths:
        owner = str(lint.read_metadata(path).get("id")).partition("/")[0]
        if owner not in (OWNER_PLACEHOLDER, user):
            raise InputError(f"{path.name}: the owner is {owner} already; edit the file to change it")
    for path in paths:
        write_file(path, path.read_text(encoding="utf-8").replace(OWNER_PLACEHOLDER, user))
        print(f"{path.name}: owner {user}")


# ---------------------------------------------------------------------------------------------- sources
def source_versions(client: KaggleClient, metadata: dict[str, Any], runs: Path) -> dict[str, int]:
    """The version of every attached dataset and kernel, once each is ready: else a session takes the one before."""
    found = {source: dataset_version(client, source, runs) for source in metadata.get("dataset_sources", [])}
    return found | {source: kernel_version(client, source) for source in metadata.get("kernel_sources", [])}


def dataset_version(client: KaggleClient, source: str, runs: Path) -> int:
    """The current version of a dataset; one of ours is waited for, in the version that the record knows."""
    owner, slug = source.split("/")[:2]
    ref = f"{owner}/{slug}"
    wanted = recorded_version(runs, ref)
    if not wanted and not client.datasets.exists(ref):
        raise InputError(f"dataset {ref} does not exist; make it with python tools/package_dataset.py --run RUN")
    if wanted or owner == client.username:
        return wait_ready(client, ref, wanted, {}, 60 * READY_MINUTES)
    return client.datasets.current_version(ref)  # no mere look: by another number it would be another order


def kernel_version(client: KaggleClient, source: str) -> int:
    """The current version of a kernel whose output is attached; one of ours that still runs is waited for."""
    version = Version(source, client.kernels.shown(source).number)
    if not version.number:
        raise InputError(f"kernel source {source}: no such kernel for {client.username}; push it first")
    if version.owner != client.username:
        return version.number
    status, _ = wait_for_end(client, version, SessionTime().wait_seconds)
    if status != "complete":
        raise InputError(
            f"kernel source {version} ended {status}, and Kaggle mounts only what is complete; "
            f"go on from what it left with python tools/ship.py --resume {version.number}"
        )
    return version.number
