"""verify: its report, its page in a real browser, what it says of runs that are not whole, its bad inputs."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawn import TINY, draw_data
from forked import Ended, Tool, failed, succeeded
from lib import plots
from lib.report import contents, figures, numbers
from lib.report.page import Picture
from lib.weights import held_out, load_run
from made_runs import make_prediction

FIGURES = {"ranks", "pool_sizes", "baselines", "caption_length", "hubness", "calibration", "distances"}
FIGURES |= {f"contact_{kind}" for kind in ("good", "median", "worst")}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def verify(tool: Tool, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The tool on the data of the runs, for tests of what is measured and said: no picture is drawn."""
    pictures = {name: Picture(f"{name} 1", b"light", b"dark") for name in FIGURES}
    monkeypatch.setattr(contents, "draw_all", lambda *_: pictures)
    return partial(tool, "verify", "--data", data)


@pytest.fixture(scope="module")
def page(verified: tuple[Path, dict]) -> str:
    """The report as a browser gets it."""
    return (verified[0] / "report.html").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- outputs


def test_every_figure_is_written_and_inlined(verified: tuple[Path, dict], page: str) -> None:
    output, _ = verified
    assert {path.stem for path in output.glob("*.png")} == FIGURES
    assert {path.stem for path in output.glob("dark/*.png")} == FIGURES
    for attribute, folder in (("src", output), ("srcset", output / "dark")):
        inlined = [base64.b64decode(code) for code in re.findall(rf'{attribute}="data:image/png;base64,([^"]+)"', page)]
        assert sorted(inlined) == sorted(path.read_bytes() for path in folder.glob("*.png"))
    assert "http://" not in page
    assert "https://" not in page
    assert "<b>" not in page
    assert not list(output.rglob(".*"))


def test_a_dark_page_has_dark_pictures(verified: tuple[Path, dict]) -> None:
    for name in FIGURES:
        corners = [
            sum(Image.open(path / f"{name}.png").convert("RGB").getpixel((1, 1)))
            for path in (verified[0], verified[0] / "dark")
        ]
        assert corners[0] > 700
        assert corners[1] < 100


def test_titles_state_numbers(page: str) -> None:
    titles = re.findall(r'alt="([^"]+)"', page)
    assert len(titles) == len(FIGURES)
    assert [title for title in titles if not re.search(r"\d", title)] == []


def test_the_sheet_of_the_median_says_of_whom(run: Path, data: Path) -> None:
    held = held_out(load_run(run)[0], data)
    titles = []
    for misses in (2, 4):
        ranks = np.ones((5, len(held.names)), int)
        ranks[:misses] = 7
        sheets = contents.contact_figures(np.zeros((5, *held.images.shape)), ranks, held, figures.Photos())
        titles.append(sheets["contact_median"].get_suptitle())
    assert [title.count("\n") for title in titles] == [1, 1]  # there is room for two lines
    assert " ".join(titles[0].split()) == "40% of captions miss the first place; the median of these is rank 7 of 100"
    assert " ".join(titles[1].split()) == "A median caption finds its photo at rank 7 of 100"


def test_the_page_opens_with_the_metric_and_the_verdict(verified: tuple[Path, dict], page: str) -> None:
    text, results = html.unescape(page), verified[1]
    places = [
        text.index(part)
        for part in (
            f"<h1>{results['baselines'][0]['model']}: MRR {results['recorded']['mrr']:.3f}",
            "Among 100 photos the right one comes first for",
            numbers.verdict(results["against"]["raw"], results["baselines"][1]["model"]),
            "<h2>The official metric</h2>",
            "<h2>Distances</h2>",
            "compare own with random",
        )
    ]
    assert places == sorted(places)


