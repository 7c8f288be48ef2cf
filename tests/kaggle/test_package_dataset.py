"""Packaging: what goes is what was shown, and it arrives whole or not at all, once."""

import json
from pathlib import Path

import pytest

from account import WEIGHTS
from drawn import read_tree, write_tree
from forked import failed, succeeded
from lib.jobs import dataset
from lib.jobs.lint import DATASET_METADATA
from made_runs import made_outputs, make_run
from stand_in import Dataset, DatasetVersion, Fault
from stopping import stop_at
from turns import waiting_for


@pytest.fixture
def run(tmp_path) -> Path:
    """The run that is packaged, with made-up weights."""
    return tmp_path / "runs" / "mine"


def versions_of(kaggle) -> list[DatasetVersion]:
    """The versions that the stand-in has of the dataset."""
    return kaggle.datasets[WEIGHTS].versions if WEIGHTS in kaggle.datasets else []


# ------------------------------------------------------------------------------------------- what would go
def test_dry_run_shows_exactly_what_would_go_without_credentials_or_network(package, tmp_path):
    shown = json.loads(succeeded(package("--dry-run", "--json")).stdout)
    staged = {path.name: path for path in (tmp_path / "build" / "dataset").iterdir()}
    assert set(shown["files"]) == set(staged) - {"dataset-metadata.json"}
    assert {name: facts["bytes"] for name, facts in shown["files"].items()} == {
        name: staged[name].stat().st_size for name in shown["files"]
    }
    assert set(shown["files"]) == {
        "README.md", "manifest.json", "metrics.json", "pipeline.py", "pipeline_final_model.pth",
        "pipeline_validated_model.pth",
    }  # fmt: skip
    said = succeeded(package("--dry-run")).stdout
    assert said.startswith(f"run: {shown['run']}\n")
    assert [name for name in shown["files"] if name not in said] == []
    assert "nothing was sent" in said


def test_the_card_holds_the_run_s_own_figures(package, tmp_path):
    succeeded(package("--dry-run"))
    card = (tmp_path / "build" / "dataset" / "README.md").read_text()
    assert "| pool100_raw | 0.7500 | 0.0070 | 0.6000 | - | - |" in card
    assert "`mine` (recipe `align`)" in card
    assert "$" not in card


def test_staging_twice_gives_the_same_bytes(package, tmp_path):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "build" / "dataset").iterdir()}

    succeeded(package("--dry-run"))
    first = content()
    succeeded(package("--dry-run"))
    assert content() == first


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("folder/file.txt", "x", "sub-folder"),
        (".hidden", "x", "hidden file"),
        ("kaggle.json", "{}", "credentials file"),
        (".env", "A=1", "credentials file"),
        ("id_rsa", "x", "credentials file"),
        ("access_token", "x", "credentials file"),
        ("train.npz", "x", "does not belong"),
        ("README.md", 'export KAGGLE_KEY="0123456789abcdef0123456789abcdef"', "a Kaggle key"),
        ("README.md", '{"username": "ada", "key": "0123456789abcdef0123456789abcdef"}', "a Kaggle key"),
        ("README.md", "KGAT_0123456789abcdef0123456789abcdef", "a Kaggle token"),
        ("README.md", "-----BEGIN OPENSSH PRIVATE " + "KEY-----", "a private key"),
        ("README.md", "ghp_" + "a1" * 18, "a GitHub token"),
        ("README.md", "hf_" + "aB" * 17, "a Hugging Face token"),
        ("README.md", "AKIA" + "A1B2" * 4, "an AWS key"),
    ],
)
def test_secrets_and_foreign_files_in_the_folder_are_refused_and_kept(package, kaggle, tmp_path, name, text, words):
    folder = tmp_path / "build" / "dataset"
    write_tree(folder, {name: text.encode()})
    done = failed(package(), 2, words)
    assert name.partition("/")[0] in done.error
    assert (folder / name).read_text() == text
    assert not versions_of(kaggle)
    assert kaggle.count("StartBlobUpload") == 0


