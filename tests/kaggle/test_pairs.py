"""Pairs on Kaggle: embed.py is pushed, its output becomes a dataset, and the walk of docs/pairs.md ends in a score."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import package_dataset
import push_kernel
import submit
from kaggle_runs import QUICK, npz, write_tree
from lib.data import Known
from lib.jobs.dataset import facts_of
from lib.jobs.lint import EMBED_METADATA, PAIRS_METADATA, lint_dataset_metadata, lint_kernel_metadata, lint_script
from lib.kernel import load_script
from lib.project import KERNEL, REPO, InputError
from stand_in import Plan, metric_score
from tiny_encoders import save_hub

EMBED, PIPELINE, PAIRS = "tester/aml-embed-pairs", "tester/aml-text-to-image-alignment", "tester/aml-alignment-pairs"
COCO = "awsaf49/coco-2017-dataset"
SCRIPT = KERNEL.with_name("embed.py")


@pytest.fixture
def call(tmp_path, kaggle, monkeypatch):
    """Run a tool's command line as docs have it, with everything in the test's folder."""
    monkeypatch.setattr("lib.jobs.order.BUILD", tmp_path / "build" / "kernel")
    monkeypatch.setattr("package_dataset.BUILD", tmp_path / "build" / "dataset")
    kaggle.competitions.setdefault("aml-competition", None)
    tools = {"push_kernel": push_kernel.main, "package_dataset": package_dataset.main, "submit": submit.main}

    def run(line: str, *more: object) -> int | None:
        words = [str(word) for word in [*shlex.split(line), *more]]
        words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
        return tools[words[0]]([*words[1:], "--runs", str(tmp_path / "runs")])

    return run


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder as embed.py leaves it."""
    facts = {"num_captions": 2500, "num_images": 500, "embedding_dim_text": 12, "embedding_dim_image": 16}
    models = {"photos": {"model": "facebook/dinov2-giant"}, "captions": {"model": "a/roberta"}}
    folder = write_tree(tmp_path / "runs" / "made", {"pairs.npz": npz(images__embeddings=np.ones((2, 16)))})
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


def test_embed_is_pushed_with_its_settings_and_the_internet(call, kaggle, capsys):
    kaggle.add_dataset(COCO, {"a.jpg": b"x"})
    assert call(f"push_kernel --script embed --dataset {COCO} --set limit=9 --set missing=skip --no-wait") == 0
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
    assert call("push_kernel --script embed status") == 0
    assert f"{EMBED} version 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--set epochs=8", "unrecognized arguments: --epochs=8"),
        ("--set limit=many", "invalid int value: 'many'"),
        ("--recipe align", "unrecognized arguments: --recipe=align"),
    ],
)
def test_settings_that_embed_does_not_know_are_one_line(call, kaggle, options, words):
    with pytest.raises(Exception, match=re.escape(words)) as error:
        call(f"push_kernel --script embed {options}")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert kaggle.count("SaveKernel") == 0


def test_a_session_s_limit_becomes_the_script_s_budget(call, kaggle):
    assert call("push_kernel --script embed --timeout-minutes 60 --no-wait") == 0
    overrides = ast.literal_eval(re.search(r"^OVERRIDES: dict = (.*)$", kaggle.kernels[EMBED][0].text, re.M)[1])
    assert load_script(SCRIPT).resolve_knobs(overrides).max_minutes == 55


# ----------------------------------------------------------------------------------------------- packaging
def test_pairs_become_a_private_dataset_of_their_own_once(call, kaggle, made, tmp_path, capsys):
    assert call("package_dataset --run runs/made") == 0
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
    assert call("package_dataset --run runs/made") == 0
    assert len(dataset.versions) == 1
    assert f"{PAIRS} version 1: private, ready" in capsys.readouterr().out


