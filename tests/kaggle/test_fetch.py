"""Outputs of kernels: fetched whole and verified, late or in pieces, and what a broken version left."""

from __future__ import annotations

import json

import pytest

from account import OUTAGE, PIPELINE, SLUG, WEIGHTS, fetched, versions
from drawn import read_tree
from forked import failed, succeeded
from lib.jobs.fetch import Output
from lib.jobs.push import settings_of
from lib.kaggle_api.kernels import Version
from lib.project import ToolError
from made_runs import made_outputs
from stand_in import Fault, Plan
from stopping import stop_at
from turns import waiting_for


def test_push_wait_fetch_verify(push, kaggle, finished, tmp_path):
    kaggle.plans[0].queued, kaggle.plans[0].running = 2, 3
    kaggle.output_page = 2
    done = succeeded(push("--json"))
    result = json.loads(done.stdout)
    run = str(tmp_path / "runs" / f"{SLUG}-v1")
    assert result == {"kernel": PIPELINE, "version": 1, "status": "complete", "run": run}
    assert fetched(tmp_path) == finished | {"kernel.log": b"epoch 1\nepoch 2\n"}
    assert "version 1: queued" in done.stderr
    assert "version 1: running" in done.stderr
    assert "epoch 2\n" in done.stderr  # the log as it ran


def test_status_and_output_of_an_earlier_version(push, kaggle, finished, tmp_path):
    succeeded(push("--no-wait"))
    kaggle.plans = [Plan(outcome="ERROR", failure="Out of memory")]
    succeeded(push("--no-wait", "--set", "epochs=2"))
    done = succeeded(push("status"))
    assert done.stdout == f"{PIPELINE} version 2: error (Out of memory)\n"
    done = succeeded(push("status", "--version", 1, "--json"))
    assert json.loads(done.stdout)["status"] == "queued"
    succeeded(push("output", "--version", 1))
    assert fetched(tmp_path)["manifest.json"] == finished["manifest.json"]
    assert kaggle.count("SaveKernel") == 2


@pytest.mark.parametrize(
    "fault",
    [Fault(status=403, xml=True), Fault(status=503), Fault(truncate=10), Fault(drop="before"), Fault(html=True)],
    ids=["expired", "503", "cut", "drop", "html"],
)
@pytest.mark.parametrize("which", [0, 2])
def test_downloads_survive_and_are_right(push, kaggle, finished, tmp_path, which, fault):
    kaggle.fail("GET output", *[None] * which, fault)
    succeeded(push())
    assert {name: fetched(tmp_path)[name] for name in finished} == finished


def test_urls_that_expire_while_fetching_are_asked_for_again(push, kaggle, finished, tmp_path, monkeypatch):
    fetch_one = Output.download_verified

    def late(output: Output, *arguments: object) -> None:
        kaggle.expire_urls()
        fetch_one(output, *arguments)

    monkeypatch.setattr(Output, "download_verified", late)
    succeeded(push())
    assert {name: fetched(tmp_path)[name] for name in finished} == finished


def test_a_file_that_a_later_list_lacks_is_looked_for_again(push, kaggle, finished, tmp_path):
    kaggle.fail("ListKernelSessionOutput", None, Fault(json={}))
    kaggle.fail("GET output", Fault(status=403, xml=True))
    succeeded(push())
    assert {name: fetched(tmp_path)[name] for name in finished} == finished


def test_two_fetches_of_the_same_make_one(tool, push, kaggle, finished, tmp_path):
    succeeded(push("--no-wait"))
    command = ["push_kernel", "output", "--version", 1, "--runs", tmp_path / "runs"]
    for one in [tool.start(*command) for _ in range(2)]:
        succeeded(one.wait())
    assert {name: fetched(tmp_path)[name] for name in finished} == finished
    assert kaggle.count("GET output") == len(finished) + 1  # the second one asks the manifest whose the folder is


def test_an_output_that_is_not_what_the_manifest_says_is_not_accepted(push, kaggle, kernel, finished, tmp_path):
    kaggle.plans[0].outputs = finished | {kernel.FINAL_MODEL: finished[kernel.FINAL_MODEL].replace(b"w", b"W")}
    failed(push(), 1, r"pipeline_final_model\.pth has another sha256")
    assert not (tmp_path / "runs" / f"{SLUG}-v1").exists()
    kaggle.kernels[PIPELINE][0].outputs = finished
    succeeded(push())
    assert kaggle.count("SaveKernel") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest.json": None}, r"no manifest\.json among 4 files"),
        ({"pipeline_submission.csv": None}, r"does not list pipeline_submission\.csv"),
        ({"manifest.json": b"{"}, "not the manifest of a run"),
        ({"manifest.json": b'{"complete": true, "outputs": {}}'}, "not the manifest of a run"),
        ({"manifest.json": b'{"complete": true, "outputs": ["metrics.json"]}'}, "not the manifest of a run"),
        ({"manifest.json": b'{"complete": true, "outputs": {"metrics.json": {}}}'}, "not the manifest of a run"),
        ({"metrics.json": b"short"}, r"metrics\.json"),
    ],
)
def test_an_output_that_is_not_whole_is_no_run(push, kaggle, finished, tmp_path, change, words):
    kaggle.plans[0].outputs = {name: data for name, data in (finished | change).items() if data is not None}
    failed(push(), 1, words)
    assert not (tmp_path / "runs" / f"{SLUG}-v1").exists()


