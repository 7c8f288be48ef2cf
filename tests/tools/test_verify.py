"""verify: its numbers against loops that compute them anew, its page in a real browser, its bad inputs."""
from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import verify
from drawn import TINY, draw_data
from forked import KernelServer
from lib.report import numbers
from lib.report.figures import find_photos
from lib.report.measure import held_out, load_run, ridge

FIGURES = {"distances", "baselines", "pool_sizes", "ranks", "caption_length", "hubness", "calibration", "contact_good",
           "contact_median", "contact_worst"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# ------------------------------------------------------------------------------------------------- a run, verified

@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelServer]:
    started = KernelServer(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 drawn images with a photo each, captions that try to break a page."""
    root = draw_data(tmp_path_factory.mktemp("data"), {"captions/text": lambda text: np.array(
        [f'{caption} , <b>$x_{i % 7}$</b> "open' + " word" * (i % 9) for i, caption in enumerate(text)])})
    folder = root / "train/train/Images"
    folder.mkdir()
    for i in range(240):
        Image.new("RGB", (60, 40), (i, 255 - i, 128)).save(folder / f"{1000 + i}.jpg")
    return root


@pytest.fixture(scope="module")
def train(server: KernelServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny run: train("--recipe=baseline")."""
    def run(*settings: str) -> Path:
        output = tmp_path_factory.mktemp("run")
        ended = server.run("--input", data, "--output", output, *TINY, "--set=val_fraction=0.5", *settings)
        assert ended.returncode == 0, ended.stderr
        return output

    return run


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    return train("--recipe=align", "--set=refit=false")


@pytest.fixture(scope="module")
def baseline(train: Callable[..., Path]) -> Path:
    return train("--recipe=baseline", "--set=refit=false", "--set=seed=1")


@pytest.fixture(scope="module")
def verified(run: Path, baseline: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("report")
    return output, verify.verify(run, data, output, baseline)


@pytest.fixture(scope="module")
def pairs(run: Path, data: Path, kernel) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and gallery, computed without verify."""
    bundle = kernel.load_weights(run / kernel.FINAL_MODEL)
    train = kernel.read_train(data / "train/train/train.npz")
    chosen = [train.image_names.index(name) for name in bundle["val_images"]]
    views = [[5 * i + view for i in chosen] for view in range(5)]
    return np.stack([kernel.repel(bundle, kernel.predict(bundle, train.text[view])) for view in views]), \
        train.images[chosen]


def test_the_run_s_own_record_says_the_same(run: Path, verified: tuple[Path, dict], kernel) -> None:
    recorded = json.loads((run / kernel.METRICS).read_text())["validation"]
    for name, table in verified[1]["retrieval"]["pooled"].items():
        assert table["mrr"] == pytest.approx(recorded[name]["mrr"], abs=1e-6)
        assert table["recall@10"] == pytest.approx(recorded[name]["recall@10"], abs=1e-6)
    assert not [line for line in verified[1]["warnings"] if "metrics.json" in line]


def test_retrieval_against_loops(verified: tuple[Path, dict], pairs) -> None:
    predictions, gallery = pairs
    ranks = [[1 + sum(p @ other >= p @ own for j, other in enumerate(gallery) if j != i)
              for i, (p, own) in enumerate(zip(view, gallery, strict=True))] for view in predictions]
    assert len(gallery) == 100
    views = verified[1]["retrieval"]["views"]
    for view, expected in zip(views, ranks, strict=True):
        assert view["raw"]["mrr"] == pytest.approx(np.mean([1 / r if r < 100 else 0 for r in expected]), abs=1e-6)
        assert view["raw"]["recall@5"] == pytest.approx(np.mean([r <= 5 for r in expected]))
    assert verified[1]["baselines"][0]["raw"] == pytest.approx(np.mean([view["raw"]["mrr"] for view in views]))


def test_distances_against_loops(verified: tuple[Path, dict], pairs) -> None:
    predictions, gallery = pairs
    table = verified[1]["distances"]
    measures = {"euclidean": lambda p, y: math.dist(p, y),
                "manhattan": lambda p, y: sum(abs(a - b) for a, b in zip(p.tolist(), y.tolist(), strict=True)),
                "cosine": lambda p, y: 1 - p @ y / np.sqrt((p @ p) * (y @ y))}
    for metric, measure in measures.items():
        own = [measure(view[i], gallery[i]) for view in predictions for i in range(len(gallery))]
        assert table[metric]["own"]["mean"] == pytest.approx(np.mean(own), rel=1e-4)
        assert table[metric]["own"]["sd"] == pytest.approx(np.std(own, ddof=1), rel=1e-3)
        assert table[metric]["own"]["median"] == pytest.approx(np.median(own), rel=1e-4)
        others = np.mean([measure(view[i], gallery[j]) for view in predictions for i in range(0, 100, 5)
                          for j in range(0, 100, 7) if i != j])
        assert table[metric]["random"]["mean"] == pytest.approx(others, rel=0.03)
        assert table[metric]["improvement_low"] < table[metric]["improvement_percent"] \
            < table[metric]["improvement_high"]


def test_distances_pair_each_caption_with_other_images_only() -> None:
    gallery = np.eye(30, dtype=np.float32)
    own, others = numbers.distances(np.stack([gallery] * 2), gallery)["euclidean"]
    assert (own == 0).all()
    assert others.shape == (2, 30, numbers.OTHERS)
    assert others == pytest.approx(2**0.5)
    summary = numbers.summarise_distance(own, others)
    assert (summary["nearer_to_own"], summary["improvement_percent"]) == (1.0, 100.0)


def test_mean_image_and_permutation_are_chance(verified: tuple[Path, dict]) -> None:
    rows = {row["model"]: row for row in verified[1]["baselines"]}
    assert rows["mean image"]["raw"] == pytest.approx(0.0518, abs=1e-3)
    assert rows["random permutation"]["raw"] == pytest.approx(0.0519, abs=0.025)
    assert rows["ridge"]["raw"] > 0.1


def test_ridge_is_ridge(run: Path, data: Path, kernel) -> None:
    held = held_out(load_run(run)[0], data)
    found = ridge(held)
    inside = np.isin(held.train.image_of, held.seen)
    x, y = held.train.text[inside].astype(float), held.train.images[held.train.image_of[inside]].astype(float)
    penalty = kernel.Knobs().ridge * np.trace(np.cov(x.T, bias=True)) / x.shape[1]
    weight = np.linalg.solve(np.cov(x.T, bias=True) + penalty * np.eye(x.shape[1]),
                             (x - x.mean(0)).T @ (y - held.train.images[held.seen].mean(0)) / len(x))
    expected = (held.text - x.mean(0)) @ weight
    cosine = (numbers.unit(found) * numbers.unit(expected)).sum(-1)
    assert cosine.min() > 0.999


# ------------------------------------------------------------------------------------------------------- statistics

def test_paired_bootstrap_has_the_right_size_on_shuffled_pairs() -> None:
    rng, refused = np.random.default_rng(0), []
    for seed in range(400):
        pair = 1 / rng.integers(1, 30, size=(2, 100))
        pair = np.where(rng.random(100) < 0.5, pair, pair[::-1])  # who is who is chance: there is no difference
        refused.append(numbers.paired_bootstrap(*pair, rounds=400, seed=seed)["p"] < 0.05)
    assert 0.02 < np.mean(refused) < 0.09


def test_paired_bootstrap_finds_a_real_difference() -> None:
    rng = np.random.default_rng(0)
    theirs = 1 / rng.integers(1, 30, size=300)
    result = numbers.paired_bootstrap(theirs + rng.normal(0.05, 0.1, 300), theirs)
    assert result["p"] < 0.001
    assert 0 < result["low"] < result["difference"] < result["high"]
    assert numbers.paired_bootstrap(theirs, theirs)["p"] == 1


def test_the_comparison_pairs_images(verified: tuple[Path, dict]) -> None:
    rows, against = verified[1]["baselines"], verified[1]["against"]
    assert rows[1]["model"].startswith("baseline")
    for name in ("raw", "cosine"):
        assert against[name]["difference"] == pytest.approx(rows[0][name] - rows[1][name], abs=1e-6)
        assert against[name]["images"] == 100


def test_hubs_against_loops() -> None:
    rng = np.random.default_rng(0)
    predictions, gallery = rng.normal(size=(2, 40, 8)), rng.normal(size=(40, 8)) * rng.uniform(0.5, 2, size=(40, 1))
    hubs = numbers.hubness(predictions, gallery, [f"{i}.jpg" for i in range(40)])
    counts = [0] * 40
    for query in predictions.reshape(-1, 8):
        for image in sorted(range(40), key=lambda j: -(query @ gallery[j]))[:10]:
            counts[image] += 1
    assert hubs["counts"] == counts
    assert hubs["expected"] == 20
    assert hubs["worst"][0]["lists"] == max(counts)
    spread = np.array(counts) - 20
    assert hubs["skew"] == pytest.approx(np.mean(spread**3) / np.mean(spread**2) ** 1.5)
    assert hubs["never"] == counts.count(0) / 40


def test_pool_sizes_end_at_the_full_gallery(verified: tuple[Path, dict], kernel, pairs) -> None:
    rows = verified[1]["pool_sizes"]
    assert [row["pool"] for row in rows] == [10, 20, 50, 100]
    assert rows[0]["chance"] == pytest.approx(0.2929, abs=1e-4)
    ten = [kernel.true_ranks(view[start:start + 10], pairs[1][start:start + 10], None)
           for view in pairs[0] for start in range(0, 100, 10)]
    assert rows[0]["raw"] == pytest.approx(np.mean(1 / np.concatenate(ten)))
    assert all(a["raw"] >= b["raw"] for a, b in pairwise(rows))


def test_calibration_of_scores_whose_truth_is_known() -> None:
    rng, temperature = np.random.default_rng(0), 0.1
    logits = rng.normal(size=(4000, 20)) * 2
    own = np.array([rng.choice(20, p=row) for row in numbers.softmax(logits)])
    scores = temperature * np.take_along_axis(logits, (own[:, None] + np.arange(20)) % 20, axis=1)
    right = numbers.calibration(scores, temperature)
    assert right["ece"] < 0.03
    assert numbers.calibration(scores, temperature / 4)["ece"] > 0.2
    assert numbers.best_temperature(scores) == pytest.approx(temperature, rel=0.12)
    assert sum(row["captions"] for row in right["curve"]) == 4000


def test_pool_scores_put_the_own_image_first() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(250, 6))
    scores = numbers.pool_scores(gallery[None], gallery, 100)
    assert scores.shape == (200, 100)
    expected = (numbers.unit(gallery) * gallery).sum(1) / np.linalg.norm(gallery, axis=1).mean()
    assert scores[:, 0] == pytest.approx(expected[:200])


def test_caption_lengths_cover_every_caption_once() -> None:
    captions = [["a dog ."] * 10 + ["a big dog runs , fast"] * 10, ["one two three four five six"] * 20]
    rows = numbers.by_caption_length(captions, np.arange(40).reshape(2, 20) / 40)
    assert sum(row["captions"] for row in rows) == 40
    assert (rows[0]["from"], rows[-1]["to"]) == (2, 6)
    same = numbers.by_caption_length([["a dog"] * 4], np.ones((1, 4)))
    assert [(row["captions"], row["mrr"]) for row in same] == [(4, 1.0)]


def test_a_distance_that_says_nothing_is_called_so(verified: tuple[Path, dict]) -> None:
    said = " ".join(verified[1]["warnings"])
    assert "Euclidean and Manhattan distance say little" in said
    vectors = np.random.default_rng(0).normal(size=(50, 8)) * np.linspace(1, 3, 50)[:, None]
    assert numbers.distance_warnings(numbers.anisotropy(vectors[None], vectors)) == []


# ----------------------------------------------------------------------------------------------------------- outputs

def test_every_figure_is_written_and_inlined(verified: tuple[Path, dict]) -> None:
    output, _ = verified
    assert {path.stem for path in output.glob("*.png")} == FIGURES
    text = (output / "report.html").read_text(encoding="utf-8")
    inlined = [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(inlined) == sorted(path.read_bytes() for path in output.glob("*.png"))
    assert "http://" not in text and "https://" not in text
    assert "prefers-color-scheme: dark" in text
    assert "<b>" not in text
    assert not list(output.glob(".*"))


def test_titles_state_numbers(verified: tuple[Path, dict]) -> None:
    text = (verified[0] / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r'alt="([^"]+)"', text)
    assert len(titles) == len(FIGURES)
    assert all(re.search(r"\d", title) for title in titles)


MEASURE = """<!doctype html><body>{frames}<pre id="found"></pre><script>
onload = () => {{ found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
  const page = frame.contentDocument, root = page.documentElement
  return {{width: root.clientWidth, needed: root.scrollWidth,
          images: [...page.images].map(image => image.complete ? image.naturalWidth : 0)}} }})) }}
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_the_page_in_a_browser(verified: tuple[Path, dict], tmp_path: Path) -> None:
    """Frames of a phone's and a desktop's width: every figure is there, nothing is wider than the screen."""
    report = html.escape((verified[0] / "report.html").read_text(encoding="utf-8"))
    frames = "".join(f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{report}"></iframe>'
                     for width in (390, 1280))
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # its socket's path must not be long
        done = subprocess.run([CHROMIUM, *flags, f"--user-data-dir={short}/profile", "--window-size=1400,1000",
                               "--dump-dom", (tmp_path / "measure.html").as_uri()], capture_output=True, text=True,
                              timeout=120, env=os.environ | {"TMPDIR": short})
    found = re.search(r'<pre id="found">(\[.*?\])</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    for page, width in zip(json.loads(html.unescape(found[1])), (390, 1280), strict=True):
        assert len(page["images"]) == len(FIGURES)
        assert min(page["images"]) > 0
        assert page["needed"] <= page["width"] <= width


def test_json_is_all_of_stdout(run: Path, data: Path, tmp_path: Path, tool) -> None:
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "out", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["images"] == 100
    assert Path(found["report"]).exists()
    assert found["against"] is None


def test_the_newest_run_is_the_default_and_its_folder_gets_the_report(run: Path, data: Path, tmp_path: Path,
                                                                      tool) -> None:
    for name in ("20260101-000000-align", "20260102-000000-align"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "runs" / "20260103-000000-failed").mkdir()
    outcome = tool(verify.main, "--runs", tmp_path / "runs", "--data", data)
    assert (outcome.code, "20260102-000000-align" in outcome.out) == (0, True)
    assert (tmp_path / "runs/20260102-000000-align/verify/report.html").exists()
    assert re.search(r"^ridge +0\.\d", outcome.out, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------ photos

def copy_of(data: Path, root: Path) -> Path:
    return Path(shutil.copytree(data, root / "data"))


def test_without_photos_captions_are_shown_and_it_is_said(run: Path, data: Path, tmp_path: Path, tool) -> None:
    other = copy_of(data, tmp_path)
    shutil.rmtree(other / "train/train/Images")
    outcome = tool(verify.main, "--run", run, "--data", other, "--output", tmp_path / "out")
    assert outcome.code == 0
    assert "No photos below" in outcome.err
    assert (tmp_path / "out/contact_worst.png").exists()


def test_missing_and_damaged_photos_are_counted_and_skipped(run: Path, data: Path, tmp_path: Path, tool,
                                                            kernel) -> None:
    other = copy_of(data, tmp_path)
    names = kernel.load_weights(run / kernel.FINAL_MODEL)["val_images"]
    folder = other / "train/train/Images"
    for name in names[:7]:
        (folder / name).unlink()
    for name in names[7:9]:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    (folder / names[9]).write_text("no picture")
    outcome = tool(verify.main, "--run", run, "--data", other, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["photos"] == {"shown_from": 90, "missing": 7, "damaged": 3}
    assert "7 of 100 validation photos named in train.npz but missing on disk" in outcome.err
    assert "3 of 100 validation photos damaged" in outcome.err


def test_a_photo_is_found_in_any_folder_called_images(tmp_path: Path) -> None:
    (tmp_path / "deep/er/images").mkdir(parents=True)
    Image.new("L", (500, 900), 7).save(tmp_path / "deep/er/images/1.jpg")
    photos = find_photos(tmp_path, ["1.jpg", "2.jpg"])
    assert photos.thumbnail(0).shape == (320, 178, 3)
    assert photos.thumbnail(1) is None
    assert photos.missing == ["2.jpg"]


# --------------------------------------------------------------------------------------------------------- bad input

def refused(tool: Callable, message: str, *arguments: Any) -> None:
    outcome = tool(verify.main, *arguments)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert (outcome.code, len(errors)) == (2, 1), outcome.err
    assert message in errors[0]
    assert outcome.err.splitlines()[-1] == errors[0]


def test_runs_that_cannot_be_verified(run: Path, data: Path, tmp_path: Path, tool, kernel) -> None:
    refused(tool, "no such run", "--run", tmp_path / "none", "--data", data)
    (tmp_path / "empty").mkdir()
    refused(tool, "no weights", "--run", tmp_path / "empty", "--data", data)
    refused(tool, "no run with weights", "--runs", tmp_path, "--data", data)
    (tmp_path / "empty" / kernel.VALIDATED_MODEL).write_bytes(b"no weights")
    refused(tool, "not a readable weights file", "--run", tmp_path / "empty", "--data", data)
    refused(tool, "no such folder", "--run", run, "--data", tmp_path / "none")


def test_a_final_model_is_taken_only_where_nothing_was_refitted(train, run: Path, data: Path, tmp_path: Path, tool,
                                                                kernel) -> None:
    plain = Path(shutil.copytree(run, tmp_path / "plain"))
    (plain / kernel.VALIDATED_MODEL).unlink()
    outcome = tool(verify.main, "--run", plain, "--data", data)
    assert outcome.code == 0
    assert "with refit=false it is the same model" in outcome.err
    refitted = train("--recipe=closed_form")
    (refitted / kernel.VALIDATED_MODEL).unlink()
    refused(tool, "has seen the validation images", "--run", refitted, "--data", data)


def test_other_data_is_refused(run: Path, tmp_path: Path, tool) -> None:
    wider = draw_data(tmp_path / "wider", {"captions/embeddings": lambda x: np.tile(x, 2)}, images=40)
    refused(tool, "64-d captions and 48-d images, but the run has 32 and 48", "--run", run, "--data", wider)
    fewer = draw_data(tmp_path / "fewer", images=100)
    refused(tool, "validation images are not in it", "--run", run, "--data", fewer)


def test_a_run_of_another_split_is_no_comparison(run: Path, train, data: Path, tmp_path: Path, tool) -> None:
    other = train("--recipe=closed_form", "--set=refit=false", "--set=split_seed=5")
    refused(tool, "validated on other images; make it again with --set split_seed=0", "--run", run, "--data", data,
            "--against", other)


def test_a_record_that_disagrees_is_pointed_out(run: Path, data: Path, tmp_path: Path, tool, kernel) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = json.loads((other / kernel.METRICS).read_text())
    record["validation"]["pool100_raw"]["mrr"] = 0.9
    (other / kernel.METRICS).write_text(json.dumps(record))
    outcome = tool(verify.main, "--run", other, "--data", data)
    assert (outcome.code, "says MRR 0.9000, measured here" in outcome.err) == (0, True)


def test_an_output_that_cannot_be_written_is_one_line(run: Path, data: Path, tmp_path: Path, tool) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "file")
    assert (outcome.code, outcome.error.startswith("error: ")) == (1, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_help_has_an_example(run_tool_process) -> None:
    done = run_tool_process("verify", "--help")
    assert (done.returncode, "example:" in done.stdout) == (0, True)
