"""Pushing: what is sent, that it is sent once, that exactly its version is followed, fetched and verified."""

import ast
import json
import re

import pytest

import package_dataset
import push_kernel
from kaggle_runs import outputs_of_run, write_tree
from lib.jobs import lint
from lib.jobs.fetch import Output
from lib.jobs.lint import KERNEL_METADATA
from lib.kaggle_api.kernels import Kernels
from lib.project import KERNEL, InputError, ToolError
from stand_in import Fault, Plan

REF = "tester/aml-text-to-image-alignment"
FAULTS_THAT_PASS = [Fault(status=503), Fault(status=429, retry_after="0"), Fault(drop="before"), Fault(html=True)]


def fetched(tmp_path, version: int = 1) -> dict[str, bytes]:
    """The files of a fetched version."""
    folder = tmp_path / "runs" / f"aml-text-to-image-alignment-v{version}"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- staging
def test_what_is_pushed_is_the_script_with_its_overrides_and_the_metadata(push, kaggle, finished, capsys):
    settings = ["--set", "epochs=5", "--set", "refit=false", "--set", "lr=0.002"]
    assert push("--recipe", "baseline", *settings, "--no-wait") == 0
    sent = kaggle.kernels[REF][0]
    original = KERNEL.read_text()
    line = 'OVERRIDES: dict = {"recipe": "baseline", "epochs": 5, "refit": False, "lr": 0.002}'
    assert sent.text.rpartition("# order ")[0] == original.replace("OVERRIDES: dict = {}", line)
    ast.parse(sent.text)
    request = sent.request
    assert request["isPrivate"]
    assert request["enableGpu"]
    assert request["machineShape"] == "NvidiaTeslaT4"
    assert "enableInternet" not in request or request["enableInternet"] is False
    assert request["competitionDataSources"] == ["aml-competition"]
    assert request["newTitle"] == "AML Text to Image Alignment"
    assert f"{REF} version 1: pushed" in capsys.readouterr().out


