"""The ground floor: a tool stopped by signals, left by its reader, writing under the user's umask."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lib.project import REPO, InputError, atomic_path, damage, make_parser, read_json, sha256_of

TOOLS = REPO / "tools"


def start(tmp_path: Path, body: str, **streams: object) -> subprocess.Popen:
    """A tool of its own process whose `main` is `body`; it prints "ready" when it wants to be waited for."""
    lines = "\n    ".join(body.strip().splitlines())
    script = tmp_path / "tool.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(TOOLS)!r})\nfrom lib.project import run_tool\n"
        f"from pathlib import Path\nhere = Path({str(tmp_path)!r})\n\ndef main():\n    {lines}\n\n"
        "run_tool(main)\n"
    )
    return subprocess.Popen(
        [sys.executable, script], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_cleans_up_and_is_the_exit_code(tmp_path, number):
    tool = start(
        tmp_path, "try:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    (here / 'clean').touch()"
    )
    assert tool.stdout.readline() == "ready\n"
    tool.send_signal(number)
    assert (tool.communicate(timeout=30)[1], tool.returncode) == ("interrupted\n", 128 + number)
    assert (tmp_path / "clean").exists()


def test_an_import_that_a_signal_breaks_is_an_interruption(tmp_path):
    tool = start(
        tmp_path,
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('half of it') from None",
    )
    tool.stdout.readline()
    tool.send_signal(signal.SIGTERM)
    assert (tool.communicate(timeout=30)[1], tool.returncode) == ("interrupted\n", 143)


def test_a_signal_before_the_tool_begins_leaves_no_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    done = subprocess.run(
        [sys.executable, TOOLS / "sample_data.py", tmp_path / "x"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_what_nohup_ignores_stays_ignored(tmp_path):
    tool = start(
        tmp_path,
        "print('ready', flush=True)\ntime.sleep(1)\nprint('done')",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    tool.stdout.readline()
    tool.send_signal(signal.SIGHUP)
    assert (tool.communicate(timeout=30)[0], tool.returncode) == ("done\n", 0)


def test_a_tool_outlives_its_reader(tmp_path):
    """`tool | head -1`: the work is done to its end, and only then is the exit code 0."""
    tool = start(tmp_path, "for k in range(20000):\n    print('line', k)\n(here / 'done').touch()")
    tool.stdout.readline()
    tool.stdout.close()
    assert "nobody reads the output any more; the work goes on" in tool.stderr.read()
    assert tool.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_the_output_is_no_success(tmp_path):
    with Path("/dev/full").open("w") as full:
        tool = start(tmp_path, "print('line')", stdout=full)
    assert tool.stderr.read() == "error: [Errno 28] No space left on device\n"
    assert tool.wait(30) == 1


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
    assert text is not None or read_json(tmp_path / "x.json", "mend it", optional=True) == {}


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
