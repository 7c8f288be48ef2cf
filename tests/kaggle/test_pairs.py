"""Pairs on Kaggle: embed.py is pushed, its output becomes a dataset, and the walk of docs/pairs.md ends in a score."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from account import EMBED, PAIRS, PIPELINE
from drawn import CLOSED, TEST, TRAIN, as_npz, write_tree
from forked import Ended, failed, succeeded
from lib.data import Known
from lib.jobs.dataset import facts_of
from lib.jobs.lint import EMBED_METADATA, PAIRS_METADATA, lint_dataset_metadata, lint_kernel_metadata, lint_script
from lib.kernel import load_script
from lib.project import KERNEL, REPO
from stand_in import Plan, metric_score
from tiny_encoders import save_hub

COCO = "awsaf49/coco-2017-dataset"
SCRIPT = KERNEL.with_name("embed.py")


@pytest.fixture
def call(tool, tmp_path, kaggle) -> Callable[..., Ended]:
    """Run a tool's command line as docs have it: its runs/ lie in the test's folder, where it works."""
    return lambda line, *more: tool(*shlex.split(line), *more, "--runs", tmp_path / "runs")


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder as embed.py leaves it."""
    facts = {"num_captions": 2500, "num_images": 500, "embedding_dim_text": 12, "embedding_dim_image": 16}
    models = {"photos": {"model": "facebook/dinov2-giant"}, "captions": {"model": "a/roberta"}}
    folder = write_tree(tmp_path / "runs" / "made", {"pairs.npz": as_npz({"images/embeddings": np.ones((2, 16))})})
    manifest = {
        "complete": True,
        **facts,
        **models,
        "outputs": facts_of(folder, ["pairs.npz"]),
        "damaged": [],
        "check": {"photos": {"mean": 0.99991}, "captions": {"mean": 0.99998}},
    }
    return write_tree(folder, {"manifest.json": json.dumps(manifest).encode()})


# ------------------------------------------------------------------------------------------------- pushing
def test_the_files_of_pairs_have_nothing_to_report():
    assert lint_kernel_metadata(EMBED_METADATA) + lint_script(SCRIPT) + lint_dataset_metadata(PAIRS_METADATA) == []


def test_embed_is_pushed_with_its_settings_and_the_internet(call, kaggle):
    kaggle.add_dataset(COCO, {"a.jpg": b"x"})
    succeeded(call(f"push_kernel --script embed --dataset {COCO} --set limit=9 --set missing=skip --no-wait"))
    sent = kaggle.kernels[EMBED][0]
    line = 'OVERRIDES: dict = {"limit": 9, "missing": "skip"}'
    assert line in sent.text
    assert ast.parse(sent.text)
    assert SCRIPT.read_text().replace("OVERRIDES: dict = {}", line) in sent.text
    request = sent.request
    assert request["isPrivate"]
    assert request["enableGpu"]
    assert request["enableInternet"]
    assert request["datasetDataSources"] == [COCO]
    assert request["competitionDataSources"] == ["aml-competition"]
    assert PIPELINE not in kaggle.kernels
    assert f"{EMBED} version 1" in succeeded(call("push_kernel --script embed status")).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--set epochs=8", "unrecognized arguments: --epochs=8"),
        ("--set limit=many", "invalid int value: 'many'"),
        ("--recipe align", "unrecognized arguments: --recipe=align"),
    ],
)
def test_settings_that_embed_does_not_know_are_one_line(call, kaggle, options, words):
    failed(call(f"push_kernel --script embed {options}"), 2, re.escape(words))
    assert kaggle.count("SaveKernel") == 0


def test_a_session_s_limit_becomes_the_script_s_budget(call, kaggle):
    succeeded(call("push_kernel --script embed --timeout-minutes 60 --no-wait"))
    overrides = ast.literal_eval(re.search(r"^OVERRIDES: dict = (.*)$", kaggle.kernels[EMBED][0].text, re.M)[1])
    assert load_script(SCRIPT).resolve_knobs(overrides).max_minutes == 55


def test_a_wait_that_ends_names_the_command_that_goes_on(call, kaggle):
    kaggle.plans = [Plan(running=10**6)]
    words = r"not done after .*push_kernel\.py output --version 1 --script embed$"
    failed(call("push_kernel --script embed --timeout-minutes 0.01"), 1, words)


# ----------------------------------------------------------------------------------------------- packaging
def test_pairs_become_a_private_dataset_of_their_own_once(call, kaggle, made):
    succeeded(call("package_dataset --run runs/made"))
    dataset = kaggle.datasets[PAIRS]
    assert dataset.private
    assert set(kaggle.datasets) == {PAIRS}
    assert dataset.versions[0].files.keys() == {"pairs.npz", "README.md", "manifest.json"}
    assert dataset.versions[0].files["pairs.npz"] == (made / "pairs.npz").read_bytes()
    card = dataset.versions[0].files["README.md"].decode()
    assert "2,500 captions of 500 photos" in card
    assert "photos cosine 0.99991, captions cosine 0.99998" in card
    assert "--dataset aml-alignment-pairs --set pairs=true" in card
    assert "$" not in card
    done = succeeded(call("package_dataset --run runs/made"))
    assert len(dataset.versions) == 1
    assert f"{PAIRS} version 1: private, ready" in done.stdout


def test_damaged_pairs_do_not_go(call, kaggle, made):
    (made / "pairs.npz").write_bytes(b"x")
    failed(call("package_dataset --run runs/made"), 2, r"made: pairs\.npz has 1 bytes .*the pairs are damaged")
    assert not kaggle.datasets


