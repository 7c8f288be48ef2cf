"""sweep: many members over stand-in sessions, failing, full, interrupted and killed; and the blend itself."""

from __future__ import annotations

import csv
import errno
import json
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from account import PIPELINE
from drawn import TINY, draw_data, read_tree, write_tree
from forked import Ended, failed, succeeded
from lib import record
from lib.jobs import blend, fetch, fleet
from lib.jobs.blend import blend_runs, blended_before
from lib.jobs.fetch import Output
from lib.jobs.fleet import Fleet, Row
from lib.kaggle_api.kernels import Kernels
from lib.process import Ended as KernelEnded
from lib.process import run_kernel
from lib.project import InputError
from lib.runs import check_run
from stand_in import Fault, Plan
from stopping import KillAt, kill_at_random_moments, stop_at
from turns import waiting_for

FULL = Fault(json={"error": "Maximum batch GPU session count of 2 reached."})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("drawn"), images=420)


@pytest.fixture(scope="module")
def outputs(server, tmp_path_factory, data) -> list[dict[str, bytes]]:
    """What three trainings of different seeds write, each with 200 images held out."""
    found = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("trained")
        knobs = [*TINY, f"--set=seed={seed}", "--set=val_fraction=0.5"]
        succeeded(server.run("--input", data, "--output", folder, *knobs))
        found.append(read_tree(folder))
    return found


@pytest.fixture
def plans(kaggle, outputs) -> Callable[[str], None]:
    """The coming pushes by letter: . succeeds, E ends in an error, T lacks a file that its manifest names."""
    kaggle.competitions["aml-competition"].files = {"x": b""}

    def plan(letters: str) -> None:
        made = {letter: [Plan(queued=1, running=1, outputs=one) for one in outputs] for letter in ".ET"}
        for one in made["E"]:
            one.outcome, one.failure = "ERROR", "out of luck"
        for one in made["T"]:
            one.outputs = {name: data for name, data in one.outputs.items() if name != "metrics.json"}
        kaggle.plans = [made[letter][number % 3] for number, letter in enumerate(letters + ".")]

    plan("")
    return plan


@pytest.fixture
def run_sweep(tool, plans, data, tmp_path) -> Callable[..., Ended]:
    """The tool, with everything in the test's folder."""
    return partial(tool, "sweep", *common(data, tmp_path))


def common(data: Path, tmp_path: Path) -> list[object]:
    """The options of every sweep here."""
    return ["--runs", tmp_path / "runs", "--data", data, "--set", "val_fraction=0.5"]


def check_blend(result: dict, kernel, data: Path) -> None:
    """The submission is valid for the test set, and is vouched for."""
    test = kernel.read_test(kernel.find_file(data, "test.clean.npz"))
    kernel.check_submission(Path(result["submission"]), test.caption_ids, test.image_dim)
    run = check_run(Path(result["run"]))
    assert run.metrics["validation"]["pool100_raw"]["mrr"] == result["expected_mrr"] > 0.1  # chance is .05


# ------------------------------------------------------------------------------------------- on Kaggle
def test_eight_members_two_of_them_failing(run_sweep, plans, kaggle, kernel, data, tmp_path, monkeypatch):
    plans(".E..T")
    kaggle.session_limit = 3
    at_once, save = [], kaggle.rpc_SaveKernel

    def watch(body: dict) -> dict:
        at_once.append(sum(one.status in ("QUEUED", "RUNNING") for runs in kaggle.kernels.values() for one in runs))
        return save(body)

    monkeypatch.setattr(kaggle, "rpc_SaveKernel", watch)
    result = json.loads(succeeded(run_sweep("--members", 8, "--json")).stdout)
    check_blend(result, kernel, data)
    assert len(result["members"]) == 8
    assert [member["name"] for member in result["members"] if not member["run"]] == []
    assert sum(member["weight"] for member in result["members"]) == pytest.approx(1, abs=0.01)
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1] * 6 + [2] * 2
    assert max(at_once) == 3
    assert at_once.count(3) == 1  # asked for a fourth one once, and knew the number from then on
    assert set(kaggle.kernels) == {f"{PIPELINE}-s{k:02}" for k in range(1, 9)}
    assert '"seed": 3' in kaggle.kernels[f"{PIPELINE}-s04"][0].text
    (entry,) = record.find(tmp_path / "runs", event="sweep")
    assert entry["validation"] == result["expected_mrr"]
    assert len(entry["members"]) == 8

    assert json.loads(succeeded(run_sweep("--members", 8, "--json")).stdout) == result
    assert kaggle.count("SaveKernel") == 11
    assert len(record.find(tmp_path / "runs", event="sweep")) == 1


