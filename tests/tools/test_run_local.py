"""run_local: the real kernel on drawn data, and stand-ins for it where it has to fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from drawn import CLOSED, TINY, draw_data
from forked import Ended, Tool, failed, succeeded
from lib import record
from lib.data import KNOWN
from lib.kernel import recipe_names
from lib.process import locked, run_kernel
from lib.runs import check_run, named_folder
from made_runs import make_prediction, make_run


def script(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel's script; `output` is its --output."""
    path.write_text(f"import pathlib, sys, time\noutput = pathlib.Path(sys.argv[4])\n{body}\n")
    monkeypatch.setattr("lib.process.KERNEL", path)


def copying(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that leaves the outputs of the run `made`."""
    body = f"import shutil; shutil.copytree({str(made)!r}, output, dirs_exist_ok=True)"
    script(made.with_name("copy.py"), body, monkeypatch)


@pytest.fixture
def run_local(tool, tmp_path) -> Callable[..., Ended]:
    """The tool, with its runs in the test's folder, on data that a stand-in does not look at."""
    return partial(tool, "run_local", "--runs", tmp_path / "runs", "--data", tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.mark.usefixtures("forked")
def test_a_run_is_checked_recorded_and_told_as_json(run_local, data, tmp_path):
    done = succeeded(run_local("--data", data, "--json", *CLOSED))
    result = json.loads(done.stdout)
    run = Path(result["run"])
    assert run.parent == tmp_path / "runs"
    assert run.name.endswith("-closed_form")
    assert Path(result["submission"]).is_file()
    assert "validation on" in done.stderr
    assert "pool24_raw" in done.stderr  # fewer than a hundred images are not called pools of 100
    assert result["complete"]
    assert 0 < result["validation"]["pool100_raw"]["mrr"] < 1
    (entry,) = record.find(tmp_path / "runs", event="local_run")
    assert entry["run"] == run.name
    assert entry["validation"]["pool100_raw"] == result["validation"]["pool100_raw"]["mrr"]


@pytest.mark.slow
def test_interrupted_run_goes_on(tool, data, tmp_path):
    """Ctrl-C reaches the kernel once, it checkpoints; the same output folder goes on to the end."""
    output = tmp_path / "mine"
    knobs = ["--set=epochs=60", "--set=eval_every=20", "--set=refit=false", "--set=checkpoint_seconds=0.1"]
    command = ["run_local", "--data", data, "--output", output, "--runs", tmp_path, *TINY, *knobs]
    run = tool.start(*command)
    run.wait_for((output / "resume_validate_1.pth").exists, "a state")
    run.send(signal.SIGINT)
    done = run.wait()
    assert done.returncode == 130
    assert f"--output {output}" in done.error
    assert not record.read(tmp_path)
    said = succeeded(tool(*command)).stdout
    assert "going on from" in said
    assert str(output / "pipeline_submission.csv") in said.splitlines()[-2]
    assert said.splitlines()[-3].endswith(" s, all parts of the run together")
    assert said.splitlines()[-1] == f"next: python tools/verify.py --run {output} --data {data}"


STOPS_WELL = """
import signal
def stop(number, frame):
    (output / "ended").touch()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
(output / "started").touch()
print("started", flush=True)
for _ in range(6000):  # a signal that comes just before a sleep does not end it
    time.sleep(0.01)"""


def stopped(tool: Tool, tmp_path: Path, number: int) -> Ended:
    """The end of the tool after a signal that it gets when the stand-in has started."""
    run = tool.start("run_local", "--data", tmp_path, "--runs", tmp_path / "runs", "--output", tmp_path)
    run.wait_for((tmp_path / "started").exists, "the stand-in")
    run.send(number)
    return run.wait()


def test_a_signal_while_the_child_loads_its_libraries_is_no_traceback(tool, tmp_path, monkeypatch):
    script(tmp_path / "importing.py", "(output / 'started').touch(); time.sleep(60)", monkeypatch)
    done = stopped(tool, tmp_path, signal.SIGINT)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing kept yet; run it again\n"


def test_an_interrupted_run_says_the_whole_command_that_goes_on(tool, tmp_path, monkeypatch):
    script(tmp_path / "slow.py", f"(output / 'resume_run.json').touch()\n{STOPS_WELL}", monkeypatch)
    asked = ["--recipe", "align", "--set", "epochs=60", "--set", "seed=1"]
    places = ["--data", tmp_path, "--runs", tmp_path / "runs", "--output", tmp_path / "my run"]
    run = tool.start("run_local", *places, "--again", *asked)
    run.wait_for((tmp_path / "my run" / "started").exists, "the stand-in")
    run.send(signal.SIGINT)
    command = shlex.join(["python", "tools/run_local.py", *asked, *map(str, places)])
    assert run.wait().stderr == f"interrupted; to go on: {command}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_the_child(tool, tmp_path, monkeypatch, number):
    script(tmp_path / "slow.py", STOPS_WELL, monkeypatch)
    assert stopped(tool, tmp_path, number).returncode == 128 + number
    assert (tmp_path / "ended").exists()


def test_a_log_that_cannot_be_written_lets_the_child_save_its_state(tmp_path, monkeypatch):
    script(tmp_path / "slow.py", STOPS_WELL, monkeypatch)

    def log(line: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_kernel(tmp_path, tmp_path, [], log)
    assert (tmp_path / "ended").exists()


@pytest.fixture(scope="module")
def left(loaded, data, tmp_path_factory) -> tuple[Path, Ended]:
    """A run of the closed form, whose log is read no further than its third line: its folder, how the tool ended."""
    runs, said = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("said")
    os.mkfifo(said / "pipe")
    command = ["run_local", "--data", data, "--runs", runs, "--output", runs / "mine", *CLOSED]
    tool = Tool(said, said).start(*command, stdout=said / "pipe")
    with (said / "pipe").open() as log:
        for _ in range(3):
            assert log.readline()
    return runs / "mine", tool.wait()


@pytest.fixture
def trained(left) -> Path:
    """The folder of a finished run."""
    return left[0]


def test_the_run_outlives_the_reader_of_its_log(left):
    """`run_local.py ... | head -3`: it goes on to its end, and the code says so."""
    folder, done = left
    assert "the work goes on" in succeeded(done).stderr
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
def test_failure_is_one_line_and_the_kernels_code(run_local, tmp_path, monkeypatch, body, code, message):
    script(tmp_path / "broken.py", body, monkeypatch)
    done = failed(run_local(), code, f"^{message}")
    assert done.stderr.count("\n") == 1
    assert not record.read(tmp_path / "runs")


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", 137, "its last lines are above; to go on: "),
        ("print('error: cannot be written; free some space'); sys.exit(1)", 1, "free some space; to go on: "),
    ],
)
def test_a_kernel_that_failed_on_the_way_leaves_the_command_that_goes_on(
    run_local, tmp_path, monkeypatch, end, code, message
):
    script(tmp_path / "broken.py", f"(output / 'resume_run.json').touch(); {end}", monkeypatch)
    done = failed(run_local("--output", tmp_path / "mine"), code, message)
    assert done.stderr.rstrip().endswith(f"--output {tmp_path / 'mine'}")


def test_wrong_input_beside_the_state_of_another_run_is_told_alone(run_local, tmp_path, monkeypatch):
    body = "(output / 'resume_run.json').touch(); print('error: holds an unfinished run of other knobs'); sys.exit(2)"
    script(tmp_path / "broken.py", body, monkeypatch)
    done = failed(run_local("--output", tmp_path / "mine"), 2)
    assert done.stderr == "error: holds an unfinished run of other knobs\n"


def test_output_that_differs_from_the_manifest_is_no_success(run_local, tmp_path, monkeypatch):
    made = make_run(tmp_path / "made")
    (made / "pipeline_submission.csv").write_text("other")
    copying(made, monkeypatch)
    failed(run_local(), 1, r"pipeline_submission\.csv has 5 bytes instead of")
    assert not record.read(tmp_path / "runs")


def test_empty_folder_and_plain_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script(tmp_path / "look.py", "import os; print(os.listdir(), 'PYTHONPATH' in os.environ)", monkeypatch)
    lines: list[str] = []
    assert run_kernel(tmp_path, tmp_path / "out", [], lines.append).code == 0
    assert lines == ["[] False"]


def test_bad_input_is_told_before_anything_is_drawn(run_local, tmp_path):
    failed(run_local("--data", tmp_path / "nowhere"), 2, "no such folder")
    failed(run_local("--set", "epoch=3"), 2, "unknown knob 'epoch'")


# ---------------------------------------------------------------------------------------------- a run's own weights
@pytest.mark.usefixtures("forked")
def test_predicting_with_the_weights_of_a_run(run_local, data, trained, tmp_path):
    """No links by hand; other weights below --data do not confuse it; the folder is named after what predicted."""
    (data / "old").mkdir(exist_ok=True)
    (data / "old" / "pipeline_final_model.pth").write_text("another one")
    done = succeeded(run_local("--data", data, "--weights", trained, "--set=device=cpu", "--json"))
    run = check_run(Path(json.loads(done.stdout)["run"]))
    assert run.name.endswith("-closed_form-predict")
    assert run.weights == check_run(trained).weights
    name = "pipeline_submission.csv"
    assert (run.folder / name).read_bytes() == (trained / name).read_bytes()
    (entry,) = record.find(tmp_path / "runs", event="local_run")
    assert (entry["run"], entry["weights"], entry["set"]) == (run.name, "mine", {"device": "cpu", "mode": "predict"})


@pytest.mark.parametrize("option", ["--recipe=align", "--set=recipe=align", "--mode=train"])
def test_weights_come_with_their_recipe(run_local, trained, option):
    failed(run_local("--weights", trained, option), 2, "leave --recipe and --mode away")


def test_a_recipe_that_is_set_otherwise_as_well_is_a_slip(run_local):
    failed(run_local("--recipe=search", "--set=recipe=align"), 2, "--recipe search and --set recipe=align: give one")


def test_weights_that_are_none_are_told_before_anything_is_made(run_local, trained, tmp_path):
    failed(run_local("--weights", tmp_path), 2, r"no readable manifest\.json; give a finished run")
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    (broken / "pipeline_final_model.pth").write_text("x")
    failed(run_local("--weights", broken), 2, r"pipeline_final_model\.pth has 1 bytes instead of")
    message = f"only predicts, with the weights of {broken}: give that one"
    failed(run_local("--weights", make_prediction(tmp_path / "predicted", broken)), 2, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [[], ["--again"]])
def test_a_prediction_does_not_take_the_place_of_its_own_weights(run_local, data, trained, tmp_path, options):
    mine = Path(shutil.copytree(trained, tmp_path / "mine"))
    manifest = json.loads((mine / "manifest.json").read_text())
    (mine / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    given = ["--data", data, "--weights", mine, "--output", tmp_path / "mine/../mine", *options]
    failed(run_local(*given), 2, "holds the weights to predict with; name another --output")
    assert check_run(mine).weights == check_run(trained).weights


@pytest.mark.slow
def test_weights_of_a_run_that_was_stopped_predict_but_it_is_said(run_local, data, trained, tmp_path):
    stopped = Path(shutil.copytree(trained, tmp_path / "stopped"))
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "stopped": "SIGTERM"}))
    done = succeeded(run_local("--data", data, "--weights", stopped))
    assert f"warning: {stopped} is not finished (SIGTERM); trained: candidate 0 in closed form" in done.stderr


