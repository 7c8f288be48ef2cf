"""run_local: the real kernel on drawn data, and stand-ins for it where it has to fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import run_local
from drawn import SMALL, TINY, draw_data
from lib import record
from lib.kernel import recipe_names
from lib.process import locked, run_kernel
from lib.project import REPO, InputError, ToolError
from lib.runs import check_run


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
        if condition():
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
    assert run.parent == runs
    assert run.name.endswith("-closed_form")
    assert Path(result["submission"]).is_file()
    assert "validation on" in err
    assert result["complete"]
    assert 0 < result["validation"]["pool100_raw"]["mrr"] < 1
    (entry,) = record.find(runs, event="local_run")
    assert entry["run"] == run.name
    assert entry["validation"]["pool100_raw"] == result["validation"]["pool100_raw"]["mrr"]


@pytest.mark.slow
def test_interrupted_run_goes_on(tmp_path, capfd):
    """Ctrl-C reaches the kernel once, it checkpoints; the same output folder goes on and ends with the table."""
    data, output = draw_data(tmp_path / "data"), tmp_path / "mine"
    command = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--runs",
        str(tmp_path),
        *TINY,
        "--set=epochs=60",
        "--set=eval_every=20",
        "--set=refit=false",
        "--set=checkpoint_seconds=0.1",
    ]
    sender = send_when(lambda: any(output.glob("resume_validate_1.pth")), signal.SIGINT)
    assert run_local.main(command) == 130
    sender.join()
    assert f"--output {output}" in capfd.readouterr().err.splitlines()[-1]
    assert not record.read(tmp_path)
    assert run_local.main(command) == 0
    out = capfd.readouterr().out
    assert "going on from" in out
    assert str(output / "pipeline_submission.csv") in out.splitlines()[-2]
    assert out.splitlines()[-7].split()[:2] == ["validation", "MRR"]


STOPS_WELL = """
import signal
def stop(number, frame):
    (output / "ended").touch()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
(output / "started").touch()
print("started", flush=True)
time.sleep(60)"""


def test_a_signal_while_the_child_loads_its_libraries_is_no_traceback(tmp_path, monkeypatch):
    script(tmp_path / "importing.py", "(output / 'started').touch(); time.sleep(60)", monkeypatch)
    send_when((tmp_path / "started").exists, signal.SIGINT)
    lines: list[str] = []
    assert (run_kernel(tmp_path, tmp_path, [], lines.append).code, lines) == (130, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_the_child(tmp_path, monkeypatch, number):
    script(tmp_path / "slow.py", STOPS_WELL, monkeypatch)
    before = signal.getsignal(number)
    send_when((tmp_path / "started").exists, number)
    assert run_kernel(tmp_path, tmp_path, [], print).code == 128 + number
    assert (tmp_path / "ended").exists()
    assert signal.getsignal(number) is before


def test_a_log_that_cannot_be_written_lets_the_child_save_its_state(tmp_path, monkeypatch):
    script(tmp_path / "slow.py", STOPS_WELL, monkeypatch)

    def log(line: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_kernel(tmp_path, tmp_path, [], log)
    assert (tmp_path / "ended").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def left(data, tmp_path_factory) -> tuple[Path, subprocess.Popen, str]:
    """A run of the closed form, whose log is read no further than its third line: (folder, ended tool, its stderr)."""
    runs = tmp_path_factory.mktemp("made")
    tool = subprocess.Popen(
        [
            sys.executable,
            REPO / "tools" / "run_local.py",
            "--data",
            data,
            "--runs",
            runs,
            "--output",
            runs / "mine",
            "--recipe=closed_form",
            *SMALL,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert tool.stdout.readline()
    tool.stdout.close()
    error = tool.stderr.read()
    tool.wait(60)
    return runs / "mine", tool, error


@pytest.fixture
def trained(left) -> Path:
    """The folder of a finished run."""
    return left[0]


def test_the_run_outlives_the_reader_of_its_log(left):
    """`run_local.py ... | head -3`: it goes on to its end, and the code says so."""
    folder, tool, error = left
    assert "the work goes on" in error
    assert tool.returncode == 0
    (entry,) = record.find(folder.parent, event="local_run")
    assert entry["run"] == "mine"
    assert check_run(folder).complete


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("print('error: train.npz: is broken', file=sys.stderr); sys.exit(2)", 2, "error: train.npz: is broken"),
        ("1 / 0", 1, "error: the kernel ended with code 1"),
        ("import os; os.kill(os.getpid(), 9)", 137, "error: the kernel ended with code 137"),
    ],
)
def test_failure_is_one_line_and_the_kernels_code(tmp_path, monkeypatch, capfd, body, code, message):
    script(tmp_path / "broken.py", body, monkeypatch)
    assert run_local.main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not record.read(tmp_path / "runs")


def test_output_that_differs_from_the_manifest_is_no_success(tmp_path, monkeypatch):
    script(
        tmp_path / "liar.py",
        """
