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
from lib.report import contents, figures, numbers
from lib.report.figures import find_photos
from lib.report.measure import ridge
from lib.report.page import Picture
from lib.report.weights import held_out, load_run, predict, repelled

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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is measured and said: pictures without their drawing."""
    pictures = {name: Picture(f"{name} 1", b"light", b"dark") for name in FIGURES}
    monkeypatch.setattr(contents, "draw_all", lambda *_: pictures)


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
    assert numbers.verdict(result, "B") == "Better than B: sure"
    same = numbers.paired_bootstrap(theirs, theirs)
    assert (same["p"], numbers.verdict(same, "B")) == (1, "As good as B, to the digit")
    swapped = numbers.paired_bootstrap(theirs, theirs + rng.normal(0.001, 0.1, 300))
    assert re.fullmatch("(Better|Worse) than B: not sure", numbers.verdict(swapped, "B"))


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
    said = " ".join(verified[1]["distance_notes"])
    assert "Euclidean and Manhattan distance say little" in said
    vectors = np.random.default_rng(0).normal(size=(50, 8)) * np.linspace(1, 3, 50)[:, None]
    assert numbers.distance_warnings(numbers.anisotropy(vectors[None], vectors)) == []


# ----------------------------------------------------------------------------------------------------------- outputs

def test_every_figure_is_written_and_inlined(verified: tuple[Path, dict]) -> None:
    output, _ = verified
    assert {path.stem for path in output.glob("*.png")} == FIGURES
    assert {path.stem for path in output.glob("dark/*.png")} == FIGURES
    text = (output / "report.html").read_text(encoding="utf-8")
    for attribute, folder in (("src", output), ("srcset", output / "dark")):
        inlined = [base64.b64decode(code) for code in re.findall(rf'{attribute}="data:image/png;base64,([^"]+)"', text)]
        assert sorted(inlined) == sorted(path.read_bytes() for path in folder.glob("*.png"))
    assert "http://" not in text and "https://" not in text
    assert "<b>" not in text
    assert not list(output.rglob(".*"))


def test_a_dark_page_has_dark_pictures(verified: tuple[Path, dict]) -> None:
    for name in FIGURES:
        corners = [sum(Image.open(path / f"{name}.png").convert("RGB").getpixel((1, 1)))
                   for path in (verified[0], verified[0] / "dark")]
        assert corners[0] > 700 and corners[1] < 100


def test_titles_state_numbers(verified: tuple[Path, dict]) -> None:
    text = (verified[0] / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r'alt="([^"]+)"', text)
    assert len(titles) == len(FIGURES)
    assert all(re.search(r"\d", title) for title in titles)


def test_the_page_opens_with_the_metric_and_the_verdict(verified: tuple[Path, dict]) -> None:
    text = html.unescape((verified[0] / "report.html").read_text(encoding="utf-8"))
    results = verified[1]
    places = [text.index(part) for part in (
        f"<h1>align: MRR {results['baselines'][0]['raw']:.3f}", "Among 100 photos the right one comes first for",
        f"than {results['baselines'][1]['model']}: ", "<h2>The official metric</h2>", "<h2>Distances</h2>",
        "Euclidean and Manhattan distance say little")]
    assert places == sorted(places)


def test_repulsion_and_seen_images_are_lines_of_the_table(verified: tuple[Path, dict], run: Path, data: Path,
                                                          kernel) -> None:
    bundle = load_run(run)[0]
    held = held_out(bundle, data)
    plain = kernel.evaluate(predict(bundle, held.text, held.captions), held.images)
    rows = {row[0]: row[1] for row in contents.official_table(verified[1])[1]}
    assert rows["raw, without repulsion"] == f"{plain['pool100_raw']['mrr']:.4f}"
    text = held.train.text[kernel.caption_views(held.train.image_of, held.seen, 1)]
    seen = kernel.evaluate(repelled(bundle, predict(bundle, text, [["a drawing"] * len(held.seen)])),
                           held.train.images[held.seen])
    assert rows[f"raw, {len(held.seen)} seen images (no measure of quality)"] == f"{seen['pool100_raw']['mrr']:.4f}"


# ----------------------------------------------------------------------------------------------------------- pictures

def results_of(*scores: tuple[str, float], against: dict[str, float] | None = None) -> dict[str, Any]:
    rows = [{"model": name, "raw": score, "raw_se": 0.01, "cosine": score, "cosine_se": 0.01} for name, score in scores]
    return {"baselines": rows, "pools": "pools of 100", "against": {"raw": against} if against else None}


def test_the_comparison_is_the_picture_s_title_and_no_name_is_cut() -> None:
    long = "20260101-000000-a-run-of-a-rather-long-name"
    results = results_of(("align", 0.61), (long, 0.6), ("ridge", 0.3), ("random permutation", 0.05),
                         against={"difference": 0.01, "low": -0.01, "high": 0.03})
    figure = figures.baseline_figure(results)
    assert " ".join(figure.get_suptitle().split()) == f"Better than {long}: not sure. MRR 0.610 against 0.600"
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = [text for text in axes.texts if text.get_text() in ("align", long, "ridge")]
    assert len(names) == 3
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in names)
    assert "2.00 times ridge" in figures.baseline_title(results_of(("align", 0.6), ("ridge", 0.3),
                                                                   ("random permutation", 0.05)))


@pytest.mark.parametrize(("top", "word"), [(0.97, "is well calibrated"), (0.79, "is too sure at 95%")])
def test_one_wide_gap_is_not_well_calibrated(top: float, word: str) -> None:
    """The mean gap is small in both: most captions lie where probability and truth agree."""
    shown = {"temperature": 0.02, "ece": 0.02, "worst": {"confidence": 0.95, "right": top, "captions": 60}}
    assert word in figures.calibration_title(shown, True)


def test_the_worst_gap_is_of_a_well_filled_bin() -> None:
    confident, unsure = np.array([[9.0, 0, 0, 0]]), np.array([[0.0, 0.1, 0, 0]])
    scores = np.concatenate([np.repeat(confident, 70, 0), np.repeat(np.roll(confident, 1, 1), 30, 0), unsure])
    worst = numbers.calibration(scores, 1.0)["worst"]
    assert worst["captions"] == 100
    assert worst["confidence"] - worst["right"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("worst", [3, 29, 30, 200])
def test_hub_bins_hold_equally_many_whole_numbers(worst: int) -> None:
    counts = np.arange(worst + 1)
    (axes,) = figures.hub_figure({"counts": counts.tolist(), "worst": [{"lists": worst}], "expected": 2.0, "k": 10,
                                  "never": 0.0}).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert len(set(heights[:-1])) == 1 and sum(heights) == worst + 1


def test_legends_lie_outside_the_panels() -> None:
    figure = figures.calibration_figure(None, {"temperature": 0.02, "ece": 0.1, "worst": None, "curve": [
        {"confidence": 0.1, "right": 0.9, "captions": 5}]})
    figure.draw_without_rendering()
    legend, (axes,) = figure.legends[0].get_window_extent(), figure.axes
    assert legend.y1 <= axes.get_window_extent().y0


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


@pytest.mark.usefixtures("undrawn")
def test_json_is_all_of_stdout(run: Path, data: Path, tmp_path: Path, tool) -> None:
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "out", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["images"] == 100
    assert Path(found["report"]).exists()
    assert found["against"] is None


@pytest.mark.usefixtures("undrawn")
def test_the_newest_run_is_the_default_and_its_folder_gets_the_report(run: Path, data: Path, tmp_path: Path,
                                                                      tool, kernel) -> None:
    for age, name in enumerate(("20260102-000000-align", "20260101-000000-align")):
        copy = shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(copy / kernel.VALIDATED_MODEL, (1e9 - age, 1e9 - age))
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


@pytest.mark.usefixtures("undrawn")
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
    assert photos.thumbnail(0).shape == (230, 128, 3)
    assert photos.thumbnail(1) is None
    assert photos.missing == ["2.jpg"]


# --------------------------------------------------------------------------- small, interrupted, known answers

@pytest.mark.usefixtures("undrawn")
def test_fewer_than_a_hundred_images_are_one_pool_everywhere(train, data: Path, tmp_path: Path, tool) -> None:
    small = train("--recipe=closed_form", "--set=refit=false", "--set=val_fraction=0.25")
    outcome = tool(verify.main, "--run", small, "--data", data, "--output", tmp_path, "--json")
    found = json.loads(outcome.out)
    assert (found["pool"], found["pools"]) == (60, "one pool of 60")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "in one pool of 60</h1>" in text and "Among 60 photos" in text
    assert "pools of 100" not in text
    ranks = np.tile(np.arange(1, 61), (5, 1))
    figure = figures.rank_figure(ranks, numbers.Pools(60))
    assert "of 60" in figure.get_suptitle() and "60" in figure.axes[0].get_xlabel()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][-1] == "51-60"


def test_pools_are_named_by_what_they_are() -> None:
    assert [str(numbers.Pools(images)) for images in (60, 100, 600, 250)] == [
        "one pool of 60", "pools of 100", "pools of 100", "pools of 100 (the last of 50)"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("manifest", "said"), [
    (None, "interrupted or still runs"),
    ({"complete": False, "stopped": "SIGTERM", "predicted_by": [{"candidate": 1, "refitted": False}]},
     "not finished (SIGTERM); trained: candidate 1 for 2.5 epochs; its submission is predicted by candidate 1 (not "
     "refitted)"),
    ({"complete": True, "stopped": "time budget"}, None)])
def test_a_run_that_is_not_finished_says_so(run: Path, data: Path, tmp_path: Path, tool, kernel,
                                            manifest: dict | None, said: str | None) -> None:
    partial = Path(shutil.copytree(run, tmp_path / "partial"))
    (partial / kernel.MANIFEST).unlink()
    if manifest:
        (partial / kernel.MANIFEST).write_text(json.dumps(manifest))
        record = json.loads((partial / kernel.METRICS).read_text())
        record["members"] = [{"candidate": 1, "epochs": 2.5}]
        (partial / kernel.METRICS).write_text(json.dumps(record))
    outcome = tool(verify.main, "--run", partial, "--data", data, "--output", tmp_path / "out")
    page = html.unescape((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for text in (outcome.err, page):
        assert said in text if said else "not finished" not in text


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Known answers for the test captions of the drawn data."""
    vectors = np.random.default_rng(5).normal(size=(100, 48)).astype(np.float32)
    path = tmp_path / "solution.npz"
    np.savez(path, **{"captions/ids": np.arange(1, 101), "images/embeddings": vectors})
    return path