def test_damaged_pairs_do_not_go(call, kaggle, made):
    (made / "pairs.npz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"made: pairs\.npz has 1 bytes .*the pairs are damaged"):
        call("package_dataset --run runs/made")
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


def draw_photos(names: list[str], seed: int, folder: Path) -> dict[str, bytes]:
    """Photos of blocks and stripes, as files."""
    draw, files = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        blocks = draw.integers(0, 256, (draw.integers(1, 7), draw.integers(1, 7), 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 36), Image.Resampling.NEAREST).save(folder / name)
        files[name] = (folder / name).read_bytes()
    return files


@pytest.fixture
def world(kaggle, kernel, tmp_path, monkeypatch):
    """The competition and COCO in small, of drawn photos; the hub's cache has tiny encoders under the real names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    save_hub(tmp_path / "hub")
    draw = np.random.default_rng(0)

    def say(letters: str) -> str:
        return "".join(draw.choice(list(letters), draw.integers(5, 40)))

    names, test_names = [f"{i}.jpg" for i in range(220)], [f"t{i}.jpg" for i in range(100)]
    photos = draw_photos([*names, *test_names], 1, tmp_path / "photos")
    rows = [f"{name},{say('abcdefghij')}" for name in photos for _ in range(5)]
    (tmp_path / "all.csv").write_text("\n".join(["image,caption", *rows]))
    embed = load_script(SCRIPT)
    models = [next((tmp_path / "hub" / "hub").glob(f"models--{kind}*/snapshots/*")) for kind in ("facebook", "sent")]
    options = [
        "--captions",
        tmp_path / "all.csv",
        "--photos",
        tmp_path / "photos",
        "--output",
        tmp_path / "vectors",
        "--image-model",
        models[0],
        "--text-model",
        models[1],
    ]
    assert embed.main([str(option) for option in options]) == 0
    with np.load(tmp_path / "vectors" / "pairs.npz") as arrays:
        text, words, images = (arrays[key] for key in ("captions/embeddings", "captions/text", "images/embeddings"))
    train = npz(
        captions__ids=np.arange(1100),
        captions__text=words[:1100],
        captions__embeddings=text[:1100],
        captions__label=np.eye(220, dtype=bool)[np.repeat(np.arange(220), 5)],
        images__names=np.array(names),
        images__embeddings=images[:220],
    )
    test = npz(
        captions__ids=np.arange(1, 101),
        captions__text=words[1100::5],
        captions__embeddings=text[1100::5],
        metadata__embedding_dim_image=np.array([16]),
        metadata__num_captions=np.array([100]),
    )
    competition = kaggle.competitions["aml-competition"]
    competition.files = {
        "train/train/train.npz": train,
        "test/test/test.clean.npz": test,
        **{f"train/train/Images/{name}": photos[name] for name in names},
    }
    competition.score = metric_score(kernel, {i + 1: vector.tolist() for i, vector in enumerate(images[220:])})
    coco = draw_photos([f"{i:012d}.jpg" for i in range(40)], 2, tmp_path / "coco")
    about = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(coco)],
        "annotations": [{"image_id": i, "id": i, "caption": say("0123456789")} for i in range(40)],
    }
    kaggle.add_dataset(
        COCO,
        {
            "coco2017/annotations/captions_train2017.json": json.dumps(about).encode(),
            **{f"coco2017/train2017/{name}": photo for name, photo in coco.items()},
        },
    )
    vectors = {name: data for name, data in competition.files.items() if name.endswith(".npz")}
    write_tree(tmp_path / "data", vectors)
    known = {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in vectors.items()}
    monkeypatch.setattr("lib.jobs.submission.KNOWN", known)
    return competition


@pytest.mark.slow
def test_the_walk_from_coco_to_a_submission(call, kaggle, kernel, world, tmp_path, capsys):
    """Every command of the docs, with the real scripts in the sessions; only the pipeline's recipe is a quick one."""
    kaggle.plans = [Plan(queued=1, run=True)]
    for command in commands_of("More pairs: from COCO to a submission"):
        quick = QUICK if "pairs=true" in command else []
        data = ["--data", tmp_path / "data"] if command.startswith("submit") else []
        assert not call(command, *quick, *data), command  # 0 or None
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
    assert "public score" in capsys.readouterr().out
