"""sweep: many members over stand-in sessions, failing, full, interrupted and killed; and the blend itself."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sweep
from drawn import TINY, draw_data
from forked import KernelServer
from kaggle_runs import KillAt, copy_of_the_repo, kill_at_random_moments, write_tree
from lib import record
from lib.jobs import blend, fetch
from lib.jobs.blend import blend_runs
from lib.jobs.fetch import Output
from lib.jobs.fleet import Fleet, Row
from lib.kaggle_api.kernels import Kernels
from lib.process import Ended, run_kernel
from lib.project import InputError, ToolError
from lib.runs import check_run
from stand_in import Fault, Plan

SLUG = "tester/aml-text-to-image-alignment"
FULL = Fault(json={"error": "Maximum batch GPU session count of 2 reached."})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("drawn"), images=420)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, data) -> list[dict[str, bytes]]:
    """What three trainings of different seeds write, each with 200 images held out."""
    server, found = KernelServer(tmp_path_factory.mktemp("server")), []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("trained")
        done = server.run("--input", data, "--output", folder, *TINY, f"--set=seed={seed}", "--set=val_fraction=0.5")
        assert done.returncode == 0, done.stderr
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    server.close()
    return found


@pytest.fixture
def plans(kaggle, outputs, tmp_path, monkeypatch) -> Callable[[str], None]:
    """The coming pushes by letter: . succeeds, E ends in an error, T lacks a file that its manifest names."""
    kaggle.competitions["aml-competition"].files = {"x": b""}
    monkeypatch.setattr("lib.jobs.fleet.BUILD", tmp_path / "build")

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
def run_sweep(plans, data, tmp_path) -> Callable[..., int]:
    fixed = ["--runs", str(tmp_path / "runs"), "--data", str(data), "--set", "val_fraction=0.5"]
    return lambda *options: sweep.main([*map(str, options), *fixed])


def check_blend(result: dict, kernel, data: Path) -> None:
    """The submission is valid for the test set, and is vouched for."""
    test = kernel.read_test(kernel.find_file(data, "test.clean.npz"))
    kernel.check_submission(Path(result["submission"]), test.caption_ids, test.image_dim)
    run = check_run(Path(result["run"]))
    assert run.metrics["validation"]["pool100_raw"]["mrr"] == result["expected_mrr"] > 0.1  # chance is .05


# ------------------------------------------------------------------------------------------- on Kaggle
@pytest.mark.slow
def test_eight_members_two_of_them_failing(run_sweep, plans, kaggle, kernel, data, tmp_path, capsys, monkeypatch):
    plans(".E..T")
    kaggle.session_limit = 3
    at_once, save = [], kaggle.rpc_SaveKernel

    def watch(body: dict) -> dict:
        at_once.append(sum(one.status in ("QUEUED", "RUNNING") for runs in kaggle.kernels.values() for one in runs))
        return save(body)

    monkeypatch.setattr(kaggle, "rpc_SaveKernel", watch)
    assert run_sweep("--members", 8, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    check_blend(result, kernel, data)
    assert len(result["members"]) == 8
    assert all(member["run"] for member in result["members"])
    assert sum(member["weight"] for member in result["members"]) == pytest.approx(1, abs=0.01)
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1] * 6 + [2] * 2
    assert max(at_once) == 3
    assert at_once.count(3) == 1
    assert set(kaggle.kernels) == {f"{SLUG}-s{k:02}" for k in range(1, 9)}
    assert '"seed": 3' in kaggle.kernels[f"{SLUG}-s04"][0].text
    (entry,) = record.find(tmp_path / "runs", event="sweep")
    assert entry["validation"] == result["expected_mrr"]
    assert len(entry["members"]) == 8

    assert run_sweep("--members", 8, "--json") == 0
    assert json.loads(capsys.readouterr().out) == result
    assert kaggle.count("SaveKernel") == 11
    assert len(record.find(tmp_path / "runs", event="sweep")) == 1


def test_members_that_keep_failing_are_left_out(run_sweep, plans, kaggle, capsys):
    plans("E.E.")
    assert run_sweep("--members", 4, "--retries", 0) == 0
    out, err = capsys.readouterr()
    assert "2 of 4 runs in one checked submission" in out
    assert out.count("failed") == 6
    assert len(re.findall("out of luck .*; giving it up", err)) == 2
    assert run_sweep("--members", 4, "--retries", 0) == 0
    assert kaggle.count("SaveKernel") == 4


def test_all_fail(run_sweep, kaggle, outputs, tmp_path):
    kaggle.plans = [Plan(outcome="ERROR", failure="out of luck")]
    with pytest.raises(ToolError, match="every run failed, the first one: out of luck"):
        run_sweep("--members", 2, "--retries", 1)
    assert kaggle.count("SaveKernel") == 4
    assert not list((tmp_path / "runs").glob("sweep-*"))


def test_full_sessions_are_waited_for(run_sweep, kaggle, capsys):
    kaggle.fail("SaveKernel", FULL, None, FULL)
    assert run_sweep("--members", 3) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 runs" in out
    assert err.count("waiting for a free session") == 2
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1, 1]


def test_other_refusals_are_errors(run_sweep, kaggle):
    kaggle.push_error = "Phone verification is required"
    with pytest.raises(ToolError, match="Phone verification"):
        run_sweep("--members", 3)


def test_used_up_quota_keeps_what_is_done(run_sweep, kaggle, monkeypatch):
    kaggle.gpu_used_hours, save = 29.0, kaggle.rpc_SaveKernel

    def use_up(body: dict) -> dict:
        kaggle.gpu_used_hours += 0.5
        return save(body)

    monkeypatch.setattr(kaggle, "rpc_SaveKernel", use_up)
    with pytest.raises(ToolError, match=r"GPU quota used up.*2 done, 0 running, 1 waiting.*goes on later"):
        run_sweep("--members", 3)
    kaggle.gpu_used_hours = 0.0
    assert run_sweep("--members", 3) == 0
    assert kaggle.count("SaveKernel") == 3


def test_runs_of_other_data_are_refused(run_sweep, plans, tmp_path):
    other = draw_data(tmp_path / "other", seed=7)
    with pytest.raises(InputError, match="trained on other data"):
        sweep.main(["--members", "2", "--runs", str(tmp_path / "runs"), "--data", str(other)])


def test_missing_data_is_told_before_anything_is_pushed(plans, kaggle, tmp_path):
    with pytest.raises(Exception, match="no such input folder") as caught:
        sweep.main(["--members", "2", "--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "none")])
    assert caught.value.exit_code == 2
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
    assert run_sweep("--members", 2) == 0
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


def test_one_push_that_fails_leaves_no_other_row_unpushed(run_sweep, kaggle):
    kaggle.fail("SaveKernel", Fault(status=500), None, Fault(status=500, after=True))
    assert run_sweep("--members", 4) == 0
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1] * 4


def test_a_completed_member_whose_output_shows_late_is_not_pushed_again(run_sweep, kaggle):
    kaggle.habits.output_lag, kaggle.habits.manifest_lag, kaggle.habits.session_lag = 20, 60, 30
    assert run_sweep("--members", 2) == 0
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


def test_a_session_that_runs_for_ever_is_given_up_and_not_pushed_again(run_sweep, kaggle, capsys):
    kaggle.plans = [Plan(running=10**9), *kaggle.plans]
    assert run_sweep("--members", 2, "--timeout-minutes", 1) == 0
    out, err = capsys.readouterr()
    assert "for longer than a session can be" in err
    assert "1 of 2 runs" in out
    assert [len(runs) for runs in kaggle.kernels.values()] == [1, 1]


def test_members_are_told_their_session_s_time(run_sweep, kaggle):
    assert run_sweep("--members", 2, "--timeout-minutes", 60) == 0
    for (sent,) in kaggle.kernels.values():
        assert sent.request["sessionTimeoutSeconds"] == 3600
        assert '"max_minutes": 55.0' in sent.text


def test_what_a_failed_member_left_is_kept(run_sweep, plans, kaggle, tmp_path):
    plans("E")
    assert run_sweep("--members", 2) == 0
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
    "after blending": (sweep, "blend_runs", 1, True),
    "before the record": (sweep, "keep", 1, False),
    "after the record": (sweep, "keep", 1, True),
    **{f"before writing the record, entry {number}": (record, "append", number, False) for number in (2, 6, 7)},
    **{f"after writing the record, entry {number}": (record, "append", number, True) for number in (1, 6, 8)},
}


@pytest.mark.parametrize("place", INTERRUPTIONS)
def test_interrupted_anywhere_nothing_is_pushed_twice_or_lost(run_sweep, plans, kaggle, tmp_path, monkeypatch, place):
    plans("E.")
    owner, name, number, takes_effect = INTERRUPTIONS[place]
    original, count = getattr(owner, name), 0

    def interrupt(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        result = original(*arguments, **options) if count != number or takes_effect else None
        if count == number:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_sweep("--members", 2)
    assert run_sweep("--members", 2) == 0
    assert {ref: len(runs) for ref, runs in kaggle.kernels.items()} == {f"{SLUG}-s01": 2, f"{SLUG}-s02": 1}
    assert len(record.find(tmp_path / "runs", event="sweep")) == 1
    assert len(record.find(tmp_path / "runs", event="run_failed")) == 1


@pytest.mark.slow
def test_killed_sweep_goes_on(plans, kaggle, data, tmp_path):
    repo = copy_of_the_repo(tmp_path / "repo")
    command = [
        sys.executable,
        repo / "tools" / "sweep.py",
        "--members=2",
        "--runs",
        tmp_path / "runs",
        "--data",
        data,
        "--set=val_fraction=0.5",
    ]
    plans("E.")
    kaggle.calls = KillAt()
    for name in ("SaveKernel", "GET output", ""):  # the push is carried out although the client is dead
        kaggle.calls.name = name
        kaggle.calls.victim = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert kaggle.calls.victim.wait(timeout=120) == (-signal.SIGKILL if name else 0)
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1, 2]
    assert kaggle.count("SaveKernel") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("lagging")
def test_sweep_killed_at_random_moments_pushes_nothing_twice(plans, kaggle, data, tmp_path):
    repo = copy_of_the_repo(tmp_path / "repo")
    command = [
        sys.executable,
        repo / "tools" / "sweep.py",
        "--members=3",
        "--runs",
        tmp_path / "runs",
        "--data",
        data,
        "--set=val_fraction=0.5",
    ]
    plans("E.")
    reached = kill_at_random_moments(kaggle.calls, command, kills=6, most=6)
    assert sorted(len(runs) for runs in kaggle.kernels.values()) == [1, 1, 2]
    names = [name for name, _ in kaggle.calls]
    assert names.count("SaveKernel") == 4
    assert sum(calls < len(names) - names[::-1].index("GET output") for calls in reached) >= 3  # not all was fetched
    (entry,) = record.find(tmp_path / "runs", event="sweep")
    folder = tmp_path / "runs" / entry["run"]
    assert len(check_run(folder).manifest["members"]) == 3
    assert len(record.find(tmp_path / "runs", event="run_failed")) == 1


# ------------------------------------------------------------------------------------------- here
def test_local_sweep_goes_on_after_a_failure(data, outputs, tmp_path, kernel, capfd, monkeypatch):
    table = tmp_path / "runs.csv"
    table.write_text("recipe,seed,knobs\nclosed_form,0,ridge=0.1\nclosed_form,0,ridge=1 whiten=1\n")
    command = [
        "--table",
        str(table),
        "--local",
        "--data",
        str(data),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        "--set",
        "device=cpu",
        "--set",
        "dtype=float32",
        "--set",
        "val_fraction=0.5",
        "--retries",
        "0",
    ]
    real, made = run_kernel, {"s02": Ended(1, "no luck")}

    def run(data: Path, output: Path, *rest: object) -> Ended:
        return made.get(output.name) or real(data, output, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("lib.runs.run_kernel", run)
        assert sweep.main(command) == 0
    out, err = capfd.readouterr()
    assert "run s02: no luck" in err
    assert [bool(one["run"]) for one in json.loads(out)["members"]] == [True, False]

    def copy(data: Path, output: Path, *rest: object) -> Ended:
        for name, content in outputs[0].items():
            (output / name).write_bytes(content)
        return Ended(0, "")

    monkeypatch.setattr("lib.runs.run_kernel", copy)
    assert sweep.main(command) == 0
    out, err = capfd.readouterr()
    check_blend(json.loads(out), kernel, data)
    assert "s01" not in err
    assert all(one["run"] for one in json.loads(out)["members"])


# ------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe,sed\nalign,1\n", "expected a header of recipe, seed, knobs"),
        ("recipe,seed\n", "at least one row"),
        ("seed\n1,2\n", "expected a header"),
        ("recipe,seed\nbest,1\n", "unknown recipe 'best'"),
        ("seed,knobs\n1,lr\n", "expected KEY=VALUE"),
        ("seed\n1\n1\n", "run s02 is the same as s01"),
        ("seed,knobs\n1,\n2,split_seed=4\n", "run s02: all runs train, with one split_seed"),
        ("recipe\nalign\nbaseline\n", "run s02: all runs train, with one repulsion"),
        ("seed,knobs\n1,mode=predict\n", "run s01: all runs train"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(Exception, match=message) as caught:
        sweep.main(["--table", str(path), "--local", "--runs", str(tmp_path)])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "options", [[], ["--members", "0"], ["--members", "2", "--sessions", "0"], ["--table", "/nonexistent.csv"]]
)
def test_bad_options(options):
    with pytest.raises(InputError):
        sweep.main(options)


# ------------------------------------------------------------------------------------------- the blend
def test_a_blend_of_one_run_is_that_run(outputs, data, tmp_path, kernel):
    """Its repulsion is applied as the kernel does it: the same expected score, the same predictions."""
    folder = write_tree(tmp_path / "run", outputs[0])
    row = Row("s01", {})
    blend_runs([row], {"s01": folder}, data, tmp_path / "blend")
    run, blended = (check_run(path) for path in (folder, tmp_path / "blend"))
    assert run.manifest["knobs"]["repulsion"] > 0
    for name, scores in run.metrics["validation"].items():
        assert blended.metrics["validation"][name] == pytest.approx(scores, rel=1e-3)
    ours, theirs = (read_predictions(one.folder / kernel.SUBMISSION) for one in (blended, run))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def read_predictions(path: Path) -> np.ndarray:
    with path.open(newline="") as file:
        return np.array([json.loads(row["embedding"]) for row in csv.DictReader(file)])
