"""runs.py: the table, what is chosen and sorted, two runs compared, the picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drawn import CLOSED, draw_data
from forked import Tool, failed, succeeded
from lib import kernel, record
from lib.jobs import ledger
from lib.runs import open_run
from made_runs import make_prediction, make_run

PNG = b"\x89PNG"


def scores(raw: float) -> dict[str, dict[str, float]]:
    """A validation with made-up tables."""
    return {
        name: {"mrr": raw + shift, "mrr_se": 0.01}
        for name, shift in (("pool100_raw", 0), ("pool100_cosine", 0.01), ("full_cosine", -0.3))
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five runs: two trained, one of a sweep, one that predicted with the first one's weights, one interrupted."""
    root = tmp_path / "runs"
    plain = vars(kernel.resolve_knobs({"recipe": "align"}))
    make_run(root / "a", 1e9, scores(0.7), knobs=plain)
    make_run(root / "sweep-1", 1.1e9, scores(0.8), recipe="sweep", members={"s01": "s01", "s02": "s02"})
    knobs = plain | {"seed": 3, "gone": 1, "device": "cuda"}
    make_run(root / "sweep-1/s01", 1.2e9, scores(0.75), knobs=knobs, seconds={"total": 90.0})
    make_prediction(root / "predicted", root / "a", 1.3e9)
    make_run(root / "stopped", 1.4e9, scores(0.6), complete=False, stopped="SIGTERM")
    csv = open_run(root / "a").outputs[kernel.SUBMISSION]["sha256"]
    record.append(root, "submitted", ref=7, sha256=csv)
    record.append(root, "scored", ref=7, public=0.71234)
    return root


def shown(tool: Tool, *arguments: object) -> list[dict]:
    """What the tool says as JSON."""
    return json.loads(succeeded(tool("runs", *arguments, "--json")).stdout)


def test_every_run_has_its_line(tool, folder):
    entries = shown(tool, "--runs", folder)
    assert [one["run"] for one in entries] == ["a", "sweep-1", "sweep-1/s01", "predicted", "stopped"]
    first, blend, member, predicted, stopped = entries
    assert (first["raw"], first["raw_se"], first["cosine"], first["full"]) == (0.7, 0.01, 0.71, pytest.approx(0.4))
    assert (first["date"], first["changed"], first["seconds"]) == ("2001-09-09 01:46", {}, 3.2)
    assert (first["submission"], first["public"]) == (7, 0.71234)
    assert (member["changed"], member["submission"]) == ({"seed": 3}, None)  # a knob that is gone says nothing
    assert blend["note"] == "2 members"
    assert predicted["note"] == "weights of a"
    assert predicted["raw"] is None
    assert stopped["note"] == "ended by SIGTERM, unfinished"


def test_a_run_at_work_is_told_from_one_that_nobody_goes_on_with(tool, folder):
    """Its kernel may be at work without the command that started it, as after kill -9."""
    waits = "import os, sys; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waits, folder / "stopped"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        stopped = shown(tool, "--runs", folder)[-1]
        other.stdin.close()
    assert stopped["note"] == f"ended by SIGTERM, at work (process {other.pid})"


def test_runs_of_the_same_weights_are_all_named(tool, folder):
    """As after a resumed run and one that nobody stopped."""
    shutil.copytree(folder / "a", folder / "b")
    predicted = next(one for one in shown(tool, "--runs", folder) if one["run"] == "predicted")
    assert predicted["note"] == "weights of a = b"


def test_the_table_has_a_line_a_run_in_fixed_columns(tool, folder):
    done = succeeded(tool("runs", "--runs", folder))
    header, *lines = done.stdout.splitlines()
    assert len(lines) == 5
    cells = "sweep-1/s01 2008-01-10 21:20 align 0.7500 0.0100 0.7600 0.4500 90.0 cpu - - seed=3"
    assert " ".join(lines[2].split()) == cells
    assert lines[0].index("0.71234") + len("0.71234") == header.index("public") + len("public")
    assert (folder / "runs.png").read_bytes().startswith(PNG)
    assert "runs.png" in done.stderr


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--recipe", "sweep"], ["sweep-1"]),
        (["--last", 2], ["predicted", "stopped"]),
        (["--recipe", "align", "--last", 3, "--sort", "raw"], ["sweep-1/s01", "stopped", "predicted"]),
        (["--sort", "raw"], ["sweep-1", "sweep-1/s01", "a", "stopped", "predicted"]),
        (["--sort", "public"], ["a", "sweep-1", "sweep-1/s01", "predicted", "stopped"]),
        (["--recipe", "search"], []),
    ],
)
def test_runs_are_chosen_and_sorted(tool, folder, options, names):
    assert [one["run"] for one in shown(tool, "--runs", folder, *options)] == names