MEASURE = """<!doctype html><body>{frames}<pre id="found"></pre><script>
onload = () => {{ found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
  const page = frame.contentDocument, root = page.documentElement
  return {{width: root.clientWidth, needed: root.scrollWidth,
          tables: [...page.querySelectorAll(".table")].map(table => table.scrollWidth > table.clientWidth),
          images: [...page.images].map(image => image.complete ? image.clientWidth / image.naturalWidth : 0)}} }})) }}
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_the_page_can_be_read_in_a_browser(page: str, tmp_path: Path) -> None:
    """Frames of a phone's and a desktop's width: every figure is there, its smallest letters can be read, and nothing
    is wider than the screen but tables, which scroll by themselves."""
    style = "border:0;width:{}px;height:900px"
    frames = "".join(
        f'<iframe style="{style.format(width)}" srcdoc="{html.escape(page)}"></iframe>' for width in (390, 1280)
    )
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    off = ["gpu", "quic", "sync", "background-networking", "component-update", "dev-shm-usage"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--window-size=1400,1000", "--dump-dom"]
    flags += [f"--disable-{name}" for name in off]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # its socket's path must not be long
        done = subprocess.run(
            [CHROMIUM, *flags, f"--user-data-dir={short}/profile", (tmp_path / "measure.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"TMPDIR": short},
        )
    found = re.search(r'<pre id="found">(\[.*?\])</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    for seen, width in zip(json.loads(html.unescape(found[1])), (390, 1280), strict=True):
        assert len(seen["images"]) == len(FIGURES)
        assert min(seen["images"]) * plots.SMALL * plots.DPI / 72 > 9  # pixels of the screen
        assert seen["needed"] <= seen["width"] <= width
        assert any(seen["tables"]) == (width == 390)


def test_json_is_all_of_stdout(run: Path, tmp_path: Path, verify) -> None:
    done = succeeded(verify("--run", run, "--output", tmp_path / "out", "--json"))
    found = json.loads(done.stdout)
    assert found["images"] == 100
    assert Path(found["report"]).exists()
    assert found["against"] is None


def test_what_the_kernel_says_of_odd_data_is_not_among_the_json(run: Path, tmp_path: Path, verify) -> None:
    odd = draw_data(tmp_path / "odd", {"captions/embeddings": lambda x: np.concatenate([np.ones_like(x[:1]), x[1:]])})
    done = succeeded(verify("--run", run, "--data", odd, "--output", tmp_path / "out", "--json"))
    assert json.loads(done.stdout)["images"] == 100
    assert "captions/embeddings: 1 vectors of 1200 are zero or constant" in done.stderr


def test_the_newest_run_is_the_default_and_its_folder_gets_the_report(
    run: Path, tmp_path: Path, verify, kernel
) -> None:
    for age, name in enumerate(("20260102-000000-align", "20260101-000000-align")):
        copy = shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(copy / kernel.VALIDATED_MODEL, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "20260103-000000-failed").mkdir()
    done = succeeded(verify("--runs", tmp_path / "runs"))
    assert "20260102-000000-align" in done.stdout
    assert (tmp_path / "runs/20260102-000000-align/verify/report.html").exists()
    assert re.search(r"^closed form +- +0\.\d", done.stdout, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------ photos


def test_without_photos_captions_are_shown_and_it_is_said(run: Path, data: Path, tmp_path: Path, verify) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(other / "train/train/Images")
    done = succeeded(verify("--run", run, "--data", other, "--output", tmp_path / "out"))
    assert "No photos below" in done.stderr
    row = {"rank": 3, "caption": "a dog runs", "image": 1, "retrieved": [0, 1]}
    sheet = figures.contact_figure("title", [row], figures.Photos(), ["a cat sits .", "a dog lies ."])
    assert [axes.texts[0].get_text() for axes in sheet.axes] == ["a dog lies.", "a cat sits.", "a dog lies."]


def test_missing_and_damaged_photos_are_counted_and_skipped(
    run: Path, data: Path, tmp_path: Path, verify, kernel
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    names = kernel.load_weights(run / kernel.FINAL_MODEL)["val_images"]
    folder = other / "train/train/Images"
    for name in names[:7]:
        (folder / name).unlink()
    for name in names[7:9]:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    (folder / names[9]).write_text("no picture")
    done = succeeded(verify("--run", run, "--data", other, "--output", tmp_path / "out", "--json"))
    assert json.loads(done.stdout)["photos"] == {"shown_from": 90, "missing": 7, "damaged": 3}
    assert "7 of 100 validation photos named in train.npz but missing on disk" in done.stderr
    assert "3 of 100 validation photos damaged" in done.stderr


# ----------------------------------------------------------------------------------------------- small, interrupted


def test_fewer_than_a_hundred_images_are_one_pool_everywhere(train, tmp_path: Path, verify) -> None:
    small = train("--recipe=closed_form", "--set=refit=false", "--set=val_fraction=0.25")
    done = verify("--run", small, "--output", tmp_path, "--json")
    found = json.loads(done.stdout)
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
    run: Path, tmp_path: Path, verify, kernel, manifest: dict | None, said: str | None
) -> None:
    halfway = Path(shutil.copytree(run, tmp_path / "halfway"))
    (halfway / kernel.MANIFEST).unlink()
    if manifest:
        (halfway / kernel.MANIFEST).write_text(json.dumps(manifest))
        record = json.loads((halfway / kernel.METRICS).read_text())
        record["members"] = [{"candidate": 0, "epochs": 0}, {"candidate": 1, "epochs": 2.5}]
        at = {"history": [{"epoch": epoch} for epoch in (1, 2, 3)]}
        kernel.save_torch(halfway / kernel.RESUME_STATE.format("validate", 2), {"at": at})
        (halfway / kernel.RESUME_STATE.format("validate", 3)).write_bytes(b"damaged")
        (halfway / "resume_validate_2_by_hand.pth").write_bytes(b"a copy")
        (halfway / kernel.METRICS).write_text(json.dumps(record))
    done = verify("--run", halfway, "--output", tmp_path / "out")
    page = html.unescape((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for text in (done.stderr, page):
        assert said in text if said else "not finished" not in text


@pytest.mark.slow
def test_a_run_stopped_in_a_network_says_in_which_epoch(server, data: Path, tmp_path: Path, verify) -> None:
    given = ["--input", data, "--output", tmp_path / "run", *TINY, "--set=val_fraction=0.5", "--set=epochs=2000"]
    log = server.stop(signal.SIGTERM, *given, after=" validate ").stdout
    epochs = len([line for line in log.splitlines() if line.startswith(" validate ")])
    done = succeeded(verify("--run", tmp_path / "run"))
    assert "not finished (SIGTERM); trained: candidate 0 in closed form" in done.stderr
    assert f", candidate 1 up to epoch {epochs + 1};" in done.stderr


# --------------------------------------------------------------------------------------------------------- bad input


def test_runs_that_cannot_be_verified(run: Path, data: Path, tmp_path: Path, verify, kernel) -> None:
    failed(verify("--run", tmp_path / "none"), 2, "no such run")
    (tmp_path / "empty").mkdir()
    failed(verify("--run", tmp_path / "empty"), 2, "no weights")
    predicted = make_prediction(tmp_path / "predicted", run)
    failed(verify("--run", predicted), 2, f"weights of a run that is not in {tmp_path}: give")
    failed(verify("--runs", tmp_path), 2, f"no run with {kernel.VALIDATED_MODEL}")
    (tmp_path / "empty" / kernel.VALIDATED_MODEL).write_bytes(b"no weights")
    failed(verify("--run", tmp_path / "empty"), 2, "the weights file cannot be read")
    failed(verify("--run", run, "--data", tmp_path / "none"), 2, "no such folder")


def test_a_final_model_is_taken_only_where_nothing_was_refitted(
    train, run: Path, tmp_path: Path, verify, kernel
) -> None:
    plain = Path(shutil.copytree(run, tmp_path / "plain"))
    (plain / kernel.VALIDATED_MODEL).unlink()
    done = succeeded(verify("--run", plain))
    assert "with refit=false it is the same model" in done.stderr
    refitted = train("--recipe=closed_form")
    (refitted / kernel.VALIDATED_MODEL).unlink()
    failed(verify("--run", refitted), 2, "has seen the validation images")


def test_other_data_is_refused(run: Path, tmp_path: Path, verify) -> None:
    wider = draw_data(tmp_path / "wider", {"captions/embeddings": lambda x: np.tile(x, 2)}, images=40)
    failed(verify("--run", run, "--data", wider), 2, "64-d captions and 48-d images, but the run has 32 and 48")
    fewer = draw_data(tmp_path / "fewer", images=100)
    failed(verify("--run", run, "--data", fewer), 2, "validation images are not in it")


def test_a_run_of_another_split_is_no_comparison(run: Path, train, verify) -> None:
    other = train("--recipe=closed_form", "--set=refit=false", "--set=split_seed=5")
    failed(
        verify("--run", run, "--against", other), 2, "validated on other images; make it again with --set split_seed=0"
    )


def test_a_record_that_disagrees_is_pointed_out(run: Path, tmp_path: Path, verify, kernel) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = json.loads((other / kernel.METRICS).read_text())
    record["validation"]["pool100_raw"]["mrr"] = 0.2
    (other / kernel.METRICS).write_text(json.dumps(record))
    for given in (["--run", other], ["--run", run, "--against", other]):
        done = succeeded(verify(*given))
        assert "says MRR 0.2000, measured here" in done.stderr
        assert "it has 0.2000 in place of 0." in done.stdout


def test_an_output_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path, verify) -> None:
    (tmp_path / "file").write_text("mine")
    failed(verify("--run", run, "--output", tmp_path / "file"), 1)
    assert (tmp_path / "file").read_text() == "mine"