def submission(path: Path, vectors: np.ndarray, kernel) -> Path:
    kernel.write_submission(path, np.arange(1, len(vectors) + 1), vectors.astype(np.float32))
    return path


def test_a_submission_against_known_answers(answers: Path, tmp_path: Path, tool, kernel) -> None:
    images = np.load(answers)["images/embeddings"]
    guess = images + 4 * np.random.default_rng(0).normal(size=images.shape)
    path = submission(tmp_path / "guess.csv", guess, kernel)
    outcome = tool(verify.main, "--solution", answers, "--run", path, "--json")
    found = json.loads(outcome.out)
    ranks = [1 + sum(g @ other >= g @ own for j, other in enumerate(images) if j != i)
             for i, (g, own) in enumerate(zip(guess, images, strict=True))]
    gains = [1 / rank if rank < 100 else 0 for rank in ranks]
    assert found["scores"]["pool100_raw"]["mrr"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert found["scores"]["pool100_raw"]["mrr_se"] == pytest.approx(np.std(gains, ddof=1) / 10, abs=1e-4)
    assert (found["captions"], found["pool"]) == (100, 100)
    text = tool(verify.main, "--solution", answers, "--run", path).out
    assert re.search(rf"^raw: the official metric +{np.mean(gains):.4f} ", text, re.MULTILINE)
    assert "100 captions in pools of 100" in text


def test_two_submissions_are_compared(answers: Path, tmp_path: Path, tool, kernel) -> None:
    images = np.load(answers)["images/embeddings"]
    good = submission(tmp_path / "good.csv", images, kernel)
    bad = submission(tmp_path / "bad.csv", np.random.default_rng(1).normal(size=images.shape), kernel)
    text = tool(verify.main, "--solution", answers, "--run", good, "--against", bad).out
    assert f"Better than {bad}: sure (raw MRR +0.9" in text


def test_a_run_s_own_submission_is_found(run: Path, answers: Path, tool, kernel) -> None:
    found = json.loads(tool(verify.main, "--solution", answers, "--run", run, "--json").out)
    assert found["submission"] == str(run / kernel.SUBMISSION)
    assert 0.01 < found["scores"]["pool100_raw"]["mrr"] < 0.15  # these answers are drawn at random
    newest = json.loads(tool(verify.main, "--solution", answers, "--runs", run.parent, "--json").out)
    assert newest["captions"] == 100


def test_answers_and_submissions_that_cannot_be_scored(answers: Path, run: Path, data: Path, tmp_path: Path, tool,
                                                       kernel) -> None:
    images, csv = np.load(answers)["images/embeddings"], run / kernel.SUBMISSION
    refused(tool, "leave out --data and --output", "--solution", answers, "--run", run, "--data", data)
    refused(tool, "no such submission", "--solution", answers, "--run", tmp_path / "none.csv")
    refused(tool, "needs the keys captions/ids and images/embeddings", "--solution", data / "test/test/test.clean.npz",
            "--run", csv)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(answers.read_bytes()[:-200])
    refused(tool, "not a readable npz", "--solution", broken, "--run", csv)
    refused(tool, "not a readable npz", "--solution", tmp_path / "none.npz", "--run", csv)
    np.savez(broken, **{"captions/ids": np.arange(1, 100), "images/embeddings": images})
    refused(tool, "expected as many whole numbers as vectors", "--solution", broken, "--run", csv)
    np.savez(broken, **{"captions/ids": np.arange(1, 101), "images/embeddings": images * np.nan})
    refused(tool, "NaN or infinity", "--solution", broken, "--run", csv)
    np.savez(broken, **{"captions/ids": np.arange(2, 102), "images/embeddings": images})
    refused(tool, "row 1: expected id 2", "--solution", broken, "--run", csv)
    np.savez(broken, **{"captions/ids": np.arange(1, 101), "images/embeddings": images[:, :7]})
    refused(tool, "expected a list of 7 numbers", "--solution", broken, "--run", csv)


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
    refused(tool, f"no run with {kernel.VALIDATED_MODEL}", "--runs", tmp_path, "--data", data)
    (tmp_path / "empty" / kernel.VALIDATED_MODEL).write_bytes(b"no weights")
    refused(tool, "not a readable weights file", "--run", tmp_path / "empty", "--data", data)
    refused(tool, "no such folder", "--run", run, "--data", tmp_path / "none")


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_a_record_that_disagrees_is_pointed_out(run: Path, data: Path, tmp_path: Path, tool, kernel) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = json.loads((other / kernel.METRICS).read_text())
    record["validation"]["pool100_raw"]["mrr"] = 0.9
    (other / kernel.METRICS).write_text(json.dumps(record))
    outcome = tool(verify.main, "--run", other, "--data", data)
    assert (outcome.code, "says MRR 0.9000, measured here" in outcome.err) == (0, True)


@pytest.mark.usefixtures("undrawn")
def test_an_output_that_cannot_be_written_is_one_line(run: Path, data: Path, tmp_path: Path, tool) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "file")
    assert (outcome.code, outcome.error.startswith("error: ")) == (1, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_help_has_an_example(run_tool_process) -> None:
    done = run_tool_process("verify", "--help")
    assert (done.returncode, "example:" in done.stdout) == (0, True)