def test_the_picture_says_which_run_is_best_and_which_is_as_good_sooner(folder):
    entries = ledger.read_ledger(folder)
    assert ledger.finding(entries[:1]) == "Best: a with 0.700 in 3 s"
    slow = [entry for entry in entries if entry.run in ("a", "sweep-1/s01")]
    assert ledger.finding(slow) == "Best: sweep-1/s01 with 0.750 in 90 s"
    close = make_run(folder / "close", 2e9, scores(0.745))
    both = [*slow, *(entry for entry in ledger.read_ledger(folder) if entry.run == close.name)]
    assert ledger.finding(both) == "Best: sweep-1/s01 with 0.750 in 90 s; close is as good within the error in 3 s"


def test_a_folder_without_runs_says_so(tool, tmp_path):
    (tmp_path / "runs").mkdir()
    assert "no such runs yet" in succeeded(tool("runs", "--runs", tmp_path / "runs")).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "none"], "no such folder"),
        (["--last", "0"], "at least 1"),
        (["--runs", ".", "--recipe", "foo"], "--recipe foo: .* there are baseline, "),
        (["--compare", ".", "."], "no readable manifest"),
    ],
)
def test_wrong_options_are_one_line(tool, options, message):
    failed(tool("runs", *options), 2, message)


def test_two_runs_that_held_out_other_images_are_compared_by_their_records(tool, folder, tmp_path):
    done = succeeded(tool("runs", "--compare", folder / "a", folder / "sweep-1/s01", "--data", tmp_path))
    assert "not paired: " in done.stderr
    assert "measured here" not in done.stdout
    half = 1.96 * 0.01 * 2**0.5
    assert re.match("seed +0 +3 +initial weights", done.stdout.splitlines()[1])
    interval = f"95% interval {-0.05 - half:+.4f} to {-0.05 + half:+.4f}"
    assert f"Worse than s01: sure (raw MRR -0.0500, {interval}, unpaired, as recorded)" in done.stdout


def test_a_run_that_only_predicts_is_not_compared_but_the_one_that_trained_is_named(tool, folder):
    message = f"{folder / 'predicted'}: only predicts, with the weights of {folder / 'a'}: give that one"
    failed(tool("runs", "--compare", folder / "stopped", folder / "predicted"), 2, message)


def test_two_runs_of_one_split_are_compared_pair_by_pair(tool, server, tmp_path):
    data = draw_data(tmp_path / "data")
    folders = [tmp_path / "runs" / name for name in ("one", "other")]
    for folder, setting in zip(folders, ("ridge=0.1", "ridge=1000"), strict=True):
        succeeded(server.run("--input", data, "--output", folder, *CLOSED, f"--set={setting}"))
    found = shown(tool, "--compare", *folders, "--data", data)
    assert (found["how"], found["knobs"]) == ("paired", {"ridge": [0.1, 1000.0]})
    recorded = [open_run(folder).scores["pool100_raw"]["mrr"] for folder in folders]
    raw, rows = found["mrr"]["raw"], found["measured"]
    assert [row["recorded"] for row in rows] == recorded
    assert rows[0]["raw"] - rows[1]["raw"] == pytest.approx(raw["difference"], abs=1e-6)
    said = succeeded(tool("runs", "--compare", *folders, "--data", data)).stdout
    assert re.search(r"^ridge +0.1 +1000.0 +closed form: penalty", said, re.MULTILINE)
    assert re.search(f"^one +{recorded[0]:.4f} +{rows[0]['raw']:.4f} ", said, re.MULTILINE)
    differ = [row for row in rows if abs(row["raw"] - row["recorded"]) >= 5e-5]
    assert said.count("the run's own, honest figure") == len(differ)
    assert raw["difference"] == pytest.approx(recorded[0] - recorded[1], abs=0.03)  # these chose repulsion in halves
    assert 0 < raw["low"] <= raw["difference"] <= raw["high"]
    assert raw["images"] == 24
