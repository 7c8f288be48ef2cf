"""The output of a kernel version: fetched into a folder of runs, every file verified; what a broken one left, apart."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lib import kernel
from lib.jobs import order
from lib.jobs.lint import read_metadata
from lib.jobs.session import wait_for_end
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.errors import KaggleError, MachineFailed
from lib.kaggle_api.kernels import Version
from lib.kaggle_api.patience import glance
from lib.project import InputError, ToolError, as_command, in_turn
from lib.runs import damaged_files, read_run_json

LOG, LOG_LINES = "kernel.log", 20  # its last lines are shown where a kernel failed
UNVERIFIED = "unverified"  # a folder below runs/, so that nothing takes what lies there for runs


def collect(client: KaggleClient, version: Version, runs: Path, time: order.SessionTime) -> Path:
    """Wait for a version's end and fetch its verified output; the folder it lies in."""
    what, seconds = f"output of {version}", time.wait_seconds
    try:
        status, message = wait_for_end(client, version, seconds)
        if status == "complete":
            folder = client.patience.wait_for(lambda: fetch(client, version, runs), what, seconds)
            check_finished(folder, version)
            return folder
    except KaggleError as error:
        raise error.with_hint(f"; go on with {command_again(version)}") from None
    raise ToolError(what_is_left(client, version, runs, status, message))


def command_again(version: Version) -> str:
    """The command that goes on waiting for a version."""
    for script in order.SCRIPTS:
        if str(read_metadata(order.metadata_of(script)).get("id")).endswith(f"/{version.slug}"):
            return as_command("push_kernel", {"--version": version.number, "--script": script}, "output")
    return "the same command"


def run_folder(runs: Path, version: Version) -> Path:
    """Where the output of a kernel version lies: the same place each time, so that a fetch goes on."""
    return runs / f"{version.slug}-v{version.number}"


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
    """The folder below `runs` with the verified output of a kernel version; appears only when all of it is right.

    One that is there has to be what Kaggle lists now: a kernel that was made anew has the same name and version again.
    """
    folder = run_folder(runs, version)
    output = Output(client, version, folder.with_name(f".{folder.name}.partial"))
    with in_turn(runs, output.what):
        output.fetch_manifest()
        if not folder.exists():
            output.fetch_listed()
            return output.folder.replace(folder)
        shutil.rmtree(output.folder)
    if problems := damaged_files(folder, output.expected):
        raise MachineFailed(
            f"{folder}: {problems[0]} by the manifest on Kaggle: it was changed here, or is of a kernel of this name "
            f"that was deleted since; move the folder away, then {command_again(version)}"
        )
    return folder


def outputs_of(manifest: Path) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of every output, as the kernel lists them in the end; {} for what is no manifest of a run."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        outputs = {name: {key: facts[key] for key in ("sha256", "bytes")} for name, facts in content["outputs"].items()}
        return outputs if isinstance(content["complete"], bool) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


