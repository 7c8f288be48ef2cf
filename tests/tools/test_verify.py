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
from lib import plots
from lib.report import contents, figures, numbers
from lib.report.measure import measure, ridge
from lib.report.page import Picture
from lib.weights import held_out, load_run, predict, repelled

FIGURES = {
    "distances",
    "baselines",
    "pool_sizes",
    "ranks",
    "caption_length",
    "hubness",
    "calibration",
    "contact_good",
    "contact_median",
    "contact_worst",
}
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
    root = draw_data(
        tmp_path_factory.mktemp("data"),
        {
            "captions/text": lambda text: np.array(
                [f'{caption} , <b>$x_{i % 7}$</b> "open' + " word" * (i % 9) for i, caption in enumerate(text)]
            )
        },
    )
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
    predictions = [kernel.predict(bundle, train.text[view], [train.captions[i] for i in view]) for view in views]
    return np.stack([kernel.repel(each, bundle["repulsion"], bundle["length"]) for each in predictions]), train.images[
        chosen
    ]


def test_the_run_s_own_record_says_the_same(run: Path, verified: tuple[Path, dict], kernel) -> None:
    recorded = json.loads((run / kernel.METRICS).read_text())["validation"]
    for name, table in verified[1]["retrieval"]["pooled"].items():  # the blend is chosen here, half by half there
        assert table["mrr"] == pytest.approx(recorded[name]["mrr"], abs=recorded[name]["mrr_se"])
        assert table["recall@10"] == pytest.approx(recorded[name]["recall@10"], abs=0.02)
    assert verified[1]["recorded"] == recorded["pool100_raw"]
    assert not [line for line in verified[1]["warnings"] if "metrics.json" in line]


def test_retrieval_against_loops(verified: tuple[Path, dict], pairs) -> None:
    predictions, gallery = pairs
    ranks = [
        [
            1 + sum(p @ other >= p @ own for j, other in enumerate(gallery) if j != i)
            for i, (p, own) in enumerate(zip(view, gallery, strict=True))
        ]
        for view in predictions
    ]
    assert len(gallery) == 100
    views = verified[1]["retrieval"]["views"]
    for view, expected in zip(views, ranks, strict=True):
        assert view["raw"]["mrr"] == pytest.approx(np.mean([1 / r if r < 100 else 0 for r in expected]), abs=1e-6)
        assert view["raw"]["recall@5"] == pytest.approx(np.mean([r <= 5 for r in expected]))
    assert verified[1]["baselines"][0]["raw"] == pytest.approx(np.mean([view["raw"]["mrr"] for view in views]))


def test_distances_against_loops(verified: tuple[Path, dict], pairs) -> None:
    predictions, gallery = pairs
    table = verified[1]["distances"]
    measures = {
        "euclidean": lambda p, y: math.dist(p, y),
        "manhattan": lambda p, y: sum(abs(a - b) for a, b in zip(p.tolist(), y.tolist(), strict=True)),
        "cosine": lambda p, y: 1 - p @ y / np.sqrt((p @ p) * (y @ y)),
    }
    for metric, distance in measures.items():
        own = [distance(view[i], gallery[i]) for view in predictions for i in range(len(gallery))]
        assert table[metric]["own"]["mean"] == pytest.approx(np.mean(own), rel=1e-4)
        assert table[metric]["own"]["sd"] == pytest.approx(np.std(own, ddof=1), rel=1e-3)
        assert table[metric]["own"]["median"] == pytest.approx(np.median(own), rel=1e-4)
        others = np.mean(
            [
                distance(view[i], gallery[j])
                for view in predictions
                for i in range(0, 100, 5)
                for j in range(0, 100, 7)
                if i != j
            ]
        )
        assert table[metric]["random"]["mean"] == pytest.approx(others, rel=0.03)
        assert (
            table[metric]["improvement_low"] < table[metric]["improvement_percent"] < table[metric]["improvement_high"]
        )


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
    weight = np.linalg.solve(
        np.cov(x.T, bias=True) + penalty * np.eye(x.shape[1]),
        (x - x.mean(0)).T @ (y - held.train.images[held.seen].mean(0)) / len(x),
    )
    expected = (held.train.text[held.views] - x.mean(0)) @ weight
    cosine = (kernel.unit(found) * kernel.unit(expected)).sum(-1)
    assert cosine.min() > 0.999


def test_the_comparison_pairs_images(verified: tuple[Path, dict]) -> None:
    rows, against = verified[1]["baselines"], verified[1]["against"]
    assert rows[1]["model"].startswith("baseline")
    for name in ("raw", "cosine"):
        assert against[name]["difference"] == pytest.approx(rows[0][name] - rows[1][name], abs=1e-6)
        assert against[name]["images"] == 100