def test_members_that_keep_failing_are_left_out(run_sweep, plans, kaggle):
    plans("E.E.")
    done = succeeded(run_sweep("--members", 4, "--retries", 0))
    assert "2 of 4 runs in one checked submission" in done.stdout
    assert done.stdout.count("failed") == 6
    assert len(re.findall("out of luck .*; giving it up", done.stderr)) == 2
    succeeded(run_sweep("--members", 4, "--retries", 0))
    assert kaggle.count("SaveKernel") == 4


def test_two_sweeps_of_the_same_blend_in_turn(tool, plans, data, tmp_path):
    """Each would take the files of the other's blend for its own."""
    folder, lock = tmp_path / "runs" / "mine", tmp_path / "runs" / ".locks" / "blend-of-mine"
    command = ["sweep", *common(data, tmp_path), "--members", 1, "--output", folder]
    with waiting_for(lock, lambda: tool.start(*command)):
        assert not folder.exists()
    assert check_run(folder).complete


def test_where_every_run_fails_there_is_no_blend(run_sweep, kaggle, tmp_path):
    kaggle.plans = [Plan(outcome="ERROR", failure=f"out of luck {number}") for number in range(4)]
    failed(run_sweep("--members", 2, "--retries", 1), 1, "every run failed, the first one: out of luck 0")
    assert kaggle.count("SaveKernel") == 4
    assert not list((tmp_path / "runs").glob("sweep-*"))


def test_the_failure_of_a_deleted_kernel_is_none_of_one_made_anew(run_sweep, plans, kaggle):
    """Which has the same number."""
    plans("E.")
    failed(run_sweep("--members", 1, "--retries", 0), 1, "every run failed")
    kaggle.kernels.clear()
    with stop_at(fetch, "fetch"):
        assert run_sweep("--members", 1).returncode == 130
    succeeded(run_sweep("--members", 1))
    assert [len(runs) for runs in kaggle.kernels.values()] == [1]


@pytest.mark.slow
def test_full_sessions_are_waited_for(run_sweep, kaggle):
    kaggle.fail("SaveKernel", FULL, None, FULL)
    done = succeeded(run_sweep("--members", 3))
    assert "3 of 3 runs" in done.stdout
    assert done.stderr.count("waiting for a free session") == 2
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1, 1]


def test_other_refusals_are_errors(run_sweep, kaggle):
    kaggle.push_error = "Phone verification is required"
    failed(run_sweep("--members", 3), 1, "Phone verification")


def test_used_up_quota_keeps_what_is_done(run_sweep, kaggle, monkeypatch):
    kaggle.gpu_used_hours, save = 29.0, kaggle.rpc_SaveKernel

    def use_up(body: dict) -> dict:
        kaggle.gpu_used_hours += 0.5
        return save(body)

    monkeypatch.setattr(kaggle, "rpc_SaveKernel", use_up)
    failed(run_sweep("--members", 3), 1, r"GPU quota used up.*2 done, 0 running, 1 waiting.*goes on later")
    kaggle.gpu_used_hours = 0.0
    succeeded(run_sweep("--members", 3))
    assert kaggle.count("SaveKernel") == 3