def test_accelerators(push, kaggle, finished):
    push("--accelerator", "none", "--no-wait")
    push("--accelerator", "TpuV5E8", "--no-wait")
    without, tpu = (run.request for run in kaggle.kernels[REF])
    assert "machineShape" not in without
    assert not without.get("enableGpu")
    assert tpu["machineShape"] == "TpuV5E8"
    with pytest.raises(InputError, match="retired; use NvidiaTeslaT4"):
        push("--accelerator", "NvidiaTeslaP100")
    with pytest.raises(InputError, match=r"did you mean NvidiaL4\?"):
        push("--accelerator", "NvidiaL44")
    assert len(kaggle.kernels[REF]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "epoch=5"], "epochs"),
        (["--set", "epochs=many"], "epochs"),
        (["--set", "epochs"], "KEY=VALUE"),
        (["--recipe", "best"], "best"),
        (["--timeout-minutes", "721"], "at most 720"),
        (["--timeout-minutes", "0"], "more than 0"),
        (["--dataset", "aml-alignment-weights"], "does not exist; make it with python tools/package_dataset.py"),
        (["--dataset", "datasets/tester/weights"], "no prefix"),
        (["--kernel-source", "a/b"], "owner/slug"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_pushed(push, kaggle, options, words):
    with pytest.raises(Exception, match=re.escape(words)) as error:
        push(*options)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert kaggle.count("SaveKernel") == 0


def test_a_title_that_is_not_the_slug_is_not_pushed(push, kaggle, tmp_path, monkeypatch):
    metadata = json.loads(KERNEL_METADATA.read_text()) | {"title": "Another Title"}
    write_tree(tmp_path, {"kernel-metadata.json": json.dumps(metadata).encode(), "kernel/pipeline.py": b""})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    with pytest.raises(InputError, match=r"title: 'Another Title' becomes the slug 'another-title'"):
        push()
    assert kaggle.count("SaveKernel") == 0


def test_a_script_that_kaggle_cannot_run_is_not_pushed(push, kaggle, tmp_path, monkeypatch):
    metadata = KERNEL_METADATA.read_bytes()
    script = b"import sklearn\nOVERRIDES: dict = {}\n"
    write_tree(tmp_path, {"kernel-metadata.json": metadata, "kernel/pipeline.py": script})
    monkeypatch.setattr("lib.jobs.lint.KERNEL_METADATA", tmp_path / "kernel-metadata.json")
    with pytest.raises(InputError, match=r"pipeline\.py: line 1: imports sklearn"):
        push()
    assert kaggle.count("SaveKernel") == 0


def test_no_credentials(tmp_path):
    with pytest.raises(InputError, match=r"no Kaggle credentials.*KAGGLE_API_TOKEN"):
        push_kernel.main(["--runs", str(tmp_path)])


def test_a_wrong_key(push, kaggle):
    kaggle.key = "another"
    with pytest.raises(InputError, match="credentials were refused"):
        push()


def test_init_writes_the_owner_once_and_the_official_client_can_push_it(tmp_path, monkeypatch, kaggle, capsys):
    for name in ("KERNEL", "EMBED", "DATASET", "PAIRS"):
        content = getattr(lint, f"{name}_METADATA").read_bytes()
        monkeypatch.setattr(f"lib.jobs.lint.{name}_METADATA", tmp_path / f"{name.lower()}-metadata.json")
        write_tree(tmp_path, {f"{name.lower()}-metadata.json": content})
    assert push_kernel.main(["--init", "tester"]) == 0
    for name, ref in (
        ("kernel-metadata.json", REF),
        ("embed-metadata.json", "tester/aml-embed-pairs"),
        ("dataset-metadata.json", "tester/aml-alignment-weights"),
        ("pairs-metadata.json", "tester/aml-alignment-pairs"),
    ):
        assert json.loads((tmp_path / name).read_text())["id"] == ref
    with pytest.raises(InputError, match="the owner is tester already"):
        push_kernel.main(["--init", "ada"])
    with pytest.raises(InputError, match="not a Kaggle user name"):
        push_kernel.main(["--init", "a da"])

    from kaggle.api.kaggle_api_extended import KaggleApi

    write_tree(tmp_path, {"kernel/pipeline.py": KERNEL.read_bytes()})
    api = KaggleApi()
    api.authenticate()
    assert api.kernels_push(str(tmp_path)).version_number == 1
    assert kaggle.kernels[REF][0].text == KERNEL.read_text()


# --------------------------------------------------------------------------------------- to the very end
def test_push_wait_fetch_verify(push, kaggle, finished, tmp_path, capsys):
    kaggle.plans[0].queued, kaggle.plans[0].running = 2, 3
    kaggle.output_page = 2
    assert push("--json") == 0
    out = capsys.readouterr()
    result = json.loads(out.out)
    run = str(tmp_path / "runs" / "aml-text-to-image-alignment-v1")
    assert result == {"kernel": REF, "version": 1, "status": "complete", "run": run}
    assert fetched(tmp_path) == finished | {"kernel.log": b"epoch 1\nepoch 2\n"}
    assert "version 1: queued" in out.err
    assert "version 1: running" in out.err
    assert "epoch 2\n" in out.err  # the log as it ran


def test_the_same_push_is_made_once_and_its_output_fetched_once(push, kaggle, finished):
    assert push() == 0
    calls = kaggle.count("GET output")
    assert push() == 0
    assert kaggle.count("SaveKernel") == 1
    assert kaggle.count("GET output") == calls
    assert push("--set", "epochs=2") == 0
    assert push("--again") == 0
    assert [len(kaggle.kernels[REF]), kaggle.count("SaveKernel")] == [3, 3]


def test_status_and_output_of_an_earlier_version(push, kaggle, finished, tmp_path, capsys):
    push("--no-wait")
    kaggle.plans = [Plan(outcome="ERROR", failure="Out of memory")]
    push("--no-wait", "--set", "epochs=2")
    capsys.readouterr()
    assert push("status") == 0
    assert capsys.readouterr().out == f"{REF} version 2: error (Out of memory)\n"
    assert push("status", "--version", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "queued"
    assert push("output", "--version", 1) == 0
    assert fetched(tmp_path)["manifest.json"] == finished["manifest.json"]
    assert kaggle.count("SaveKernel") == 2


def test_status_without_any_version(push):
    with pytest.raises(InputError, match="does not exist for tester; push it first"):
        push("status")


def test_quota(push, kaggle, capsys):
    assert push("--quota") == 0
    assert re.search(r"GPU +1\.5 +0\.0 +30\.0 +28\.5", capsys.readouterr().out)
    assert push("--quota", "--json") == 0
    assert json.loads(capsys.readouterr().out)["GPU"]["left_hours"] == 28.5
    kaggle.gpu_used_hours = 30.0
    with pytest.raises(ToolError, match=r"GPU quota used up \(30\.0 of 30\.0 h.*--accelerator none"):
        push()
    assert kaggle.count("SaveKernel") == 0
    assert push("--accelerator", "none", "--no-wait") == 0


def test_a_push_waits_for_its_own_dataset_in_the_recorded_version(push, kaggle, finished, tmp_path, kernel):
    run = write_tree(tmp_path / "runs" / "mine", outputs_of_run(kernel))
    options = ["--run", run, "--runs", tmp_path / "runs", "--folder", tmp_path / "build" / "dataset"]
    assert package_dataset.main([str(option) for option in options]) == 0
    dataset = kaggle.datasets["tester/aml-alignment-weights"]
    dataset.versions[0].polls_left = 4  # Kaggle is at it again
    assert push("--dataset", "aml-alignment-weights", "--set", "mode=predict", "--no-wait") == 0
    assert dataset.versions[0].polls_left <= 0
    assert kaggle.kernels[REF][0].request["datasetDataSources"] == ["tester/aml-alignment-weights"]


def test_new_data_is_a_new_push(push, kaggle, finished):
    dataset = kaggle.add_dataset("tester/aml-alignment-weights", {"a": b"1"})
    options = ["--dataset", "aml-alignment-weights", "--no-wait"]
    push(*options)
    push(*options)
    assert kaggle.count("SaveKernel") == 1
    dataset.versions.append(type(dataset.versions[0])({"a": b"2"}))
    push(*options)
    assert kaggle.count("SaveKernel") == 2


# ------------------------------------------------------------------------------------------- kernels that end otherwise
def test_a_failed_kernel_shows_the_end_of_its_log(push, kaggle, tmp_path, capsys):
    log = "".join(f"line {i}\n" for i in range(100)) + "RuntimeError: out of memory\n"
    kaggle.plans = [Plan(running=1, outcome="ERROR", failure="exit code 1", log=log, outputs={"half.csv": b"1"})]
    with pytest.raises(ToolError, match=r"version 1 failed: exit code 1; .*--again") as error:
        push()
    assert error.value.exit_code == 1
    assert capsys.readouterr().err.rstrip().endswith("| RuntimeError: out of memory")
    assert not list((tmp_path / "runs").glob("aml-*"))
    with pytest.raises(ToolError, match="version 1 failed"):
        push()  # says so again, pushes nothing
    assert kaggle.count("SaveKernel") == 1


def test_a_cancelled_kernel(push, kaggle):
    kaggle.plans = [Plan(outcome="CANCEL_ACKNOWLEDGED")]
    with pytest.raises(ToolError, match="version 1 was cancelled"):
        push()


def test_the_deadline(push, kaggle, finished):
    kaggle.plans = [Plan(running=10**6)]
    with pytest.raises(ToolError, match=r"not done after .*push_kernel\.py output --version 1"):
        push("--timeout-minutes", 0.01, "--set", "max_minutes=0.001")
    assert kaggle.kernels[REF][0].request["sessionTimeoutSeconds"] == 1


def test_a_run_that_was_stopped_is_kept_but_is_no_success(push, kaggle, kernel, tmp_path):
    kaggle.plans = [Plan(outputs=outputs_of_run(kernel, complete=False, stopped="SIGTERM"))]
    with pytest.raises(ToolError, match=r"stopped early \(SIGTERM\).*--kernel-source"):
        push()
    assert kernel.SUBMISSION in fetched(tmp_path)


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
    with pytest.raises(ToolError, match=words) as error:
        push()
    assert "\n" not in str(error.value)
    assert push() == 0
    assert kaggle.count("SaveKernel") == 2


# ------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    "call", ["GetKernel", "GetKernelSessionStatus", "ListKernelSessionOutput", "GetAcceleratorQuotaStatistics"]
)
@pytest.mark.parametrize("fault", FAULTS_THAT_PASS, ids=["503", "429", "drop", "html"])
def test_calls_that_may_be_repeated_are(push, kaggle, finished, tmp_path, call, fault):
    kaggle.fail(call, fault)
    assert push() == 0
    assert kaggle.count("SaveKernel") == 1
    assert fetched(tmp_path).keys() >= finished.keys()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop="after"),
        Fault(status=502, html=True, after=True),
        Fault(status=500, after=True),
        Fault(status=429, retry_after="0"),
        Fault(truncate=4),
    ],
    ids=["drop", "502", "500", "429", "cut"],
)
def test_a_push_that_took_effect_without_saying_so_is_found(push, kaggle, finished, fault):
    kaggle.fail("SaveKernel", fault)
    assert push() == 0
    assert len(kaggle.kernels[REF]) == 1