# ------------------------------------------------------------------------------------------------------- the folder
def test_a_finished_folder_is_refused_or_kept(run_local, trained, tmp_path, monkeypatch):
    output = Path(shutil.copytree(trained, tmp_path / "mine"))
    (tmp_path / "mine.1").mkdir()  # an earlier one, kept
    failed(run_local("--output", output), 2, "holds a finished run; name another --output, or --again")
    script(tmp_path / "new.py", "(output / 'new').touch(); sys.exit(1)", monkeypatch)
    assert f"kept as {tmp_path / 'mine.2'}" in failed(run_local("--output", output, "--again"), 1).stderr
    assert check_run(tmp_path / "mine.2").manifest == check_run(trained).manifest
    assert [path.name for path in output.iterdir()] == ["new"]


def test_the_folder_one_stands_in_is_kept_aside_too(trained, tmp_path, monkeypatch):
    output = Path(shutil.copytree(trained, tmp_path / "mine"))
    monkeypatch.chdir(output)
    assert named_folder(Path(), again=True) == output
    assert not output.exists()
    assert check_run(tmp_path / "mine.1").manifest == check_run(trained).manifest


def test_a_folder_in_which_a_run_is_at_work_is_refused(run_local, tmp_path):
    with locked(tmp_path / "mine"):
        failed(run_local("--output", tmp_path / "mine"), 2, "a run is at work in it")
        assert (tmp_path / "mine").is_dir()  # empty as it still is


