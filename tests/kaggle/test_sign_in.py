"""Signing in: every kind of credentials, and what is said where they are wrong or missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from account import COMPETITION, version, write
from drawn import write_tree
from forked import failed, succeeded
from lib.kaggle_api.client import connect
from lib.kaggle_api.errors import Unauthorized
from stand_in import Fault


def test_a_wrong_key_is_told_as_such_not_as_a_wrong_slug(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    with pytest.raises(Unauthorized, match=r"credentials were refused.*settings/api"):
        connect().kernels.status(version(1))


def test_a_token_is_checked_and_used(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", kaggle.token)
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    client = connect()
    assert client.username == "tester"
    assert client.competitions.history(COMPETITION) == []


@pytest.mark.parametrize("where", ["variable", "file"])
def test_a_wrong_token_is_told_with_its_place(kaggle, monkeypatch, where, tmp_path):
    if where == "variable":
        monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    else:
        write(tmp_path / "home" / ".kaggle" / "access_token", b"wrong\n")
    with pytest.raises(Unauthorized, match=r"token from (KAGGLE_API_TOKEN|access_token) is not valid"):
        connect()


@pytest.mark.parametrize("token", ["KGAT_secret\n", "KGAT_secret x", "KGAT_sécret", "KGAT_secret" * 30])
def test_a_token_that_cannot_be_one_is_told_without_showing_it(tool, kaggle, monkeypatch, token):
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    done = failed(tool("push_kernel", "--quota"), 2, "KAGGLE_API_TOKEN")
    assert "cret" not in done.stderr


@pytest.mark.parametrize("content", [b"[]", b"\xff", b'{"refresh_token": "r", "access_token_expiration": "soon"}'])
def test_a_broken_file_of_kaggle_auth_login_is_one_line(tool, kaggle, tmp_path, monkeypatch, content):
    monkeypatch.delenv("KAGGLE_KEY")
    write(tmp_path / "home" / ".kaggle" / "credentials.json", content)
    failed(tool("push_kernel", "--quota"), 2, "cannot be read: kaggle auth login makes it anew")


def test_a_server_error_while_checking_the_token_is_retried(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", kaggle.token)
    kaggle.fail("IntrospectToken", Fault(503), Fault(drop="before"))
    assert connect().username == "tester"


COMMANDS = {
    "push_kernel": ["--runs", "runs"],
    "package_dataset": ["--run", "runs/done", "--runs", "runs"],
    "ship": ["--runs", "runs"],
    "submit": ["runs/done", "--runs", "runs", "--data", "data"],
    "scores": ["--runs", "runs"],
    "sweep": ["--members", 2, "--runs", "runs", "--data", "data"],
    "download_data": ["--data", "elsewhere"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_to_sign_in(tool, kaggle, weights, competition, tmp_path, monkeypatch, command):
    write_tree(tmp_path / "runs" / "done", kaggle.plans[0].outputs)
    monkeypatch.delenv("KAGGLE_KEY")
    error = failed(tool(command, *COMMANDS[command]), 2, r"no Kaggle credentials; python tools/doctor\.py").error
    assert len(error) <= 160
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    failed(tool(command, *COMMANDS[command]), 2, "credentials were refused")


@pytest.fixture
def kaggle_json(kaggle, tmp_path, monkeypatch) -> Path:
    """The legacy file, right and alone."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    content = json.dumps({"username": kaggle.user, "key": kaggle.key}).encode()
    path = write(tmp_path / "home" / ".kaggle" / "kaggle.json", content)
    path.chmod(0o600)
    return path


def test_kaggle_json_signs_in_and_nothing_is_printed(tool, kaggle_json):
    done = succeeded(tool("push_kernel", "--quota", "--json"))
    assert json.loads(done.stdout)["GPU"]["left_hours"] == 28.5
    assert done.stderr == ""


def test_a_broken_kaggle_json_is_named(tool, kaggle_json):
    kaggle_json.write_text("{")
    done = failed(tool("push_kernel", "--quota"), 2, r"kaggle\.json has no username and key")
    assert done.stdout == ""


@pytest.mark.slow
def test_the_import_of_the_client_makes_no_call(tool, kaggle):
    done = tool.from_nothing("push_kernel", "--quota", "--json", KAGGLE_API_TOKEN=kaggle.token, VERBOSE="1")
    assert json.loads(succeeded(done).stdout)["GPU"]["left_hours"] == 28.5
    assert kaggle.count("IntrospectToken") == 1
