"""Pushing: what is sent, that it is sent once, that exactly its version is followed, fetched and verified."""

import ast
import json
import re

import pytest

from account import PIPELINE, SLUG, fetched, versions
from drawn import write_tree
from forked import failed, succeeded
from lib.jobs import lint
from lib.jobs.lint import KERNEL_METADATA, OWNER_PLACEHOLDER
from lib.kaggle_api.kernels import Kernels
from lib.project import KERNEL
from stand_in import Fault, Plan
from stopping import stop_at

FAULTS_THAT_PASS = [Fault(status=503), Fault(status=429, retry_after="0"), Fault(drop="before"), Fault(html=True)]


# ---------------------------------------------------------------------------------------------- staging
def test_what_is_pushed_is_the_script_with_its_overrides_and_the_metadata(push, kaggle, finished):
    settings = ["--set", "epochs=5", "--set", "refit=false", "--set", "lr=0.002"]
    done = succeeded(push("--recipe", "baseline", *settings, "--no-wait"))
    sent = kaggle.kernels[PIPELINE][0]
    original = KERNEL.read_text()
    line = 'OVERRIDES: dict = {"recipe": "baseline", "epochs": 5, "refit": False, "lr": 0.002}'
    assert sent.text.rpartition("# order ")[0] == original.replace("OVERRIDES: dict = {}", line)
    ast.parse(sent.text)
    request = sent.request
    assert request["isPrivate"]
    assert request["enableGpu"]
    assert request["machineShape"] == "NvidiaTeslaT4"
    assert request.get("enableInternet", False) is False
    assert request["competitionDataSources"] == ["aml-competition"]
    assert request["newTitle"] == "AML Text to Image Alignment"
    assert f"{PIPELINE} version 1: pushed" in done.stdout


def test_an_accelerator_is_asked_for_by_a_name_that_kaggle_has(push, kaggle, finished):
    succeeded(push("--accelerator", "none", "--no-wait"))
    succeeded(push("--accelerator", "TpuV5E8", "--no-wait"))
    without, tpu = (run.request for run in kaggle.kernels[PIPELINE])
    assert "machineShape" not in without
    assert not without.get("enableGpu")
    assert tpu["machineShape"] == "TpuV5E8"
    failed(push("--accelerator", "NvidiaTeslaP100"), 2, "retired; use NvidiaTeslaT4")
    failed(push("--accelerator", "NvidiaL44"), 2, r"did you mean NvidiaL4\?")
    assert versions(kaggle) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "epoch=5"], "epochs"),
        (["--set", "epochs=many"], "epochs"),
        (["--set", "epochs"], "KEY=VALUE"),
        (["--recipe", "best"], "best"),
        (["--script", "embed", "--set", "max_minutes=inf"], "max_minutes=inf: give a finite number"),
        (["--timeout-minutes", "721"], "at most 720"),
        (["--timeout-minutes", "0"], "more than 0"),
        (["--dataset", "aml-alignment-weights"], "does not exist; make it with python tools/package_dataset.py"),
        (["--dataset", "datasets/tester/weights"], "no prefix"),
        (["--kernel-source", "a/b"], "owner/slug"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_pushed(push, kaggle, options, words):
    failed(push(*options), 2, re.escape(words))
    assert kaggle.count("SaveKernel") == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"title": "Another Title"}, r"title: 'Another Title' becomes the slug 'another-title'"),
        ({"dataset_sources": 5}, "dataset_sources: "),
    ],
)
def test_metadata_that_kaggle_would_refuse_are_not_pushed(push, kaggle, tmp_path, monkeypatch, fault, words):
    metadata = json.loads(KERNEL_METADATA.read_text()) | fault
    write_tree(tmp_path, {"kernel-metadata.json": json.dumps(metadata).encode(), "kernel/pipeline.py": b""})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    failed(push(), 2, words)
    assert kaggle.count("SaveKernel") == 0


