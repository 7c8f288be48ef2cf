"""Kaggle's real rules for kernel-metadata.json, dataset-metadata.json and the kernel script."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lib.project import REPO, InputError, read_json

OWNER_PLACEHOLDER = "INSERT_KAGGLE_USERNAME"
KERNEL_METADATA = REPO / "kernel-metadata.json"
EMBED_METADATA = REPO / "embed-metadata.json"
DATASET_METADATA = REPO / "kaggle_dataset" / "dataset-metadata.json"
PAIRS_METADATA = REPO / "kaggle_pairs" / "dataset-metadata.json"

KERNEL_KEYS = (
    "id", "id_no", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu",
    "enable_internet", "machine_shape", "dataset_sources", "competition_sources", "kernel_sources", "model_sources",
    "keywords", "docker_image_pinning_type", "docker_image",
)  # fmt: skip
KERNEL_REQUIRED = ("id", "title", "code_file", "language", "kernel_type", "enable_internet", "is_private")
KERNEL_BOOLEANS = ("is_private", "enable_gpu", "enable_tpu", "enable_internet")
KERNEL_CHOICES = {
    "language": ("python", "r", "rmarkdown"),
    "kernel_type": ("script", "notebook"),
    "docker_image_pinning_type": ("original", "latest"),
}
ACCELERATORS = (
    "NvidiaTeslaT4", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000",
    "TpuV5E8", "TpuV6E8",
)  # fmt: skip
RETIRED_ACCELERATORS = {"NvidiaTeslaP100": "NvidiaTeslaT4"}
RETIRED_ACCELERATORS |= dict.fromkeys(("TpuV38", "Tpu1VmV38", "tpuv232", "tpuv2256"), "TpuV5E8")
LONGEST = 50  # characters of a slug or a title
OWNED = r"[A-Za-z0-9_-]+/[A-Za-z0-9-]{%d,}"
SOURCE_RULES = {
    "dataset_sources": (OWNED % 3 + r"(/\d+)?", "owner/slug or owner/slug/version"),
    "competition_sources": (r"[A-Za-z0-9-]+", "the bare slug of the competition"),
    "kernel_sources": (OWNED % 5, "owner/slug without a version, which Kaggle drops"),
    "model_sources": (r"([A-Za-z0-9_.-]+/){4}\d+", "owner/model/framework/variation/version"),
    "keywords": (r".+", "tags"),  # a list like them
}

DATASET_KEYS = (
    "id", "id_no", "title", "subtitle", "description", "licenses", "keywords", "resources", "isPrivate",
    "collaborators", "expectedUpdateFrequency", "userSpecifiedSources", "image",
)  # fmt: skip
DATASET_REQUIRED = ("id", "title", "licenses")
LICENCES = (
    "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-IGO", "CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0",
    "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-SA-3.0-IGO", "CC-BY-NC-SA-4.0", "GPL-2.0", "GPL-3.0", "LGPL-3.0",
    "AGPL-3.0", "FDL-1.3", "apache-2.0", "PDDL", "ODbL-1.0", "DbCL-1.0", "ODC-BY-1.0", "CDLA-Permissive-1.0",
    "CDLA-Sharing-1.0", "US-Government-Works", "EU-ODP-Legal-Notice", "copyright-authors", "other", "unknown",
)  # fmt: skip

SCRIPT_BYTES = 1_000_000
SCRIPT_PYTHON = (3, 12)  # the Kaggle image's Python
SCRIPT_PACKAGES = frozenset({"torch", "numpy", "pandas", "matplotlib", "PIL", "transformers"})
GONE_IN_SCRIPT_PYTHON = frozenset({"asynchat", "asyncore", "distutils", "imp", "smtpd"})
SECRET_NAMES = re.compile(
    r"kaggle\.json|credentials\.json|access_token.*|\.env.*|\.netrc|id_(rsa|dsa|ecdsa|ed25519).*|.*\.(pem|key|p12|pfx)"
)
SECRET_TEXTS = {
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Kaggle key": re.compile(rb"""(?i)(KAGGLE_KEY|["']key["'])["']?\s*[:=]\s*["']?[0-9a-f]{32}\b"""),
    "a Kaggle token": re.compile(rb"KGAT_[0-9A-Za-z]{16,}|KAGGLE_API_TOKEN[\"']?\s*[:=]\s*[\"']?[0-9A-Za-z_-]{16,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[0-9A-Za-z]{36}|\bgithub_pat_[0-9A-Za-z_]{40,}"),
    "a Hugging Face token": re.compile(rb"\bhf_[0-9A-Za-z]{30,}"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
}
OVERRIDES_LINE = re.compile(r"^OVERRIDES: dict = (\{.*\})$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One thing that Kaggle would refuse, drop or silently change."""

    file: str
    key: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.what}; {self.fix}"


def slug_of(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    from slugify import slugify  # comes with the kaggle package: needed only where something is linted

    return slugify(title)


def read_metadata(path: Path) -> dict[str, Any]:
    """A metadata file as a dict; what is not a JSON object is the user's error."""
    return read_json(path, "repair the JSON or restore it with git checkout")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name that `word` was probably meant to be, as advice."""
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[close[0]]}?" if close else "known: " + ", ".join(by_lower.values())


def lint_keys(name: str, metadata: dict[str, Any], known: Iterable[str], required: Iterable[str]) -> Iterator[Finding]:
    """Unknown keys, which Kaggle ignores in silence, and missing ones."""
    for key in metadata:
        if key not in known:
            yield Finding(name, key, "unknown key, Kaggle ignores it", nearest(key, known))
    for key in required:
        if metadata.get(key) in (None, "", []):
            hint = "set it to false: left out it means true" if key == "enable_internet" else "add it"
            yield Finding(name, key, "missing", hint)


def lint_identity(name: str, metadata: dict[str, Any], shortest: int) -> list[Finding]:
    """`id` and `title`: shape, lengths, and one resolving to the other."""
    ref, title = str(metadata.get("id") or ""), metadata.get("title")
    slug = ref.partition("/")[2]
    findings = []
    if ref and not re.fullmatch(r"[A-Za-z0-9_-]+/[a-z0-9-]+", ref):
        findings.append(Finding(name, "id", f"{ref!r} is not owner/slug", "lower case, digits and hyphens, no version"))
    elif ref and not shortest <= len(slug) <= LONGEST:
        what = f"the slug {slug!r} has {len(slug)} characters"
        findings.append(Finding(name, "id", what, f"make it {shortest} to {LONGEST}"))
    if title is None or not ref:
        return findings
    if not isinstance(title, str) or not shortest <= len(title) <= LONGEST:
        what = f"{title!r} is not a text of {shortest} to {LONGEST} characters"
        findings.append(Finding(name, "title", what, "shorten or lengthen it"))
    elif not findings and slug_of(title) != slug:
        what = f"{title!r} becomes the slug {slug_of(title)!r}, but id says {slug!r}"
        findings.append(Finding(name, "title", what, "Kaggle takes the title's slug: change one of the two"))
    return findings


def lint_sources(name: str, metadata: dict[str, Any]) -> Iterator[Finding]:
    """Sources in the shape that the server takes: what it does not know it drops in silence."""
    for key, (pattern, shape) in SOURCE_RULES.items():
        sources = metadata.get(key, [])
        if not isinstance(sources, list):
            yield Finding(name, key, "not a list", f"a list of {shape}")
            continue
        for source in sources:
            if not isinstance(source, str) or not re.fullmatch(pattern, source):
                yield Finding(name, key, f"{source!r} would be dropped", f"write {shape}, no prefix")
            elif re.match(r"(datasets|competitions|kernels|code|models)/", source):
                yield Finding(name, key, f"{source!r} has a prefix", f"write {shape}")


def lint_accelerator(name: str, shape: Any) -> list[Finding]:
    """Retired accelerators are replaced by Kaggle in silence, unknown ones fall back to the default."""
    if str(shape) in RETIRED_ACCELERATORS:
        return [Finding(name, "machine_shape", f"{shape} is retired", f"use {RETIRED_ACCELERATORS[shape]}")]
    if shape is not None and shape not in ACCELERATORS:
        return [Finding(name, "machine_shape", f"unknown accelerator {shape!r}", nearest(str(shape), ACCELERATORS))]
    return []


def lint_kernel_metadata(path: Path) -> list[Finding]:
    """Findings in a kernel-metadata.json."""
    metadata, name = read_metadata(path), path.name
    findings = [*lint_keys(name, metadata, KERNEL_KEYS, KERNEL_REQUIRED), *lint_identity(name, metadata, 5)]
    for key in KERNEL_BOOLEANS:
        if key in metadata and not isinstance(metadata[key], bool):
            findings.append(Finding(name, key, f"{metadata[key]!r} is not a boolean", "write true or false, no quotes"))
    for key, choices in KERNEL_CHOICES.items():
        if metadata.get(key) is not None and metadata[key] not in choices:
            findings.append(Finding(name, key, f"{metadata[key]!r} is not known", "one of " + ", ".join(choices)))
    if metadata.get("is_private") is False:
        findings.append(Finding(name, "is_private", "the kernel would be public", "set it to true"))
    if not isinstance(metadata.get("docker_image") or "", str):
        findings.append(Finding(name, "docker_image", "not a text", "write the name of an image"))
    code_file = Path(str(metadata.get("code_file") or ""))
    if code_file.is_absolute() or ".." in code_file.parts:
        findings.append(Finding(name, "code_file", f"{code_file} is outside the metadata's folder", "move it there"))
    elif code_file.name and not (path.parent / code_file).is_file():
        findings.append(Finding(name, "code_file", f"{code_file} does not exist", "a path from the metadata's folder"))
    return [*findings, *lint_accelerator(name, metadata.get("machine_shape")), *lint_sources(name, metadata)]


def lint_licences(name: str, licences: Any) -> list[Finding]:
    """Exactly one licence, by a name that Kaggle knows; that there is none is found by its key."""
    only = licences[0] if isinstance(licences, list) and len(licences) == 1 else None
    licence = only.get("name") if isinstance(only, dict) else None
    if licences and licence is None:
        return [Finding(name, "licenses", "not exactly one licence", 'write [{"name": "other"}] or another name')]
    if licences and licence not in LICENCES:
        return [Finding(name, "licenses", f"unknown licence {licence!r}", nearest(str(licence), LICENCES))]
    return []


def lint_dataset_metadata(path: Path, staged: bool = False) -> list[Finding]:
    """Findings in a dataset-metadata.json; `staged`: listed resources must exist."""
    metadata, name = read_metadata(path), path.name
    findings = [*lint_keys(name, metadata, DATASET_KEYS, DATASET_REQUIRED), *lint_identity(name, metadata, 6)]
    subtitle = metadata.get("subtitle")
    if subtitle and not (isinstance(subtitle, str) and 20 <= len(subtitle) <= 80):
        what = f"{subtitle!r} is not a text of 20 to 80 characters"
        findings.append(Finding(name, "subtitle", what, "lengthen, shorten or empty it"))
    if metadata.get("isPrivate") is False:
        findings.append(Finding(name, "isPrivate", "the dataset would be public", "leave the key out"))
    resources = metadata.get("resources") or []
    for resource in resources if isinstance(resources, list) else [resources]:
        file = resource.get("path") if isinstance(resource, dict) else resource
        if staged and not (path.parent / str(file)).is_file():
            findings.append(Finding(name, "resources", f"{file} is not in the folder", "remove it"))
    return findings + lint_licences(name, metadata.get("licenses"))


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import; a relative one is '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else str(node.module).partition(".")[0]


def lint_imports(name: str, tree: ast.Module) -> Iterator[Finding]:
    """Imports that the Kaggle image cannot satisfy: no internet there, and one file only."""
    available = (sys.stdlib_module_names - GONE_IN_SCRIPT_PYTHON) | SCRIPT_PACKAGES
    of_repo = {"lib"} | {path.stem for folder in ("tools", "kernel", "tests") for path in (REPO / folder).glob("*.py")}
    for line, package in imported(tree):
        if package in available:
            continue
        what, fix = "not in the Kaggle image", f"use the standard library, {', '.join(sorted(SCRIPT_PACKAGES))}"
        if package == "." or package in of_repo:
            what, fix = "a file that is not pushed", "the kernel is one file: move the code in"
        yield Finding(name, f"line {line}", f"imports {package}, {what}", fix)


def lint_script(path: Path) -> list[Finding]:
    """Findings in a kernel script: its syntax, its imports, its one OVERRIDES line."""
    name = path.name
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, feature_version=SCRIPT_PYTHON)
    except FileNotFoundError:
        return [Finding(name, "code_file", "does not exist", "write the kernel first")]
    except UnicodeDecodeError:
        return [Finding(name, "encoding", "not UTF-8", "save it as UTF-8")]
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        return [Finding(name, f"line {line}", f"does not parse: {getattr(error, 'msg', error)}", "write Python 3.12")]
    findings = list(lint_imports(name, tree))
    size = len(text.encode())
    if size >= SCRIPT_BYTES:
        fix = f"Kaggle takes less than {SCRIPT_BYTES:,}: move data to a dataset"
        findings.append(Finding(name, "size", f"has {size:,} bytes", fix))
    count = len(OVERRIDES_LINE.findall(text))
    if count != 1:
        findings.append(Finding(name, "OVERRIDES", f"{count} such lines", "exactly one line `OVERRIDES: dict = {}`"))
    return findings


def lint_secrets(path: Path) -> list[Finding]:
    """Credentials in a file that is about to leave this machine, known by its name or by what it holds."""
    fix = "take it out; what was already published must be revoked"
    if SECRET_NAMES.fullmatch(path.name):
        return [Finding(path.name, "secret", "has the name of a credentials file", fix)]
    content = path.read_bytes()
    if b"\0" in content[:8192]:  # weights and pictures: random bytes would only give false alarms
        return []
    held = [what for what, text in SECRET_TEXTS.items() if text.search(content)]
    return [Finding(path.name, "secret", f"holds {what}", fix) for what in held]


def refuse(findings: list[Finding]) -> None:
    """Stop at findings: every one on a line of its own, the last as the error itself."""
    if not findings:
        return
    for finding in findings[:-1]:
        print(f"error: {finding}", file=sys.stderr)
    raise InputError(str(findings[-1]))
