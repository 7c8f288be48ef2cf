"""A run, its weights or its pairs, as a private Kaggle dataset: staged, checked, uploaded, waited for."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from string import Template
from typing import Any

from lib import kernel, record
from lib.jobs import lint
from lib.jobs.lint import OWNER_PLACEHOLDER, Finding, refuse
from lib.kaggle_api.client import KaggleClient
from lib.kaggle_api.errors import Conflict, KaggleError
from lib.kaggle_api.patience import News
from lib.project import KERNEL, REPO, InputError, ToolError, figure, in_turn, markdown_table, write_file
from lib.runs import RESUME_STATES, damaged_files, payload_of, read_run_json

BUILD = REPO / "build" / "dataset"
CARD = Path(__file__).with_name("card.md")  # a template, so not in kaggle_dataset/, which may be uploaded as it is
PAIRS_CARD = Path(__file__).with_name("pairs_card.md")
PAIRS = "pairs.npz"
README = "README.md"
CODE = "pipeline.py"
METADATA = "dataset-metadata.json"
READY_MINUTES = 30.0


# ------------------------------------------------------------------------------------------- the folder
@dataclass(frozen=True)
class Package:
    """A folder that may go to Kaggle as it is."""

    folder: Path
    metadata: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name: sha256 and bytes, of everything that is uploaded
    content: str  # one hash of code, weights and metrics: the same content is not uploaded twice

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, as Kaggle must list them."""
        return {name: facts["bytes"] for name, facts in self.files.items()}

    @property
    def ref(self) -> str:
        """owner/slug of the dataset."""
        return self.metadata["id"]


def allowed_files() -> frozenset[str]:
    """The only names, or patterns of names, that may lie in a staged folder."""
    of_run = {kernel.METRICS, kernel.MANIFEST, kernel.FINAL_MODEL, kernel.VALIDATED_MODEL, kernel.RESUME_RUN}
    return frozenset({METADATA, README, CODE, RESUME_STATES, PAIRS} | of_run)


def lint_folder(folder: Path, allowed: Collection[str]) -> list[Finding]:
    """Secrets and foreign files in a folder that goes to Kaggle; sub-folders would be dropped, hidden files sent."""
    findings = []
    for path in sorted(folder.iterdir()):
        name, out = f"{folder.name}/{path.name}", "move it out of the folder"
        if path.is_dir():
            findings.append(Finding(name, "folder", "is a sub-folder, which Kaggle leaves out", out))
        elif secrets := lint.lint_secrets(path):
            findings += secrets
        elif path.is_symlink() or path.name.startswith("."):
            findings.append(Finding(name, "folder", "is a hidden file or a link", out))
        elif not any(fnmatch(path.name, pattern) for pattern in allowed):
            findings.append(Finding(name, "folder", "does not belong to the dataset", out))
    return findings


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """sha256 and size of files, as manifests have them."""
    return {name: kernel.file_facts(folder / name) for name in sorted(names)}


def validation_table(metrics: dict[str, Any]) -> str:
    columns = ["mrr", "mrr_se", "recall@1", "recall@5", "recall@10"]
    tables = metrics.get("validation", {})
    rows = [[name, *(figure(values.get(key)) for key in columns)] for name, values in tables.items()]
    return markdown_table(["gallery", *columns], rows) if rows else "This run made no validation."


def weights_to_send(run: Path) -> tuple[list[str], dict[str, Any]]:
    """The files of a run that a kernel can use, and what their card says of them."""
    names = payload_of(run)
    metrics = read_run_json(run, kernel.METRICS) if kernel.METRICS in names else {}
    about = {key: metrics.get(key, "unknown") for key in ("recipe", "device", "dtype")}
    seconds = round(metrics.get("seconds", {}).get("total", 0), 1)
    return names, about | {"run": run.name, "seconds": seconds, "validation": validation_table(metrics)}


def holds_pairs(run: Path) -> bool:
    """Whether `kernel/embed.py` made the run."""
    return (run / kernel.MANIFEST).is_file() and PAIRS in (read_run_json(run, kernel.MANIFEST).get("outputs") or {})


