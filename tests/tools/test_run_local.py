"""run_local: the real kernel on drawn data, and stand-ins for it where it has to fail."""
from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import run_local
from drawn import SMALL, TINY, draw_data
from lib import record
from lib.data import choose_data
from lib.process import run_kernel
from lib.project import InputError, ToolError


def script(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel's script; `output` is its --output."""
    path.write_text(f"import pathlib, sys, time\noutput = pathlib.Path(sys.argv[4])\n{body}\n")
    monkeypatch.setattr("lib.process.KERNEL", path)


def send_when(condition, number: int) -> threading.Thread:
    """A signal to this process as soon as `condition` holds: what a user's Ctrl-C is."""
    def wait() -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_run_with_json(tmp_path, capfd):
    data, runs = draw_data(tmp_path / "data"), tmp_path / "runs"
    assert run_local.main(["--data", str(data), "--runs", str(runs), "--json", "--recipe", "closed_form", *SMALL]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    run = Path(result["run"])
    assert run.parent == runs and run.name.endswith("-closed_form") and Path(result["submission"]).is_file()
    assert "validation on" in err and result["complete"] and 0 < result["validation"]["pool100_raw"]["mrr"] < 1
    (entry,) = record.find(runs, event="local_run")
    assert entry["run"] == run.name and entry["validation"]["pool100_raw"] == result["validation"]["pool100_raw"]["mrr"]


def test_interrupted_run_goes_on(tmp_path, capfd):
    """Ctrl-C reaches the kernel once, it checkpoints; the same output folder goes on and ends with the table."""
    data, output = draw_data(tmp_path / "data"), tmp_path / "mine"
    command = ["--data", str(data), "--output", str(output), "--runs", str(tmp_path), *TINY, "--set=epochs=20",
               "--set=eval_every=1", "--set=checkpoint_seconds=0.1"]
    sender = send_when(lambda: any(output.glob("resume_validate_0.pth")), signal.SIGINT)
    assert run_local.main(command) == 130
    sender.join()
    assert f"--output {output}" in capfd.readouterr().err.splitlines()[-1] and not record.read(tmp_path)
    assert run_local.main(command) == 0
    out = capfd.readouterr().out
    assert "going on from" in out and str(output / "pipeline_submission.csv") in out.splitlines()[-2]
    assert out.splitlines()[-7].split()[:2] == ["validation", "MRR"]


def test_signal_stops_the_child(tmp_path, monkeypatch):
    started, ended = tmp_path / "started", tmp_path / "ended"
    script(tmp_path / "slow.py", f"""
import signal
def stop(number, frame):
    pathlib.Path({str(ended)!r}).write_text("x")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(started)!r}).write_text("x")
time.sleep(60)""", monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    send_when(started.exists, signal.SIGTERM)
    assert run_kernel(tmp_path, tmp_path, [], print).code == 143
    assert ended.exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("body", "code", "message"), [
    ("print('error: train.npz: is broken', file=sys.stderr); sys.exit(2)", 2, "error: train.npz: is broken"),
    ("1 / 0", 1, "error: the kernel ended with code 1"),
    ("import os; os.kill(os.getpid(), 9)", 137, "error: the kernel ended with code 137"),
])
def test_failure_is_one_line_and_the_kernels_code(tmp_path, monkeypatch, capfd, body, code, message):
    script(tmp_path / "broken.py", body, monkeypatch)
    assert run_local.main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(message) and not record.read(tmp_path / "runs")


def test_output_that_differs_from_the_manifest_is_no_success(tmp_path, monkeypatch):
    script(tmp_path / "liar.py", """
import json
output.mkdir(parents=True)
(output / "pipeline_submission.csv").write_text("id,embedding")
facts = {"pipeline_submission.csv": {"sha256": "0", "bytes": 12}}
(output / "manifest.json").write_text(json.dumps({"complete": True, "outputs": facts}))""", monkeypatch)
    with pytest.raises(ToolError, match=r"pipeline_submission\.csv has another sha256"):
        run_local.main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert not record.read(tmp_path / "runs")


def test_empty_folder_and_plain_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script(tmp_path / "look.py", "import os; print(os.listdir(), 'PYTHONPATH' in os.environ)", monkeypatch)
    lines: list[str] = []
    assert run_kernel(tmp_path, tmp_path / "out", [], lines.append).code == 0
    assert lines == ["[] False"]


def test_sample_is_drawn_once_and_real_data_wins(tmp_path, monkeypatch, capsys):
    drawn = []

    def make_sample(folder: Path) -> None:
        drawn.append(folder)
        for name in ("train/train/train.npz", "test/test/test.clean.npz"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()

    monkeypatch.setattr("lib.data.DATA", tmp_path / "data")
    monkeypatch.setattr("lib.data.SAMPLE", tmp_path / "sample")
    monkeypatch.setattr("lib.sample.layout.make_sample", make_sample)
    assert choose_data(None) == choose_data(None) == tmp_path / "sample"
    lines = capsys.readouterr().err.splitlines()
    assert len(drawn) == 1 and len(lines) == 2 and all("download_data.py" in line for line in lines)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "train.npz").touch()
    assert choose_data(None) == tmp_path / "data"
    assert not capsys.readouterr().err


def test_bad_input_is_told_before_anything_is_drawn(tmp_path, kernel):
    with pytest.raises(InputError, match="no such folder"):
        run_local.main(["--data", str(tmp_path / "nowhere"), "--runs", str(tmp_path)])
    with pytest.raises(Exception, match="unknown knob 'epoch'") as caught:
        run_local.main(["--set", "epoch=3"])
    assert caught.value.exit_code == 2
