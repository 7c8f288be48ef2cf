"""The tools against a server that lags, forgets, renames, refuses and lies: docs/kaggle.md has the table."""

from __future__ import annotations

import json

import pytest

from account import OUTAGE, PIPELINE, SLUG, WEIGHTS, versions
from forked import failed, succeeded
from lib import record
from lib.jobs import dataset
from lib.jobs import push as pushing
from stand_in import Fault
from stopping import stop_at


# ------------------------------------------------------------------------------- waiting, in minutes
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
    succeeded(push())
    assert versions(kaggle) == 1


def test_a_session_that_has_not_opened_yet_is_waited_for(push, kaggle, finished):
    kaggle.habits.session_lag = 120
    succeeded(push())


@pytest.mark.slow
def test_a_dataset_outlives_minutes_without_an_answer(package, kaggle):
    kaggle.ready_after = 3
    kaggle.fail("GetDatasetStatus", *OUTAGE)
    succeeded(package())
    assert len(kaggle.datasets[WEIGHTS].versions) == 1


@pytest.mark.slow
@pytest.mark.parametrize("call", ["GetKernelSessionStatus", "ListKernelSessionOutput"])
def test_an_outage_that_lasts_ends_the_wait_and_says_how_to_go_on(push, kaggle, finished, call):
    kaggle.fail(call, *[Fault(status=503)] * 10**4)
    failed(push(), 1, r"so for \d+ minutes; go on with .*push_kernel\.py output --version 1")
    kaggle.faults.clear()
    succeeded(push())
    assert versions(kaggle) == 1


@pytest.mark.slow
def test_time_in_the_queue_is_no_part_of_the_session(push, kaggle, finished):
    kaggle.plans[0].queued = 25  # about 20 minutes, of a session of five
    succeeded(push("--timeout-minutes", 5))


# ---------------------------------------------------------------------------------- one look is no proof


def test_a_new_dataset_that_nobody_knows_yet_is_waited_for(package, kaggle, push, finished):
    kaggle.habits.dataset_lag, kaggle.habits.files_lag = 60, 40
    succeeded(package())
    succeeded(package())
    assert len(kaggle.datasets[WEIGHTS].versions) == 1
    succeeded(push("--dataset", "aml-alignment-weights", "--set", "mode=predict"))


@pytest.mark.parametrize("absent", [403, 404])
def test_an_upload_that_was_cut_off_is_found_although_it_shows_late(package, kaggle, absent):
    kaggle.habits.dataset_lag, kaggle.habits.absent_dataset = 40, absent
    with stop_at(dataset, "wait_ready"):
        assert package().returncode == 130
    succeeded(package())
    assert len(kaggle.datasets[WEIGHTS].versions) == 1


def test_a_push_that_was_cut_off_is_found_although_it_shows_late(push, kaggle, finished):
    kaggle.habits.kernel_lag = 60
    with stop_at(pushing, "record_pushed"):
        assert push().returncode == 130
    succeeded(push())
    assert versions(kaggle) == 1


@pytest.mark.parametrize("fault", [Fault(status=500, after=True), Fault(drop="after"), Fault(json={}, after=True)])
def test_a_push_without_an_answer_is_found_although_it_shows_late(push, kaggle, finished, fault):
    kaggle.habits.kernel_lag = 40
    kaggle.fail("SaveKernel", fault)
    succeeded(push())
    assert versions(kaggle) == 1


# ---------------------------------------------------------------------------------- texts are normalised
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
    succeeded(push())
    assert versions(kaggle) == 1


def test_a_lost_record_pushes_nothing_anew(push, kaggle, finished, tmp_path):
    succeeded(push())
    (tmp_path / "runs" / record.RECORD).unlink()
    kaggle.habits.stores = lambda text: text.replace("\n", "\r\n")
    succeeded(push())
    assert versions(kaggle) == 1
    succeeded(push("--set", "epochs=2"))
    assert versions(kaggle) == 2


# ------------------------------------------------------------------------- a look never stops the job
@pytest.mark.parametrize("call", ["GetKernel", "GetAcceleratorQuotaStatistics", "GET log"])
def test_a_first_push_depends_on_no_look(push, kaggle, finished, call):
    kaggle.habits.absent_kernel = 500
    kaggle.fail(call, *[Fault(status=500)] * 100)
    succeeded(push())
    assert versions(kaggle) == 1


def test_a_kernel_without_metadata_is_no_traceback(push, kaggle, finished):
    succeeded(push("--no-wait"))
    kaggle.habits.no_metadata = True
    succeeded(push("--set", "epochs=2"))
    failed(push("status"), 2, "does not exist")


def test_a_status_that_nobody_knows_is_not_the_end(push, kaggle, finished):
    kaggle.fail(
        "GetKernelSessionStatus",
        Fault(json={"status": "PAUSED_BY_ADMIN"}),
        None,
        Fault(json={"status": "PAUSED_BY_ADMIN"}),
    )
    succeeded(push())


# --------------------------------------------------------------------------------------- versions
@pytest.mark.parametrize("status", [400, 404])
def test_without_labels_the_current_version_is_asked(push, kaggle, finished, status):
    kaggle.habits.refuse_labels = status
    succeeded(push())


def test_without_labels_another_current_version_is_told(push, kaggle, finished):
    succeeded(push("--no-wait"))
    succeeded(push("--no-wait", "--set", "epochs=2"))
    kaggle.habits.refuse_labels = 400
    failed(push("status", "--version", 1), 1, "the current version, 2, is not provably version 1")


def test_again_is_taken_up_where_it_was_cut_off(push, kaggle, finished):
    succeeded(push())
    with stop_at(pushing, "record_pushed"):
        assert push("--again").returncode == 130
    succeeded(push("--again"))
    assert versions(kaggle) == 2
    succeeded(push("--again"))
    assert versions(kaggle) == 3


def test_another_name_than_asked_for_is_followed_and_told(push, kaggle, finished, tmp_path):
    kaggle.habits.renames_to = f"{SLUG}-2"
    done = succeeded(push("--json"))
    assert json.loads(done.stdout)["kernel"] == f"{PIPELINE}-2"
    assert f"Kaggle calls it {PIPELINE}-2" in done.stderr
    succeeded(push())
    assert len(kaggle.kernels[f"{PIPELINE}-2"]) == 1
    assert (tmp_path / "runs" / f"{SLUG}-2-v1").is_dir()


# ------------------------------------------------------------------------------------ two at once
def test_two_pushes_of_the_same_make_one(tool, kaggle, finished, tmp_path):
    both = [tool.start("push_kernel", "--runs", tmp_path / "runs", "--no-wait") for _ in range(2)]
    for one in both:
        succeeded(one.wait())
    assert versions(kaggle) == 1


# ------------------------------------------------------------------------------------------- names


def test_titles_in_use_name_the_line_to_change(package, push, kaggle, finished):
    kaggle.habits.taken_titles = {"AML Alignment Weights"}
    failed(package(), 1, r"change title and id in kaggle_dataset/dataset-metadata\.json")
    kaggle.push_error = "The requested title 'x' is already in use by another notebook."
    failed(push(), 1, r"change title and id in kernel-metadata\.json")