def test_a_fetch_that_was_interrupted_goes_on(push, kaggle, finished, tmp_path):
    with stop_at(Output, "download_verified"):
        assert push().returncode == 130
    assert not (tmp_path / "runs" / f"{SLUG}-v1").exists()
    succeeded(push())
    assert versions(kaggle) == 1
    assert fetched(tmp_path).keys() >= finished.keys()


def test_a_fetched_run_that_was_changed_is_not_called_verified(push, kaggle, finished, tmp_path):
    succeeded(push())
    (tmp_path / "runs" / f"{SLUG}-v1" / "metrics.json").write_text("{}")
    failed(push(), 1, r"metrics\.json has 2 bytes.*move the folder away")


def test_the_output_of_a_deleted_kernel_is_not_taken_for_that_of_one_made_anew(push, kaggle, finished, tmp_path):
    """Which begins again at version 1, and so has the same folder."""
    succeeded(push())
    before = fetched(tmp_path)
    del kaggle.kernels[PIPELINE]
    kaggle.plans = [Plan(outputs=made_outputs("another"))]
    go_on = r"move the folder away, then python tools/push_kernel\.py output --version 1"
    failed(push("--again"), 1, f"has .* by the manifest on Kaggle.*{go_on}")
    assert fetched(tmp_path) == before
    (tmp_path / "runs" / f"{SLUG}-v1").rename(tmp_path / "runs" / "deleted")
    succeeded(push("output", "--version", 1))
    assert fetched(tmp_path).items() >= kaggle.plans[0].outputs.items()


def test_what_a_deleted_kernel_left_is_no_state_of_one_made_anew(push, kaggle, kernel, tmp_path):
    kaggle.plans = [broken(kernel, "ERROR")]
    failed(push(), 1)
    del kaggle.kernels[PIPELINE]
    again = broken(kernel, "ERROR")
    del again.outputs["resume_validate_0.pth"]
    again.outputs[kernel.RESUME_RUN] = b'{"fingerprint": "g"}'
    kaggle.plans = [again]
    failed(push("--again"), 1)
    left = read_tree(tmp_path / "runs" / "unverified" / f"{SLUG}-v1")
    assert left == again.outputs | {"kernel.log": b"epoch 1\nstopped\n"}


def test_a_run_that_was_stopped_is_kept_but_is_no_success(push, kaggle, kernel, tmp_path):
    kaggle.plans = [Plan(outputs=made_outputs(complete=False, stopped="SIGTERM"))]
    failed(push(), 1, r"stopped early \(SIGTERM\).*--kernel-source")
    assert kernel.SUBMISSION in fetched(tmp_path)


def test_a_run_that_its_time_budget_ended_is_what_was_asked_for(push, kaggle, kernel, tmp_path):
    """Nothing of it is left to go on from."""
    kaggle.plans = [Plan(outputs=made_outputs(complete=True, stopped="time budget"))]
    succeeded(push())
    assert kernel.SUBMISSION in fetched(tmp_path)


@pytest.mark.parametrize("call", ["ListKernelSessionOutput", "GET output"])
def test_an_output_outlives_minutes_without_an_answer(push, kaggle, finished, tmp_path, call):
    kaggle.fail(call, None, *OUTAGE)
    succeeded(push())
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs" / f"{SLUG}-v1").iterdir()}
    assert {name: files[name] for name in finished} == finished


def test_output_that_shows_late_is_waited_for(push, kaggle, finished):
    kaggle.habits.output_lag, kaggle.habits.manifest_lag = 20, 60
    succeeded(push())
    assert versions(kaggle) == 1


def test_urls_that_expire_again_and_again_are_renewed(push, kaggle, kernel, tmp_path):
    big = b"x" * 2_000_000
    kaggle.plans = [Plan(outputs=made_outputs(submission=big))]
    kaggle.habits.url_bytes = 150_000
    succeeded(push())
    assert (tmp_path / "runs" / f"{SLUG}-v1" / kernel.SUBMISSION).read_bytes() == big