def test_a_script_named_by_its_whole_path_stays_as_it_is(push, kaggle, tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text("OVERRIDES: dict = {}\n")
    metadata = json.loads(KERNEL_METADATA.read_text()) | {"code_file": str(script)}
    write_tree(tmp_path, {"kernel-metadata.json": json.dumps(metadata).encode()})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    failed(push("--set", "epochs=2"), 2, "code_file")
    assert script.read_text() == "OVERRIDES: dict = {}\n"


def test_a_script_that_kaggle_cannot_run_is_not_pushed(push, kaggle, tmp_path, monkeypatch):
    metadata = KERNEL_METADATA.read_bytes()
    script = b"import sklearn\nOVERRIDES: dict = {}\n"
    write_tree(tmp_path, {"kernel-metadata.json": metadata, "kernel/pipeline.py": script})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    failed(push(), 2, r"pipeline\.py: line 1: imports sklearn")
    assert kaggle.count("SaveKernel") == 0


def test_init_writes_the_owner_once_and_the_official_client_can_push_it(push, tmp_path, monkeypatch, kaggle):
    for name in ("KERNEL", "EMBED", "DATASET", "PAIRS"):
        content = getattr(lint, f"{name}_METADATA").read_bytes()
        monkeypatch.setattr(f"lib.jobs.lint.{name}_METADATA", tmp_path / f"{name.lower()}-metadata.json")
        write_tree(tmp_path, {f"{name.lower()}-metadata.json": content})
    succeeded(push("--init", "tester"))
    for name, ref in (
        ("kernel-metadata.json", PIPELINE),
        ("embed-metadata.json", "tester/aml-embed-pairs"),
        ("dataset-metadata.json", "tester/aml-alignment-weights"),
        ("pairs-metadata.json", "tester/aml-alignment-pairs"),
    ):
        assert json.loads((tmp_path / name).read_text())["id"] == ref
    failed(push("--init", "ada"), 2, "the owner is tester already")
    succeeded(push("--init", "tester"))  # again, or on from the file where it was interrupted
    failed(push("--init", "a da"), 2, "not a Kaggle user name")

    from kaggle.api.kaggle_api_extended import KaggleApi

    write_tree(tmp_path, {"kernel/pipeline.py": KERNEL.read_bytes()})
    api = KaggleApi()
    api.authenticate()
    assert api.kernels_push(str(tmp_path)).version_number == 1
    assert kaggle.kernels[PIPELINE][0].text == KERNEL.read_text()


# --------------------------------------------------------------------------------------- once


def test_the_same_push_is_made_once_and_its_output_fetched_once(push, kaggle, finished):
    succeeded(push())
    calls = kaggle.count("GET output")
    succeeded(push())
    assert kaggle.count("SaveKernel") == 1
    assert kaggle.count("GET output") == calls + 1  # the manifest, to see that what is here is of this kernel
    succeeded(push("--set", "epochs=2"))
    succeeded(push("--again"))
    assert [len(kaggle.kernels[PIPELINE]), kaggle.count("SaveKernel")] == [3, 3]


def test_a_push_anew_that_did_not_happen_leaves_the_one_before(push, kaggle, finished):
    succeeded(push())
    kaggle.fail("SaveKernel", Fault(json={"error": "Maximum batch GPU session count of 2 reached."}))
    failed(push("--again"), 1, "session count")
    assert "version 1 runs this already" in succeeded(push()).stderr
    with stop_at(Kernels, "push"):
        assert push("--again").returncode == 130
    assert "version 1 runs this already" in succeeded(push()).stderr
    assert versions(kaggle) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--version", 3], "--version is of what was pushed: say status or output before it"),
        (["--only", "*.csv"], "--only is of what was pushed: say output before it"),
        (["status", "--only", "*.csv"], "say output before it"),
        (["list", "--version", 3], "say status or output before it"),
    ],
)
def test_what_is_of_an_earlier_version_stands_beside_its_action(push, kaggle, options, words):
    failed(push(*options), 2, words)
    assert kaggle.calls == []


def test_a_status_without_any_version_is_an_error(push):
    failed(push("status"), 2, "does not exist for tester; push it first")


def test_the_quota_is_shown_and_a_push_without_it_refused(push, kaggle):
    done = succeeded(push("--quota"))
    assert re.search(r"GPU +1\.5 +0\.0 +30\.0 +28\.5", done.stdout)
    done = succeeded(push("--quota", "--json"))
    assert json.loads(done.stdout)["GPU"]["left_hours"] == 28.5
    kaggle.gpu_used_hours = 30.0
    failed(push(), 1, r"GPU quota used up \(30\.0 of 30\.0 h.*--accelerator none")
    assert kaggle.count("SaveKernel") == 0
    succeeded(push("--accelerator", "none", "--no-wait"))


