"""What a push sends: the staged folder, the sources it runs on, the time it may take; one hash for all of it.

The same order is not carried out twice: another script, another setting or a new version of a source is another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from lib.jobs.session import ENDED, wait_for_end
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import glance
from lib.kernel import load_script
from lib.project import KERNEL, REPO, InputError, write_file

BUILD = REPO / "build" / "kernel"
SESSION_LIMIT_MINUTES = 720.0  # Kaggle ends a session after 12 hours
NO_ACCELERATOR = "none"
SCRIPTS = ("pipeline", "embed")  # below kernel/


# ------------------------------------------------------------------------------------------------- time
@dataclass(frozen=True)
class SessionTime:
    """How long a session on Kaggle may take, in minutes; None: as long as Kaggle lets it."""

    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes <= SESSION_LIMIT_MINUTES:
            raise InputError(
                f"--timeout-minutes {self.minutes:g}: give more than 0 and at most {SESSION_LIMIT_MINUTES:g}"
            )

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


def owner_and_slug(path: Path) -> tuple[str, str]:
    """What metadata name; the owner is a placeholder, until `--init` writes a user there."""
    owner, _, slug = str(lint.read_metadata(path).get("id", "")).partition("/")
    return owner, slug


def read_overrides(recipe: str | None, settings: list[str], script: str = "pipeline") -> dict[str, Any]:
    """`--recipe` and `--set` as typed values, checked by the script itself before anything is pushed."""
    module = load_script(KERNEL.with_name(f"{script}.py"))
    overrides = kernel.beside(dict(map(module.parse_setting, settings)), recipe=recipe)
    module.resolve_knobs(overrides)
    return overrides


def staged_metadata(
    user: str,
    accelerator: str | None = None,
    datasets: Sequence[str] = (),
    kernels: Sequence[str] = (),
    script: str = "pipeline",
) -> dict[str, Any]:
    """A script's metadata with the owner filled in and the sources of this push added."""
    refuse(lint.lint_kernel_metadata(metadata_of(script)))
    metadata = lint.read_metadata(metadata_of(script))
    metadata["id"] = str(metadata.get("id", "")).replace(OWNER_PLACEHOLDER, user)
    if metadata["id"].partition("/")[0].lower() != user.lower():
        print(
            f"warning: {metadata_of(script).name} says id {metadata['id']}, but the signed-in user is {user}: Kaggle "
            f"refuses a push for another owner; write {OWNER_PLACEHOLDER} or {user} there",
            file=sys.stderr,
        )
    for key, added in (("dataset_sources", datasets), ("kernel_sources", kernels)):
        full = [ref if "/" in ref else f"{user}/{ref}" for ref in added]
        metadata[key] = [*(metadata.get(key) or []), *full]
    if accelerator == NO_ACCELERATOR:
        metadata["enable_gpu"] = False
        metadata.pop("machine_shape", None)
    elif accelerator is not None:
        metadata["machine_shape"] = accelerator
    return metadata


def stage(metadata: dict, overrides: dict, folder: Path, seconds: int | None, script: str = "pipeline") -> Order:
    """Write and lint the folder that is pushed: the metadata and a copy of the script with its overrides."""
    source = metadata_of(script).parent / metadata["code_file"]
    refuse(lint.lint_script(source))
    text = with_overrides(source.read_text(encoding="utf-8"), overrides)
    copy, described = folder / metadata["code_file"], folder / "kernel-metadata.json"
    write_file(copy, text)
    write_file(described, json.dumps(metadata, indent=1) + "\n")
    refuse(lint.lint_kernel_metadata(described) + lint.lint_secrets(copy))
    return Order(folder, metadata, text, overrides, seconds)


def stage_push(
    user: str, given: argparse.Namespace, overrides: dict[str, Any], datasets: list[str], script: str = "pipeline"
) -> Order:
    """The same by the options of a push, with `datasets` attached."""
    metadata = staged_metadata(user, given.accelerator, datasets, given.kernel_source, script)
    return stage(metadata, overrides, BUILD, SessionTime(given.timeout_minutes).kaggle_seconds, script)


def init_owner(user: str) -> None:
    """Write the owner into the metadata files, for those who push by hand."""
    if not user.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--init {user!r}: not a Kaggle user name; it is the last part of your profile's address")
    paths = (lint.KERNEL_METADATA, lint.EMBED_METADATA, lint.DATASET_METADATA, lint.PAIRS_METADATA)
    for path in paths:
        owner, _ = owner_and_slug(path)
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
    wanted = recorded_version(runs, f"{owner}/{slug}")
    if owner != client.username and not wanted:
        return glance(f"the version of dataset {source}", lambda: client.datasets.current_version(owner, slug), 0)
    if not wanted and not client.datasets.exists(owner, slug):
        raise InputError(
            f"dataset {owner}/{slug} does not exist; make it with python tools/package_dataset.py --run RUN"
        )
    return wait_ready(client, owner, slug, wanted, {}, 60 * READY_MINUTES)


def kernel_version(client: KaggleClient, source: str) -> int:
    """The current version of a kernel whose output is attached; one that still runs is waited for."""
    owner, slug = source.split("/")[:2]
    number = client.kernels.shown(owner, slug).number
    if not number:
        raise InputError(f"kernel source {source}: no such kernel for {client.username}; push it first")
    version = Version(owner, slug, number)
    status = glance(f"whether {version} still runs", lambda: client.kernels.status(version)[0], "complete")
    if status not in ENDED:
        print(f"{version} is {status}: its output can be attached when it is complete", file=sys.stderr)
        status = wait_for_end(client, version, 60 * SESSION_LIMIT_MINUTES)[0]
    if status != "complete":
        raise InputError(
            f"kernel source {version} ended {status}, and Kaggle mounts only what is complete; "
            f"go on from what it left with python tools/ship.py --resume {number}"
        )
    return number
