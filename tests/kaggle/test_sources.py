"""What a kernel works with is part of an order: datasets and outputs of kernels, bound late, dropped or replaced."""

from __future__ import annotations

from account import OUTAGE, PIPELINE, SLUG, WEIGHTS, versions
from drawn import write_tree
from forked import failed, succeeded
from lib import record
from made_runs import made_outputs
from stand_in import Fault, Plan


def test_a_push_waits_for_its_own_dataset_in_the_recorded_version(push, package, kaggle, finished):
    succeeded(package())
    dataset = kaggle.datasets["tester/aml-alignment-weights"]
    dataset.versions[0].polls_left = 4  # Kaggle is at it again
    succeeded(push("--dataset", "aml-alignment-weights", "--set", "mode=predict", "--no-wait"))
    assert dataset.versions[0].polls_left <= 0
    assert kaggle.kernels[PIPELINE][0].request["datasetDataSources"] == ["tester/aml-alignment-weights"]


def test_new_data_is_a_new_push(push, kaggle, finished):
    dataset = kaggle.add_dataset("tester/aml-alignment-weights", {"a": b"1"})
    options = ["--dataset", "aml-alignment-weights", "--no-wait"]
    succeeded(push(*options))
    succeeded(push(*options))
    assert kaggle.count("SaveKernel") == 1
    dataset.versions.append(type(dataset.versions[0])({"a": b"2"}))
    succeeded(push(*options))
    assert kaggle.count("SaveKernel") == 2


def test_a_dataset_that_was_made_anew_begins_at_version_1(push, package, kaggle, finished, tmp_path):
    succeeded(package())
    write_tree(tmp_path / "runs" / "mine", made_outputs("other"))
    succeeded(package())
    del kaggle.datasets[WEIGHTS]
    succeeded(package())
    succeeded(push("--dataset", "aml-alignment-weights", "--no-wait"))


def test_a_dataset_that_kaggle_binds_late_is_tried_again(push, kaggle, finished, package, tmp_path):
    succeeded(package())
    answers = iter([False, False])
    kaggle.bound = lambda source: next(answers, True)
    succeeded(push("--dataset", "aml-alignment-weights", "--set", "mode=predict"))
    succeeded(push("--dataset", "aml-alignment-weights", "--set", "mode=predict"))
    assert versions(kaggle) == 3
    assert [path.name for path in (tmp_path / "runs").glob("aml-*")] == [f"{SLUG}-v3"]


def test_a_dataset_that_stays_unbound_fails_the_push(push, kaggle, finished, package):
    succeeded(package())
    kaggle.habits.binding = 10**6
    failed(push("--dataset", "aml-alignment-weights", "--set", "mode=predict"), 1, "runs without it")


def test_a_version_that_runs_without_its_data_is_never_taken_for_the_right_one(push, kaggle, finished, tmp_path):
    kaggle.add_dataset(WEIGHTS, {"a": b"1"})
    options = ["--dataset", "aml-alignment-weights", "--set", "mode=predict", "--no-wait"]
    succeeded(push(*options))
    kaggle.kernels[PIPELINE][0].request["datasetDataSources"] = []  # dropped by Kaggle
    (tmp_path / "runs" / record.RECORD).unlink()
    succeeded(push(*options))
    assert versions(kaggle) == 2


def test_a_push_without_an_answer_that_lost_its_data_is_made_anew(push, kaggle, finished, package):
    succeeded(package())
    bound = iter([False])
    kaggle.bound = lambda source: next(bound, True)
    dropping = kaggle.rpc_SaveKernel

    def save(body: dict) -> dict:
        answer = dropping(body)
        if "invalidDatasetSources" in answer:
            kaggle.kernels[PIPELINE][-1].request = body | {"datasetDataSources": []}
        return answer

    kaggle.rpc_SaveKernel = save
    kaggle.fail("SaveKernel", Fault(drop="after"))
    succeeded(push("--dataset", "aml-alignment-weights", "--set", "mode=predict"))
    assert versions(kaggle) == 2


def test_a_new_version_of_a_kernel_source_is_a_new_push(push, kaggle, finished):
    other = "tester/another-kernel"
    kaggle.rpc("SaveKernel", {"slug": other, "text": "1"})
    options = ["--kernel-source", "another-kernel"]
    succeeded(push(*options))  # it still runs at first, and is waited for
    succeeded(push(*options))
    assert versions(kaggle) == 1
    kaggle.rpc("SaveKernel", {"slug": other, "text": "2"})
    succeeded(push(*options))
    assert versions(kaggle) == 2


def test_an_order_is_the_same_while_a_foreign_dataset_does_not_answer(push, kaggle, finished):
    kaggle.add_dataset("somebody/photos", {"a": b"1"})
    options = ["--dataset", "somebody/photos", "--no-wait"]
    succeeded(push(*options))
    kaggle.fail("GetDataset", *[Fault(status=503)] * 5)
    failed(push(*options), 1, "dataset somebody/photos: Kaggle answered 503")
    succeeded(push(*options))
    assert versions(kaggle) == 1
    failed(push("--dataset", "somebody/nothing"), 2, "dataset somebody/nothing does not exist")


def test_a_kernel_source_that_does_not_answer_is_waited_for_all_the_same(push, kaggle, finished):
    kaggle.rpc("SaveKernel", {"slug": "tester/another-kernel", "text": "1"})
    kaggle.fail("GetKernelSessionStatus", *OUTAGE)
    succeeded(push("--kernel-source", "another-kernel", "--no-wait"))
    (source,) = kaggle.kernels["tester/another-kernel"]
    assert source.status == "COMPLETE"


def test_a_kernel_source_that_failed_is_an_error(push, kaggle, finished):
    kaggle.plans = [Plan(outcome="ERROR"), kaggle.plans[0]]
    kaggle.rpc("SaveKernel", {"slug": "tester/another-kernel", "text": "1"})
    failed(push("--kernel-source", "another-kernel"), 2, "ended error, and Kaggle mounts only what is complete")
    failed(push("--kernel-source", "no-such-kernel"), 2, "no such kernel")
    failed(push("--kernel-source", "tester/another-kernel/1"), 2, "without a version, which Kaggle drops")
    assert versions(kaggle) == 0


def test_a_dataset_that_was_made_anew_is_suspected_after_three_pushes(push, kaggle, finished):
    kaggle.add_dataset(WEIGHTS, {"a": b"1"})
    kaggle.habits.broken_datasets = {WEIGHTS}
    for _ in range(2):
        failed(push("--dataset", "aml-alignment-weights"), 1, r"running this again is safe$")
    failed(
        push("--dataset", "aml-alignment-weights"),
        1,
        r"push number 3 to fail.*deleted and made anew.*another title and id",
    )
