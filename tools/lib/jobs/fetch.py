"""The output of a kernel version: fetched into a folder of runs, every file verified; what a broken one left, apart."""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel, record
from lib.jobs import order
from lib.jobs.session import wait_for_end
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.errors import KaggleError
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import glance
from lib.project import InputError, ToolError, as_command
from lib.runs import damaged_files, read_run_json

LOG, LOG_LINES = "kernel.log", 20  # its last lines are shown where a kernel failed
UNVERIFIED = "unverified"  # a folder below runs/, so that nothing takes what lies there for runs


def collect(client: KaggleClient, version: Version, runs: Path, seconds: float) -> Path:
    """Wait for a version's end and fetch its verified output; the folder it lies in."""
    try:
        status, message = wait_for_end(client, version, seconds)
    except KaggleError as error:
        raise error.with_hint(f"; go on with {command_again(version)}") from None
    if status != "complete":
        raise ToolError(what_is_left(client, version, runs, status, message))
    folder = client.patience.wait_for(lambda: fetch(client, version, runs), f"output of {version}", seconds)
    check_finished(folder, version)
    return folder


def command_again(version: Version) -> str:
    """The command that goes on waiting for a version."""
    for script in order.SCRIPTS:
        if order.owner_and_slug(order.metadata_of(script))[1] == version.slug:
            return as_command("push_kernel", {"--version": version.number, "--script": script}, "output")
    return "the same command"


def run_folder(runs: Path, version: Version) -> Path:
    """Where the output of a kernel version lies: the same place each time, so that a fetch goes on."""
    return runs / f"{version.slug}-v{version.number}"


def read_manifest(path: Path, what: str) -> dict[str, Any]:
    """The kernel's own list of its outputs, written last: without it the output is not whole."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = [(facts["sha256"], facts["bytes"]) for facts in manifest["outputs"].values()]
        usable = isinstance(manifest["complete"], bool) and bool(listed)
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        path.unlink()
        raise ToolError(f"{what}: {path.name} is not the manifest of a run; run this again or push with --again")
    return manifest


def check_finished(folder: Path, version: Version) -> None:
    """A stopped run has a valid submission, but is not what was asked for; one that its time budget ended is."""
    manifest = read_run_json(folder, kernel.MANIFEST)
    if manifest["complete"]:
        return
    raise ToolError(
        f"{version.ref}: stopped early ({manifest.get('stopped') or 'unfinished'}); what it has lies verified in "
        f"{folder}; go on with python tools/push_kernel.py --again --kernel-source {version.ref} and the same settings"
    )


def fetch(client: KaggleClient, version: Version, runs: Path) -> Path:
    """The folder below `runs` with the verified output of a kernel version; appears only when all of it is right."""
    folder = run_folder(runs, version)
    with record.locked(runs, f"output of {version}"):
        if not folder.exists():
            fetch_new(Output(client, version, folder.with_name(f".{folder.name}.partial"))).replace(folder)
        elif problems := damaged_files(folder, read_run_json(folder, kernel.MANIFEST)["outputs"]):
            raise ToolError(f"{folder}: {problems[0]}; move the folder away and run this again")
    return folder


def fetch_new(output: Output) -> Path:
    """The folder of an output, once all of it is there and right."""
    what = f"output of {output.version}"
    if output.lacks({kernel.MANIFEST}):
        count = len(output.urls)
        raise ToolError(f"{what}: no {kernel.MANIFEST} among {count} files: the kernel did not finish its work")
    output.download(kernel.MANIFEST)
    expected = read_manifest(output.folder / kernel.MANIFEST, what)["outputs"]
    if missing := output.lacks(set(expected)):
        raise ToolError(f"{what}: Kaggle does not list {', '.join(missing)}, which the manifest names")
    for name, facts in expected.items():
        output.download_verified(name, facts)
    output.keep_log()
    return output.folder


class Output:
    """The output of one kernel version on its way into a folder: what Kaggle lists of it, and its log."""

    def __init__(self, client: KaggleClient, version: Version, folder: Path) -> None:
        self.client, self.version, self.folder = client, version, folder
        self.urls: dict[str, str] = {}
        self.log = ""

    def look(self) -> None:
        """Ask for the list; its URLs expire."""
        self.urls, self.log = self.client.kernels.output(self.version)

    def lacks(self, wanted: set[str]) -> list[str]:
        """Those of `wanted` that Kaggle does not list, not even after a while."""

        def check() -> bool | None:
            self.look()
            return wanted <= self.urls.keys() or None

        if not wanted <= self.urls.keys():
            self.client.patience.look(check, f"output of {self.version}")
        return sorted(wanted - self.urls.keys())

    def fresh_url(self, name: str) -> str:
        self.look()
        if self.lacks({name}):
            raise ToolError(f"output of {self.version}: Kaggle does not list {name} any more; run this again")
        return self.urls[name]

    def download(self, name: str, size: int | None = None) -> None:
        self.client.kernels.download(self.urls[name], self.folder / name, lambda: self.fresh_url(name), size)

    def download_verified(self, name: str, facts: dict[str, Any]) -> None:
        """Fetch one file unless it is here already; one that is not what the manifest says is fetched once more."""
        for _ in range(2):
            if not damaged_files(self.folder, {name: facts}):
                return
            (self.folder / name).unlink(missing_ok=True)
            self.download(name, facts["bytes"])
        if problems := damaged_files(self.folder, {name: facts}):
            (self.folder / name).unlink()
            raise ToolError(f"output of {self.version}: {problems[0]}; run this again")

    def keep_log(self) -> None:
        """The log beside the files; where it did not come with them, what the stream has kept."""
        if not self.log.strip():
            stream = self.client.kernels.log_stream
            self.log = glance(f"the log of {self.version}", lambda: "".join(stream(self.version)), "")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / LOG).write_text(self.log, encoding="utf-8")


# ------------------------------------------------------------------------------------ what is not whole
@dataclass(frozen=True)
class Partial:
    """Files of a version's output in a folder of their own, with the problems that its manifest finds in them."""

    folder: Path
    names: list[str]
    manifest: dict[str, Any]  # {} where there is none

    def verifies(self, name: str) -> bool:
        facts = (self.manifest.get("outputs") or {}).get(name)
        return facts is not None and not damaged_files(self.folder, {name: facts})