# ------------------------------------------------------------------------------------------------ the walk
def commands_of(section: str) -> list[str]:
    """The commands of a section of docs/pairs.md, in order."""
    text = (REPO / "docs" / "pairs.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [
        line.removeprefix("    python tools/").replace(".py", "", 1)
        for line in text.splitlines()
        if line.startswith("    python tools/")
    ]


def draw_photos(names: list[str], seed: int) -> dict[str, bytes]:
    """Photos of blocks and stripes."""
    draw, files = np.random.default_rng(seed), {}
    for name in names:
        blocks = draw.integers(0, 256, (draw.integers(1, 7), draw.integers(1, 7), 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks).resize((40, 36), Image.Resampling.NEAREST).save(buffer, "JPEG")
        files[name] = buffer.getvalue()
    return files


def say(draw: np.random.Generator, letters: str) -> str:
    """A caption of random letters."""
    return "".join(draw.choice(list(letters), draw.integers(5, 40)))


def embedded(tool, photos: dict[str, bytes], folder: Path) -> dict[str, np.ndarray]:
    """The vectors of the photos and of five captions for each, by the models that the competition's are from."""
    draw, hub = np.random.default_rng(0), folder / "hub"
    save_hub(hub)
    rows = [f"{name},{say(draw, 'abcdefghij')}" for name in photos for _ in range(5)]
    write_tree(folder / "photos", photos)
    (folder / "all.csv").write_text("\n".join(["image,caption", *rows]))
    given = ["--captions", folder / "all.csv", "--photos", folder / "photos", "--output", folder / "vectors"]
    models = [next((hub / "hub").glob(f"models--{kind}*/snapshots/*")) for kind in ("facebook", "sent")]
    succeeded(tool("../kernel/embed", *given, "--image-model", models[0], "--text-model", models[1]))
    with np.load(folder / "vectors" / "pairs.npz") as arrays:
        return dict(arrays)


def coco() -> dict[str, bytes]:
    """COCO in small: photos, and what people said of them."""
    draw, photos = np.random.default_rng(1), draw_photos([f"{i:012d}.jpg" for i in range(40)], 2)
    about = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(photos)],
        "annotations": [{"image_id": i, "id": i, "caption": say(draw, "0123456789")} for i in range(40)],
    }
    return {
        "coco2017/annotations/captions_train2017.json": json.dumps(about).encode(),
        **{f"coco2017/train2017/{name}": photo for name, photo in photos.items()},
    }


@pytest.fixture
def world(tool, kaggle, kernel, tmp_path, monkeypatch):
    """The competition and COCO in small, of drawn photos; the hub's cache has tiny encoders under the real names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    names = [f"{i}.jpg" for i in range(220)]
    photos = draw_photos([*names, *(f"t{i}.jpg" for i in range(100))], 1)
    made = embedded(tool, photos, tmp_path)
    text, words, images = (made[key] for key in ("captions/embeddings", "captions/text", "images/embeddings"))
    train = {
        "captions/ids": np.arange(1100),
        "captions/text": words[:1100],
        "captions/embeddings": text[:1100],
        "captions/label": np.eye(220, dtype=bool)[np.repeat(np.arange(220), 5)],
        "images/names": np.array(names),
        "images/embeddings": images[:220],
    }
    test = {
        "captions/ids": np.arange(1, 101),
        "captions/text": words[1100::5],
        "captions/embeddings": text[1100::5],
        "metadata/embedding_dim_image": np.array([16]),
        "metadata/num_captions": np.array([100]),
    }
    vectors = {TRAIN: as_npz(train), TEST: as_npz(test)}
    competition = kaggle.competitions["aml-competition"]
    competition.files = vectors | {f"train/train/Images/{name}": photos[name] for name in names}
    competition.score = metric_score(kernel, {i + 1: vector.tolist() for i, vector in enumerate(images[220:])})
    kaggle.add_dataset(COCO, coco())
    write_tree(tmp_path / "data", vectors)
    known = {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in vectors.items()}
    monkeypatch.setattr("lib.jobs.submission.KNOWN", known)
    return competition


@pytest.mark.slow
def test_the_walk_from_coco_to_a_submission(call, kaggle, kernel, world, tmp_path, monkeypatch):
    """Every command of the docs, with the real scripts in the sessions; only the pipeline's recipe is a quick one."""
    kaggle.clock.pace = 0.005  # a session's twelve hours are minutes: real scripts may be slow on a busy machine
    monkeypatch.setenv("ALIGN_PACE", str(kaggle.clock.pace))
    kaggle.plans, said = [Plan(queued=1, run=True)], ""
    for command in commands_of("More pairs: from COCO to a submission"):
        quick = CLOSED if "pairs=true" in command else []
        data = ["--data", tmp_path / "data"] if command.startswith("submit") else []
        said += succeeded(call(command, *quick, *data)).stdout
    assert len(kaggle.kernels[EMBED]) == 1
    assert "check: 50 photos, mean cosine 1.00000" in kaggle.kernels[EMBED][0].log
    direct, attached = kaggle.kernels[PIPELINE]
    assert direct.request["kernelDataSources"] == [EMBED]
    assert attached.request["datasetDataSources"] == [PAIRS]
    fetched = facts_of(tmp_path / "runs" / "aml-embed-pairs-v1", ["pairs.npz"])["pairs.npz"]
    for run in (direct, attached):
        (pairs,) = json.loads(run.outputs[kernel.MANIFEST])["pairs"]
        assert pairs["images"] == 40
        assert pairs["joined_images"] > 0
        assert pairs["sha256"] == fetched["sha256"]
    assert len(world.submissions) == 1
    assert world.submissions[0].public is not None
    assert "public score" in said
