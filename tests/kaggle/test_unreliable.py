"""The tools against a server that lags, forgets, renames, refuses and lies: docs/kaggle.md has the table."""

from __future__ import annotations

import json
import threading

import pytest

import package_dataset
from kaggle_runs import outputs_of_run, write_tree
from lib import record
from lib.jobs.lint import KERNEL_METADATA
from lib.project import InputError, ToolError
from stand_in import DatasetVersion, Fault, Plan

SLUG = "aml-text-to-image-alignment"
REF = f"tester/{SLUG}"
DATASET = "tester/aml-alignment-weights"
OUTAGE = [Fault(status=503)] * 40  # eight looks of five tries each: minutes


@pytest.fixture
def package(tmp_path, kernel):
    """Package a run with made-up weights."""
    run = write_tree(tmp_path / "runs" / "mine", outputs_of_run(kernel))
    fixed = ["--run", run, "--runs", tmp_path / "runs", "--folder", tmp_path / "build" / "dataset"]
    return lambda *options: package_dataset.main([str(option) for option in [*fixed, *options]])


def versions(kaggle) -> int:
    return len(kaggle.kernels[REF])


# ------------------------------------------------------------------------------- 1: waiting, in minutes
@pytest.mark.parametrize(
    "faults",
    [
        OUTAGE,
        [Fault(drop="before")] * 40,
        [Fault(status=404)] * 8,
        [Fault(status=403)] * 8,
        [Fault(status=400)] * 3,
        [Fault(status=503, retry_after="120")] * 3,
    ],
    ids=["503", "dropped", "404", "403", "400", "retry after"],
)
def test_a_push_outlives_minutes_without_a_status(push, kaggle, finished, faults):
    kaggle.fail("GetKernelSessionStatus", None, *faults)
    assert push() == 0
    assert versions(kaggle) == 1


@pytest.mark.parametrize("call", ["ListKernelSessionOutput", "GET output"])
def test_an_output_outlives_minutes_without_an_answer(push, kaggle, finished, tmp_path, call):
    kaggle.fail(call, None, *OUTAGE)
    assert push() == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs" / f"{SLUG}-v1").iterdir()}
    assert {name: files[name] for name in finished} == finished


def test_a_session_that_has_not_opened_yet_is_waited_for(push, kaggle, finished):
    kaggle.habits.session_lag = 120
    assert push() == 0


def test_a_dataset_outlives_minutes_without_an_answer(package, kaggle):
    kaggle.ready_after = 3
    kaggle.fail("GetDatasetStatus", *OUTAGE)
    assert package() == 0
    assert len(kaggle.datasets[DATASET].versions) == 1


@pytest.mark.slow
def test_an_outage_that_lasts_ends_the_wait_and_says_how_to_go_on(push, kaggle, finished):
    kaggle.fail("GetKernelSessionStatus", *[Fault(status=503)] * 10**4)
    with pytest.raises(ToolError, match=r"so for \d+ minutes; go on with .*push_kernel\.py output --version 1"):
        push()
    kaggle.faults.clear()
    assert push() == 0
    assert versions(kaggle) == 1


@pytest.mark.slow
def test_time_in_the_queue_is_no_part_of_the_session(push, kaggle, finished):
    kaggle.plans[0].queued = 25  # about 20 minutes, of a session of five
    assert push("--timeout-minutes", 5) == 0


# ---------------------------------------------------------------------------------- 2: one look is no proof
def test_output_that_shows_late_is_waited_for(push, kaggle, finished):
    kaggle.habits.output_lag, kaggle.habits.manifest_lag = 20, 60
    assert push() == 0
    assert versions(kaggle) == 1


def test_a_new_dataset_that_nobody_knows_yet_is_waited_for(package, kaggle, push, finished):
    kaggle.habits.dataset_lag, kaggle.habits.files_lag = 60, 40
    assert package() == 0
    assert package() == 0
    assert len(kaggle.datasets[DATASET].versions) == 1
    assert push("--dataset", "aml-alignment-weights", "--set", "mode=predict") == 0


