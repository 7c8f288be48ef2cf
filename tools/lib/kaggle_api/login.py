"""Signing in: credentials in the official order, and the SDK's client made from them.

The SDK (kagglesdk) is used as it is, without the `kaggle` package around it, whose import prints help, asks the network
and may end the process. What the SDK has no public way for is the session below it: timeouts, redirects that keep the
key at home, and answers with a status that this SDK does not know yet.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from lib.kaggle_api.errors import NoCredentials, Unauthorized
from lib.kaggle_api.http import SETTINGS_PAGE, Transport
from lib.kaggle_api.service import fill
from lib.project import InputError, ToolError

if TYPE_CHECKING:
    from kagglesdk import KaggleClient as Sdk


@dataclass(frozen=True)
class Login:
    """A signed-in SDK client: whose, by which credentials, and the session that its calls go through."""

    sdk: Sdk
    session: requests.Session
    username: str
    source: str


def sign_in(transport: Transport) -> Login:
    """Find credentials in the official order: token, kaggle.json or user and key, the file of `kaggle auth login`."""
    token, source = _saved_token()
    if token:
        sdk, session = _client(transport, api_token=token)
        user = transport.retry(f"checking the token from {source}", lambda: _owner(sdk, token))
        if not user:
            raise Unauthorized(f"the token from {source} is not valid: make a new one at {SETTINGS_PAGE}")
        return Login(sdk, session, user, source)
    path = config_path()
    saved = _read_config(path)
    user, key = (os.environ.get(f"KAGGLE_{name.upper()}") or saved.get(name) for name in ("username", "key"))
    if user and key:
        sdk, session = _client(transport, username=user, password=key)
        return Login(sdk, session, user, str(path) if saved.get("key") == key else "KAGGLE_USERNAME and KAGGLE_KEY")
    if login := _oauth(transport):
        return login
    if path.exists():
        raise Unauthorized(f"{path} has no username and key: make a new one at {SETTINGS_PAGE}")
    raise NoCredentials("no Kaggle credentials; python tools/doctor.py says how to get them")


def _saved_token() -> tuple[str | None, str]:
    """An access token and where it is from; None without one. No error shows its text."""
    try:
        from kagglesdk import get_access_token_from_env
    except ImportError as error:
        raise ToolError(f"the kaggle package cannot be imported ({error}): pip install -r requirements.txt") from None
    try:
        token, source = get_access_token_from_env()
    except (OSError, ValueError):  # it names the token, which is taken for a path first
        token, source = "", "KAGGLE_API_TOKEN or ~/.kaggle/access_token"
    if token is not None and not re.fullmatch("[!-~]+", token):  # the error of a request with it would name it
        raise Unauthorized(f"{source}: not a token, nor a file with one: make a new one at {SETTINGS_PAGE}")
    return token, source


def config_path() -> Path:
    """Where the official client looks for kaggle.json."""
    home = Path.home() / ".kaggle"
    if folder := os.environ.get("KAGGLE_CONFIG_DIR"):
        return Path(folder) / "kaggle.json"
    if sys.platform.startswith("linux") and not home.exists():
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    return home / "kaggle.json"


def _read_config(path: Path) -> dict[str, str]:
    """The content of kaggle.json, {} where it is missing or broken."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if path.stat().st_mode & 0o044:
            print(f"warning: {path} is readable by other users: chmod 600 {path}", file=sys.stderr)
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def environment() -> Any:
    """Where the official client would call: Kaggle itself, unless KAGGLE_API_ENVIRONMENT says otherwise."""
    from kagglesdk.kaggle_env import get_env

    try:
        return get_env()
    except Exception as error:
        raise InputError(f"{error}: unset KAGGLE_API_ENVIRONMENT") from None


def _client(transport: Transport, **credentials: str) -> tuple[Sdk, requests.Session]:
    """An SDK client whose session has timeouts, follows no redirect by itself and forgives unknown statuses."""
    from kagglesdk import KaggleClient as Sdk

    sdk = Sdk(env=environment(), **credentials).__enter__()
    session = transport.mount(sdk.http_client()._session, _known_statuses)  # the SDK has no public way to it
    # `follow` goes there, with Range and without the key.
    session.get_redirect_target = lambda response: None  # type: ignore[method-assign, assignment]
    return sdk, session


def _owner(sdk: Sdk, token: str) -> str | None:
    """Whose token it is, None when it is not valid."""
    from kagglesdk.security.types.oauth_service import IntrospectTokenRequest

    try:
        found = sdk.security.oauth_client.introspect_token(fill(IntrospectTokenRequest(), token=token))
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code in (400, 401, 403, 404):
            return None
        raise
    return found.username if found.active else None


def _oauth(transport: Transport) -> Login | None:
    """Signed in with the file that `kaggle auth login` left; None without one."""
    from kagglesdk import KaggleCredentials

    what = "signing in with the file of `kaggle auth login`"
    try:
        saved = KaggleCredentials.load(_client(transport)[0])
    except (OSError, ValueError, AttributeError, TypeError):
        raise Unauthorized(f"{what}: it cannot be read: kaggle auth login makes it anew") from None
    if saved is None:
        return None
    try:
        token = transport.retry(what, saved.get_access_token)
    except Unauthorized:
        raise Unauthorized(f"{what}: it is not valid any more: kaggle auth login") from None
    sdk, session = _client(transport, api_token=token)
    return Login(sdk, session, saved.get_username(), saved.DEFAULT_CREDENTIALS_FILE)


def _known_statuses(response: requests.Response) -> requests.Response:
    """The answer without statuses that the SDK does not know, on which it would fail: left out means not known yet."""
    from kagglesdk.kaggle_object import EnumSerializer

    kind = _status_kinds().get(str(response.url).rpartition("/")[2])
    if kind is None or response.status_code != 200:
        return response
    try:
        body = response.json()
        entries = [entry for entry in (body, *body.get("submissions", [])) if "status" in entry]
    except (ValueError, AttributeError, TypeError):
        return response
    for entry in entries:
        try:
            EnumSerializer().from_dict_value(kind, entry["status"])
        except (KeyError, AttributeError):
            new = entry.pop("status")
            print(f"Kaggle's status {new!r} is new here: not known yet (pip install -U kaggle)", file=sys.stderr)
    response._content = json.dumps(body).encode()  # from where `json()` and the SDK read it
    return response


def _status_kinds() -> dict[str, type]:
    """The calls whose answer has a status, and the SDK's type of it."""
    from kagglesdk.competitions.types.submission_status import SubmissionStatus
    from kagglesdk.datasets.types.dataset_enums import DatabundleVersionStatus
    from kagglesdk.kernels.types.kernels_enums import KernelWorkerStatus

    submissions = dict.fromkeys(("GetSubmission", "ListSubmissions"), SubmissionStatus)
    return {"GetKernelSessionStatus": KernelWorkerStatus, "GetDatasetStatus": DatabundleVersionStatus, **submissions}