def pairs_to_send(run: Path) -> tuple[list[str], dict[str, Any]]:
    """The same for a run of `kernel/embed.py`."""
    made = read_run_json(run, kernel.MANIFEST)
    if problems := damaged_files(run, made["outputs"]):
        raise InputError(f"{run}: {problems[0]}; the pairs are damaged: make or fetch them again")
    check = made.get("check") or {}
    return [PAIRS], {
        "captions": f"{made['num_captions']:,}",
        "images": f"{made['num_images']:,}",
        "text_dim": made["embedding_dim_text"],
        "image_dim": made["embedding_dim_image"],
        "image_model": made["photos"]["model"],
        "text_model": made["captions"]["model"],
        "check": ", ".join(f"{what} cosine {part['mean']:.5f}" for what, part in check.items()) or "no, not compared",
    }


def fill_folder(folder: Path, run: Path, owner: str) -> None:
    """Write everything that a dataset of `run` consists of into an empty folder: files, card, metadata, manifest."""
    pairs = holds_pairs(run)
    names, about = pairs_to_send(run) if pairs else weights_to_send(run)
    for name in names:
        shutil.copyfile(run / name, folder / name)
    if not pairs:  # which need no code of ours
        shutil.copyfile(KERNEL, folder / CODE)
    files = facts_of(folder, (path.name for path in folder.iterdir()))
    metadata = lint.read_metadata(lint.PAIRS_METADATA if pairs else lint.DATASET_METADATA)
    metadata["id"] = metadata["id"].replace(OWNER_PLACEHOLDER, owner)
    rows = [[name, f"{facts['bytes']:,}", f"`{facts['sha256'][:16]}`"] for name, facts in files.items()]
    about |= {"title": metadata["title"], "slug": metadata["id"].partition("/")[2]}
    about |= {"files": markdown_table(["file", "bytes", "sha256"], rows)}
    card = Template((PAIRS_CARD if pairs else CARD).read_text(encoding="utf-8")).substitute(about)
    content = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    write_file(folder / README, card)
    kernel.write_json(folder / METADATA, metadata | {"description": card})
    kernel.write_json(folder / kernel.MANIFEST, {"run": run.name, "content": content, "files": files})


def check_folder(folder: Path) -> Package:
    """Lint a folder that is about to go; what it holds, if nothing was found."""
    findings = lint_folder(folder, allowed_files()) + lint.lint_dataset_metadata(folder / METADATA, staged=True)
    if not (folder / PAIRS).exists():  # pairs go without code
        findings += lint.lint_script(folder / CODE)
    refuse(findings)
    manifest = read_run_json(folder, kernel.MANIFEST)
    files = facts_of(folder, (path.name for path in folder.iterdir() if path.name != METADATA))
    return Package(folder, lint.read_metadata(folder / METADATA), files, manifest["content"])