@pytest.mark.parametrize("absent", [403, 404])
def test_an_upload_that_was_cut_off_is_found_although_it_shows_late(package, kaggle, absent, monkeypatch):
    kaggle.habits.dataset_lag, kaggle.habits.absent_dataset = 40, absent
    with monkeypatch.context() as patch:
        patch.setattr("lib.jobs.dataset.wait_ready", interrupt)
        with pytest.raises(KeyboardInterrupt):
            package()
    assert package() == 0
    assert len(kaggle.datasets[DATASET].versions) == 1


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_push_that_was_cut_off_is_found_although_it_shows_late(push, kaggle, finished, monkeypatch):
    kaggle.habits.kernel_lag = 60
    with monkeypatch.context() as patch:
        patch.setattr("lib.jobs.push.record_pushed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push()
    assert push() == 0
    assert versions(kaggle) == 1


@pytest.mark.parametrize("fault", [Fault(status=500, after=True), Fault(drop="after"), Fault(json={}, after=True)])
def test_a_push_without_an_answer_is_found_although_it_shows_late(push, kaggle, finished, fault):
    kaggle.habits.kernel_lag = 40
    kaggle.fail("SaveKernel", fault)
    assert push() == 0
    assert versions(kaggle) == 1


# ---------------------------------------------------------------------------------- 3: texts are normalised
@pytest.mark.parametrize(
    "stores",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: "\n" + text.strip() + "\n\n",
    ],
    ids=["crlf", "last newline", "blank"],
)
def test_a_push_is_known_again_whatever_kaggle_does_to_its_text(push, kaggle, finished, stores):
    kaggle.habits.stores = stores
    kaggle.fail("SaveKernel", Fault(drop="after"))
    assert push() == 0
    assert versions(kaggle) == 1


def test_a_lost_record_pushes_nothing_anew(push, kaggle, finished, tmp_path):
    push()
    (tmp_path / "runs" / record.RECORD).unlink()
    kaggle.habits.stores = lambda text: text.replace("\n", "\r\n")
    assert push() == 0
    assert versions(kaggle) == 1
    assert push("--set", "epochs=2") == 0
    assert versions(kaggle) == 2


# ------------------------------------------------------------------------- 4: a look never stops the job
@pytest.mark.parametrize("call", ["GetKernel", "GetAcceleratorQuotaStatistics", "GET log"])
def test_a_first_push_depends_on_no_look(push, kaggle, finished, call):
    kaggle.habits.absent_kernel = 500
    kaggle.fail(call, *[Fault(status=500)] * 100)
    assert push() == 0
    assert versions(kaggle) == 1


def test_a_kernel_without_metadata_is_no_traceback(push, kaggle, finished):
    push("--no-wait")
    kaggle.habits.no_metadata = True
    assert push("--set", "epochs=2") == 0
    with pytest.raises(InputError, match="does not exist"):
        push("status")


def test_a_status_that_nobody_knows_is_not_the_end(push, kaggle, finished):
    kaggle.fail(
        "GetKernelSessionStatus",
        Fault(json={"status": "PAUSED_BY_ADMIN"}),
        None,
        Fault(json={"status": "PAUSED_BY_ADMIN"}),
    )
    assert push() == 0


# --------------------------------------------------------------------------------- 5: the session's time
@pytest.mark.parametrize(("minutes", "budget"), [(60, 55.0), (10, 8.0), (1, 0.8)])
def test_the_script_is_told_how_long_it_may_take(push, kaggle, finished, minutes, budget):
    assert push("--timeout-minutes", minutes, "--no-wait") == 0
    sent = kaggle.kernels[REF][0]
    assert sent.request["sessionTimeoutSeconds"] == 60 * minutes
    assert f'"max_minutes": {budget}' in sent.text


def test_a_budget_above_the_limit_is_wrong_and_one_below_is_kept(push, kaggle, finished):
    with pytest.raises(InputError, match="max_minutes=30 does not fit"):
        push("--timeout-minutes", 20, "--set", "max_minutes=30")
    assert push("--timeout-minutes", 20, "--set", "max_minutes=3", "--no-wait") == 0
    assert '"max_minutes": 3.0' in kaggle.kernels[REF][0].text


