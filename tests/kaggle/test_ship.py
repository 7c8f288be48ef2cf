"""From the repository's state to a score: end to end with the real kernel, and interrupted at every step."""

import json
import signal
from pathlib import Path

import pytest

from account import PIPELINE, WEIGHTS
from drawn import CLOSED, write_tree
from forked import failed, succeeded
from lib.jobs import dataset, fetch, submission
from lib.jobs.fetch import Output
from lib.kaggle_api.competitions import Competitions
from lib.kaggle_api.kernels import Kernels
from lib.runs import damaged_files
from made_runs import made_outputs
from stand_in import Fault, Plan, SubmissionState
from stopping import KillAt, stop_at


def done_once(kaggle, competition) -> None:
    """Nothing was uploaded, pushed or submitted twice, and the submission has its score."""
    assert len(kaggle.datasets[WEIGHTS].versions) == 1
    assert len(kaggle.kernels[PIPELINE]) == 1
    assert len(competition.submissions) == 1
    assert competition.submissions[0].public is not None


# -------------------------------------------------------------------------------------------- end to end
@pytest.mark.slow
def test_from_the_repository_to_a_score(run_ship, kaggle, kernel, competition, client, tmp_path):
    kaggle.plans = [Plan(queued=1, run=True)]
    result = json.loads(succeeded(run_ship(*CLOSED, "--json")).stdout)
    board = client.competitions.leaderboard("aml-competition")
    assert board[0] == pytest.approx(result["public"], abs=1e-4)
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
    again = json.loads(succeeded(run_ship("--weights", folder, "--set", "device=cpu", "--json")).stdout)
    assert again == result | {"version": 2, "run": str(folder)[:-1] + "2"}
    assert len(competition.submissions) == 1


# ------------------------------------------------------------------------------------------- step by step
def test_every_step_is_done_once_and_a_re_run_only_reports(run_ship, kaggle, competition, weights):
    first = succeeded(run_ship("--weights", weights, "--json"))
    assert "== package" in first.stderr
    assert "== push" in first.stderr
    assert "== submit" in first.stderr
    assert kaggle.kernels[PIPELINE][0].request["datasetDataSources"] == [WEIGHTS]
    assert 'OVERRIDES: dict = {"mode": "predict"}' in kaggle.kernels[PIPELINE][0].text
    done_once(kaggle, competition)
    again = succeeded(run_ship("--weights", weights, "--json"))
    assert json.loads(again.stdout) == json.loads(first.stdout)
    done_once(kaggle, competition)


def test_pushed_anew_the_same_csv_is_not_submitted_twice(run_ship, kaggle, competition, weights):
    succeeded(run_ship("--weights", weights))
    succeeded(run_ship("--weights", weights, "--again"))
    assert len(kaggle.kernels[PIPELINE]) == 2
    assert len(competition.submissions) == 1


def test_predict_takes_the_newest_weights(run_ship, kaggle, competition, weights):
    succeeded(run_ship("--set", "mode=predict"))
    done_once(kaggle, competition)


def test_with_no_submit_it_stops_before_the_submission(run_ship, kaggle, competition, weights):
    assert "verified output in" in succeeded(run_ship("--weights", weights, "--no-submit")).stdout
    assert not competition.submissions
    assert "public score" in succeeded(run_ship("--weights", weights)).stdout
    done_once(kaggle, competition)


def test_the_validation_is_that_of_the_run_whatever_is_staged_meanwhile(
    run_ship, kaggle, competition, weights, builds, monkeypatch, tmp_path
):
    inputs = json.loads(kaggle.plans[0].outputs["manifest.json"])["inputs"]
    csv = (tmp_path / "made.csv").read_bytes()
    kaggle.plans[0].outputs = made_outputs(validation={}, submission=csv, inputs=inputs)  # it only predicted
    collect = fetch.collect

    def meanwhile(*arguments: object) -> Path:
        (builds / "dataset" / "metrics.json").write_text('{"validation": {"pool100_raw": {"mrr": 0.1}}}')
        return collect(*arguments)

    monkeypatch.setattr(fetch, "collect", meanwhile)
    assert json.loads(succeeded(run_ship("--weights", weights, "--json")).stdout)["validation"] == 0.75