def test_an_empty_log_is_taken_from_the_stream(push, kaggle, finished, tmp_path):
    kaggle.habits.empty_log = True
    succeeded(push())
    assert (tmp_path / "runs" / f"{SLUG}-v1" / "kernel.log").read_text() == "epoch 1\nepoch 2\n"


def test_single_files_of_an_output_are_fetched(push, kaggle, finished, tmp_path):
    succeeded(push("--no-wait"))
    for _ in range(3):
        succeeded(push("status"))
    done = succeeded(push("output", "--only", "metrics.*", "--json"))
    path = tmp_path / "runs" / "unverified" / f"{SLUG}-v1" / "metrics.json"
    assert json.loads(done.stdout) == [{"file": str(path), "state": "verified"}]
    assert path.read_bytes() == finished["metrics.json"]
    failed(push("output", "--only", "*.txt"), 1, r"none of 5 files matches \*\.txt: manifest\.json, ")


def test_two_fetches_of_what_is_left_take_turns(tool, push, kaggle, finished, tmp_path):
    """Both would write the same half-fetched files."""
    succeeded(push())
    runs = tmp_path / "runs"
    (lock,) = (runs / ".locks").glob("output-of-*")
    command = ["push_kernel", "output", "--only", "metrics.*", "--runs", runs]
    with waiting_for(lock, lambda: tool.start(*command)):
        assert not (runs / "unverified").exists()


def broken(kernel, outcome: str) -> Plan:
    """A version that was stopped: its state, and a submission with its manifest."""
    outputs = made_outputs(complete=False, stopped="SIGTERM")
    state = {kernel.RESUME_RUN: b'{"fingerprint": "f"}', "resume_validate_0.pth": b"\0state"}
    return Plan(running=1, outcome=outcome, outputs=outputs | state, log="epoch 1\nstopped\n")


@pytest.mark.parametrize("outcome", ["CANCEL_ACKNOWLEDGED", "ERROR"])
def test_what_a_stopped_version_left_is_fetched_apart_and_named(push, kaggle, kernel, tmp_path, outcome):
    kaggle.plans = [broken(kernel, outcome)]
    done = failed(push(), 1, r"submission verifies.*submit\.py .*ship\.py --resume 1")
    folder = tmp_path / "runs" / "unverified" / f"{SLUG}-v1"
    assert str(folder) in done.error
    assert (folder / "resume_validate_0.pth").read_bytes() == b"\0state"
    assert not list((tmp_path / "runs").glob("aml-*"))


def test_the_command_that_submits_it_can_be_copied_as_it_is(push, kaggle, kernel, tmp_path):
    kaggle.plans = [broken(kernel, "ERROR")]
    folder = tmp_path / "my runs" / "unverified" / f"{SLUG}-v1"
    failed(push("--runs", tmp_path / "my runs"), 1, f"python tools/submit.py '{folder}'; ")


@pytest.mark.parametrize("literal", ['{"epochs": many}', '{"epochs"}'])
def test_settings_that_cannot_be_read_are_one_line(kaggle, client, tmp_path, literal):
    kaggle.rpc("SaveKernel", {"slug": PIPELINE, "text": f"OVERRIDES: dict = {literal}"})
    with pytest.raises(ToolError, match="repeat them with --recipe and --set"):
        settings_of(client, Version(PIPELINE, 1), tmp_path)


def test_ship_goes_on_from_what_a_stopped_version_left(run_ship, kaggle, kernel, weights):
    good = kaggle.plans[0]
    kaggle.plans = [broken(kernel, "CANCEL_ACKNOWLEDGED"), good]
    failed(run_ship("--recipe", "align", "--set", "epochs=3", "--timeout-minutes", 60), 1, r"--resume 1")
    succeeded(run_ship("--resume", 1))
    first, sent = kaggle.kernels[PIPELINE]
    assert first.request["sessionTimeoutSeconds"] == 3600
    assert '"max_minutes": 55.0' in first.text
    assert sent.request["datasetDataSources"] == [WEIGHTS]
    assert 'OVERRIDES: dict = {"recipe": "align", "epochs": 3}' in sent.text
    assert kaggle.datasets[WEIGHTS].versions[0].files["resume_validate_0.pth"] == b"\0state"
    succeeded(run_ship("--resume", 1))
    assert (versions(kaggle), len(kaggle.datasets[WEIGHTS].versions)) == (2, 1)


def test_there_must_be_a_state_to_resume_from(run_ship, kaggle, weights):
    succeeded(run_ship("--recipe", "align"))
    failed(run_ship("--resume", 1), 2, "nothing to go on from")
    failed(run_ship("--resume", 7), 2, "has no version 7")