# ------------------------------------------------------------------------- 6: what a broken version left
def broken(kernel, outcome: str, complete: bool) -> Plan:
    """A version that was stopped: its state, and a submission with its manifest."""
    outputs = outputs_of_run(kernel, complete=complete, stopped="SIGTERM")
    state = {kernel.RESUME_RUN: b'{"fingerprint": "f"}', "resume_validate_0.pth": b"\0state"}
    return Plan(running=1, outcome=outcome, outputs=outputs | state, log="epoch 1\nstopped\n")


@pytest.mark.parametrize("outcome", ["CANCEL_ACKNOWLEDGED", "ERROR"])
def test_what_a_stopped_version_left_is_fetched_apart_and_named(push, kaggle, kernel, tmp_path, outcome):
    kaggle.plans = [broken(kernel, outcome, complete=False)]
    with pytest.raises(ToolError, match=r"submission verifies.*submit\.py .*ship\.py --resume 1") as error:
        push()
    folder = tmp_path / "runs" / "unverified" / f"{SLUG}-v1"
    assert str(folder) in str(error.value)
    assert (folder / "resume_validate_0.pth").read_bytes() == b"\0state"
    assert not list((tmp_path / "runs").glob("aml-*"))


def test_ship_goes_on_from_what_a_stopped_version_left(run_ship, kaggle, kernel, weights, tmp_path):
    good = kaggle.plans[0]
    kaggle.plans = [broken(kernel, "CANCEL_ACKNOWLEDGED", complete=False), good]
    with pytest.raises(ToolError, match=r"--resume 1"):
        run_ship("--recipe", "align", "--set", "epochs=3", "--timeout-minutes", 60)
    assert run_ship("--resume", 1) == 0
    first, sent = kaggle.kernels[REF]
    assert first.request["sessionTimeoutSeconds"] == 3600
    assert '"max_minutes": 55.0' in first.text
    assert sent.request["datasetDataSources"] == [DATASET]
    assert 'OVERRIDES: dict = {"recipe": "align", "epochs": 3}' in sent.text
    assert kaggle.datasets[DATASET].versions[0].files["resume_validate_0.pth"] == b"\0state"
    assert run_ship("--resume", 1) == 0
    assert (versions(kaggle), len(kaggle.datasets[DATASET].versions)) == (2, 1)


def test_there_must_be_a_state_to_resume_from(run_ship, kaggle, kernel, weights):
    run_ship("--recipe", "align")
    with pytest.raises(InputError, match="nothing to go on from"):
        run_ship("--resume", 1)
    with pytest.raises(InputError, match="has no version 7"):
        run_ship("--resume", 7)


def test_single_files_of_an_output(push, kaggle, finished, tmp_path, capsys):
    push("--no-wait")
    capsys.readouterr()
    for _ in range(3):
        push("status")
    capsys.readouterr()
    assert push("output", "--only", "metrics.*", "--json") == 0
    path = tmp_path / "runs" / "unverified" / f"{SLUG}-v1" / "metrics.json"
    assert json.loads(capsys.readouterr().out) == [{"file": str(path), "state": "verified"}]
    assert path.read_bytes() == finished["metrics.json"]
    with pytest.raises(ToolError, match=r"none of 5 files matches \*\.txt: manifest\.json, "):
        push("output", "--only", "*.txt")


# ------------------------------------------------------------------------ 7: sources are part of an order
def test_a_dataset_that_kaggle_binds_late_is_tried_again(push, kaggle, finished, package, tmp_path):
    package()
    answers = iter([False, False])
    kaggle.bound = lambda source: next(answers, True)
    assert push("--dataset", "aml-alignment-weights", "--set", "mode=predict") == 0
    assert push("--dataset", "aml-alignment-weights", "--set", "mode=predict") == 0
    assert versions(kaggle) == 3
    assert [path.name for path in (tmp_path / "runs").glob("aml-*")] == [f"{SLUG}-v3"]


def test_a_dataset_that_stays_unbound_fails_the_push(push, kaggle, finished, package):
    package()
    kaggle.habits.binding = 10**6
    with pytest.raises(ToolError, match="runs without it"):
        push("--dataset", "aml-alignment-weights", "--set", "mode=predict")