PLACES = [  # the moment before one of them is about that after the one above
    (dataset, "upload"),
    (dataset, "wait_ready"),
    (Kernels, "push"),
    (fetch, "wait_for_end"),
    (Output, "download_verified"),
    (fetch, "fetch"),
    (submission, "check_csv"),
    (Competitions, "submit_file"),
    (Competitions, "wait_for_score"),
]


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_interrupted_anywhere_the_same_command_goes_on(run_ship, kaggle, competition, weights, owner, name, after):
    with stop_at(owner, name, after):
        assert run_ship("--weights", weights).returncode == 130
    succeeded(run_ship("--weights", weights))
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
    succeeded(run_ship("--weights", weights))
    done_once(kaggle, competition)


@pytest.mark.parametrize("call", ["CreateDataset", "SaveKernel", "CreateSubmission"])
def test_killed_where_it_is_worst_nothing_is_done_twice(tool, kaggle, competition, weights, tmp_path, call):
    """The call is carried out although the client is dead."""
    kaggle.calls = KillAt()
    command = ["ship", "--weights", weights, "--runs", tmp_path / "runs", "--data", tmp_path / "data"]
    assert kaggle.calls.run(call, tool.start(*command)).returncode == -signal.SIGKILL
    succeeded(tool(*command))
    done_once(kaggle, competition)
    assert kaggle.count(call) == 1


# ----------------------------------------------------------------------------------------------- failures
def test_no_submissions_left_loses_nothing(run_ship, kaggle, competition, weights):
    competition.daily_limit = 1
    by_hand = SubmissionState(ref=77, file_name="a.csv", description="by hand", data=b"", polls_left=0, public=0.1)
    competition.submissions.append(by_hand)
    failed(run_ship("--weights", weights), 1, "no submissions left today")
    competition.daily_limit = 5
    competition.submissions.clear()
    succeeded(run_ship("--weights", weights))
    done_once(kaggle, competition)


def test_a_failed_kernel_submits_nothing(run_ship, kaggle, competition):
    kaggle.plans = [Plan(outcome="ERROR", failure="out of memory", log="Traceback\nRuntimeError: x\n")]
    failed(run_ship(), 1, "version 1 failed: out of memory")
    assert not competition.submissions


def test_a_kernel_that_used_other_weights_is_not_submitted(run_ship, kaggle, kernel, competition, weights):
    stale = {kernel.FINAL_MODEL: {"sha256": "0" * 64, "bytes": 1}}
    kaggle.plans[0].outputs = made_outputs(inputs=stale)
    failed(run_ship("--weights", weights), 1, f"predicted with other weights than {WEIGHTS} holds")
    assert not competition.submissions


def test_a_csv_of_another_dimension_is_not_submitted(run_ship, kaggle, kernel, competition, weights):
    kaggle.plans[0].outputs = made_outputs()
    failed(run_ship("--recipe", "align"), 2, kernel.SUBMISSION)
    assert not competition.submissions


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--weights", "nothing"], "no readable manifest.json"), (["--set", "epoch=1"], "did you mean epochs")],
)
def test_wrong_input_pushes_nothing(run_ship, kaggle, options, words):
    failed(run_ship(*options), 2, words)
    assert kaggle.count("SaveKernel") == 0


@pytest.mark.parametrize("options", [["--recipe", "align"], ["--set", "mode=train"]])
def test_weights_are_predicted_with_by_their_own_recipe(run_ship, kaggle, weights, options):
    failed(run_ship("--weights", weights, *options), 2, "--weights predicts with the run's own recipe")
    assert kaggle.calls == []


def test_a_run_without_weights_yet_is_told_before_anything_is_sent(run_ship, kaggle, kernel, tmp_path):
    stopped = write_tree(tmp_path / "stopped", {kernel.RESUME_RUN: b"{}", "resume_validate_0.pth": b"state"})
    failed(run_ship("--weights", stopped), 2, r"stopped: .* no pipeline_final_model\.pth")
    assert kaggle.calls == []


def test_minutes_that_kaggle_does_not_have_are_told_before_anything_is_sent(run_ship, kaggle, weights):
    failed(run_ship("--weights", weights, "--timeout-minutes", 721), 2, "at most 720")
    assert kaggle.calls == []


def test_a_failure_is_one_line_and_nothing_on_stdout(run_ship):
    done = failed(run_ship("--set", "epoch=1"), 2, "unknown knob 'epoch'")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