# ------------------------------------------------------------------------------------------- kernels that end otherwise
def test_a_failed_kernel_shows_the_end_of_its_log(push, kaggle, tmp_path):
    log = "".join(f"line {i}\n" for i in range(100)) + "RuntimeError: out of memory\n"
    kaggle.plans = [Plan(running=1, outcome="ERROR", failure="exit code 1", log=log, outputs={"half.csv": b"1"})]
    done = failed(push(), 1, r"version 1 failed: exit code 1; .*--again")
    assert done.stderr.splitlines()[-2].endswith("| RuntimeError: out of memory")
    assert not list((tmp_path / "runs").glob("aml-*"))
    failed(push(), 1, "version 1 failed")  # says so again, pushes nothing
    assert kaggle.count("SaveKernel") == 1


def test_a_cancelled_kernel_is_a_failure(push, kaggle):
    kaggle.plans = [Plan(outcome="CANCEL_ACKNOWLEDGED")]
    failed(push(), 1, "version 1 was cancelled")


@pytest.mark.slow
def test_a_kernel_that_outlasts_its_deadline_is_a_failure(push, kaggle, finished):
    kaggle.plans = [Plan(running=10**6)]
    failed(
        push("--timeout-minutes", 0.01, "--set", "max_minutes=0.001"),
        1,
        r"not done after .*push_kernel\.py output --version 1",
    )
    assert kaggle.kernels[PIPELINE][0].request["sessionTimeoutSeconds"] == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count of 2 reached"),
        ({"versionNumber": 1, "invalidDatasetSources": ["tester/nothing"]}, "dataset source tester/nothing"),
        ({"versionNumber": 1, "invalidCompetitionSources": ["aml-competition"]}, "competition source aml-competition"),
        ({"versionNumber": 1, "invalidKernelSources": ["tester/nothing"]}, "kernel source tester/nothing"),
        ({"versionNumber": 1, "invalidModelSources": ["a/b/c/d/1"]}, "model source a/b/c/d/1"),
    ],
)
def test_refused_pushes_fail_and_are_pushed_anew_next_time(push, kaggle, finished, answer, words):
    kaggle.fail("SaveKernel", Fault(json=answer))
    failed(push(), 1, words)
    succeeded(push())
    assert kaggle.count("SaveKernel") == 2


# ------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    "call", ["GetKernel", "GetKernelSessionStatus", "ListKernelSessionOutput", "GetAcceleratorQuotaStatistics"]
)
@pytest.mark.parametrize("fault", FAULTS_THAT_PASS, ids=["503", "429", "drop", "html"])
def test_calls_that_may_be_repeated_are(push, kaggle, finished, tmp_path, call, fault):
    kaggle.fail(call, fault)
    succeeded(push())
    assert kaggle.count("SaveKernel") == 1
    assert fetched(tmp_path).keys() >= finished.keys()


def test_a_push_that_did_not_happen_is_one_line_and_the_next_run_pushes(push, kaggle, finished):
    kaggle.fail("SaveKernel", Fault(drop="before"))
    failed(push(), 1, "running this again is safe")
    succeeded(push())
    assert versions(kaggle) == 1


def test_a_push_that_met_a_409_is_known_not_to_have_happened(push, kaggle, finished):
    kaggle.fail("SaveKernel", Fault(status=409, message="The title is already in use"))
    failed(push(), 1, "change title and id in kernel-metadata.json")
    assert "that was begun at" not in succeeded(push()).stderr
    assert versions(kaggle) == 1


def test_a_push_whose_client_died_is_found_by_the_next_run(push, kaggle, finished):
    with stop_at(Kernels, "push", after=True):
        assert push().returncode == 130
    succeeded(push())
    assert versions(kaggle) == 1


def test_a_version_that_somebody_else_pushed_is_not_taken_for_ours(push, kaggle, finished, tmp_path):
    with stop_at(Kernels, "push"):
        assert push().returncode == 130
    kaggle.rpc("SaveKernel", {"slug": PIPELINE, "text": "print('by hand')"})
    succeeded(push())
    assert versions(kaggle) == 2
    assert (tmp_path / "runs" / "aml-text-to-image-alignment-v2").is_dir()


