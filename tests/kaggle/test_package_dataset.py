"""Packaging: what goes is what was shown, it arrives whole or not at all, once; and a kernel can use it."""

import json
import signal
from pathlib import Path

import pytest

import package_dataset
from drawn import TINY
from kaggle_runs import QUICK, competition_files, outputs_of_run, write_tree
from lib.jobs.dataset import facts_of
from lib.jobs.lint import DATASET_METADATA
from lib.project import InputError, ToolError
from stand_in import Dataset, DatasetVersion, Fault

REF = "tester/aml-alignment-weights"


@pytest.fixture
def run(tmp_path, kernel):
    """A finished run with made-up weights."""
    return write_tree(tmp_path / "runs" / "mine", outputs_of_run(kernel))


@pytest.fixture
def package(tmp_path, run):
    """Call the tool on that run."""

    def call(*options: object) -> int | None:
        fixed = ["--run", run, "--runs", tmp_path / "runs", "--folder", tmp_path / "build" / "dataset"]
        return package_dataset.main([str(option) for option in [*fixed, *options]])

    return call


def versions_of(kaggle) -> list[DatasetVersion]:
    """The versions that the stand-in has of the dataset."""
    return kaggle.datasets[REF].versions if REF in kaggle.datasets else []


# ------------------------------------------------------------------------------------------- what would go
def test_dry_run_shows_exactly_what_would_go_without_credentials_or_network(package, tmp_path, capsys):
    assert package("--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    staged = {path.name: path for path in (tmp_path / "build" / "dataset").iterdir()}
    assert set(shown["files"]) == set(staged) - {"dataset-metadata.json"}
    assert all(shown["files"][name]["bytes"] == staged[name].stat().st_size for name in shown["files"])
    assert set(shown["files"]) == {
        "README.md", "manifest.json", "metrics.json", "pipeline.py", "pipeline_final_model.pth",
        "pipeline_validated_model.pth",
    }  # fmt: skip
    assert package("--dry-run") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shown["files"])
    assert "nothing was sent" in out


def test_the_card_holds_the_run_s_own_figures(package, tmp_path):
    package("--dry-run")
    card = (tmp_path / "build" / "dataset" / "README.md").read_text()
    assert "| pool100_raw | 0.7500 | 0.0070 | 0.6000 | - | - |" in card
    assert "`mine` (recipe `align`)" in card
    assert "$" not in card


def test_staging_twice_gives_the_same_bytes(package, tmp_path):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "build" / "dataset").iterdir()}

    package("--dry-run")
    first = content()
    package("--dry-run")
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
    with pytest.raises(InputError, match=words) as error:
        package()
    assert "\n" not in str(error.value)
    assert name.partition("/")[0] in str(error.value)
    assert (folder / name).read_text() == text
    assert not versions_of(kaggle)
    assert kaggle.count("StartBlobUpload") == 0


def test_a_secret_beside_the_dataset_metadata_is_refused(package, tmp_path, monkeypatch):
    source = DATASET_METADATA.parent
    copy = write_tree(tmp_path / "kaggle_dataset", {path.name: path.read_bytes() for path in source.iterdir()})
    write_tree(copy, {"kaggle.json": b"{}"})
    monkeypatch.setattr("lib.jobs.lint.DATASET_METADATA", copy / "dataset-metadata.json")
    with pytest.raises(InputError, match=r"kaggle\.json.*credentials"):
        package("--dry-run")


def test_a_link_in_the_folder_is_refused(package, tmp_path):
    folder = write_tree(tmp_path / "build" / "dataset", {})
    folder.mkdir(parents=True)
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(InputError, match="a link"):
        package("--dry-run")


def test_the_secrets_of_the_kernel_script_are_found_as_well(package, tmp_path, monkeypatch):
    script = tmp_path / "pipeline.py"
    script.write_text('OVERRIDES: dict = {}\nTOKEN = "KGAT_0123456789abcdef0123456789abcdef"\n')
    monkeypatch.setattr("lib.jobs.dataset.KERNEL", script)
    with pytest.raises(InputError, match=r"pipeline\.py.*a Kaggle token"):
        package("--dry-run")


# ------------------------------------------------------------------------------------------------ bad runs
def test_a_run_that_is_not_there(package, run):
    with pytest.raises(InputError, match=r"nothing.*manifest\.json.*run_local"):
        package("--run", run.parent / "nothing", "--dry-run")


def test_no_run_at_all(tmp_path):
    with pytest.raises(InputError, match=r"no finished run with pipeline_final_model\.pth"):
        package_dataset.main(["--runs", str(tmp_path / "runs"), "--dry-run"])


