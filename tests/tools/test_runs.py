"""A run as an object: made once, locked at work, opened, verified, found by time, packaged by what is complete."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib import kernel
from lib.process import locked
from lib.project import InputError, ToolError, sha256_of
from lib.runs import check_run, find_runs, named_folder, new_folder, newest_run, open_run, payload_of
from made_runs import make_prediction, make_run


# ------------------------------------------------------------------------------------------------------------ made
def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs", "align"), range(40)))
    assert len({*folders}) == 40
    assert [folder for folder in folders if not folder.is_dir()] == []


def test_a_place_that_cannot_be_written_names_the_option_that_helps(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be made .*--runs DIR names another place"):
        new_folder(tmp_path / "runs", "align")


@pytest.mark.parametrize("manifest", [None, {"complete": False}])
def test_an_unfinished_folder_goes_on(tmp_path, manifest):
    folder = make_run(tmp_path / "mine", **(manifest or {}))
    if manifest is None:
        (folder / kernel.MANIFEST).unlink()
    assert named_folder(folder, again=False) == folder == named_folder(folder, again=True)
    assert named_folder(tmp_path / "new", again=False) == tmp_path / "new"


def test_a_kernel_that_outlives_its_parent_keeps_the_folder(tmp_path):
    with locked(tmp_path / "run") as lock:
        kernel_left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    named = rf"a run is at work in it \(process {kernel_left.pid}\); wait"
    with pytest.raises(InputError, match=named), locked(tmp_path / "run"):
        pass
    kernel_left.communicate(b"\n")
    with locked(tmp_path / "run"):
        pass


# ------------------------------------------------------------------------------------------------ opened, verified
def test_a_run_says_what_it_is(tmp_path):
    scores = {"pool100_raw": {"mrr": 0.7, "mrr_se": 0.01}}
    run = check_run(make_run(tmp_path / "a", validation=scores))
    assert (run.name, run.recipe, run.complete, run.scores) == ("a", "align", True, scores)
    assert (run.total_seconds, run.ended.year) == (3.2, 2001)
    assert run.weights == sha256_of(run.folder / kernel.FINAL_MODEL)


def test_a_prediction_knows_the_weights_that_made_it(tmp_path):
    trained = open_run(make_run(tmp_path / "a"))
    predicted = open_run(make_prediction(tmp_path / "b", trained.folder))
    assert (trained.only_predicts, predicted.only_predicts) == (False, True)
    assert predicted.weights == trained.weights
    assert predicted.scores == {}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("other"), "has 5 bytes instead of"),
        (lambda path: path.write_text(path.read_text()[::-1]), "has another sha256"),
    ],
)
def test_damage_is_told(tmp_path, harm, message):
    folder = make_run(tmp_path / "a")
    harm(folder / kernel.SUBMISSION)
    with pytest.raises(ToolError, match=f"pipeline_submission.csv {message}"):
        check_run(folder)


# ------------------------------------------------------------------------------------------------------ looked for
def test_the_newest_is_that_by_time_and_never_half_fetched(tmp_path):
    make_run(tmp_path / "z-old", 1e9)
    new = make_run(tmp_path / "a-new", 2e9)
    make_run(tmp_path / ".b-v1.partial", 3e9)
    assert newest_run(tmp_path, kernel.FINAL_MODEL) == new
    unfinished = make_run(tmp_path / "unfinished", 4e9, complete=False)
    assert newest_run(tmp_path, kernel.FINAL_MODEL) == unfinished
    assert newest_run(tmp_path, kernel.FINAL_MODEL, complete=True) == new
    with pytest.raises(InputError, match="no run with other"):
        newest_run(tmp_path, "other")


def test_all_runs_are_found_by_time(tmp_path, capsys):
    for name, mtime in (("a", 3e9), ("sweep-1", 2e9), ("sweep-1/s01", 1e9), (".half", 9e8)):
        make_run(tmp_path / name, mtime)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / kernel.MANIFEST).write_text("{")
    assert [run.name for run in find_runs(tmp_path)] == ["s01", "sweep-1", "a"]
    assert "broken: no readable manifest.json" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- packaged
def test_a_budget_stopped_run_is_packaged_by_its_final_model(tmp_path):
    """Its resume state may still lie there: only where the manifest says unfinished is it what counts."""
    folder = make_run(tmp_path / "a", stopped="time budget")
    (folder / kernel.RESUME_RUN).write_text("{}")
    (folder / "resume_refit_0.pth").write_text("state")
    assert payload_of(folder) == [kernel.FINAL_MODEL, kernel.VALIDATED_MODEL, kernel.METRICS]


@pytest.mark.parametrize("manifest", [True, False])
def test_an_unfinished_run_is_packaged_by_its_state(tmp_path, manifest):
    folder = make_run(tmp_path / "a", complete=False)
    if not manifest:
        (folder / kernel.MANIFEST).unlink()
    (folder / kernel.RESUME_RUN).write_text("{}")
    (folder / "resume_refit_0.pth").write_text("state")
    assert payload_of(folder) == [kernel.RESUME_RUN, "resume_refit_0.pth"]


def test_an_unfinished_run_without_a_state_is_not_packaged(tmp_path):
    with pytest.raises(InputError, match="not a complete run with weights"):
        payload_of(make_run(tmp_path / "a", complete=False))
