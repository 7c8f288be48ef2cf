"""Importing the official `kaggle` package without its side effects, and signing in.

`import kaggle` prints help, asks the network and may end the process; its own sign-in does the same. Here each of
these is a typed error that says what to do.
"""
from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from lib.kaggle_api.http import SETTINGS_PAGE, Transport, Unauthorized
from lib.project import ToolError

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

NO_CREDENTIALS = (
    f"no Kaggle credentials: make a token at {SETTINGS_PAGE} and either set KAGGLE_API_TOKEN to it, or save it as "
    "~/.kaggle/access_token; or save the legacy kaggle.json from the same page as ~/.kaggle/kaggle.json, or set "
    "KAGGLE_USERNAME and KAGGLE_KEY from it")


def _import_kaggle() -> type[KaggleApi]:
    """The official class, without the help text, the exit and the network call of `import kaggle`."""
    try:
        from kagglesdk.kaggle_http_client import KaggleHttpClient

        def offline(*_: object) -> None:
            raise requests.ConnectionError("no call while importing")

        call, KaggleHttpClient.call = KaggleHttpClient.call, offline
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from kaggle.api.kaggle_api_extended import KaggleApi
        finally:
            KaggleHttpClient.call = call
    except ImportError as error:
        raise ToolError(f"the kaggle package cannot be imported ({error}): pip install -r requirements.txt") from None
    except SystemExit:
        raise ToolError("this kaggle package exits on import: pip install -U 'kaggle>=2.2.4,<3'") from None
    except OSError as error:
        raise ToolError(f"the kaggle package cannot make its folder ({error}): set KAGGLE_CONFIG_DIR") from None
    return KaggleApi


def make_api(transport: Transport) -> KaggleApi:
    """A KaggleApi whose clients have timeouts and which neither prints nor ends the process."""
    class Api(_import_kaggle()):  # type: ignore[misc]
        already_printed_version_warning = True

        def build_kaggle_client(self) -> Any:
            client = super().build_kaggle_client()
            client.http_client()._init_session()
            session = transport.mount(client.http_client()._session)
            session.get_redirect_target = lambda response: None  # `_follow` goes there, with Range and without the key
            return client

    api = Api()
    api.args = [argument for argument in api.args if argument != "--verbose"]  # it prints credentials on stdout
    return api


def sign_in(api: KaggleApi, transport: Transport) -> None:
    """Find credentials in the official order: token, kaggle.json or user and key, the file of `kaggle auth login`."""
    from kagglesdk.kaggle_env import get_access_token_from_env

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        api._load_config()
        token, source = get_access_token_from_env()
        if token:
            user = transport.retry(f"checking the token from {source}", lambda: _introspect(api, token))
            if not user:
                raise Unauthorized(f"the token from {source} is not valid: make a new one at {SETTINGS_PAGE}")
            api.config_values |= {api.CONFIG_NAME_TOKEN: token, api.CONFIG_NAME_USER: user}
        elif not (api._authenticate_with_legacy_apikey() or _oauth(api, transport)):
            broken = f"{api.config} has no username and key; " if Path(api.config).exists() else ""
            raise Unauthorized(broken + NO_CREDENTIALS)
    if "readable by other" in said.getvalue():
        print(f"warning: {api.config} is readable by other users: chmod 600 {api.config}", file=sys.stderr)


def _introspect(api: KaggleApi, token: str) -> str | None:
    try:
        return api._introspect_token(token)
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            return None
        raise


def _oauth(api: KaggleApi, transport: Transport) -> bool:
    return transport.retry("signing in with the file of `kaggle auth login`", api._authenticate_with_oauth_creds)