@pytest.mark.parametrize("name", ["pairs.npz", "resume_validate_0.pth"])
def test_a_folder_that_was_not_staged_is_not_replaced(package, tmp_path, name):
    """A run, say, that holds only what a dataset may hold: hours of work."""
    folder = write_tree(tmp_path / "runs" / "other", {name: b"1", "manifest.json": b"{}"})
    failed(package("--dry-run", "--folder", folder), 2, "other: was not staged by this command")
    assert read_tree(folder) == {name: b"1", "manifest.json": b"{}"}


def test_a_secret_beside_the_dataset_metadata_is_refused(package, tmp_path, monkeypatch):
    source = DATASET_METADATA.parent
    copy = write_tree(tmp_path / "kaggle_dataset", {path.name: path.read_bytes() for path in source.iterdir()})
    write_tree(copy, {"kaggle.json": b"{}"})
    monkeypatch.setattr("lib.jobs.lint.DATASET_METADATA", copy / "dataset-metadata.json")
    failed(package("--dry-run"), 2, r"kaggle\.json.*credentials")


def test_a_link_in_the_folder_is_refused(package, tmp_path):
    folder = write_tree(tmp_path / "build" / "dataset", {})
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    failed(package("--dry-run"), 2, "a link")


def test_the_secrets_of_the_kernel_script_are_found_as_well(package, tmp_path, monkeypatch):
    script = tmp_path / "pipeline.py"
    script.write_text('OVERRIDES: dict = {}\nTOKEN = "KGAT_0123456789abcdef0123456789abcdef"\n')
    monkeypatch.setattr("lib.jobs.dataset.KERNEL", script)
    failed(package("--dry-run"), 2, r"pipeline\.py.*a Kaggle token")


# ------------------------------------------------------------------------------------------------ bad runs
def test_a_run_that_is_not_there_is_named(package, run):
    failed(package("--run", run.parent / "nothing", "--dry-run"), 2, r"nothing.*manifest\.json.*run_local")


def test_without_any_run_there_is_nothing_to_package(tool, tmp_path):
    done = tool("package_dataset", "--runs", tmp_path / "runs", "--dry-run")
    failed(done, 2, r"no finished run with pipeline_final_model\.pth")


def test_the_newest_run_with_weights_is_the_default(tool, tmp_path):
    for name, mtime in (("old", 1e9), ("newest", 2e9), ("older", 5e8)):
        make_run(tmp_path / "runs" / name, mtime)
    succeeded(tool("package_dataset", "--runs", tmp_path / "runs", "--dry-run"))
    assert "`newest`" in (tmp_path / "build" / "dataset" / "README.md").read_text()


def test_a_run_that_is_not_finished_is_refused(package, run):
    make_run(run, complete=False)
    failed(package("--dry-run"), 2, "not a complete run")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data.swapcase()], ids=["short", "changed"])
def test_a_damaged_run_is_refused(package, run, kernel, damage):
    path = run / kernel.FINAL_MODEL
    path.write_bytes(damage(path.read_bytes()))
    failed(package("--dry-run"), 2, r"pipeline_final_model\.pth .*damaged")


# ------------------------------------------------------------------------------------------------- upload
def test_upload_is_private_whole_and_done_once(package, kaggle, tmp_path):
    kaggle.ready_after = 3
    assert json.loads(succeeded(package("--json")).stdout)["version"] == 1
    dataset = kaggle.datasets[WEIGHTS]
    assert dataset.private
    staged = {path.name: path.read_bytes() for path in (tmp_path / "build" / "dataset").iterdir()}
    del staged["dataset-metadata.json"]
    assert dataset.versions[0].files == staged
    assert dataset.request["description"] == staged["README.md"].decode()
    assert json.loads(succeeded(package("--json")).stdout)["version"] == 1
    assert len(dataset.versions) == 1


