"""benchmark: figures read off real runs on drawn data; counts, comparison and the scaling fit on made-up ones."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmark
from drawn import SMALL, draw_data
from lib.bench import scaling
from lib.bench.measure import SCORES, Measured, full_size_data, matmul_peak, measure, network_flops
from lib.bench.table import against_baseline, finding, summarise, table_rows
from lib.data import FILES
from lib.process import Ended
from lib.project import InputError, ToolError

PNG = b"\x89PNG"


def made(recipe: str, seed: int, curve: list[tuple[float, float]], **changes: object) -> Measured:
    """A run whose scores are all the same number at each time."""
    points = [(seconds, dict.fromkeys(SCORES, value)) for seconds, value in curve]
    values = {"load_seconds": 1.0, "train_seconds": curve[-1][0], "step_seconds": curve[-1][0],
              "captions": 1000, "flops": 2e9, "device": "cpu",
              "dtype": "float32", "peak_bytes": 2**30} | changes
    return Measured(recipe, seed, points[-1][1], points, **values)


def test_recipes_side_by_side(tmp_path, capfd, kernel, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device, dtype: 1e11)  # has a test of its own
    data, output = draw_data(tmp_path / "data"), tmp_path / "bench"
    command = ["--recipes", "baseline", "closed_form", "--data", str(data), "--output", str(output), "--json"]
    assert benchmark.main([*command, *SMALL, "--set=eval_every=1"]) == 0
    result = json.loads(capfd.readouterr().out)
    baseline, closed = result["recipes"]
    captions = (240 - kernel.split_images(240, 0.1, 0)[1].size) * 5
    metrics = json.loads((output / "baseline-seed0" / "metrics.json").read_text())
    stepping = metrics["seconds"]["train"] - metrics["validate_seconds"]
    assert 0 < stepping < baseline["train_seconds"] == metrics["seconds"]["train"]
    assert baseline["captions_per_second"] * stepping == pytest.approx(3 * captions)
    weights = 32 * 32 + 32 * 48
    assert baseline["flops_per_second"] * stepping == pytest.approx(3 * captions * (6 * weights - 2 * 32 * 32))
    assert closed["pool100_raw"] > baseline["pool100_raw"] > 0 and closed["captions_per_second"] > 0
    (passed,) = result["against_baseline"]
    assert passed["recipe"] == "closed_form" and passed["pool100_raw_ratio"] > 0
    assert (output / "benchmark.md").read_text().count("| closed_form |") == 2
    assert (output / "benchmark.png").read_bytes().startswith(PNG)
    assert "done in" in (output / "baseline-seed0" / "run.log").read_text()


def test_mean_and_error_over_seeds():
    runs = [made("align", seed, [(2, value)]) for seed, value in enumerate((0.7, 0.8, 0.9))]
    (row,) = summarise(runs, {("cpu", "float32"): 4e9})
    assert row["pool100_raw"] == pytest.approx(0.8) and row["pool100_raw_se"] == pytest.approx(0.1 / 3**0.5)
    assert row["of_peak"] == pytest.approx(0.25) and row["captions_per_second"] == pytest.approx(500)
    (alone,) = summarise(runs[:1], {("cpu", "float32"): 4e9})
    assert alone["pool100_raw_se"] is None and table_rows([alone])[0][3] is None


def test_passing_the_baseline_counts_the_slowest_seed():
    runs = [made("baseline", 0, [(100, 0.5)]), made("baseline", 1, [(100, 0.6)]),
            made("align", 0, [(1, 0.5), (4, 0.7)]), made("align", 1, [(1, 0.5), (4, 0.7)]),
            made("weak", 0, [(1, 0.6)]), made("weak", 1, [(1, 0.55)])]
    align, weak = against_baseline(runs)
    assert align["pool100_raw_seconds"] == 4 and align["pool100_raw_ratio"] == pytest.approx(25)
    assert weak["pool100_raw_ratio"] is None
    assert not against_baseline(runs[2:])
    rows = summarise(runs, {("cpu", "float32"): 4e9})
    assert "25 times sooner" in finding(rows, [align, weak])


def test_work_of_a_member_with_a_gallery(kernel):
    knobs = kernel.resolve_knobs({"recipe": "align", "hidden": 8})
    state = kernel.AlignNet(4, 6, knobs).state_dict()
    weights = sum(value.numel() for value in state.values() if value.dim() == 2)
    assert network_flops(knobs, gallery=100, d_text=4, d_image=6) == 6 * weights + 4 * 100 * 6


def test_matmul_peak_is_a_rate():
    assert 1e8 < matmul_peak("cpu", "float32") < 1e15


def test_full_size_data_is_made_once(tmp_path, monkeypatch):
    made_in = []

    def make(folder: Path) -> None:
        made_in.append(folder)
        folder.mkdir()
        for name in FILES:
            (folder / name).touch()

    monkeypatch.setattr("lib.bench.measure.FULL_SIZE", tmp_path / "full")
    monkeypatch.setattr("lib.sample.layout.make_full_size", make)
    assert full_size_data() == full_size_data() == tmp_path / "full" == made_in.pop()
    assert not made_in


@pytest.mark.parametrize(("options", "message"), [
    (["--recipes", "best"], "unknown recipe 'best'"),
    (["--set", "epoch=1"], "unknown knob 'epoch'"),
    (["--seeds", "1", "1"], "different numbers"),
])
def test_bad_options_are_told_before_any_run(tmp_path, options, message):
    with pytest.raises(Exception, match=message) as caught:
        benchmark.main([*options, "--output", str(tmp_path / "out")])
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


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
        assert sizes == sorted(sizes) and sizes[-1] >= 100 * sizes[0]
        assert all(problem.captions % problem.gallery == 0 for problem in problems)


def test_scaling_fits_the_exponents(tmp_path, monkeypatch, capsys):
    def train(problem: scaling.Problem, settings: list[str], folder: Path) -> tuple[float, float]:
        grown = problem.captions * problem.gallery * problem.dimension**2
        return 1e-3 * problem.captions + 1e-9 * grown, 400 + 1e-3 * problem.dimension**2

    monkeypatch.setattr(scaling, "train", train)
    assert benchmark.main(["--scaling", "--output", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    fitted = result["exponents"]
    assert fitted["captions"]["time"] == pytest.approx(1) and 1.5 < fitted["dimension"]["time"] <= 2
    assert fitted["dimension"]["memory"] == pytest.approx(2, abs=0.1)
    assert scaling.exponents([scaling.Point(size, 1.0, 2.0) for size in (10, 100)])["memory"] is None  # too little
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)
    assert (tmp_path / "scaling.md").read_text().startswith("| what grows |")


def test_scaling_point_is_a_real_training(tmp_path, kernel):
    problem = scaling.Problem(captions=300, gallery=60, dimension=8)
    seconds, mebibytes = scaling.train(problem, ["device=cpu", "dtype=float32"], tmp_path)
    assert 0 < seconds < 60 and 50 < mebibytes < 4000
    knobs = json.loads((tmp_path / kernel.MANIFEST).read_text())["knobs"]
    assert (knobs["hidden"], knobs["epochs"]) == (8, scaling.EPOCHS)
    assert len(json.loads((tmp_path / kernel.METRICS).read_text())["members"]) == 1
