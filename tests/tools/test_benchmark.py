"""benchmark: figures read off real runs on drawn data; counts, comparison and the scaling fit on made-up ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from drawn import SMALL, draw_data
from forked import failed, succeeded
from lib.bench import anytime, scaling
from lib.bench.measure import (
    SCORES,
    Measured,
    count_work,
    measure,
    member_knobs,
    network_flops,
    read_curve,
    step_seconds,
)
from lib.bench.table import against_baseline, finding, summarise, table_rows
from lib.plots import recipe_colours
from lib.process import Ended
from lib.project import InputError, ToolError
from lib.runs import Run

PNG = b"\x89PNG"


def made(recipe: str, seed: int, curve: list[tuple[float, float]], **changes: object) -> Measured:
    """A run whose scores are all the same number at each time."""
    points = [(seconds, dict.fromkeys(SCORES, value)) for seconds, value in curve]
    values = {
        "load_seconds": 1.0,
        "train_seconds": curve[-1][0],
        "step_seconds": curve[-1][0],
        "captions": 1000,
        "flops": 2e9,
        "device": "cpu",
        "dtype": "float32",
        "peak_bytes": 2**30,
    } | changes
    return Measured(recipe, seed, points[-1][1], points, **values)


@pytest.mark.usefixtures("forked")
def test_recipes_are_measured_side_by_side(tool, tmp_path, kernel, monkeypatch):
    monkeypatch.setattr(kernel, "product_rate", lambda *_: 1e11)  # takes seconds
    data, output = draw_data(tmp_path / "data"), tmp_path / "bench"
    command = ["--recipes", "baseline", "closed_form", "--data", data, "--output", output, "--json"]
    result = json.loads(succeeded(tool("benchmark", *command, *SMALL, "--set=eval_every=1")).stdout)
    baseline, closed = result["recipes"]
    captions = (240 - kernel.split_images(240, 0.1, 0)[1].size) * 5
    metrics = json.loads((output / "baseline-seed0" / "metrics.json").read_text())
    stepping = metrics["members"][0]["seconds"] - metrics["validate_seconds"]
    assert 0 < stepping < baseline["train_seconds"] == metrics["seconds"]["train"]
    assert baseline["captions_per_second"] * stepping == pytest.approx(3 * captions)
    weights = 32 * 32 + 32 * 48
    assert baseline["flops_per_second"] * stepping == pytest.approx(3 * captions * (6 * weights - 2 * 32 * 32))
    assert baseline["of_peak"] == pytest.approx(baseline["flops_per_second"] / 1e11)
    assert json.loads((output / "closed_form-seed0" / "metrics.json").read_text())["members"][0]["epochs"] == 0
    assert closed["pool100_raw"] > baseline["pool100_raw"] > 0
    assert closed["captions_per_second"] > 0
    (passed,) = result["against_baseline"]
    assert passed["recipe"] == "closed_form"
    assert passed["pool100_raw_ratio"] > 0
    assert (output / "benchmark.md").read_text().count("| closed_form |") == 2
    assert (output / "benchmark.png").read_bytes().startswith(PNG)
    assert "done in" in (output / "baseline-seed0" / "run.log").read_text()


def test_mean_and_error_over_seeds():
    runs = [made("align", seed, [(2, value)]) for seed, value in enumerate((0.7, 0.8, 0.9))]
    (row,) = summarise(runs, {("cpu", "float32"): 4e9})
    assert row["pool100_raw"] == pytest.approx(0.8)
    assert row["pool100_raw_se"] == pytest.approx(0.1 / 3**0.5)
    assert row["of_peak"] == pytest.approx(0.25)
    assert row["captions_per_second"] == pytest.approx(500)
    (alone,) = summarise(runs[:1], {("cpu", "float32"): 4e9})
    assert alone["pool100_raw_se"] is None
    assert table_rows([alone])[0][3] is None


def test_passing_the_baseline_counts_the_slowest_seed():
    runs = [
        made("baseline", 0, [(100, 0.5)]),
        made("baseline", 1, [(100, 0.6)]),
        made("align", 0, [(1, 0.5), (4, 0.7)]),
        made("align", 1, [(1, 0.5), (4, 0.7)]),
        made("weak", 0, [(1, 0.6)]),
        made("weak", 1, [(1, 0.55)]),
    ]
    align, weak = against_baseline(runs)
    assert align["pool100_raw_seconds"] == 4
    assert align["pool100_raw_ratio"] == pytest.approx(25)
    assert weak["pool100_raw_ratio"] is None
    assert not against_baseline(runs[2:])
    rows = summarise(runs, {("cpu", "float32"): 4e9})
    assert "25 times sooner" in finding(rows, [align, weak])


@pytest.mark.parametrize(
    ("settings", "flops"),
    [
        ({}, 4 * (4 * 8 + 4 * 6) + 6 * 8 * 6 + 4 * 100 * 6),
        ({"gallery": 40}, 4 * (4 * 8 + 4 * 6) + 6 * 8 * 6 + 4 * 40 * 6),
        ({"gallery": 0}, 4 * (4 * 8 + 4 * 6) + 6 * 8 * 6 + 4 * 100 * 6),
        ({"sees": "both", "word_width": 3}, 6 * (7 * 8 + 7 * 6 + 8 * 6) + 4 * 100 * 6),
        ({"loss": "triplet", "skip": False, "batch": 50}, 4 * 4 * 8 + 6 * 8 * 6 + 4 * 10 * 6),
        (
            {"loss": "triplet", "skip": False, "batch": 500},
            4 * 4 * 8 + 6 * 8 * 6 + 4 * 20 * 6,
        ),  # of 5000 // 50 captions
        ({"network": "mlp", "loss": "cosine"}, 4 * 4 * 8 + 6 * 8 * 6),
    ],
)
def test_the_work_of_a_caption_is_counted_by_hand(kernel, settings, flops):
    knobs = kernel.resolve_knobs({"recipe": "align", "hidden": 8, "epochs": 10, "min_steps": 50, **settings})
    assert network_flops(knobs, captions=500, gallery=100, d_text=4, d_image=6) == flops


def test_extra_pairs_are_work_of_the_candidates_that_learn_from_them(tmp_path, kernel):
    data = draw_data(tmp_path / "data", images=100)
    bundle = {"val_images": ["held out"] * 20, "dims": [4, 6]}
    kernel.save_torch(tmp_path / kernel.VALIDATED_MODEL, bundle)
    joined = [{"joined_captions": 30, "joined_images": 10}, {"joined_captions": 60, "joined_images": 20}]
    knobs = kernel.resolve_knobs({"recipe": "align", "hidden": 8, "epochs": 1})
    members = [{"knobs": "pairs=False", "epochs": 2}, {"knobs": "pairs=True", "epochs": 3}]
    run = Run(tmp_path, {"knobs": dataclasses.asdict(knobs), "pairs": joined}, {"members": members})
    plain, more = (network_flops(knobs, *size, *bundle["dims"]) for size in ((400, 80), (490, 110)))
    assert count_work(run, data) == (2 * 400 + 3 * 490, 2 * 400 * plain + 3 * 490 * more)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--recipes", "baseline", "align"], "recipe=align"),
        (["--seeds", "1", "2"], "split_seed=0"),
        (["--minutes", "1", "2"], "max_minutes=3"),
        (["--scaling"], "hidden=64"),
    ],
)
def test_a_knob_that_the_study_gives_is_not_set_otherwise(tool, tmp_path, options, setting):
    """Every row of its table would be of other knobs than it says."""
    data = [] if options == ["--scaling"] else ["--data", tmp_path]
    done = failed(tool("benchmark", *options, *data, "--output", tmp_path / "out", "--set", setting), 2)
    assert f"--set {setting}: " in done.error
    assert not (tmp_path / "out").exists()


def test_the_curve_is_the_best_so_far_and_ends_with_the_blend(tmp_path, kernel):
    rows = ["validate,1,1,2.0,0.5,0.5,0.5,9", "validate,1,2,1.5,,,,11", "validate,1,2,1.5,0.7,0.7,0.7,13"]
    rows += ["refit,1,1,2.0,,,,20"]
    (tmp_path / kernel.TRAINING_LOG).write_text("\n".join([",".join(kernel.LOG_COLUMNS), *rows]))
    metrics = {
        "seconds": {"load": 5.0, "train": 9.0},
        "validate_seconds": 1.0,
        "members": [
            {"epochs": 0, "seconds": 0.5, **dict.fromkeys(SCORES, 0.6)},
            {"epochs": 2, "seconds": 8.0, **dict.fromkeys(SCORES, 0.7)},
        ],
        "validation": {name: {"mrr": 0.8} for name in SCORES},
    }
    run = Run(tmp_path, {}, metrics)
    curve = [(seconds, scores["pool100_raw"]) for seconds, scores in read_curve(run)]
    assert curve == [(0.5, 0.6), (4, 0.6), (8, 0.7), (9, 0.8)]
    assert step_seconds(run) == pytest.approx(7.5)


def test_a_candidate_s_knobs_are_the_run_s_but_for_what_its_line_says(tmp_path, kernel):
    base = kernel.resolve_knobs({"recipe": "align"})
    run = Run(tmp_path, {"knobs": dataclasses.asdict(base)}, {})
    changed = member_knobs(run, {"knobs": "network=linear hidden=64 skip=False lr=0.002"})
    assert changed == dataclasses.replace(base, network="linear", hidden=64, skip=False, lr=0.002)
    assert member_knobs(run, {"knobs": "the recipe's"}) == base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipes", "best"], "unknown recipe 'best'"),
        (["--set", "epoch=1"], "unknown knob 'epoch'"),
        (["--seeds", "1", "1"], "--seeds 1 1: give each of them once"),
        (["--recipes", "align", "align"], "--recipes align align: give each of them once"),
        (["--seeds", "-1"], "knob 'seed' lies in 0"),
        (["--recipes", "search"], "give --minutes"),
        (["--minutes", "0"], "max_minutes"),
        (["--minutes", "1", "--seeds", "1", "2"], "--minutes makes no use of --seeds"),
        (["--full-size", "--data", "."], "--full-size makes no use of --data"),
    ],
)
def test_bad_options_are_told_before_any_run(tool, tmp_path, options, message):
    failed(tool("benchmark", *options, "--output", tmp_path / "out"), 2, message)
    assert not (tmp_path / "out").exists()


def test_a_study_that_cannot_begin_leaves_no_folder(tool, tmp_path):
    failed(tool("benchmark", "--data", tmp_path / "none", "--runs", tmp_path / "runs"), 2, "no such folder")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("code", "kind"), [(1, ToolError), (2, InputError)])
def test_failing_run_is_named_with_its_reason(tmp_path, monkeypatch, code, kind):
    monkeypatch.setattr("lib.runs.run_kernel", lambda *_: Ended(code, "the loss is no number"))
    with pytest.raises(kind, match=r"run align-seed0: the loss is no number \(its log: ") as caught:
        measure("align", 0, tmp_path, tmp_path / "out", [])
    assert caught.value.exit_code == code


def test_interrupted_run_ends_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.runs.run_kernel", lambda *_: Ended(143, ""))
    with pytest.raises(SystemExit) as caught:
        measure("align", 0, tmp_path, tmp_path / "out", [])
    assert caught.value.code == 143


# ------------------------------------------------------------------------------------------- scaling
def test_scaling_axes_cover_two_decades():
    for axis, problems in scaling.AXES.items():
        sizes = [getattr(problem, axis) for problem in problems]
        assert sizes == sorted(sizes)
        assert sizes[-1] >= 100 * sizes[0]
        assert all(problem.captions % problem.gallery == 0 for problem in problems)


def test_scaling_fits_the_exponents(tool, tmp_path, monkeypatch):
    def train(problem: scaling.Problem, settings: list[str], folder: Path) -> tuple[float, float]:
        grown = problem.captions * problem.gallery * problem.dimension**2
        return 1e-3 * problem.captions + 1e-9 * grown, 400 + 1e-4 * problem.dimension**2

    monkeypatch.setattr(scaling, "train", train)
    result = json.loads(succeeded(tool("benchmark", "--scaling", "--output", tmp_path, "--json")).stdout)
    fitted = result["exponents"]
    assert fitted["captions"]["time"] == pytest.approx(1)
    assert 1.5 < fitted["dimension"]["time"] <= 2
    assert fitted["captions"]["memory"] is None
    assert fitted["dimension"]["memory"] == pytest.approx(2, abs=0.1)
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)
    assert (tmp_path / "scaling.md").read_text().startswith("| what grows |")


@pytest.mark.usefixtures("forked")
def test_scaling_point_is_a_real_training(tmp_path, kernel):
    problem = scaling.Problem(captions=300, gallery=60, dimension=8)
    seconds, mebibytes = scaling.train(problem, ["device=cpu", "dtype=float32"], tmp_path)
    assert 0 < seconds < 60
    assert 50 < mebibytes < 4000
    knobs = json.loads((tmp_path / kernel.MANIFEST).read_text())["knobs"]
    assert (knobs["hidden"], knobs["epochs"]) == (8, scaling.EPOCHS)
    (member,) = json.loads((tmp_path / kernel.METRICS).read_text())["members"]  # the network alone
    assert member["epochs"] == scaling.EPOCHS


# ------------------------------------------------------------------------------------------- quality against time
def test_each_recipe_with_each_budget_until_it_has_enough(tool, tmp_path, monkeypatch):
    def run(data: Path, output: Path, arguments: list[str]) -> Run:
        with (tmp_path / "asked").open("a") as asked:
            print(output.name, file=asked)
        budget = float(output.name.split("-")[1].removesuffix("min"))
        scores = {name: {"mrr": min(0.7, 0.6 + budget / 100), "mrr_se": 0.01} for name in SCORES}
        seconds = 6 if "closed_form" in output.name else 40 * budget
        left_out = [] if "closed_form" in output.name else ["candidate 3: no time for it"]
        return Run(
            output,
            {"recipe": output.name.split("-")[0], "seconds": {"total": seconds}},
            {"members": [{"refitted": True}], "left_out": left_out, "validation": scores},
        )

    monkeypatch.setattr("lib.bench.anytime.run_logged", run)
    places = ["--data", tmp_path, "--output", tmp_path / "out"]
    command = ["--recipes", "closed_form", "search", "--minutes", 4, 1, *places]
    points = json.loads(succeeded(tool("benchmark", *command, "--json")).stdout)["points"]
    assert (tmp_path / "asked").read_text().split() == ["closed_form-1min", "search-1min", "search-4min"]
    assert [point["seconds"] for point in points] == [6, 40, 160]
    assert points[2]["scores"]["pool100_raw"] == pytest.approx(0.64)
    assert (tmp_path / "out" / "quality_time.png").read_bytes().startswith(PNG)
    assert (tmp_path / "out" / "anytime.md").read_text().count("| search |") == 2


def test_the_title_names_the_earliest_of_the_points_that_are_as_good_as_the_best():
    rows = [("closed_form", 2, 0.61), ("align", 15, 0.6668), ("align", 26, 0.6671), ("ensemble", 40, 0.65)]
    points = [anytime.Point(recipe, 1, seconds, {"pool100_raw": raw}, 0.01, 1, 1, 0) for recipe, seconds, raw in rows]
    assert anytime.finding(points) == "Raw MRR 0.610 after 2 s (closed_form), 0.667 after 15 s (align)"
    assert anytime.finding(points[1:]) == "Raw MRR 0.667 after 15 s (align)"


def test_a_recipe_has_one_colour_in_every_picture(kernel):
    known = recipe_colours([])
    assert list(known) == list(kernel.RECIPES)
    assert len(set(recipe_colours(["sweep"]).values())) == len(known) + 1
    assert recipe_colours(["sweep", "search", "align"])["align"] == known["align"]


@pytest.mark.usefixtures("forked")
def test_the_time_budget_reaches_the_kernel(tmp_path, kernel):
    data = draw_data(tmp_path / "data")
    (point,) = anytime.measure(["closed_form"], [0.5, 9.0], data, tmp_path / "out", ["device=cpu"])
    manifest = json.loads((tmp_path / "out/closed_form-0.5min" / kernel.MANIFEST).read_text())
    assert manifest["knobs"]["max_minutes"] == 0.5
    assert (point.candidates, point.refitted, point.recipe) == (1, 1, "closed_form")
    assert 0 < point.scores["pool100_raw"] < 1