def stage(run: Path, folder: Path, owner: str) -> Package:
    """A fresh build folder for the weights, or pairs, of `run`; foreign files in an old one are refused."""
    described = lint.PAIRS_METADATA if holds_pairs(run) else lint.DATASET_METADATA
    refuse(lint_folder(described.parent, {METADATA, README}) + lint.lint_dataset_metadata(described))
    if folder.exists():
        refuse(lint_folder(folder, allowed_files()))
        if any(folder.iterdir()) and not (folder / METADATA).is_file():  # a run may hold nothing but such files, too
            raise InputError(f"{folder}: was not staged by this command; name another --folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.part"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as temporary:
        fresh = Path(temporary) / folder.name
        fresh.mkdir()
        fill_folder(fresh, run, owner)
        staged = check_folder(fresh)
        if folder.exists():
            folder.replace(Path(temporary) / "old")
        fresh.replace(folder)
    return replace(staged, folder=folder)


# ------------------------------------------------------------------------------------------- the upload
def recorded_version(runs: Path, ref: str) -> int:
    """The last version of a dataset that the local record knows, 0 when it knows none."""
    return next((entry["version"] for entry in reversed(record.find(runs, event="dataset_ready", dataset=ref))), 0)


def settled_version(client: KaggleClient, ref: str, begun: bool, seconds: float) -> tuple[bool, int]:
    """Whether the dataset exists, and its version once nothing is being processed: Kaggle refuses uploads meanwhile.

    `begun`: an upload was begun here, so that its absence has to be proved.
    """

    def there() -> bool | None:
        return client.datasets.exists(ref) or None

    if not (client.patience.look(there, f"dataset {ref}") if begun else there()):
        return False, 0
    news = News()

    def check() -> tuple[bool, int] | None:
        status, version = client.datasets.status(ref)
        if status in ("ready", "failed", "deleted"):
            return status != "deleted", version
        news.tell(f"dataset {ref}: {status}")
        return None

    return client.patience.wait_for(check, f"dataset {ref}", seconds)


def wait_ready(client: KaggleClient, ref: str, version: int, sizes: dict[str, int], seconds: float) -> int:
    """Wait until `version` or a later one is current, ready, and lists every file of `sizes` with its size."""
    problem = "is not listed yet"

    def check() -> int | None:
        nonlocal problem
        status, current = client.datasets.status(ref)
        if status in ("failed", "deleted"):
            raise ToolError(
                f"dataset {ref}: Kaggle says {status} (kaggle.com/datasets/{ref} may say why); "
                "python tools/package_dataset.py --again uploads it anew"
            )
        if status != "ready" or current < version:
            problem = f"is {status} with version {current} current, not {version}"
            return None
        listed = client.datasets.files(ref) if sizes else {}
        wrong = [name for name, size in sizes.items() if listed.get(name) != size]
        problem = f"does not list {', '.join(wrong)} as uploaded"
        return None if wrong else current

    try:
        return client.patience.wait_for(check, f"dataset {ref}", seconds)
    except KaggleError as error:
        raise error.with_hint(f"; dataset {ref} {problem}: run this again (without --again) to go on waiting") from None


def existing_version(client: KaggleClient, staged: Package, runs: Path, current: int) -> int | None:
    """The current version if the record says that it holds this very content, and Kaggle lists it so."""
    entries = record.find(runs, dataset=staged.ref, content=staged.content)
    if not entries or not current:
        return None
    last = entries[-1]
    # An upload that was cut off before its version was written down made the one after `before`, or none.
    made = last["version"] if last["event"] == "dataset_ready" else last["before"] + 1
    known = record.find(runs, event="dataset_ready", dataset=staged.ref, version=current)
    if made != current or any(entry["content"] != staged.content for entry in known[-1:]):
        return None

    def check() -> int | None:
        return current if client.datasets.files(staged.ref) == staged.sizes else None

    return client.patience.look(check, f"files of {staged.ref}")  # they may be those of the version before


def upload(client: KaggleClient, staged: Package, exists: bool) -> int:
    """Send the files as a new private dataset or as its next version; the number that it will have."""
    metadata, paths = staged.metadata, [staged.folder / name for name in staged.files]
    about = {"subtitle": metadata.get("subtitle", ""), "description": metadata["description"]}
    if exists:
        return client.datasets.create_version(staged.ref, f"content {staged.content[:16]}", paths, **about)
    licence = metadata["licenses"][0]["name"]
    try:
        return client.datasets.create(staged.ref, metadata["title"], licence, paths, **about)
    except Conflict as error:
        raise error.with_hint(
            "; another dataset has the title, perhaps a deleted one: change title and id in "
            "kaggle_dataset/dataset-metadata.json"
        ) from None


def package(client: KaggleClient, staged: Package, runs: Path, seconds: float, again: bool) -> int:
    """The version of the private dataset that holds `staged`, current, ready and with every file listed."""
    ref = staged.ref
    exists, current = settled_version(client, ref, bool(record.find(runs, dataset=ref)), seconds)
    version = None if again else existing_version(client, staged, runs, current)
    if version is not None:
        print(f"{ref} version {version} holds this content already", file=sys.stderr)
    else:
        record.append(runs, "dataset_started", dataset=ref, content=staged.content, before=current)
        version = upload(client, staged, exists)
    version = wait_ready(client, ref, version, staged.sizes, seconds)
    if recorded_version(runs, ref) != version:
        record.append(runs, "dataset_ready", dataset=ref, content=staged.content, version=version)
    return version


def publish(
    client: KaggleClient, run: Path, folder: Path, runs: Path, seconds: float = 60 * READY_MINUTES, again: bool = False
) -> tuple[Package, int]:
    """Stage and package a run, one process at a time: what is sent and the version that holds it."""
    with in_turn(folder.parent, folder.name):
        staged = stage(run, folder, client.username)
        return staged, package(client, staged, runs, seconds, again)
