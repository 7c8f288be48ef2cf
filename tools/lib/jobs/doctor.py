"""What a fresh clone needs, looked at one by one; each finding names the next command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lib.data import KNOWN
from lib.project import DATA, INSTALL, REPO, ToolError, as_command

if TYPE_CHECKING:  # this page has to come up without the packages as well
    from lib.kaggle_api.client import KaggleClient

PYTHON = (3, 11)
DISK_BYTES = 5_000_000_000  # the data, some runs and a dataset on its way out
KAGGLE = "https://www.kaggle.com"
SIGN_IN = (
    f"make a token at {KAGGLE}/settings/api and set KAGGLE_API_TOKEN to it, or save it as ~/.kaggle/access_token; the "
    "legacy key does, too: as ~/.kaggle/kaggle.json, or in KAGGLE_USERNAME and KAGGLE_KEY"
)


@dataclass(frozen=True)
class Check:
    """One line of the page: what was looked at, whether it is as it must be, what was found, what to do."""

    name: str
    ok: bool
    found: str
    next: str = ""


def check_up(data: Path, competition: str) -> Iterator[Check]:
    """Every check, the quick ones first; those that ask Kaggle only with credentials that it takes."""
    yield check_python()
    yield attempt("packages", check_packages, INSTALL)
    yield check_disk()
    yield attempt("gpu", check_gpu, INSTALL)
    yield attempt("data", partial(check_data, data), INSTALL)
    clients: list[KaggleClient] = []
    yield attempt("credentials", partial(check_credentials, clients), SIGN_IN)
    for client in clients:
        page = f"look at {KAGGLE}/competitions/{competition}"
        yield attempt("rules", partial(check_rules, client, competition), page)
        yield attempt("quota", partial(check_quota, client), page)
        yield attempt("submissions", partial(check_submissions, client, competition), page)


def attempt(name: str, check: Callable[[], Check], following: str) -> Check:
    """A check; what keeps it from being made is red as well."""
    try:
        return check()
    except (ToolError, OSError) as error:
        return Check(name, False, str(error), following)
    except ImportError as error:
        return Check(name, False, f"not checked: packages first ({error})", INSTALL)


def check_python() -> Check:
    wanted = ".".join(map(str, PYTHON))
    return Check("python", sys.version_info >= PYTHON, platform.python_version(), f"use Python {wanted} or newer")


def check_packages() -> Check:
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {found[0]: line for line in lines if (found := re.match(r"[\w.-]+", line))}
    there, wrong = {}, []
    for name in names:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
    if not wrong or importlib.util.find_spec("packaging"):  # which comes with them
        wrong += [problem for name, version in there.items() if (problem := unfit(names[name], version))]
    return Check("packages", not wrong, ", ".join(wrong or map(" ".join, there.items())), INSTALL)


def unfit(requirement: str, version: str) -> str:
    """What is wrong with the version of a package; "" for one that is as required."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    fits = wanted.specifier.contains(version, prereleases=True)
    return "" if fits else f"{wanted.name} {version} is not {wanted.specifier}"


def check_disk() -> Check:
    free = shutil.disk_usage(REPO).free
    return Check("disk", free >= DISK_BYTES, f"{free / 1e9:.1f} GB free", f"make {DISK_BYTES / 1e9:.0f} GB free")


def check_gpu() -> Check:
    """Whether a GPU that torch sees really computes; without one the CPU does."""
    import torch

    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return Check("gpu", True, f"none: runs take the CPU, {threads} thread{'s' if threads > 1 else ''}")
    name = torch.cuda.get_device_name()
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return Check("gpu", False, f"{name}: {str(error).splitlines()[0]}", "run with --set device=cpu")
    return Check("gpu", True, name)


def check_data(data: Path) -> Check:
    wrong = [f"{name}: {reason}" for name, known in KNOWN.items() if (reason := known.problem(data / name))]
    found = "; ".join(wrong) or f"{len(KNOWN)} files in {data}, all right"
    if data == DATA and not os.path.lexists(data):
        found = f"no {data}: the drawn sample serves meanwhile"
    return Check("data", not wrong, found, as_command("download_data", {"--data": None if data == DATA else data}))


def check_credentials(clients: list[KaggleClient]) -> Check:
    """Whose credentials they are, once Kaggle has taken them; the client goes into `clients`."""
    from lib.kaggle_api.client import connect
    from lib.kaggle_api.errors import NoCredentials
    from lib.kaggle_api.patience import Patience

    try:
        client = connect(replace(Patience.from_environment(), tries=1))
    except NoCredentials:
        return Check("credentials", False, "none", SIGN_IN)
    client.kernels.quota()  # a legacy key is only looked at by a call
    clients.append(client)
    return Check("credentials", True, f"{client.username}, by {client.credentials}")


def check_rules(client: KaggleClient, competition: str) -> Check:
    """Whether the competition's data may be fetched."""
    from lib.kaggle_api.errors import Forbidden

    try:
        client.competitions.open_file(competition, list(KNOWN)[1])
    except Forbidden as error:
        return Check("rules", False, str(error), f"accept the rules at {KAGGLE}/competitions/{competition}/rules")
    return Check("rules", True, f"of {competition} accepted")


def check_quota(client: KaggleClient) -> Check:
    quota = client.kernels.quota().get("GPU")
    if quota is None:
        return Check("quota", False, "Kaggle tells no GPU quota", f"verify the account by phone at {KAGGLE}/settings")
    found = f"{quota.left_hours:.1f} of {quota.total_hours:.1f} GPU hours left"
    return Check("quota", quota.left_hours > 0, found, "wait for the week's end, or push with --accelerator none")


def check_submissions(client: KaggleClient, competition: str) -> Check:
    limits = client.competitions.limits(competition)
    following = "no more can be made" if limits.by_total else "run this again after 00:00 UTC"
    return Check("submissions", not limits.used_up, f"{limits.allowed_now} left today, {limits.total} made", following)