def fetch_partial(client: KaggleClient, version: Version, runs: Path, only: str = "*") -> Partial:
    """Whatever files a version has left, or those that match `only`; those here already are not fetched again."""
    folder = run_folder(runs / UNVERIFIED, version)
    output = Output(client, version, folder)
    output.look()
    names, listed = fnmatch.filter(sorted(output.urls), only), ", ".join(sorted(output.urls))
    if not names and only != "*":
        raise ToolError(f"output of {version}: none of {len(output.urls)} files matches {only}: {listed}")
    for name in [*names, kernel.MANIFEST]:
        if name in output.urls and not (folder / name).exists():
            output.download(name)
    output.keep_log()
    try:
        manifest = json.loads((folder / kernel.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    return Partial(folder, names, manifest if isinstance(manifest, dict) else {})


def what_is_left(client: KaggleClient, version: Version, runs: Path, status: str, message: str) -> str:
    """Fetch what a version that failed or was stopped has left; one line on it and on the way on."""
    ended = "was cancelled" if status == "cancel_acknowledged" else f"failed: {message or 'no reason given'}"
    left = glance(f"what {version} has left", lambda: fetch_partial(client, version, runs), None)
    if left is None:
        return f"kernel {version} {ended}; --again pushes anew"
    for line in (left.folder / LOG).read_text(encoding="utf-8").splitlines()[-LOG_LINES:]:
        print(f"  | {line}", file=sys.stderr)
    text = f"kernel {version} {ended}; the end of its log is above"
    if left.names:
        text += f"; what it left lies unverified in {left.folder}"
    if left.verifies(kernel.SUBMISSION):
        text += f"; its submission verifies against its manifest: {as_command('submit', {}, left.folder)}"
    if kernel.RESUME_RUN in left.names:
        return f"{text}; python tools/ship.py --resume {version.number} goes on from its state"
    return f"{text}; --again pushes anew"


def state_of(client: KaggleClient, version: Version, runs: Path) -> Path:
    """The folder with the state that an unfinished version left, fetched if it is not here."""
    left = fetch_partial(client, version, runs)
    if kernel.RESUME_RUN not in left.names:
        raise InputError(f"{version} left no {kernel.RESUME_RUN}: there is nothing to go on from; push anew")
    return left.folder