def test_the_newest_run_with_weights_is_the_default(tmp_path, run, capsys):
    options = ["--runs", str(run.parent), "--folder", str(tmp_path / "build" / "dataset"), "--dry-run"]
    assert package_dataset.main(options) == 0
    assert "`mine`" in (tmp_path / "build" / "dataset" / "README.md").read_text()


def test_a_run_without_weights_or_unfinished(package, run, kernel):
    write_tree(run, outputs_of_run(kernel, complete=False))
    with pytest.raises(InputError, match="not a complete run"):
        package("--dry-run")


@pytest.mark.parametrize("damage", [b"\0weights" * 99, b"\0Weights" * 100])
def test_a_damaged_run(package, run, kernel, damage):
    (run / kernel.FINAL_MODEL).write_bytes(damage)
    with pytest.raises(InputError, match=r"pipeline_final_model\.pth .*damaged"):
        package("--dry-run")


def test_no_credentials(package):
    with pytest.raises(InputError, match=r"no Kaggle credentials.*KAGGLE_API_TOKEN"):
        package()


# ------------------------------------------------------------------------------------------------- upload
def test_upload_is_private_whole_and_done_once(package, kaggle, tmp_path, capsys):
    kaggle.ready_after = 3
    assert package("--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    dataset = kaggle.datasets[REF]
    assert dataset.private
    staged = {path.name: path.read_bytes() for path in (tmp_path / "build" / "dataset").iterdir()}
    del staged["dataset-metadata.json"]
    assert dataset.versions[0].files == staged
    assert dataset.request["description"] == staged["README.md"].decode()
    assert package("--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert len(dataset.versions) == 1


def test_other_weights_make_the_next_version(package, kaggle, run, kernel, capsys):
    package()
    other = outputs_of_run(kernel)
    weights = other[kernel.FINAL_MODEL].replace(b"w", b"W")
    manifest = json.loads(other[kernel.MANIFEST])
    (run / kernel.FINAL_MODEL).write_bytes(weights)
    manifest["outputs"][kernel.FINAL_MODEL] = facts_of(run, [kernel.FINAL_MODEL])[kernel.FINAL_MODEL]
    (run / kernel.MANIFEST).write_text(json.dumps(manifest))
    assert package() == 0
    assert "version 2: private, ready" in capsys.readouterr().out
    assert [version.files[kernel.FINAL_MODEL] == weights for version in versions_of(kaggle)] == [False, True]


def test_what_the_record_says_is_checked_with_kaggle(package, kaggle):
    package()
    del versions_of(kaggle)[0].files["pipeline.py"]  # gone, or replaced by somebody else
    assert package() == 0
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
    assert package() == 0
    assert len(versions_of(kaggle)) == 1
    for name, data in versions_of(kaggle)[0].files.items():
        assert (tmp_path / "build" / "dataset" / name).read_bytes() == data


@pytest.mark.parametrize(
    ("call", "fault", "words"),
    [
        ("CreateDataset", Fault(drop="before"), "running this again is safe"),
        ("CreateDataset", Fault(json={"status": "error", "error": "The title is already in use"}), "already in use"),
        ("CreateDataset", Fault(status=403, message="No upload today"), "No upload today"),
        ("GetDataset", Fault(status=401, message="Unauthenticated"), "credentials were refused"),
        ("StartBlobUpload", Fault(status=400, message="Too large"), "Too large"),
    ],
)
def test_faults_that_stay_are_one_line_and_a_re_run_succeeds(package, kaggle, call, fault, words):
    kaggle.fail(call, fault)
    with pytest.raises(ToolError, match=words) as error:
        package()
    assert "\n" not in str(error.value)
    assert not versions_of(kaggle)
    assert package() == 0
    assert len(versions_of(kaggle)) == 1


def test_an_upload_that_was_cut_off_is_taken_up_and_not_repeated(package, kaggle, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lib.jobs.dataset.wait_ready", interrupt)
        with pytest.raises(KeyboardInterrupt):
            package()
    kaggle.ready_after = 4
    assert package() == 0
    assert len(versions_of(kaggle)) == 1


def interrupt(*_: object) -> None:
    """The user presses Ctrl-C here."""
    raise KeyboardInterrupt


def test_a_file_that_kaggle_lost_is_named_and_nothing_counts_as_done(package, kaggle, monkeypatch, tmp_path):
    create = kaggle.rpc_CreateDataset

    def lossy(body: dict) -> dict:
        answer = create(body)
        del versions_of(kaggle)[0].files["pipeline_final_model.pth"]
        return answer

    monkeypatch.setattr(kaggle, "rpc_CreateDataset", lossy)
    with pytest.raises(ToolError, match=r"does not list pipeline_final_model\.pth"):
        package("--timeout-minutes", 0.01)
    assert "dataset_ready" not in (tmp_path / "runs" / "record.jsonl").read_text()


def test_processing_that_fails_or_does_not_end(package, kaggle, monkeypatch):
    create = kaggle.rpc_CreateDataset

    def failing(body: dict) -> dict:
        answer = create(body)
        versions_of(kaggle)[0].failed = True
        return answer

    kaggle.ready_after = 10**6
    with pytest.raises(ToolError, match=r"is blobs_received.*run this again"):
        package("--timeout-minutes", 0.01)
    kaggle.datasets.clear()
    monkeypatch.setattr(kaggle, "rpc_CreateDataset", failing)
    with pytest.raises(ToolError, match="Kaggle says failed"):
        package()


def test_an_upload_waits_for_a_version_that_is_being_processed(package, kaggle):
    versions = [DatasetVersion({"old": b"x"}), DatasetVersion({"new": b"x"}, polls_left=4)]
    kaggle.datasets[REF] = Dataset(versions=versions)
    assert package() == 0
    assert len(versions_of(kaggle)) == 3


# -------------------------------------------------------------------------------------- used by a kernel
@pytest.fixture
def quietly_in_process(kernel):
    """The kernel's main in this process, whose signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda *arguments: kernel.main([str(argument) for argument in arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_a_kernel_predicts_from_the_mounted_dataset(kaggle, kernel, quietly_in_process, package, tmp_path, layout):
    kaggle.mount_layout = layout
    files, _ = competition_files()
    kaggle.competitions["aml-competition"].files = files
    data, trained = write_tree(tmp_path / "data", files), tmp_path / "runs" / "trained"
    assert quietly_in_process("--input", data, "--output", trained, *QUICK) == 0
    assert package("--run", trained) == 0
    inputs = kaggle.mount(
        {"datasetDataSources": [REF], "competitionDataSources": ["aml-competition"]}, tmp_path / "kaggle" / "input"
    )
    expected = "datasets/tester/aml-alignment-weights" if layout == "new" else "aml-alignment-weights"
    assert (inputs / expected / kernel.FINAL_MODEL).is_file()

    predicted = tmp_path / "predicted"
    assert quietly_in_process("--input", inputs, "--output", predicted, "--mode", "predict", "--set", "device=cpu") == 0
    assert (predicted / kernel.SUBMISSION).read_bytes() == (trained / kernel.SUBMISSION).read_bytes()
    manifest = json.loads((predicted / kernel.MANIFEST).read_text())
    staged = json.loads((inputs / expected / kernel.MANIFEST).read_text())
    assert manifest["inputs"][kernel.FINAL_MODEL] == staged["files"][kernel.FINAL_MODEL]


def test_a_kernel_resumes_from_the_mounted_state_of_an_unfinished_run(
    kaggle, kernel, quietly_in_process, package, tmp_path, monkeypatch, capsys
):
    files, _ = competition_files()
    kaggle.competitions["aml-competition"].files = files
    data, stopped = write_tree(tmp_path / "data", files), tmp_path / "runs" / "stopped"
    knobs = [*TINY, "--set", "hidden=8", "--set", "epochs=1"]
    with monkeypatch.context() as patch:  # stopped at its very end, before it forgets its state
        patch.setattr(kernel.Folder, "forget", lambda folder: None)
        quietly_in_process("--input", data, "--output", stopped, *knobs)
    assert (stopped / kernel.RESUME_RUN).is_file()
    manifest = json.loads((stopped / kernel.MANIFEST).read_text()) | {"complete": False, "stopped": "SIGTERM"}
    (stopped / kernel.MANIFEST).write_text(json.dumps(manifest))
    assert package("--run", stopped) == 0
    sent = versions_of(kaggle)[0].files
    assert {name for name in sent if name.startswith("resume_")} == {path.name for path in stopped.glob("resume_*")}
    inputs = kaggle.mount(
        {"datasetDataSources": [REF], "competitionDataSources": ["aml-competition"]}, tmp_path / "kaggle" / "input"
    )
    capsys.readouterr()
    assert quietly_in_process("--input", inputs, "--output", tmp_path / "resumed", *knobs) == 0
    assert "epoch  " not in capsys.readouterr().out  # no training table: the candidates are there already
    assert json.loads((tmp_path / "resumed" / kernel.MANIFEST).read_text())["complete"]


def test_the_folder_as_shipped_may_be_uploaded_by_the_official_client(kaggle, tmp_path, monkeypatch):
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


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        package_dataset.main(["--help"])
    assert "python tools/package_dataset.py --run" in capsys.readouterr().out
    assert Path(package_dataset.__file__).name == "package_dataset.py"