def test_pool_sizes_end_at_the_full_gallery(verified: tuple[Path, dict], kernel, pairs) -> None:
    rows = verified[1]["pool_sizes"]
    assert [row["pool"] for row in rows] == [10, 20, 50, 100]
    assert rows[0]["chance"] == pytest.approx(0.2929, abs=1e-4)
    ten = [
        kernel.true_ranks(view[start : start + 10], pairs[1][start : start + 10], None)
        for view in pairs[0]
        for start in range(0, 100, 10)
    ]
    assert rows[0]["raw"] == pytest.approx(np.mean(1 / np.concatenate(ten)))
    assert all(a["raw"] >= b["raw"] for a, b in pairwise(rows))


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
    assert "http://" not in text
    assert "https://" not in text
    assert "<b>" not in text
    assert not list(output.rglob(".*"))


def test_a_dark_page_has_dark_pictures(verified: tuple[Path, dict]) -> None:
    for name in FIGURES:
        corners = [
            sum(Image.open(path / f"{name}.png").convert("RGB").getpixel((1, 1)))
            for path in (verified[0], verified[0] / "dark")
        ]
        assert corners[0] > 700
        assert corners[1] < 100


def test_titles_state_numbers(verified: tuple[Path, dict]) -> None:
    text = (verified[0] / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r'alt="([^"]+)"', text)
    assert len(titles) == len(FIGURES)
    assert all(re.search(r"\d", title) for title in titles)


def test_the_page_opens_with_the_metric_and_the_verdict(verified: tuple[Path, dict]) -> None:
    text = html.unescape((verified[0] / "report.html").read_text(encoding="utf-8"))
    results = verified[1]
    places = [
        text.index(part)
        for part in (
            f"<h1>align: MRR {results['baselines'][0]['raw']:.3f}",
            "Among 100 photos the right one comes first for",
            f"than {results['baselines'][1]['model']}: ",
            "<h2>The official metric</h2>",
            "<h2>Distances</h2>",
            "Euclidean and Manhattan distance say little",
        )
    ]
    assert places == sorted(places)


def test_repulsion_and_seen_images_are_lines_of_the_table(run: Path, data: Path, tmp_path: Path, kernel) -> None:
    bundle = load_run(run)[0] | {"repulsion": 0.3}
    held = held_out(bundle, data)
    plain = predict(bundle, held, held.views)
    results, _ = measure(bundle, held, None)
    rows = {row[0]: row[1] for row in contents.official_table(results | {"recorded": None})[1]}
    assert rows["raw, without repulsion"] == f"{kernel.evaluate(plain, held.images)['pool100_raw']['mrr']:.4f}"
    assert rows["raw: the official metric"] != rows["raw, without repulsion"]
    views = kernel.caption_views(held.train.image_of, held.seen, 1)
    seen = kernel.evaluate(repelled(bundle, predict(bundle, held, views)), held.train.images[held.seen])
    assert rows[f"raw, {len(held.seen)} seen images (no measure of quality)"] == f"{seen['pool100_raw']['mrr']:.4f}"