def test_a_push_that_did_not_happen_is_one_line_and_the_next_run_pushes(push, kaggle, finished):
    kaggle.fail("SaveKernel", Fault(drop="before"))
    with pytest.raises(ToolError, match="running this again is safe"):
        push()
    assert push() == 0
    assert len(kaggle.kernels[REF]) == 1


def test_a_push_whose_client_died_is_found_by_the_next_run(push, kaggle, finished, monkeypatch):
    save = Kernels.push

    def die_after(*arguments: object, **options: object) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kernels, "push", die_after)
        with pytest.raises(KeyboardInterrupt):
            push()
    assert push() == 0
    assert len(kaggle.kernels[REF]) == 1


def test_a_version_that_somebody_else_pushed_is_not_taken_for_ours(push, kaggle, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Kernels, "push", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push()
    kaggle.rpc("SaveKernel", {"slug": REF, "text": "print('by hand')"})
    assert push() == 0
    assert len(kaggle.kernels[REF]) == 2
    assert (tmp_path / "runs" / "aml-text-to-image-alignment-v2").is_dir()


def interrupt(*_: object, **__: object) -> None:
    """The user presses Ctrl-C here."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "fault",
    [Fault(status=403, xml=True), Fault(status=503), Fault(truncate=10), Fault(drop="before"), Fault(html=True)],
    ids=["expired", "503", "cut", "drop", "html"],
)
@pytest.mark.parametrize("which", [0, 2])
def test_downloads_survive_and_are_right(push, kaggle, finished, tmp_path, which, fault):
    kaggle.fail("GET output", *[None] * which, fault)
    assert push() == 0
    assert {name: fetched(tmp_path)[name] for name in finished} == finished


def test_urls_that_expire_while_fetching_are_asked_for_again(push, kaggle, finished, tmp_path, monkeypatch):
    fetch_one = Output.download_verified

    def late(output: Output, *arguments: object) -> None:
        kaggle.expire_urls()
        fetch_one(output, *arguments)

    monkeypatch.setattr(Output, "download_verified", late)
    assert push() == 0
    assert {name: fetched(tmp_path)[name] for name in finished} == finished


def test_an_output_that_is_not_what_the_manifest_says_is_not_accepted(push, kaggle, kernel, finished, tmp_path):
    kaggle.plans[0].outputs = finished | {kernel.FINAL_MODEL: finished[kernel.FINAL_MODEL].replace(b"w", b"W")}
    with pytest.raises(ToolError, match=r"pipeline_final_model\.pth has another sha256"):
        push()
    assert not (tmp_path / "runs" / "aml-text-to-image-alignment-v1").exists()
    kaggle.kernels[REF][0].outputs = finished
    assert push() == 0
    assert kaggle.count("SaveKernel") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest.json": None}, r"no manifest\.json among 4 files"),
        ({"pipeline_submission.csv": None}, r"does not list pipeline_submission\.csv"),
        ({"manifest.json": b"{"}, "not the manifest of a run"),
        ({"manifest.json": b'{"complete": true, "outputs": {}}'}, "not the manifest of a run"),
        ({"metrics.json": b"short"}, r"metrics\.json"),
    ],
)
def test_an_output_that_is_not_whole_is_no_run(push, kaggle, finished, tmp_path, change, words):
    kaggle.plans[0].outputs = {name: data for name, data in (finished | change).items() if data is not None}
    with pytest.raises(ToolError, match=words) as error:
        push()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "aml-text-to-image-alignment-v1").exists()


def test_a_fetch_that_was_interrupted_goes_on(push, kaggle, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Output, "download_verified", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push()
    assert not (tmp_path / "runs" / "aml-text-to-image-alignment-v1").exists()
    assert push() == 0
    assert len(kaggle.kernels[REF]) == 1
    assert fetched(tmp_path).keys() >= finished.keys()


def test_a_fetched_run_that_was_changed_is_not_called_verified(push, kaggle, finished, tmp_path):
    push()
    (tmp_path / "runs" / "aml-text-to-image-alignment-v1" / "metrics.json").write_text("{}")
    with pytest.raises(ToolError, match=r"metrics\.json has 2 bytes.*move the folder away"):
        push()


def test_a_missing_log_stream_is_no_failure(push, kaggle, finished, capsys):
    kaggle.fail("GET log", *[Fault(status=404)] * 9)
    assert push() == 0


def test_a_silent_server_is_left_after_the_timeout(push, kaggle, finished, monkeypatch):
    monkeypatch.setenv("ALIGN_TIMEOUT_SECONDS", "0.5")
    kaggle.fail("GetKernelSessionStatus", Fault(silent=0.8))
    assert push() == 0


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        push_kernel.main(["--help"])
    assert "python tools/push_kernel.py --recipe" in capsys.readouterr().out
