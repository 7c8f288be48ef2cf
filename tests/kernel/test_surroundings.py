"""The script in a process of its own: packaged, pasted, without letters, without a reader."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drawn import JOINED, SMALL
from forked import succeeded
from lib.project import KERNEL, sha256_of
from outputs import CURVES, SUBMISSION, check_outputs


def as_script(
    folder: Path, *arguments: object, script: Path = KERNEL, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """The script in a process of its own, in an empty folder, with an empty home."""
    work, home = folder / "work", folder / "empty-home"
    work.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"} | (env or {})
    options = {"stdout": subprocess.PIPE} | options
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=work,
        env=environment,
        stderr=subprocess.PIPE,
        timeout=300,
        **options,
    )
    assert not list(work.iterdir())
    return done


@pytest.mark.slow
def test_a_packaged_copy_in_the_mounts_of_kaggle(kernel, data: Path, first, tmp_path: Path):
    """Command line beats OVERRIDES beats recipe beats default, in the script as it is staged, in the new mount."""
    shutil.copytree(data, tmp_path / "kaggle/input/competitions/aml-competition")
    packaged = dict(setting.removeprefix("--set=").split("=") for setting in JOINED[1:]) | {"recipe": "align"}
    text = KERNEL.read_text(encoding="utf-8")
    assert text.count("\nOVERRIDES: dict = {}\n") == 1
    script = tmp_path / "staged.py"
    staged = json.dumps(packaged | {"seed": 5})
    script.write_text(text.replace("\nOVERRIDES: dict = {}\n", f"\nOVERRIDES: dict = {staged}\n"), encoding="utf-8")
    output = tmp_path / "kaggle/working"
    done = as_script(tmp_path, "--input", tmp_path / "kaggle/input", "--output", output, "--set=seed=0", script=script)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    knobs = check_outputs(kernel, output, checkpoints=(5,))["knobs"]
    assert {key: knobs[key] for key in ("recipe", "epochs", "hidden", "seed", "schedule")} == {
        "recipe": "align",
        "epochs": 8,
        "hidden": 64,
        "seed": 0,
        "schedule": "cosine",
    }
    assert (output / CURVES).read_bytes().startswith(b"\x89PNG")
    assert sha256_of(output / SUBMISSION) == sha256_of(first[0] / SUBMISSION)  # as the fork of the old mount


@pytest.mark.slow
def test_a_terminal_without_letters_and_a_folder_with_them(kernel, data: Path, tmp_path: Path):
    """LC_ALL=C without UTF-8: no encoding has this path. And under umask 077 files are nobody else's."""
    output = tmp_path / "Aus gäbe 漢字"
    arguments = ("--input", data, "--output", output, "--recipe=closed_form", *SMALL)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = as_script(tmp_path, *arguments, umask=0o077, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    check_outputs(kernel, output)
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o600}


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(kernel, data: Path, tmp_path: Path):
    """As under `| head -1`."""
    arguments = ("--input", data, "--output", tmp_path / "out", "--recipe=closed_form", *SMALL)
    read, write = os.pipe()
    os.close(read)
    try:
        done = as_script(tmp_path, *arguments, stdout=write)
    finally:
        os.close(write)
    check_outputs(kernel, tmp_path / "out")
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr, done


def test_pasted_into_a_notebook(kernel, server, data: Path, tmp_path: Path):
    """A cell has no __file__, and the kernel's arguments are not ours; success is no SystemExit."""
    source = KERNEL.read_text(encoding="utf-8")
    for path in ("/kaggle/input", "/kaggle/working"):
        assert f'Path("{path}")' in source
    cell = source.replace('Path("/kaggle/input")', f"Path({str(data)!r})")
    cell = cell.replace('Path("/kaggle/working")', f"Path({str(tmp_path / 'out')!r})")
    settings = dict(setting.removeprefix("--set=").split("=") for setting in SMALL)
    cell = cell.replace("\nOVERRIDES: dict = {}\n", f"\nOVERRIDES: dict = {settings | {'recipe': 'closed_form'}}\n")
    asked = "\nprint('as before:', signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    ended = succeeded(server.run("-f", "kernel.json", pasted=cell + asked))
    assert "as before: True" in ended.stdout
    assert not ended.stderr, ended
    check_outputs(kernel, tmp_path / "out")
    ended = server.run("-f", "kernel.json", pasted=source)
    assert ended.returncode == 1
    assert "error: /kaggle/input: no such input folder" in ended.stderr