MEASURE = """<!doctype html><body>{frames}<pre id="found"></pre><script>
onload = () => {{ found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
  const page = frame.contentDocument, root = page.documentElement
  return {{width: root.clientWidth, needed: root.scrollWidth,
          tables: [...page.querySelectorAll(".table")].map(table => table.scrollWidth > table.clientWidth),
          images: [...page.images].map(image => image.complete ? image.clientWidth / image.naturalWidth : 0)}} }})) }}
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_the_page_in_a_browser(verified: tuple[Path, dict], tmp_path: Path) -> None:
    """Frames of a phone's and a desktop's width: every figure is there, its smallest letters can be read, and nothing
    is wider than the screen but tables, which scroll by themselves."""
    report = html.escape((verified[0] / "report.html").read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{report}"></iframe>' for width in (390, 1280)
    )
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
    ]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # its socket's path must not be long
        done = subprocess.run(
            [
                CHROMIUM,
                *flags,
                f"--user-data-dir={short}/profile",
                "--window-size=1400,1000",
                "--dump-dom",
                (tmp_path / "measure.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"TMPDIR": short},
        )
    found = re.search(r'<pre id="found">(\[.*?\])</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    for page, width in zip(json.loads(html.unescape(found[1])), (390, 1280), strict=True):
        assert len(page["images"]) == len(FIGURES)
        assert min(page["images"]) * plots.SMALL * plots.DPI / 72 > 9  # pixels of the screen
        assert page["needed"] <= page["width"] <= width
        assert any(page["tables"]) == (width == 390)


@pytest.mark.usefixtures("undrawn")
def test_json_is_all_of_stdout(run: Path, data: Path, tmp_path: Path, tool) -> None:
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "out", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["images"] == 100
    assert Path(found["report"]).exists()
    assert found["against"] is None


@pytest.mark.usefixtures("undrawn")
def test_the_newest_run_is_the_default_and_its_folder_gets_the_report(
    run: Path, data: Path, tmp_path: Path, tool, kernel
) -> None:
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


@pytest.mark.usefixtures("undrawn")
def test_without_photos_captions_are_shown_and_it_is_said(run: Path, data: Path, tmp_path: Path, tool) -> None:
    other = copy_of(data, tmp_path)
    shutil.rmtree(other / "train/train/Images")
    outcome = tool(verify.main, "--run", run, "--data", other, "--output", tmp_path / "out")
    assert outcome.code == 0
    assert "No photos below" in outcome.err
    row = {"rank": 3, "caption": "a dog runs", "image": 1, "retrieved": [0, 1]}
    sheet = figures.contact_figure("title", [row], figures.Photos(), ["a cat sits .", "a dog lies ."])
    assert [axes.texts[0].get_text() for axes in sheet.axes] == ["a dog lies.", "a cat sits.", "a dog lies."]


@pytest.mark.usefixtures("undrawn")
def test_missing_and_damaged_photos_are_counted_and_skipped(
    run: Path, data: Path, tmp_path: Path, tool, kernel
) -> None:
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


# ----------------------------------------------------------------------------------------------- small, interrupted


@pytest.mark.usefixtures("undrawn")
def test_fewer_than_a_hundred_images_are_one_pool_everywhere(train, data: Path, tmp_path: Path, tool) -> None:
    small = train("--recipe=closed_form", "--set=refit=false", "--set=val_fraction=0.25")
    outcome = tool(verify.main, "--run", small, "--data", data, "--output", tmp_path, "--json")
    found = json.loads(outcome.out)
    assert (found["pool"], found["pools"]) == (60, "one pool of 60")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "in one pool of 60</h1>" in text
    assert "Among 60 photos" in text
    assert "pools of 100" not in text
    ranks = np.tile(np.arange(1, 61), (5, 1))
    figure = figures.rank_figure(ranks, numbers.Pools(60))
    assert "of 60" in figure.get_suptitle()
    assert "60" in figure.axes[0].get_xlabel()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][-1] == "51-60"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "interrupted or still runs"),
        (
            {"complete": False, "stopped": "SIGTERM", "predicted_by": [{"candidate": 1, "refitted": False}]},
            "not finished (SIGTERM); trained: candidate 0 in closed form, candidate 1 for 2.5 epochs, candidate 2 up "
            "to epoch 4; its submission is predicted by candidate 1 (not refitted)",
        ),
        ({"complete": True, "stopped": "time budget"}, None),
    ],
)
def test_a_run_that_is_not_finished_says_so(
    run: Path, data: Path, tmp_path: Path, tool, kernel, manifest: dict | None, said: str | None
) -> None:
    partial = Path(shutil.copytree(run, tmp_path / "partial"))
    (partial / kernel.MANIFEST).unlink()
    if manifest:
        (partial / kernel.MANIFEST).write_text(json.dumps(manifest))
        record = json.loads((partial / kernel.METRICS).read_text())
        record["members"] = [{"candidate": 0, "epochs": 0}, {"candidate": 1, "epochs": 2.5}]
        kernel.save_torch(partial / kernel.RESUME_STATE.format("validate", 2), {"at": {"epoch": 3}})
        (partial / kernel.RESUME_STATE.format("validate", 3)).write_bytes(b"damaged")
        (partial / kernel.METRICS).write_text(json.dumps(record))
    outcome = tool(verify.main, "--run", partial, "--data", data, "--output", tmp_path / "out")
    page = html.unescape((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for text in (outcome.err, page):
        assert said in text if said else "not finished" not in text


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
    refused(tool, "the weights file cannot be read", "--run", tmp_path / "empty", "--data", data)
    refused(tool, "no such folder", "--run", run, "--data", tmp_path / "none")


@pytest.mark.usefixtures("undrawn")
def test_a_final_model_is_taken_only_where_nothing_was_refitted(
    train, run: Path, data: Path, tmp_path: Path, tool, kernel
) -> None:
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
    refused(
        tool,
        "validated on other images; make it again with --set split_seed=0",
        "--run",
        run,
        "--data",
        data,
        "--against",
        other,
    )


@pytest.mark.usefixtures("undrawn")
def test_a_record_that_disagrees_is_pointed_out(run: Path, data: Path, tmp_path: Path, tool, kernel) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = json.loads((other / kernel.METRICS).read_text())
    record["validation"]["pool100_raw"]["mrr"] = 0.2
    (other / kernel.METRICS).write_text(json.dumps(record))
    outcome = tool(verify.main, "--run", other, "--data", data)
    assert (outcome.code, "says MRR 0.2000, measured here" in outcome.err) == (0, True)


@pytest.mark.usefixtures("undrawn")
def test_an_output_that_cannot_be_written_is_one_line(run: Path, data: Path, tmp_path: Path, tool) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = tool(verify.main, "--run", run, "--data", data, "--output", tmp_path / "file")
    assert (outcome.code, outcome.error.startswith("error: ")) == (1, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_help_has_an_example(run_tool_process) -> None:
    done = run_tool_process("verify", "--help")
    assert (done.returncode, "python tools/verify.py --run" in done.stdout) == (0, True)
