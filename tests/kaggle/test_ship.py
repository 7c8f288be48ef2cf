"""From the repository's state to a score: end to end with the real kernel, and interrupted at every step."""

import json
import signal
import subprocess
import sys

import pytest

import ship
from kaggle_runs import (
    QUICK,
    KillAt,
    copy_of_the_repo,
    outputs_of_run,
)
from lib.jobs import dataset, fetch, submission
from lib.jobs.fetch import Output
from lib.kaggle_api.competitions import Competitions
from lib.kaggle_api.kernels import Kernels
from lib.project import InputError, ToolError
from lib.runs import damaged_files
from stand_in import Fault, Plan

KERNEL = "tester/aml-text-to-image-alignment"
DATASET = "tester/aml-alignment-weights"


def done_once(kaggle, competition) -> None:
    """Nothing was uploaded, pushed or submitted twice, and the submission has its score."""
    assert len(kaggle.datasets[DATASET].versions) == 1
    assert len(kaggle.kernels[KERNEL]) == 1
    assert len(competition.submissions) == 1
    assert competition.submissions[0].public is not None


# -------------------------------------------------------------------------------------------- end to end
@pytest.mark.slow
def test_from_the_repository_to_a_score(run_ship, kaggle, kernel, competition, client, tmp_path, capsys):
    kaggle.plans = [Plan(queued=1, run=True)]
    assert run_ship(*QUICK, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    board = client.competitions.leaderboard("aml-competition")
    assert board[0][2] == pytest.approx(result["public"], abs=1e-4)
    assert result["public"] > 0.5  # chance is .05
    assert result["validation"] > 0.5

    folder = tmp_path / "runs" / "aml-text-to-image-alignment-v1"
    assert result["run"] == str(folder)
    manifest = json.loads((folder / kernel.MANIFEST).read_text())
    assert damaged_files(folder, manifest["outputs"]) == []
    assert manifest["knobs"]["recipe"] == "closed_form"
    assert competition.submissions[0].data == (folder / kernel.SUBMISSION).read_bytes()
    events = [json.loads(line) for line in (tmp_path / "runs" / "record.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["push_started", "pushed", "submitting", "submitted", "scored"]
    assert events[-1]["public"] == result["public"]

    # The weights of that run, packaged and predicted with on Kaggle in the older mount layout: the same csv, so no
    # second submission of it.
    kaggle.mount_layout = "old"
    assert run_ship("--weights", folder, "--set", "device=cpu", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == result | {"version": 2, "run": str(folder)[:-1] + "2"}
    assert len(competition.submissions) == 1


# ------------------------------------------------------------------------------------------- step by step
def test_every_step_is_done_once_and_a_re_run_only_reports(run_ship, kaggle, competition, weights, capsys):
    assert run_ship("--weights", weights, "--json") == 0
    first = capsys.readouterr()
    assert "== package" in first.err
    assert "== push" in first.err
    assert "== submit" in first.err
    assert kaggle.kernels[KERNEL][0].request["datasetDataSources"] == [DATASET]
    assert 'OVERRIDES: dict = {"mode": "predict"}' in kaggle.kernels[KERNEL][0].text
    done_once(kaggle, competition)
    assert run_ship("--weights", weights, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first.out)
    done_once(kaggle, competition)


def test_predict_takes_the_newest_weights(run_ship, kaggle, competition, weights):
    assert run_ship("--set", "mode=predict") == 0
    done_once(kaggle, competition)


def test_no_submit(run_ship, kaggle, competition, weights, capsys):
    assert run_ship("--weights", weights, "--no-submit") == 0
    assert "verified output in" in capsys.readouterr().out
    assert not competition.submissions
    assert run_ship("--weights", weights) == 0
    assert "public score" in capsys.readouterr().out
    done_once(kaggle, competition)


INTERRUPTIONS = {
    "before the upload": (dataset, "upload", False),
    "after the upload": (dataset, "upload", True),
    "dataset not ready": (dataset, "wait_ready", False),
    "before the push": (Kernels, "push", False),
    "after the push": (Kernels, "push", True),
    "while it runs": (fetch, "wait_for_end", False),
    "while fetching": (Output, "download_verified", True),
    "after fetching": (fetch, "fetch", True),
    "before submitting": (submission, "check_csv", False),
    "submission not sent": (Competitions, "submit_file", False),
    "after submitting": (Competitions, "submit_file", True),
    "before the score": (Competitions, "wait_for_score", False),
    "after the score": (Competitions, "wait_for_score", True),
}


@pytest.mark.parametrize("place", INTERRUPTIONS)
def test_interrupted_anywhere_the_same_command_goes_on(run_ship, kaggle, competition, weights, monkeypatch, place):
    owner, name, takes_effect = INTERRUPTIONS[place]
    original = getattr(owner, name)

    def interrupt(*arguments: object, **options: object) -> None:
        if takes_effect:
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_ship("--weights", weights)
    assert run_ship("--weights", weights) == 0
    done_once(kaggle, competition)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("CreateDataset", Fault(drop="after")),
        ("PUT blob", Fault(drop="before", keep=20)),
        ("SaveKernel", Fault(drop="after")),
        ("GetKernelSessionStatus", Fault(status=503)),
        ("GET output", Fault(truncate=10)),
        ("CreateSubmission", Fault(drop="after")),
        ("GetSubmission", Fault(status=429, retry_after="0")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_on_the_way_are_survived(run_ship, kaggle, competition, weights, call, fault):
    kaggle.fail(call, fault)
    assert run_ship("--weights", weights) == 0
    done_once(kaggle, competition)


@pytest.mark.slow
def test_killed_where_it_is_worst_nothing_is_done_twice(kaggle, competition, weights, tmp_path):
    repo = copy_of_the_repo(tmp_path / "repo")
    command = [sys.executable, repo / "tools" / "ship.py", "--weights", weights, "--runs", tmp_path / "runs"]
    kaggle.calls = KillAt()
    for name in ("CreateDataset", "SaveKernel", "CreateSubmission", ""):  # carried out although the client is dead
        kaggle.calls.name = name
        kaggle.calls.victim = subprocess.Popen([*command, "--data", tmp_path / "data"], stderr=subprocess.DEVNULL)
        assert kaggle.calls.victim.wait(timeout=120) == (-signal.SIGKILL if name else 0)
    done_once(kaggle, competition)
    assert (kaggle.count("SaveKernel"), kaggle.count("CreateSubmission")) == (1, 1)


# ----------------------------------------------------------------------------------------------- failures
def test_no_submissions_left_loses_nothing(run_ship, kaggle, competition, weights):
    competition.daily_limit = 1
    competition.submissions.append(competition_submission())
    with pytest.raises(ToolError, match="no submissions left today"):
        run_ship("--weights", weights)
    competition.daily_limit = 5
    competition.submissions.clear()
    assert run_ship("--weights", weights) == 0
    done_once(kaggle, competition)


def competition_submission():
    """A submission of today that came from elsewhere."""
    from stand_in import SubmissionState

    return SubmissionState(ref=77, file_name="a.csv", description="by hand", data=b"", polls_left=0, public=0.1)


def test_a_failed_kernel_submits_nothing(run_ship, kaggle, competition):
    kaggle.plans = [Plan(outcome="ERROR", failure="out of memory", log="Traceback\nRuntimeError: x\n")]
    with pytest.raises(ToolError, match="version 1 failed: out of memory"):
        run_ship()
    assert not competition.submissions


def test_a_kernel_that_used_other_weights_is_not_submitted(run_ship, kaggle, kernel, competition, weights):
    stale = {kernel.FINAL_MODEL: {"sha256": "0" * 64, "bytes": 1}}
    kaggle.plans[0].outputs = outputs_of_run(kernel, inputs=stale)
    with pytest.raises(ToolError, match=f"predicted with other weights than {DATASET} holds"):
        run_ship("--weights", weights)
    assert not competition.submissions


def test_a_csv_of_another_dimension_is_not_submitted(run_ship, kaggle, kernel, competition, weights):
    kaggle.plans[0].outputs = outputs_of_run(kernel)
    with pytest.raises(Exception, match=kernel.SUBMISSION) as error:
        run_ship("--recipe", "align")
    assert error.value.exit_code == 2
    assert not competition.submissions


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--weights", "nothing"], "no readable manifest.json"), (["--set", "epoch=1"], "did you mean epochs")],
)
def test_bad_input(run_ship, kaggle, options, words):
    with pytest.raises(Exception, match=words) as error:
        run_ship(*options)
    assert error.value.exit_code == 2
    assert kaggle.count("SaveKernel") == 0


def test_no_credentials(tmp_path):
    with pytest.raises(InputError, match="no Kaggle credentials"):
        ship.main(["--runs", str(tmp_path)])


def test_as_a_process_a_failure_is_one_line_and_its_exit_code(run_tool_process):
    done = run_tool_process("ship", "--set", "epoch=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown knob 'epoch'")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        ship.main(["--help"])
    assert "python tools/ship.py --recipe" in capsys.readouterr().out