def test_a_version_that_runs_without_its_data_is_never_taken_for_the_right_one(push, kaggle, finished, tmp_path):
    kaggle.add_dataset(DATASET, {"a": b"1"})
    options = ["--dataset", "aml-alignment-weights", "--set", "mode=predict", "--no-wait"]
    push(*options)
    kaggle.kernels[REF][0].request["datasetDataSources"] = []  # dropped by Kaggle
    (tmp_path / "runs" / record.RECORD).unlink()
    push(*options)
    assert versions(kaggle) == 2


def test_a_push_without_an_answer_that_lost_its_data_is_made_anew(push, kaggle, finished, package):
    package()
    bound = iter([False])
    kaggle.bound = lambda source: next(bound, True)
    dropping = kaggle.rpc_SaveKernel

    def save(body: dict) -> dict:
        answer = dropping(body)
        if "invalidDatasetSources" in answer:
            kaggle.kernels[REF][-1].request = body | {"datasetDataSources": []}
        return answer

    kaggle.rpc_SaveKernel = save
    kaggle.fail("SaveKernel", Fault(drop="after"))
    assert push("--dataset", "aml-alignment-weights", "--set", "mode=predict") == 0
    assert versions(kaggle) == 2


def test_a_new_version_of_a_kernel_source_is_a_new_push(push, kaggle, finished):
    other = "tester/another-kernel"
    kaggle.rpc("SaveKernel", {"slug": other, "text": "1"})
    options = ["--kernel-source", "another-kernel"]
    assert push(*options) == 0  # it still runs at first, and is waited for
    assert push(*options) == 0
    assert versions(kaggle) == 1
    kaggle.rpc("SaveKernel", {"slug": other, "text": "2"})
    assert push(*options) == 0
    assert versions(kaggle) == 2


def test_a_kernel_source_that_failed_is_an_error(push, kaggle, finished):
    kaggle.plans = [Plan(outcome="ERROR"), kaggle.plans[0]]
    kaggle.rpc("SaveKernel", {"slug": "tester/another-kernel", "text": "1"})
    with pytest.raises(InputError, match="ended error, and Kaggle mounts only what is complete"):
        push("--kernel-source", "another-kernel")
    with pytest.raises(InputError, match="no such kernel"):
        push("--kernel-source", "no-such-kernel")
    with pytest.raises(InputError, match="without a version, which Kaggle drops"):
        push("--kernel-source", "tester/another-kernel/1")
    assert versions(kaggle) == 0


# ----------------------------------------------------------------------------- 8: URLs that expire often
def test_urls_that_expire_again_and_again_are_renewed(push, kaggle, kernel, tmp_path):
    big = b"x" * 2_000_000
    kaggle.plans = [Plan(outputs=outputs_of_run(kernel, submission=big))]
    kaggle.habits.url_bytes = 150_000
    assert push() == 0
    assert (tmp_path / "runs" / f"{SLUG}-v1" / kernel.SUBMISSION).read_bytes() == big


# --------------------------------------------------------------------------------------- 9: versions
@pytest.mark.parametrize("status", [400, 404])
def test_without_labels_the_current_version_is_asked(push, kaggle, finished, status):
    kaggle.habits.refuse_labels = status
    assert push() == 0


def test_without_labels_another_current_version_is_told(push, kaggle, finished):
    push("--no-wait")
    push("--no-wait", "--set", "epochs=2")
    kaggle.habits.refuse_labels = 400
    with pytest.raises(ToolError, match="the current version, 2, is not provably version 1"):
        push("status", "--version", 1)