def test_a_full_disk_here_is_no_failure_of_a_run(run_sweep, kaggle, tmp_path):
    """What is complete on Kaggle is fetched later, not pushed again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.kaggle_api.http.Progress.update", full)
        failed(run_sweep("--members", 2), 1, "^error: download of .* No space left on device")
    succeeded(run_sweep("--members", 2))
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]
    assert record.find(tmp_path / "runs", event="run_failed") == []


def test_a_run_of_another_kind_is_not_overwritten(run_sweep, kaggle, outputs, tmp_path):
    mine = write_tree(tmp_path / "runs" / "mine", outputs[0])
    failed(
        run_sweep("--members", 2, "--output", mine), 2, "mine: holds a run that is no sweep's; name another --output"
    )
    assert read_tree(mine) == outputs[0]
    assert not kaggle.count("SaveKernel")


def test_runs_of_other_data_are_refused(run_sweep, tmp_path):
    other = draw_data(tmp_path / "other", seed=7)
    failed(run_sweep("--members", 2, "--data", other), 2, "trained on other data")


def test_a_blend_of_other_data_is_not_what_was_asked_for(run_sweep, tmp_path):
    """A sweep of the drawn sample, say, and the same command with the real data."""
    succeeded(run_sweep("--members", 2))
    other = draw_data(tmp_path / "other", seed=7)
    failed(run_sweep("--members", 2, "--data", other), 2, "trained on other data")


def test_missing_data_is_told_before_anything_is_pushed(run_sweep, kaggle, tmp_path):
    failed(run_sweep("--members", 2, "--data", tmp_path / "none"), 2, r"no such folder; python tools/download_data\.py")
    assert not kaggle.count("SaveKernel")


# ------------------------------------------------------------------------------------ an unreliable server
@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=503)] * 40,
        [Fault(status=404)] * 8,
        [Fault(status=403)] * 8,
        [Fault(status=400)] * 3,
        [Fault(json={"status": "PAUSED"})] * 3,
    ],
)
def test_a_sweep_outlives_minutes_without_a_status(run_sweep, kaggle, faults):
    kaggle.fail("GetKernelSessionStatus", *faults)
    succeeded(run_sweep("--members", 2))
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


def test_one_push_that_fails_leaves_no_other_row_unpushed(run_sweep, kaggle):
    kaggle.fail("SaveKernel", Fault(status=500), None, Fault(status=500, after=True))
    succeeded(run_sweep("--members", 4))
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1] * 4


def test_a_completed_member_whose_output_shows_late_is_not_pushed_again(run_sweep, kaggle):
    kaggle.habits.output_lag, kaggle.habits.manifest_lag, kaggle.habits.session_lag = 20, 60, 30
    succeeded(run_sweep("--members", 2))
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


@pytest.mark.slow
def test_a_session_that_runs_for_ever_is_given_up_and_not_pushed_again(run_sweep, kaggle):
    kaggle.plans = [Plan(running=10**9), *kaggle.plans]
    done = succeeded(run_sweep("--members", 2, "--timeout-minutes", 1))
    assert "for longer than a session can be" in done.stderr
    assert "1 of 2 runs" in done.stdout
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


def test_members_are_told_their_session_s_time(run_sweep, kaggle):
    succeeded(run_sweep("--members", 2, "--timeout-minutes", 60))
    for (sent,) in kaggle.kernels.values():
        assert sent.request["sessionTimeoutSeconds"] == 3600
        assert '"max_minutes": 55.0' in sent.text


def test_what_a_failed_member_left_is_kept(run_sweep, plans, kaggle, tmp_path):
    plans("E")
    succeeded(run_sweep("--members", 2))
    assert list((tmp_path / "runs" / "unverified").glob("*-s01-v1/manifest.json"))


# ------------------------------------------------------------------------------------------- interrupted
INTERRUPTIONS = {
    "before a push": (Kernels, "push", 2, False),
    "after a push": (Kernels, "push", 2, True),
    "after pushing again": (Kernels, "push", 3, True),
    "while polling": (Kernels, "status", 3, False),
    "while fetching": (Output, "download_verified", 2, True),
    "after fetching": (fetch, "fetch", 1, True),
    "before noting a failure": (Fleet, "fail", 1, False),
    "after noting a failure": (Fleet, "fail", 1, True),
    "while blending": (blend, "answers", 1, False),
    "after blending": (blend, "blend_runs", 1, True),
    "before the record": (fleet, "keep", 1, False),
    "after the record": (fleet, "keep", 1, True),
    **{f"before writing the record, entry {number}": (record, "append", number, False) for number in (2, 6, 7)},
    **{f"after writing the record, entry {number}": (record, "append", number, True) for number in (1, 6, 8)},
}


QUICK = ("after a push", "while fetching", "before noting a failure", "after blending")


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=() if place in QUICK else pytest.mark.slow) for place in INTERRUPTIONS],
)
def test_interrupted_anywhere_nothing_is_pushed_twice_or_lost(run_sweep, plans, kaggle, tmp_path, place):
    plans("E.")
    owner, name, call, after = INTERRUPTIONS[place]
    with stop_at(owner, name, after, call):
        assert run_sweep("--members", 2).returncode == 130
    succeeded(run_sweep("--members", 2))
    assert {ref: len(runs) for ref, runs in kaggle.kernels.items()} == {f"{PIPELINE}-s01": 2, f"{PIPELINE}-s02": 1}
    assert len(record.find(tmp_path / "runs", event="sweep")) == 1
    assert len(record.find(tmp_path / "runs", event="run_failed")) == 1


@pytest.mark.parametrize("call", ["SaveKernel", "GET output"])
def test_a_killed_sweep_goes_on(tool, plans, kaggle, data, tmp_path, call):
    """The push is carried out although the client is dead."""
    plans("E.")
    kaggle.calls = KillAt()
    command = ["sweep", "--members", 2, *common(data, tmp_path)]
    assert kaggle.calls.run(call, tool.start(*command)).returncode == -signal.SIGKILL
    succeeded(tool(*command))
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1, 2]
    assert kaggle.count("SaveKernel") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("lagging")
def test_sweep_killed_at_random_moments_pushes_nothing_twice(tool, plans, kaggle, data, tmp_path):
    plans("E.")
    start = partial(tool.start, "sweep", "--members", 3, *common(data, tmp_path))
    reached = kill_at_random_moments(kaggle.calls, start, kills=6, most=6)
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1, 1, 2]
    names = [name for name, _ in kaggle.calls]
    assert names.count("SaveKernel") == 4
    assert sum(calls < len(names) - names[::-1].index("GET output") for calls in reached) >= 3  # not all was fetched
    (entry,) = record.find(tmp_path / "runs", event="sweep")
    folder = tmp_path / "runs" / entry["run"]
    assert len(check_run(folder).manifest["members"]) == 3
    assert len(record.find(tmp_path / "runs", event="run_failed")) == 1


# ------------------------------------------------------------------------------------------- here
@pytest.mark.slow
def test_local_sweep_goes_on_after_a_failure(tool, data, outputs, tmp_path, kernel, monkeypatch):
    table = tmp_path / "runs.csv"
    table.write_text("recipe,seed,knobs\nclosed_form,0,ridge=0.1\nclosed_form,0,ridge=1 whiten=1\n")
    options = ["--table", table, "--local", "--retries", 0, "--json", "--set=device=cpu", "--set=dtype=float32"]
    command = ["sweep", *options, *common(data, tmp_path)]

    def fail(data: Path, output: Path, *rest: object) -> KernelEnded:
        return KernelEnded(1, "no luck") if output.name == "s02" else run_kernel(data, output, *rest)

    def copy(data: Path, output: Path, *_: object) -> KernelEnded:
        write_tree(output, outputs[0])
        return KernelEnded(0, "")

    monkeypatch.setattr("lib.runs.run_kernel", fail)
    done = succeeded(tool(*command))
    assert "run s02: no luck" in done.stderr
    assert [bool(one["run"]) for one in json.loads(done.stdout)["members"]] == [True, False]
    monkeypatch.setattr("lib.runs.run_kernel", copy)
    done = succeeded(tool(*command))
    check_blend(json.loads(done.stdout), kernel, data)
    assert "s01" not in done.stderr
    assert [bool(one["run"]) for one in json.loads(done.stdout)["members"]] == [True, True]


def test_finished_members_of_other_settings_are_not_taken(tool, data, outputs, tmp_path):
    write_tree(tmp_path / "mine" / "s01", outputs[0])
    command = ["sweep", "--members", 1, "--local", "--output", tmp_path / "mine", *common(data, tmp_path)]
    failed(tool(*command, "--set", "epochs=77"), 2, "s01: holds a finished run of other settings")


def test_a_blend_that_cannot_be_made_leaves_the_one_before(outputs, data, tmp_path):
    folder = write_tree(tmp_path / "run", outputs[0])
    blend_runs([Row("s01", {})], {"s01": folder}, data, tmp_path / "blend")
    before = read_tree(tmp_path / "blend")
    with pytest.raises(InputError, match="trained on other data"):
        blend_runs([Row("s01", {})], {"s01": folder}, draw_data(tmp_path / "other", seed=7), tmp_path / "blend")
    assert read_tree(tmp_path / "blend") == before


# ------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe,sed\nalign,1\n", "expected a header of recipe, seed, knobs"),
        ("recipe,seed\n", "at least one row"),
        ("seed\n1,2\n", "expected a header"),
        ("recipe,seed\nbest,1\n", "unknown recipe 'best'"),
        ("seed,knobs\n1,lr\n", "expected KEY=VALUE"),
        ("\ufeffseed,knobs\n1,lr\n", "expected KEY=VALUE"),  # as spreadsheets write it
        ("seed\n1\n1\n", "run s02 is the same as s01"),
        ("seed,knobs\n1,\n2,split_seed=4\n", "run s02: all runs train, with one split_seed"),
        ("recipe\nalign\nbaseline\n", "run s02: all runs train, with one repulsion"),
        ("seed,knobs\n1,mode=predict\n", "run s01: all runs train"),
    ],
)
def test_wrong_tables_are_refused(tool, tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    failed(tool("sweep", "--table", path, "--local", "--runs", tmp_path), 2, message)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --members N, at least 1, or --table CSV"),
        (["--members", "0"], "give --members N, at least 1, or --table CSV"),
        (["--members", "2", "--table", "t.csv"], "give --members N, at least 1, or --table CSV"),
        (["--members", "2", "--sessions", "0"], "--sessions takes at least 1"),
        (["--table", "/nonexistent.csv"], "not a readable csv"),
    ],
)
def test_wrong_options_are_refused(tool, options, words):
    failed(tool("sweep", *options), 2, words)


# ------------------------------------------------------------------------------------------- the blend
def test_a_blend_of_one_run_is_that_run(outputs, data, tmp_path, kernel):
    """Its repulsion is applied as the kernel does it: the same expected score, the same predictions."""
    folder = write_tree(tmp_path / "run", outputs[0])
    row = Row("s01", {})
    blend_runs([row], {"s01": folder}, data, tmp_path / "blend")
    run, blended = (check_run(path) for path in (folder, tmp_path / "blend"))
    assert run.manifest["knobs"]["repulsion"] > 0
    assert blended.total_seconds > run.total_seconds  # what it cost to train is a part of it
    for name, scores in run.metrics["validation"].items():
        assert blended.metrics["validation"][name] == pytest.approx(scores, rel=1e-3)
    ours, theirs = (read_predictions(one.folder / kernel.SUBMISSION) for one in (blended, run))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_blend_is_older_than_a_member_that_was_made_anew(outputs, data, tmp_path, kernel):
    """Also where its folder has the same name."""
    folders = {"s01": write_tree(tmp_path / "s01", outputs[0])}
    blend_runs([Row("s01", {})], folders, data, tmp_path / "blend")
    assert blended_before(tmp_path / "blend", folders, data)
    (tmp_path / "s01" / kernel.MANIFEST).touch()
    assert not blended_before(tmp_path / "blend", folders, data)


def read_predictions(path: Path) -> np.ndarray:
    with path.open(newline="") as file:
        return np.array([json.loads(row["embedding"]) for row in csv.DictReader(file)])
