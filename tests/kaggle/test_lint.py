"""The lints: every rule finds its fault, names the place and the fix, and lets the repository's own files pass."""

import json
from pathlib import Path

import pytest

from forked import succeeded
from lib.jobs.lint import Finding, lint_dataset_metadata, lint_kernel_metadata, lint_script
from lib.project import KERNEL as KERNEL_SCRIPT
from lib.project import InputError

KERNEL = {
    "id": "ada/aml-text-to-image-alignment",
    "title": "AML Text to Image Alignment",
    "code_file": "script.py",
    "language": "python",
    "kernel_type": "script",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",
    "competition_sources": ["aml-competition"],
}
DATASET = {"id": "ada/aml-alignment-weights", "title": "AML Alignment Weights", "licenses": [{"name": "other"}]}
SCRIPT = "import torch\n\nOVERRIDES: dict = {}\n"


def kernel_findings(folder: Path, **changes: object) -> list[Finding]:
    """The findings in KERNEL with some keys changed; a key set to None is left out."""
    metadata = {key: value for key, value in {**KERNEL, **changes}.items() if value is not None}
    (folder / "script.py").write_text(SCRIPT)
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata))
    return lint_kernel_metadata(folder / "kernel-metadata.json")


def dataset_findings(folder: Path, **changes: object) -> list[Finding]:
    """The findings in DATASET with some keys changed; a key set to None is left out."""
    metadata = {key: value for key, value in {**DATASET, **changes}.items() if value is not None}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    return lint_dataset_metadata(folder / "dataset-metadata.json", staged=True)


def script_findings(folder: Path, text: str | bytes) -> list[Finding]:
    """The findings in a script of this text."""
    path = folder / "script.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return lint_script(path)