import json
output.mkdir(parents=True, exist_ok=True)
(output / "pipeline_submission.csv").write_text("id,embedding")
facts = {"pipeline_submission.csv": {"sha256": "0", "bytes": 12}}
(output / "manifest.json").write_text(json.dumps({"complete": True, "outputs": facts}))""",
        monkeypatch,
    )
    with pytest.raises(ToolError, match=r"pipeline_submission\.csv has another sha256"):
        run_local.main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert not record.read(tmp_path / "runs")


def test_empty_folder_and_plain_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script(tmp_path / "look.py", "import os; print(os.listdir(), 'PYTHONPATH' in os.environ)", monkeypatch)
    lines: list[str] = []
    assert run_kernel(tmp_path, tmp_path / "out", [], lines.append).code == 0
    assert lines == ["[] False"]


def test_bad_input_is_told_before_anything_is_drawn(tmp_path, kernel):
    with pytest.raises(InputError, match="no such folder"):
        run_local.main(["--data", str(tmp_path / "nowhere"), "--runs", str(tmp_path)])
    with pytest.raises(Exception, match="unknown knob 'epoch'") as caught:
        run_local.main(["--set", "epoch=3"])
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------- a run's own weights
def test_predicting_with_the_weights_of_a_run(data, trained, tmp_path, capfd):
    """No links by hand; other weights below --data do not confuse it; the folder is named after what predicted."""
    (data / "old").mkdir(exist_ok=True)
    (data / "old" / "pipeline_final_model.pth").write_text("another one")
    command = ["--data", str(data), "--runs", str(tmp_path), "--weights", str(trained), "--set=device=cpu", "--json"]
    assert run_local.main(command) == 0
    result = json.loads(capfd.readouterr().out)
    run = check_run(Path(result["run"]))
    assert run.name.endswith("-closed_form-predict")
    assert run.weights == check_run(trained).weights
    name = "pipeline_submission.csv"
    assert (run.folder / name).read_bytes() == (trained / name).read_bytes()
    (entry,) = record.find(tmp_path, event="local_run")
    assert (entry["run"], entry["weights"], entry["set"]) == (run.name, "mine", {"device": "cpu", "mode": "predict"})


@pytest.mark.parametrize("option", ["--recipe=align", "--set=recipe=align", "--mode=train"])
def test_weights_come_with_their_recipe(trained, tmp_path, option):
    with pytest.raises(InputError, match="leave --recipe and --mode away"):
        run_local.main(["--weights", str(trained), "--runs", str(tmp_path), option])


def test_weights_that_are_none_are_told_before_anything_is_made(data, trained, tmp_path):
    command = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--weights"]
    with pytest.raises(InputError, match=r"no readable manifest\.json; give a finished run"):
        run_local.main([*command, str(tmp_path)])
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    (broken / "pipeline_final_model.pth").write_text("x")
    with pytest.raises(InputError, match=r"pipeline_final_model\.pth has 1 bytes instead of"):
        run_local.main([*command, str(broken)])
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------- the folder
def test_a_finished_folder_is_refused_or_kept(trained, tmp_path, monkeypatch):
    output = Path(shutil.copytree(trained, tmp_path / "mine"))
    command = ["--data", str(tmp_path), "--output", str(output), "--runs", str(tmp_path)]
    with pytest.raises(InputError, match="holds a finished run"):
        run_local.main(command)
    script(tmp_path / "new.py", "(output / 'new').touch(); sys.exit(1)", monkeypatch)
    assert run_local.main([*command, "--again"]) == 1
    assert check_run(tmp_path / "mine.1").manifest == check_run(trained).manifest
    assert [path.name for path in output.iterdir()] == ["new"]


def test_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path):
    with locked(tmp_path / "mine"), pytest.raises(InputError, match="a run is at work in it"):
        run_local.main(["--data", str(tmp_path), "--output", str(tmp_path / "mine"), "--runs", str(tmp_path)])


def test_a_record_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="--runs DIR names another place"):
        run_local.main(["--data", str(tmp_path), "--output", str(tmp_path / "x"), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "x").exists()


def test_a_failed_start_leaves_no_empty_folder(tmp_path, monkeypatch):
    script(tmp_path / "broken.py", "sys.exit(2)", monkeypatch)
    assert run_local.main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["record.jsonl.lock"]


# ---------------------------------------------------------------------------------------------------- what there is
def test_the_list_names_every_recipe_and_knob(capsys, kernel):
    assert run_local.main(["--list"]) == 0
    recipes, knobs = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in recipes.splitlines()[1:]] == list(kernel.RECIPES)
    fields = dataclasses.fields(kernel.Knobs)
    assert [line.split()[0] for line in knobs.splitlines()[1:]] == [field.name for field in fields]
    assert all(field.metadata.get("why", "") in knobs for field in fields)


def test_help_names_the_recipes_without_loading_the_kernel(capsys, kernel):
    assert recipe_names() == list(kernel.RECIPES)
    with pytest.raises(SystemExit):
        run_local.main(["--help"])
    assert ", ".join(kernel.RECIPES) in " ".join(capsys.readouterr().out.split())
