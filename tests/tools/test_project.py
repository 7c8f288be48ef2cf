"""The ground floor: a tool stopped by signals, left by its reader, writing under the user's umask."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Forked, failed, succeeded
from lib.project import (
    REPO,
    InputError,
    atomic_path,
    damage,
    make_parser,
    read_json,
    run_tool,
    sha256_of,
    signals_go_to,
)


@pytest.fixture
def start(tmp_path) -> Callable[..., Forked]:
    """A tool in a process of its own, whose `main` is given; its streams may go elsewhere than into files."""

    def begin(main: Callable[[], None], stdout: Path = tmp_path / "stdout") -> Forked:
        return Forked(lambda: run_tool(main), stdout, tmp_path / "stderr")

    return begin


def work() -> None:
    """A tool at work: in steps, since a signal that comes just before a sleep does not end it."""
    print("ready", flush=True)
    for _ in range(6000):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_cleans_up_and_is_the_exit_code(start, tmp_path, number):
    def main() -> None:
        try:
            work()
        finally:
            (tmp_path / "clean").touch()

    done = start(main).stop(number, after="ready")
    assert (done.returncode, done.stderr) == (128 + number, "interrupted\n")
    assert (tmp_path / "clean").exists()


def test_an_import_that_a_signal_breaks_is_an_interruption(start):
    def main() -> None:
        try:
            work()
        except KeyboardInterrupt:
            raise ImportError("half of it") from None

    done = start(main).stop(signal.SIGTERM, after="ready")
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


def test_a_signal_before_the_tool_begins_leaves_no_traceback(tool, tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    done = tool.from_nothing("sample_data", tmp_path / "x", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_what_nohup_ignores_stays_ignored(tmp_path):
    def under_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_tool(main)

    def main() -> None:
        print("ready", flush=True)
        time.sleep(0.5)
        print("done")

    done = Forked(under_nohup, tmp_path / "stdout", tmp_path / "stderr").stop(signal.SIGHUP, after="ready")
    assert succeeded(done).stdout == "ready\ndone\n"


def test_signals_go_back_to_whom_they_went_before():
    before = signal.getsignal(signal.SIGTERM)
    with signals_go_to(print):
        assert signal.getsignal(signal.SIGTERM) is print
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_tool_outlives_its_reader(start, tmp_path):
    """`tool | head -1`: the work is done to its end, and only then is the exit code 0."""

    def main() -> None:
        for k in range(20000):
            print("line", k)
        (tmp_path / "done").touch()

    os.mkfifo(tmp_path / "pipe")
    tool = start(main, tmp_path / "pipe")
    with (tmp_path / "pipe").open() as reader:
        reader.readline()
    assert "nobody reads the output any more; the work goes on" in succeeded(tool.wait()).stderr
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_the_output_is_no_success(start):
    failed(start(lambda: print("line"), Path("/dev/full")).wait(), 1, "^error: .* No space left on device$")


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_have_the_rights_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "deep" / "file") as path:
            path.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "file").stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "file") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no readable x.json; mend it"), ("{", "no readable x.json"), ("[1]", "x.json: not a JSON object; mend it")],
)
def test_json_that_is_none_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json", "mend it")


def test_optional_json_that_is_not_there_is_empty(tmp_path):
    assert read_json(tmp_path / "x.json", "mend it", optional=True) == {}


def test_damage_names_what_is_wrong(tmp_path):
    path = tmp_path / "file"
    path.write_text("four")
    digest = sha256_of(path)
    assert damage(path, digest, 4) == ""
    assert damage(path, digest, 1234) == "has 4 bytes instead of 1,234"
    assert damage(path, "0" * 64, 4).startswith("has another sha256")
    assert damage(tmp_path / "none", digest, 4) == "is missing"


def test_a_parser_has_the_shared_options_that_it_asks_for(capsys):
    parser = make_parser("About.\n\n    python tools/x.py", "0 done", "--runs", "--set")
    assert vars(parser.parse_args(["--set", "a=1", "--set", "b=2"])) == {"runs": REPO / "runs", "set": ["a=1", "b=2"]}
    assert parser.parse_args([]).set == []
    parser.print_help()
    shown = capsys.readouterr().out
    assert "\n    python tools/x.py\n" in shown
    assert "exit codes: 0 done" in shown
