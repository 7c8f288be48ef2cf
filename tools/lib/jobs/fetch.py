"""The output of a kernel version: fetched into a folder of runs, every file verified."""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import kernel
from lib.kaggle_api.client import KaggleClient
from lib.project import ToolError
from lib.runs import damaged_files, read_run_json

LOG = "kernel.log"


def run_folder(runs: Path, slug: str, version: int) -> Path:
    """Where the output of a kernel version lies: the same place each time, so that a fetch goes on."""
    return runs / f"{slug}-v{version}"


def read_manifest(path: Path, what: str) -> dict[str, Any]:
    """The kernel's own list of its outputs, written last: without it the output is not whole."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        usable = isinstance(manifest["complete"], bool) and bool(manifest["outputs"])
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        path.unlink()
        raise ToolError(f"{what}: {path.name} is not the manifest of a run; run this again or push with --again")
    return manifest


def check_finished(folder: Path, ref: str) -> None:
    """A stopped run has a valid submission, but only where its time budget ended it is that what was asked for."""
    manifest = json.loads((folder / kernel.MANIFEST).read_text(encoding="utf-8"))
    if manifest["complete"] and not manifest.get("stopped"):
        return
    text = (f"{ref}: stopped early ({manifest.get('stopped') or 'unfinished'}); what it has lies verified in {folder}; "
            f"go on with python tools/push_kernel.py --again --kernel-source {ref} and the same settings")
    if not manifest["complete"]:
        raise ToolError(text)
    print(text, file=sys.stderr)


def fetch(client: KaggleClient, owner: str, slug: str, version: int, runs: Path) -> Path:
    """The folder below `runs` with the verified output of a kernel version; appears only when all of it is right."""
    what = f"output of {owner}/{slug} version {version}"
    folder = run_folder(runs, slug, version)
    if folder.exists():
        problems = damaged_files(folder, read_run_json(folder, kernel.MANIFEST)["outputs"])
        if problems:
            raise ToolError(f"{folder}: {problems[0]}; move the folder away and run this again")
        return folder
    files, log = client.kernel_output(owner, slug, version)
    urls = dict(files)
    if kernel.MANIFEST not in urls:
        raise ToolError(f"{what}: no {kernel.MANIFEST} among {len(urls)} files: the kernel did not finish its work")
    part = folder.with_name(f".{folder.name}.partial")
    part.mkdir(parents=True, exist_ok=True)
    output = Output(client, owner, slug, version, urls, part)
    output.download(kernel.MANIFEST, None)
    expected = read_manifest(part / kernel.MANIFEST, what)["outputs"]
    missing = sorted(set(expected) - set(urls))
    if missing:
        raise ToolError(f"{what}: Kaggle does not list {', '.join(missing)}, which the manifest names")
    for name, facts in expected.items():
        output.download_verified(name, facts)
    (part / LOG).write_text(log, encoding="utf-8")
    part.replace(folder)
    return folder


@dataclass
class Output:
    """The output of one kernel version on its way into a folder."""

    client: KaggleClient
    owner: str
    slug: str
    version: int
    urls: dict[str, str]
    folder: Path

    def fresh_url(self, name: str) -> str:
        """A new signed URL: they expire."""
        self.urls = dict(self.client.kernel_output(self.owner, self.slug, self.version)[0])
        return self.urls[name]

    def download(self, name: str, size: int | None) -> None:
        """Fetch one file."""
        renew = lambda: self.fresh_url(name)  # noqa: E731
        self.client.download_url(self.urls[name], self.folder / name, size, renew)

    def download_verified(self, name: str, facts: dict[str, Any]) -> None:
        """Fetch one file unless it is here already; one that is not what the manifest says is fetched once more."""
        for _ in range(2):
            if not damaged_files(self.folder, {name: facts}):
                return
            (self.folder / name).unlink(missing_ok=True)
            self.download(name, facts["bytes"])
        if problems := damaged_files(self.folder, {name: facts}):
            (self.folder / name).unlink()
            raise ToolError(f"output of {self.owner}/{self.slug} version {self.version}: {problems[0]}; run this again")