def test_other_weights_make_the_next_version(package, kaggle, run, kernel):
    succeeded(package())
    other = made_outputs("other")
    write_tree(run, other)
    assert "version 2: private, ready" in succeeded(package()).stdout
    right = [version.files[kernel.FINAL_MODEL] == other[kernel.FINAL_MODEL] for version in versions_of(kaggle)]
    assert right == [False, True]


def test_what_the_record_says_is_checked_with_kaggle(package, kaggle):
    succeeded(package())
    del versions_of(kaggle)[0].files["pipeline.py"]  # gone, or replaced by somebody else
    succeeded(package())
    assert len(versions_of(kaggle)) == 2


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("StartBlobUpload", Fault(status=503)),
        ("StartBlobUpload", Fault(status=429, retry_after="0")),
        ("StartBlobUpload", Fault(drop="before")),
        ("PUT blob", Fault(status=503)),
        ("PUT blob", Fault(drop="before", keep=50)),
        ("PUT blob", Fault(status=404)),  # an expired upload session
        ("CreateDataset", Fault(status=429, retry_after="0")),
        ("CreateDataset", Fault(drop="after")),
        ("CreateDataset", Fault(status=502, html=True, after=True)),
        ("GetDatasetStatus", Fault(status=500)),
        ("GetDatasetStatus", Fault(html=True)),
        ("GetDataset", Fault(drop="before")),
        ("ListDatasetFiles", Fault(status=503)),
        ("ListDatasetFiles", Fault(truncate=5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_that_pass_are_survived_with_one_whole_version(package, kaggle, tmp_path, call, fault):
    kaggle.fail(call, fault)
    succeeded(package())
    assert len(versions_of(kaggle)) == 1
    for name, data in versions_of(kaggle)[0].files.items():
        assert (tmp_path / "build" / "dataset" / name).read_bytes() == data


@pytest.mark.parametrize(
    ("call", "fault", "code", "words"),
    [
        ("CreateDataset", Fault(drop="before"), 1, "running this again is safe"),
        ("CreateDataset", Fault(json={"status": "error", "error": "The title is already in use"}), 1, "already in use"),
        ("CreateDataset", Fault(status=403, message="No upload today"), 1, "No upload today"),
        ("GetDataset", Fault(status=401, message="Unauthenticated"), 2, "credentials were refused"),
        ("StartBlobUpload", Fault(status=400, message="Too large"), 1, "Too large"),
    ],
)
def test_faults_that_stay_are_one_line_and_a_re_run_succeeds(package, kaggle, call, fault, code, words):
    kaggle.fail(call, fault)
    failed(package(), code, words)
    assert not versions_of(kaggle)
    succeeded(package())
    assert len(versions_of(kaggle)) == 1


def test_an_upload_that_was_cut_off_is_taken_up_and_not_repeated(package, kaggle):
    with stop_at(dataset, "wait_ready"):
        assert package().returncode == 130
    kaggle.ready_after = 4
    succeeded(package())
    assert len(versions_of(kaggle)) == 1


def test_a_file_that_kaggle_lost_is_named_and_nothing_counts_as_done(package, kaggle, monkeypatch, tmp_path):
    create = kaggle.rpc_CreateDataset

    def lossy(body: dict) -> dict:
        answer = create(body)
        del versions_of(kaggle)[0].files["pipeline_final_model.pth"]
        return answer

    monkeypatch.setattr(kaggle, "rpc_CreateDataset", lossy)
    failed(package("--timeout-minutes", 0.01), 1, r"does not list pipeline_final_model\.pth")
    assert "dataset_ready" not in (tmp_path / "runs" / "record.jsonl").read_text()


def test_processing_that_fails_or_does_not_end(package, kaggle, monkeypatch):
    create = kaggle.rpc_CreateDataset

    def failing(body: dict) -> dict:
        answer = create(body)
        versions_of(kaggle)[0].failed = True
        return answer

    kaggle.ready_after = 10**6
    failed(package("--timeout-minutes", 0.01), 1, r"is blobs_received.*run this again")
    kaggle.datasets.clear()
    monkeypatch.setattr(kaggle, "rpc_CreateDataset", failing)
    failed(package(), 1, "Kaggle says failed")


def test_an_upload_waits_for_a_version_that_is_being_processed(package, kaggle):
    versions = [DatasetVersion({"old": b"x"}), DatasetVersion({"new": b"x"}, polls_left=4)]
    kaggle.datasets[WEIGHTS] = Dataset(versions=versions)
    succeeded(package())
    assert len(versions_of(kaggle)) == 3


def test_the_folder_as_shipped_may_be_uploaded_by_the_official_client(kaggle, tmp_path):
    from kaggle.api.kaggle_api_extended import KaggleApi

    for path in DATASET_METADATA.parent.iterdir():
        text = path.read_text().replace("INSERT_KAGGLE_USERNAME", "tester")
        write_tree(tmp_path / "kaggle_dataset", {path.name: text.encode()})
    api = KaggleApi()
    api.authenticate()
    assert api.dataset_create_new(str(tmp_path / "kaggle_dataset"), quiet=True).status == "Ok"
    (sent,) = versions_of(kaggle)[0].files.values()
    assert b"$" not in sent
    assert b"tools/package_dataset.py" in sent


def test_an_empty_answer_to_an_upload_is_no_endless_wait(package, kaggle):
    kaggle.add_dataset(WEIGHTS, {"old": b"1"})
    kaggle.habits.empty_version_answer = True
    failed(package(), 1, "nothing at all; it did not happen as far as Kaggle shows")


def test_a_failed_dataset_is_uploaded_anew_when_asked_for(package, kaggle):
    succeeded(package())
    kaggle.datasets[WEIGHTS].versions.append(DatasetVersion({"by hand": b"1"}, failed=True))
    failed(package(), 1, r"Kaggle says failed.*--again uploads it anew")
    succeeded(package("--again"))


def test_folders_of_killed_packages_are_cleared(package, tmp_path):
    left, mine = (
        write_tree(tmp_path / "build" / name, {"dataset/weights.pth": b"1"})
        for name in (".dataset.killed.part", ".dataset.mine")
    )
    succeeded(package("--dry-run"))
    assert not left.exists()
    assert mine.exists()


def test_a_dry_run_stages_nothing_while_another_process_sends(tool, package, run, builds):
    with waiting_for(builds / ".locks" / "dataset", lambda: tool.start("package_dataset", "--run", run, "--dry-run")):
        assert not (builds / "dataset").exists()
    assert (builds / "dataset").exists()


@pytest.mark.parametrize("key", ["id", "title"])
def test_metadata_without_a_name_are_one_line(package, tmp_path, monkeypatch, key):
    metadata = {name: value for name, value in json.loads(DATASET_METADATA.read_text()).items() if name != key}
    copy = write_tree(tmp_path / "kaggle_dataset", {"dataset-metadata.json": json.dumps(metadata).encode()})
    monkeypatch.setattr("lib.jobs.lint.DATASET_METADATA", copy / "dataset-metadata.json")
    failed(package("--dry-run"), 2, f"{key}: missing")


def test_a_version_of_the_same_sizes_is_not_the_same_content(package, kaggle, run, kernel):
    """An upload that was cut off and never arrived; its number went to another content."""
    first, other = made_outputs("one"), made_outputs("two")
    write_tree(run, first)
    kaggle.fail("CreateDataset", Fault(drop="before"))
    failed(package(), 1)
    write_tree(run, other)
    succeeded(package())
    write_tree(run, first)
    succeeded(package())
    sent = [version.files[kernel.FINAL_MODEL] for version in versions_of(kaggle)]
    assert sent == [other[kernel.FINAL_MODEL], first[kernel.FINAL_MODEL]]