def test_the_right_metadata_has_no_findings(tmp_path):
    assert kernel_findings(tmp_path) == []
    assert dataset_findings(tmp_path) == []
    assert script_findings(tmp_path, SCRIPT) == []


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"enable_gpus": True}, "enable_gpus", "did you mean enable_gpu?"),
        ({"zzz": True}, "zzz", "known: id, id_no"),
        ({"enable_internet": None}, "enable_internet", "left out it means true"),
        ({"language": None}, "language", "missing"),
        ({"language": "Python"}, "language", "one of python"),
        ({"kernel_type": "Script"}, "kernel_type", "one of script, notebook"),
        ({"title": "Another Title"}, "title", "becomes the slug 'another-title'"),
        ({"title": "AML"}, "title", "5 to 50"),
        ({"title": "A" * 51}, "title", "5 to 50"),
        ({"id": "ada/aml"}, "id", "3 characters"),
        ({"id": "aml-text-to-image-alignment"}, "id", "not owner/slug"),
        ({"id": "ada/aml-text-to-image-alignment/3"}, "id", "not owner/slug"),
        ({"enable_gpu": "true"}, "enable_gpu", "no quotes"),
        ({"is_private": 1}, "is_private", "not a boolean"),
        ({"is_private": False}, "is_private", "public"),
        ({"machine_shape": "NvidiaTeslaP100"}, "machine_shape", "retired; use NvidiaTeslaT4"),
        ({"machine_shape": "tpuv232"}, "machine_shape", "retired"),
        ({"machine_shape": "nvidiateslat4"}, "machine_shape", "did you mean NvidiaTeslaT4?"),
        ({"machine_shape": ["NvidiaTeslaT4"]}, "machine_shape", "unknown accelerator"),
        ({"keywords": "nlp"}, "keywords", "not a list"),
        ({"code_file": "kernel/nothing.py"}, "code_file", "does not exist"),
        ({"code_file": "../pipeline.py"}, "code_file", "outside the metadata's folder"),
        ({"code_file": str(KERNEL_SCRIPT)}, "code_file", "outside the metadata's folder"),
        ({"docker_image": 5}, "docker_image", "not a text"),
        ({"dataset_sources": ["datasets/ada/weights"]}, "dataset_sources", "no prefix"),
        ({"dataset_sources": ["weights"]}, "dataset_sources", "owner/slug"),
        ({"dataset_sources": "ada/weights"}, "dataset_sources", "not a list"),
        ({"competition_sources": ["competitions/aml-competition"]}, "competition_sources", "bare slug"),
        ({"competition_sources": ["c/aml-competition"]}, "competition_sources", "bare slug"),
        ({"kernel_sources": ["ada/abc"]}, "kernel_sources", "owner/slug"),
        ({"kernel_sources": ["code/some-kernel"]}, "kernel_sources", "prefix"),
        ({"model_sources": ["ada/model/pytorch/default"]}, "model_sources", "variation/version"),
    ],
)
def test_each_fault_of_kernel_metadata_is_found(tmp_path, changes, key, words):
    findings = kernel_findings(tmp_path, **changes)
    assert [finding.key for finding in findings] == [key]
    assert words in str(findings[0])
    assert str(findings[0]).startswith(f"kernel-metadata.json: {key}: ")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"license": []}, "license", "did you mean licenses?"),
        ({"licenses": None}, "licenses", "missing"),
        ({"licenses": [{"name": "MIT"}]}, "licenses", "unknown licence 'MIT'"),
        ({"licenses": [{"name": "other"}, {"name": "PDDL"}]}, "licenses", "exactly one"),
        ({"title": "AML weights of a run"}, "title", "becomes the slug 'aml-weights-of-a-run'"),
        ({"id": "ada/amlws", "title": "amlws "}, "id", "5 characters"),
        ({"subtitle": "too short"}, "subtitle", "20 to 80"),
        ({"isPrivate": False}, "isPrivate", "public"),
        ({"resources": [{"path": "nothing.csv"}]}, "resources", "not in the folder"),
        ({"resources": "nothing.csv"}, "resources", "nothing.csv is not in the folder"),
        ({"licenses": 5}, "licenses", "exactly one"),
        ({"licenses": {"name": "other"}}, "licenses", "exactly one"),
        ({"subtitle": ["a text of twenty letters"]}, "subtitle", "20 to 80"),
    ],
)
def test_each_fault_of_dataset_metadata_is_found(tmp_path, changes, key, words):
    findings = [finding for finding in dataset_findings(tmp_path, **changes) if finding.key == key]
    assert len(findings) == 1
    assert words in str(findings[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "line 1: does not parse"),
        ("import requests\n" + SCRIPT, "line 1: imports requests, not in the Kaggle image"),
        ("from scipy.stats import norm\n" + SCRIPT, "imports scipy"),
        ("import distutils\n" + SCRIPT, "imports distutils"),  # in Python 3.11's library, gone in Kaggle's 3.12
        ("from lib.project import REPO\n" + SCRIPT, "imports lib, a file that is not pushed"),
        ("def f():\n    from . import knobs\n" + SCRIPT, "line 2: imports ., a file that is not pushed"),
        ("import torch\n", "0 such lines"),
        (SCRIPT + SCRIPT, "2 such lines"),
        (b"# caf\xe9\n", "not UTF-8"),
    ],
)
def test_each_fault_of_a_script_is_found(tmp_path, text, words):
    findings = script_findings(tmp_path, text)
    assert len(findings) == 1
    assert words in str(findings[0])


def test_script_imports_inside_packages_and_overrides_are_fine(tmp_path):
    text = 'import json, torch.nn as nn\nfrom PIL import Image\nOVERRIDES: dict = {"epochs": 5}\n'
    assert script_findings(tmp_path, text) == []


@pytest.mark.parametrize("text", ["", "{", "[]", b"\xff"])
def test_metadata_that_is_no_json_object_is_one_line(tmp_path, text):
    path = tmp_path / "kernel-metadata.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"kernel-metadata\.json.*JSON.*git checkout") as error:
        lint_kernel_metadata(path)
    assert "\n" not in str(error.value)


def test_the_repository_passes(tool):
    assert "nothing to report" in succeeded(tool("kaggle_lint")).stdout


def test_every_finding_is_listed(tool, tmp_path):
    kernel_findings(tmp_path, enable_gpus=True, machine_shape="NvidiaTeslaP100")
    arguments = ["--kernel-metadata", tmp_path / "kernel-metadata.json"]
    done = tool("kaggle_lint", *arguments)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("error: kernel-metadata.json: enable_gpus: unknown key")
    assert "NvidiaTeslaP100 is retired" in second
    done = tool("kaggle_lint", *arguments, "--json")
    assert done.returncode == 2
    assert [entry["key"] for entry in json.loads(done.stdout)] == ["enable_gpus", "machine_shape"]


def test_a_script_that_is_too_large_for_kaggle(tmp_path):
    script = tmp_path / "pipeline.py"
    script.write_text("OVERRIDES: dict = {}\n" + "# filler\n" * 120_000)
    (finding,) = lint_script(script)
    assert (finding.key, finding.what) == ("size", "has 1,080,021 bytes")