def test_a_record_that_cannot_be_written_is_told_before_the_work(run_local, tmp_path):
    (tmp_path / "runs").write_text("a file")
    failed(run_local("--output", tmp_path / "x"), 2, "--runs DIR names another place")
    assert not (tmp_path / "x").exists()


def test_a_failed_start_leaves_no_empty_folder(run_local, tmp_path, monkeypatch):
    script(tmp_path / "broken.py", "sys.exit(2)", monkeypatch)
    failed(run_local(), 2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["record.jsonl"]


# ---------------------------------------------------------------------------------------------------- what it says
def test_the_last_lines_are_the_submission_and_what_comes_next(run_local, tmp_path, monkeypatch):
    """The seconds are the kernel's to tell, unless it went on from an earlier part."""
    for total, first in ((0.0, []), (1e6, ["1000000.0 s, all parts of the run together"])):
        copying(make_run(tmp_path / f"made-{total}", seconds={"total": total}), monkeypatch)
        output = tmp_path / f"run-{total}"
        said = succeeded(run_local("--output", output)).stdout.splitlines()
        verify = f"next: python tools/verify.py --run {output} --data {tmp_path}"
        assert said == [*first, f"submission: {output / 'pipeline_submission.csv'} (checked)", verify]


def test_a_prediction_is_submitted_or_scored_next(run_local, tmp_path, monkeypatch):
    """Submitted if it answers the competition's captions, else scored if the answers lie beside the data."""
    made = make_prediction(tmp_path / "made", make_run(tmp_path / "trained"))
    copying(made, monkeypatch)

    def said(output: Path) -> list[str]:
        lines = succeeded(run_local("--output", output)).stdout.splitlines()
        return [line for line in lines if line.startswith("next: ")]

    assert said(tmp_path / "a") == []
    answers = tmp_path / "solution.npz"
    answers.touch()
    assert said(tmp_path / "b") == [f"next: python tools/verify.py --run {tmp_path / 'b'} --solution {answers}"]
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["inputs"]["test.clean.npz"] = {"sha256": KNOWN["test/test/test.clean.npz"].sha256}
    (made / "manifest.json").write_text(json.dumps(manifest))
    places = f"--data {tmp_path} --runs {tmp_path / 'runs'}"
    assert said(tmp_path / "c") == [f"next: python tools/submit.py {tmp_path / 'c'} {places}"]


def test_the_list_names_every_recipe_and_knob(tool, kernel):
    recipes, knobs = succeeded(tool("run_local", "--list")).stdout.split("\n\n")
    assert [line.split()[0] for line in recipes.splitlines()[1:]] == list(kernel.RECIPES)
    assert "drawn ones around the best so far" in recipes
    fields = dataclasses.fields(kernel.Knobs)
    assert [line.split()[0] for line in knobs.splitlines()[1:]] == [field.name for field in fields]
    assert [field.name for field in fields if field.metadata.get("why", "") not in knobs] == []


def test_help_names_the_recipes(tool, kernel):
    """They are read from the script, which is not loaded."""
    assert recipe_names() == list(kernel.RECIPES)
    assert ", ".join(kernel.RECIPES) in " ".join(succeeded(tool("run_local", "--help")).stdout.split())