def test_a_missing_log_stream_is_no_failure(push, kaggle, finished):
    kaggle.fail("GET log", *[Fault(status=404)] * 9)
    succeeded(push())


def test_a_silent_server_is_left_after_the_timeout(push, kaggle, finished, monkeypatch):
    monkeypatch.setenv("ALIGN_TIMEOUT_SECONDS", "0.5")
    kaggle.fail("GetKernelSessionStatus", Fault(silent=0.8))
    succeeded(push())


@pytest.mark.parametrize(("minutes", "budget"), [(60, 55.0), (10, 8.0), (1, 0.8)])
def test_the_script_is_told_how_long_it_may_take(push, kaggle, finished, minutes, budget):
    succeeded(push("--timeout-minutes", minutes, "--no-wait"))
    sent = kaggle.kernels[PIPELINE][0]
    assert sent.request["sessionTimeoutSeconds"] == 60 * minutes
    assert f'"max_minutes": {budget}' in sent.text


def test_a_budget_above_the_limit_is_wrong_and_one_below_is_kept(push, kaggle, finished):
    failed(push("--timeout-minutes", 20, "--set", "max_minutes=30"), 2, "max_minutes=30 does not fit")
    succeeded(push("--timeout-minutes", 20, "--set", "max_minutes=3", "--no-wait"))
    assert '"max_minutes": 3.0' in kaggle.kernels[PIPELINE][0].text


@pytest.fixture
def owned(tmp_path, monkeypatch) -> None:
    """Metadata with an owner, as --init leaves them."""
    text = KERNEL_METADATA.read_text().replace(OWNER_PLACEHOLDER, "somebody")
    write_tree(tmp_path, {"kernel-metadata.json": text.encode(), "kernel/pipeline.py": KERNEL.read_bytes()})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")


def test_another_owner_is_warned_of_before_the_403(push, kaggle, finished, owned):
    kaggle.fail("SaveKernel", Fault(status=403, message="Permission denied"))
    done = failed(push(), 1, "somebody is not the signed-in user tester")
    assert "says id somebody/" in done.stderr


def test_list_shows_what_runs_and_what_holds_a_slot(push, kaggle, finished):
    succeeded(push())
    kaggle.plans = [Plan(running=99)]
    succeeded(push("--no-wait", "--set", "epochs=2"))
    (row,) = json.loads(succeeded(push("list", "--json")).stdout)
    assert (row["kernel"], row["version"], row["status"], row["holds"]) == (PIPELINE, 2, "running", "GPU slot")
    assert PIPELINE in succeeded(push("list")).stdout


def test_dry_run_shows_the_push_without_credentials_or_network(tool, builds):
    done = tool("push_kernel", "--dry-run", "--json", "--set", "epochs=2", "--timeout-minutes", 60, "--dataset", "mine")
    shown = json.loads(succeeded(done).stdout)
    assert shown["metadata"]["id"] == f"{OWNER_PLACEHOLDER}/{SLUG}"
    assert shown["metadata"]["dataset_sources"] == [f"{OWNER_PLACEHOLDER}/mine"]
    assert shown["overrides"] == {"epochs": 2, "max_minutes": 55.0}
    assert '"epochs": 2' in (builds / "kernel" / "kernel" / "pipeline.py").read_text()
    assert "nothing was sent, no account was asked" in done.stderr
    assert f"a push has your account's name in place of {OWNER_PLACEHOLDER}" in done.stderr


def test_dry_run_has_the_owner_that_was_written_into_the_metadata(tool, owned):
    done = succeeded(tool("push_kernel", "--dry-run", "--json"))
    assert json.loads(done.stdout)["metadata"]["id"] == f"somebody/{SLUG}"
    assert "warning" not in done.stderr


def test_a_recipe_that_is_set_otherwise_as_well_is_a_slip(tool):
    given = ("--dry-run", "--recipe", "search", "--set", "recipe=align")
    failed(tool("push_kernel", *given), 2, "--recipe search and --set recipe=align: give one of them")


def test_dry_run_is_of_a_push_alone(tool):
    """A list, or the quota, asks Kaggle whatever else is said."""
    for others in (["list"], ["status"], ["--quota"]):
        failed(tool("push_kernel", *others, "--dry-run"), 2, "no Kaggle credentials")