class Output:
    """The output of one kernel version on its way into a folder: what Kaggle lists of it, and its log."""

    def __init__(self, client: KaggleClient, version: Version, folder: Path) -> None:
        self.client, self.version, self.folder = client, version, folder
        self.what = f"output of {version}"
        self.urls: dict[str, str] = {}
        self.log = ""
        self.expected: dict[str, dict[str, Any]] = {}  # by its manifest

    def look(self) -> None:
        """Ask for the list; its URLs expire."""
        self.urls, self.log = self.client.kernels.output(self.version)

    def lacks(self, wanted: set[str]) -> list[str]:
        """Those of `wanted` that Kaggle does not list, not even after a while."""

        def check() -> bool | None:
            self.look()
            return wanted <= self.urls.keys() or None

        if not wanted <= self.urls.keys():
            self.client.patience.look(check, self.what)
        return sorted(wanted - self.urls.keys())

    def matching(self, pattern: str) -> list[str]:
        """The names in the list that match."""
        return fnmatch.filter(sorted(self.urls), pattern)

    def verifies(self, name: str) -> bool:
        """Whether a file is here and what the manifest says."""
        return name in self.expected and not damaged_files(self.folder, {name: self.expected[name]})

    def states(self, pattern: str) -> list[list[str]]:
        """[path, verified or unverified] of the files that match."""
        words = {True: "verified", False: "unverified"}
        return [[str(self.folder / name), words[self.verifies(name)]] for name in self.matching(pattern)]

    def fresh_url(self, name: str) -> str:
        self.look()
        if self.lacks({name}):
            raise ToolError(f"{self.what}: Kaggle does not list {name} any more; run this again")
        return self.urls[name]

    def download(self, name: str, size: int | None = None) -> None:
        self.client.kernels.download(self.urls[name], self.folder / name, lambda: self.fresh_url(name), size)
        if name == kernel.MANIFEST:
            self.expected = outputs_of(self.folder / name)

    def fetch_manifest(self) -> None:
        """What the kernel writes last: without it the output is not whole."""
        name = kernel.MANIFEST
        if self.lacks({name}):
            raise ToolError(f"{self.what}: no {name} among {len(self.urls)} files: the kernel did not finish its work")
        self.download(name)
        if not self.expected:
            raise ToolError(f"{self.what}: {name} is not the manifest of a run; run this again or push with --again")

    def fetch_listed(self) -> None:
        """Fetch and verify what the manifest lists and is not here yet, and the log."""
        if missing := self.lacks(set(self.expected)):
            raise ToolError(f"{self.what}: Kaggle does not list {', '.join(missing)}, which the manifest names")
        for name in self.expected:
            self.download_verified(name)
        self.keep_log()

    def download_verified(self, name: str) -> None:
        """Fetch one file unless it is here already; one that is not what the manifest says is fetched once more."""
        for _ in range(2):
            if self.verifies(name):
                return
            (self.folder / name).unlink(missing_ok=True)
            self.download(name, self.expected[name]["bytes"])
        if problems := damaged_files(self.folder, {name: self.expected[name]}):
            (self.folder / name).unlink()
            raise ToolError(f"{self.what}: {problems[0]}; run this again")

    def drop_foreign(self) -> None:
        """Take away what Kaggle does not list: it is of a kernel of this name that was deleted."""
        for path in [*self.folder.rglob("*")]:
            if path.is_file() and path.relative_to(self.folder).as_posix() not in self.urls:
                path.unlink()

    def keep_log(self) -> None:
        """The log beside the files; where it did not come with them, what the stream has kept."""
        if not self.log.strip():
            stream = self.client.kernels.log_stream
            self.log = glance(f"the log of {self.version}", lambda: "".join(stream(self.version)), "")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / LOG).write_text(self.log, encoding="utf-8")


# ------------------------------------------------------------------------------------ what is not whole
def fetch_partial(client: KaggleClient, version: Version, runs: Path, only: str = "*") -> Output:
    """Whatever files a version has left, or those that match `only`; one that is here is kept if it verifies."""
    output = Output(client, version, run_folder(runs / UNVERIFIED, version))
    output.look()
    names = output.matching(only)
    if not names and only != "*":
        listed = ", ".join(sorted(output.urls))
        raise ToolError(f"{output.what}: none of {len(output.urls)} files matches {only}: {listed}")
    with in_turn(runs, output.what):
        output.drop_foreign()
        for name in dict.fromkeys([*output.matching(kernel.MANIFEST), *names]):  # first what vouches for the others
            if not output.verifies(name):
                output.download(name)
        output.keep_log()
    return output


def what_is_left(client: KaggleClient, version: Version, runs: Path, status: str, message: str) -> str:
    """Fetch what a version that failed or was stopped has left; one line on it and on the way on."""
    ended = "was cancelled" if status == "cancel_acknowledged" else f"failed: {message or 'no reason given'}"
    said, way_on = [f"kernel {version} {ended}"], "--again pushes anew"
    left = glance(f"what {version} has left", lambda: fetch_partial(client, version, runs), None)
    if left is not None:
        for line in left.log.splitlines()[-LOG_LINES:]:
            print(f"  | {line}", file=sys.stderr)
        said.append("the end of its log is above")
        if left.urls:
            said.append(f"what it left lies unverified in {left.folder}")
        if left.verifies(kernel.SUBMISSION):
            said.append(f"its submission verifies against its manifest: {as_command('submit', {}, left.folder)}")
        if kernel.RESUME_RUN in left.urls:
            way_on = f"python tools/ship.py --resume {version.number} goes on from its state"
    return "; ".join([*said, way_on])


def state_of(client: KaggleClient, version: Version, runs: Path) -> Path:
    """The folder with the state that an unfinished version left, fetched if it is not here."""
    left = fetch_partial(client, version, runs)
    if kernel.RESUME_RUN not in left.urls:
        raise InputError(f"{version} left no {kernel.RESUME_RUN}: there is nothing to go on from; push anew")
    return left.folder