def test_again_is_taken_up_where_it_was_cut_off(push, kaggle, finished, monkeypatch):
    push()
    with monkeypatch.context() as patch:
        patch.setattr("lib.jobs.push.record_pushed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push("--again")
    assert push("--again") == 0
    assert versions(kaggle) == 2
    assert push("--again") == 0
    assert versions(kaggle) == 3


def test_another_name_than_asked_for_is_followed_and_told(push, kaggle, finished, tmp_path, capsys):
    kaggle.habits.renames_to = f"{SLUG}-2"
    assert push("--json") == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["kernel"] == f"{REF}-2"
    assert f"Kaggle calls it {REF}-2" in out.err
    assert push() == 0
    assert len(kaggle.kernels[f"{REF}-2"]) == 1
    assert (tmp_path / "runs" / f"{SLUG}-2-v1").is_dir()


# ------------------------------------------------------------------------------------ 10: two at once
def test_two_pushes_of_the_same_make_one(push, kaggle, finished, tmp_path):
    codes = []
    both = [threading.Thread(target=lambda: codes.append(push("--no-wait"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert codes == [0, 0]
    assert versions(kaggle) == 1


# ------------------------------------------------------------------------------------------- smaller ones
def test_an_empty_answer_to_an_upload_is_no_endless_wait(package, kaggle):
    kaggle.add_dataset(DATASET, {"old": b"1"})
    kaggle.habits.empty_version_answer = True
    with pytest.raises(ToolError, match="nothing at all; it did not happen as far as Kaggle shows"):
        package()


def test_a_failed_dataset_is_uploaded_anew_when_asked_for(package, kaggle):
    package()
    kaggle.datasets[DATASET].versions.append(DatasetVersion({"by hand": b"1"}, failed=True))
    with pytest.raises(ToolError, match=r"Kaggle says failed.*--again uploads it anew"):
        package()
    assert package("--again") == 0


def test_folders_of_killed_packages_are_cleared(package, tmp_path):
    left = write_tree(tmp_path / "build" / ".dataset.killed", {"dataset/weights.pth": b"1"})
    assert package("--dry-run") == 0
    assert not left.exists()


def test_titles_in_use_name_the_line_to_change(package, push, kaggle, finished):
    kaggle.habits.taken_titles = {"AML Alignment Weights"}
    with pytest.raises(ToolError, match=r"change title and id in kaggle_dataset/dataset-metadata\.json"):
        package()
    kaggle.push_error = "The requested title 'x' is already in use by another notebook."
    with pytest.raises(ToolError, match=r"change title and id in kernel-metadata\.json"):
        push()


def test_another_owner_is_warned_of_before_the_403(push, kaggle, finished, tmp_path, monkeypatch, capsys):
    text = KERNEL_METADATA.read_text().replace("INSERT_KAGGLE_USERNAME", "somebody")
    script = KERNEL_METADATA.parent / "kernel" / "pipeline.py"
    write_tree(tmp_path, {"kernel-metadata.json": text.encode(), "kernel/pipeline.py": script.read_bytes()})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    kaggle.fail("SaveKernel", Fault(status=403, message="Permission denied"))
    with pytest.raises(ToolError, match="somebody is not the signed-in user tester"):
        push()
    assert "says id somebody/" in capsys.readouterr().err


def test_a_dataset_that_was_made_anew_is_suspected_after_three_pushes(push, kaggle, finished):
    kaggle.add_dataset(DATASET, {"a": b"1"})
    kaggle.habits.broken_datasets = {DATASET}
    for _ in range(2):
        with pytest.raises(ToolError, match=r"running this again is safe$"):
            push("--dataset", "aml-alignment-weights")
    with pytest.raises(ToolError, match=r"push number 3 to fail.*deleted and made anew.*another title and id"):
        push("--dataset", "aml-alignment-weights")


def test_an_empty_log_is_taken_from_the_stream(push, kaggle, finished, tmp_path):
    kaggle.habits.empty_log = True
    assert push() == 0
    assert (tmp_path / "runs" / f"{SLUG}-v1" / "kernel.log").read_text() == "epoch 1\nepoch 2\n"


def test_list_shows_what_runs_and_what_holds_a_slot(push, kaggle, finished, capsys):
    push()
    kaggle.plans = [Plan(running=99)]
    push("--no-wait", "--set", "epochs=2")
    capsys.readouterr()
    assert push("list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kernel"], row["version"], row["status"], row["holds"]) == (REF, 2, "running", "GPU slot")
    assert push("list") == 0
    assert REF in capsys.readouterr().out


def test_dry_run_shows_the_push_and_sends_nothing(push, kaggle, capsys):
    assert push("--dry-run", "--json", "--set", "epochs=2", "--timeout-minutes", 60) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["metadata"]["id"] == REF
    assert shown["overrides"] == {"epochs": 2, "max_minutes": 55.0}
    assert kaggle.count("SaveKernel") == 0
