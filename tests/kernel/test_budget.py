"""Little time: a run ends within it, has the best that there was time for, and says what there was no time for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drawn import BENT, LEARNING, draw_data
from forked import Ended, KernelServer, failed_in_one_line, succeeded
from outputs import FINAL, METRICS, SUBMISSION, check_submitted, mrr, read_json

SLACK = 4.0  # seconds that a loaded machine may take for what is measured in tenths
ENSEMBLE = ["--recipe=ensemble", *LEARNING]
SEARCH = ["--recipe=search", *LEARNING, "--set=epochs=2"]
HOURS = "--set=epochs=3000"  # for networks that would take longer than any budget here


def minutes(seconds: float) -> str:
    return f"--set=max_minutes={seconds / 60}"


def run_for(server: KernelServer, seconds: float, output: Path, data: Path, *settings: str) -> tuple[Ended, float]:
    """A run with a budget; how it ended and how long it took."""
    start = time.monotonic()
    ended = server.run("--input", data, "--output", output, *settings, minutes(seconds))
    return ended, time.monotonic() - start


def check_budget(kernel: Any, output: Path, ended: Ended) -> dict[str, Any]:
    """A run that its budget ended is complete, no worse than the closed form, and tells all that is missing."""
    assert ended.returncode == 0, ended
    assert not ended.stderr, ended
    manifest, metrics = check_submitted(kernel, output), read_json(output / METRICS)
    assert manifest["complete"] is True
    assert not list(output.glob("resume_*"))
    assert manifest["stopped"] in ("", "time budget")
    first = float(re.search(r"^submission: .*; ([\d.]+) raw", ended.stdout, re.M)[1])
    assert mrr(output) >= first - 5e-5, "worse than the closed form"
    for one in metrics["members"]:
        if one["weight"] and not one["refitted"]:
            assert any(f"refit of candidate {one['candidate']}:" in line for line in metrics["left_out"]), one
    for line in metrics["left_out"]:
        assert line in ended.stdout
    trained = {one["candidate"] for one in metrics["members"]}
    dropped = {int(re.search(r"candidate (\d+)", line)[1]) for line in metrics["left_out"] if "refit" not in line}
    assert trained | dropped == set(range(6))
    assert not trained & dropped
    return metrics


def test_without_time_the_closed_form_is_submitted(kernel, server, data: Path, tmp_path: Path):
    ended, took = run_for(server, 0.06, tmp_path / "out", data, *ENSEMBLE, HOURS)
    metrics = check_budget(kernel, tmp_path / "out", ended)
    assert took < SLACK
    assert len(metrics["left_out"]) == 5
    assert [one["candidate"] for one in metrics["members"]] == [0]


def test_a_run_ends_within_its_time_with_the_best_so_far(
    kernel, server, data: Path, tmp_path: Path, run_here, ticking, monkeypatch, capsys
):
    """Its networks would take hours, as the first one shows; what they came to predicts the same again."""
    output, root = tmp_path / "out", draw_data(tmp_path / "input", **BENT)
    monkeypatch.setattr(kernel, "product_rate", lambda *_: 1e15)  # a guess far too high
    code = run_here("--input", data, "--output", output, *ENSEMBLE, HOURS, minutes(6.0))
    ended = Ended(code, *capsys.readouterr())
    metrics = check_budget(kernel, output, ended)
    assert re.search(r"^time budget: candidate \d+ gets \d s at most", ended.stdout, re.M)
    assert 3 < metrics["seconds"]["total"] < 6
    assert any(0 < one["epochs"] < 3000 for one in metrics["members"])
    (root / FINAL).write_bytes((output / FINAL).read_bytes())
    predict = ["--output", tmp_path / "again", "--mode=predict", "--set=device=cpu"]
    succeeded(server.run("--input", root, *predict))
    assert (tmp_path / "again" / SUBMISSION).read_bytes() == (output / SUBMISSION).read_bytes()


@pytest.fixture
def busy() -> Iterator[None]:
    """Another process on every core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, 15.0, 30.0])
def test_a_run_ends_within_its_time_on_a_busy_machine(kernel, server, busy, tmp_path: Path, seconds: float):
    root = draw_data(tmp_path / "data", images=2000, **BENT)
    ended, took = run_for(server, seconds, tmp_path / "out", root, *ENSEMBLE, "--set=epochs=40", "--set=hidden=256")
    check_budget(kernel, tmp_path / "out", ended)
    assert took < seconds + 2 * SLACK


def test_refits_without_time_are_left_out_and_said(kernel, data: Path, tmp_path: Path, run_here, monkeypatch, capsys):
    """The heaviest member is refitted first; who has no time predicts with its validated weights."""

    def next_refit(plan: Any) -> Any:
        networks = [one for one in plan.members if one.knobs.network != "linear"]
        if plan.waiting or len(networks) < 2:
            return None
        plan.stop.deadline = time.monotonic() + plan.stop.closing + 60
        for one, seconds in zip(networks, (5.0, 500.0, 500.0, 500.0, 500.0), strict=False):
            one.trained["validate"].seconds = seconds
        return right(plan)

    right = kernel.Plan.next_refit
    monkeypatch.setattr(kernel.Plan, "next_refit", next_refit)
    assert run_here("--input", data, "--output", tmp_path / "out", *ENSEMBLE) == 0
    manifest, metrics = check_submitted(kernel, tmp_path / "out"), read_json(tmp_path / "out" / METRICS)
    networks = [one for one in manifest["predicted_by"] if "network=linear" not in one["knobs"]]
    assert [one["refitted"] for one in networks] == [True] + [False] * (len(networks) - 1)
    said = capsys.readouterr().out
    for one in networks[1:]:
        line = f"refit of candidate {one['candidate']}: no time for it; it predicts with its validated weights"
        assert line in metrics["left_out"]
        assert line in said
    assert manifest["complete"] is True


def test_no_time_for_the_only_network_is_said(server, data: Path, tmp_path: Path):
    """The baseline has no closed form to fall back on."""
    ended, _ = run_for(server, 0.06, tmp_path / "out", data, "--recipe=baseline", *LEARNING, HOURS)
    failed_in_one_line(ended, 1, "raise --set max_minutes")
    assert not (tmp_path / "out" / SUBMISSION).exists()


# ------------------------------------------------------------------------------------------------- search
def test_the_search_draws_until_its_time_is_out(kernel, data: Path, tmp_path: Path, run_here, ticking, capsys):
    output = tmp_path / "out"
    assert run_here("--input", data, "--output", output, *SEARCH, minutes(7.0)) == 0
    said = capsys.readouterr()
    assert not said.err
    manifest, metrics = check_submitted(kernel, output), read_json(output / METRICS)
    assert manifest["complete"] is True
    assert not list(output.glob("resume_*"))
    drawn = re.findall(r"^candidate (\d+) is drawn: (.*)$", said.out, re.M)
    assert len(drawn) >= 2
    assert [int(number) for number, _ in drawn] == list(range(6, 6 + len(drawn)))
    assert len({knobs for _, knobs in drawn}) == len(drawn)
    assert all("epochs=" not in knobs and "hidden=" not in knobs for _, knobs in drawn), "the user set those"
    assert len(metrics["members"]) == 6 + len(drawn)
    assert 4 < metrics["seconds"]["total"] < 7


def test_a_search_goes_on_with_what_it_had_drawn(kernel, server, data, tmp_path: Path, run_here, ticking, capsys):
    arguments = ["--input", data, "--output", tmp_path / "out", *SEARCH]
    ended = server.stop(signal.SIGTERM, *arguments, "--set=checkpoint_seconds=0", after="candidate 7 is drawn")
    assert ended.returncode == 143
    assert len(read_json(tmp_path / "out" / "resume_run.json")["drawn"]) == 2
    score = mrr(tmp_path / "out")
    assert run_here(*arguments, minutes(7.0)) == 0
    drawn = re.findall(r"^candidate (\d+) is drawn", capsys.readouterr().out, re.M)
    assert drawn[0] == "8"
    check_submitted(kernel, tmp_path / "out")
    assert len(read_json(tmp_path / "out" / METRICS)["members"]) >= 8
    assert mrr(tmp_path / "out") >= score


# --------------------------------------------------------------------------------------------- the plan
@pytest.fixture
def plan_for(kernel, lab, monkeypatch) -> Callable[..., Any]:
    """A plan of equal networks that take ten seconds each, a refit eleven, everything else nothing; time stands."""
    monkeypatch.setattr(kernel, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def plan(seconds: float, networks: int = 2, **knobs: Any) -> Any:
        problem, stop = lab.problem(), kernel.Stop(1e6)
        candidates = [kernel.Candidate(number, lab.knobs(**knobs)) for number in range(networks)]
        machine = kernel.Machine([torch.device("cpu")], torch.float32, 1.0)
        made = kernel.Plan(candidates, lab.knobs(**knobs), {}, problem, machine, stop)
        machine.rate = kernel.training_flop(candidates[0].knobs, problem) / 10
        made.judging = made.publishing = stop.closing = 0.0
        stop.deadline = seconds
        return made

    return plan


def about_to_draw(kernel: Any, plan: Any) -> Any:
    """A search's plan whose one network is validated, and in the best blend."""
    (one,) = plan.candidates
    one.trained["validate"], one.begun, one.weight = kernel.Training(1e-3, epochs=1.0, seconds=10.0), {"validate"}, 1.0
    return plan


@pytest.mark.parametrize(
    ("networks", "seconds", "refit", "share"),
    [
        (2, 84.4, True, 2.0),  # twice what both of them and their refits take
        (2, 36.0, True, 0.853),  # fewer epochs for both
        (2, 23.0, True, 1.15),  # another network is worth more than refits
        (2, 17.0, True, 0.85),
        (2, 15.0, True, 1.5),  # not enough for two: the second one gets what the first one leaves
        (2, 9.0, True, 0.9),
        (2, 3.0, True, 0.3),
        (2, 17.0, False, 0.85),
        (3, 54.0, True, 0.853),
        (3, 40.0, True, 1.333),
        (3, 23.0, True, 1.15),
    ],
)
def test_short_of_time_refits_then_the_last_networks_go(
    plan_for, networks: int, seconds: float, refit: bool, share: float
):
    assert plan_for(seconds, networks, refit=refit).share() == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    ("networks", "seconds", "share"),
    [
        (1, 8.5, 0.85),  # a second card makes no network's training shorter
        (2, 8.5, 0.85),
        (4, 17.0, 0.85),
        (1, 90.0, 4.263),
    ],
)
def test_two_cards_give_a_network_no_more_than_one_has(plan_for, networks: int, seconds: float, share: float):
    plan = plan_for(seconds, networks)
    plan.machine.devices *= 2
    assert plan.share() == pytest.approx(share, abs=0.002)


def test_a_closed_form_at_work_on_the_other_card_takes_no_time_from_the_networks(kernel, plan_for):
    """It was counted as a network: in little time all of them were left out at once."""
    plan = plan_for(17.0, networks=2)
    plan.machine.devices *= 2
    share, first = plan.share(), plan.candidates[0]
    linear = kernel.Candidate(2, kernel.dataclasses.replace(first.knobs, network="linear"), begun={"validate"})
    plan.candidates.append(linear)
    plan.running[kernel.Future()] = kernel.Job(linear, "validate", 17.0, since=0.0), plan.machine.devices[0]
    assert share == plan.share() > 0.8


@pytest.mark.parametrize(("seconds", "drawn"), [(80.0, True), (20.0, False)])
def test_two_cards_draw_nothing_that_one_has_no_time_for(kernel, plan_for, monkeypatch, seconds: float, drawn: bool):
    """Ten seconds and eleven for the refit, one after the other."""
    plan = about_to_draw(kernel, plan_for(seconds, networks=1, recipe="search"))
    plan.machine.devices *= 2
    other = kernel.dataclasses.replace(plan.candidates[0].knobs, seed=7)
    monkeypatch.setattr(kernel, "draw_candidate", lambda *_: other)
    assert (plan.next_draw() is not None) == drawn


@pytest.mark.parametrize(
    ("networks", "seconds", "share"),
    [
        (2, 9.0, 0.45),  # two kinds with half of their epochs, in place of one with nearly all
        (4, 9.0, 0.45),
        (4, 5.0, 0.25),
        (4, 3.0, 0.15),
        (4, 2.0, 0.2),  # too little for two
        (1, 9.0, 0.9),
        (4, 17.0, 0.85),
        (4, 25.0, 0.833),  # a third one needs as much as ever
    ],
)
def test_of_many_photos_two_kinds_share_what_is_enough_for_one(
    kernel, plan_for, monkeypatch, networks: int, seconds: float, share: float
):
    plan = plan_for(seconds, networks)
    monkeypatch.setattr(kernel, "MANY", len(plan.problem.train_images) / 4)
    assert plan.share() == pytest.approx(share, abs=0.002)


def test_refits_of_networks_wait_for_the_last_candidate_and_the_closed_forms_does_not(kernel, plan_for):
    plan = plan_for(1000.0, networks=3)
    first = plan.candidates[0]
    linear = kernel.Candidate(3, kernel.dataclasses.replace(first.knobs, network="linear"), begun={"validate"})
    plan.candidates.append(linear)

    def next_with(*weights: float) -> Any:
        """The next job, where these are the candidates' weights in the best blend."""
        for one, weight in zip(plan.candidates, weights, strict=True):
            one.trained["validate"], one.weight = kernel.Training(1e-3, epochs=1.0, seconds=10.0), weight
        job = plan.next_job()
        return job and (job.candidate.number, job.phase)

    assert next_with(0, 0, 0, 0) == (0, "validate")
    assert next_with(1, 0, 0, 0) == (1, "validate")
    assert next_with(0.6, 0, 0, 0.4) == (3, "refit")
    assert next_with(1, 0, 0, 0) == (2, "validate")
    assert [next_with(0.3, 0.5, 0.2, 0) for _ in range(4)] == [(1, "refit"), (0, "refit"), (2, "refit"), None]


def test_what_was_tried_is_not_drawn_again(kernel, plan_for, monkeypatch):
    plan = about_to_draw(kernel, plan_for(1000.0, networks=1, recipe="search"))
    monkeypatch.setattr(kernel, "draw_candidate", lambda *_: plan.candidates[0].knobs)
    assert plan.next_draw() is None


@pytest.mark.parametrize(("network", "drawn"), [("align", True), ("linear", False)])
def test_no_draw_around_a_formula(kernel, plan_for, network: str, drawn: bool):
    """Nothing that is drawn would change it."""
    plan = about_to_draw(kernel, plan_for(1000.0, networks=1, recipe="search", network=network))
    assert (plan.next_draw() is not None) == drawn


def test_trainings_of_less_than_a_second_are_shortened_too(kernel, plan_for):
    plan = plan_for(0.9)
    plan.machine.rate *= 20  # half a second each
    job = plan.next_job()
    assert job.candidate.number == 0
    assert job.allotted == pytest.approx(0.45)


def test_what_has_less_than_a_second_is_left_out(plan_for):
    plan = plan_for(0.5)
    assert plan.next_job() is None
    assert [line.split(" (")[0] for line in plan.left_out] == ["candidate 0", "candidate 1"]


def test_a_drawn_candidate_counts_where_it_is_about_as_good_as_the_best_of_its_kind(kernel, lab, monkeypatch):
    monkeypatch.setattr(kernel, "choose_blend", lambda predictions, images, repulsion, priors: priors)

    def candidate(number: int, score: float, drawn: bool = True, **knobs: Any) -> Any:
        figures = {"pool100_raw": score - 0.02, "pool100_cosine": score + 0.02}
        return kernel.Candidate(number, lab.knobs(**knobs), drawn, figures=figures)

    candidates = [
        candidate(0, 0.75, drawn=False),
        candidate(1, 0.745),
        candidate(2, 0.735),
        candidate(3, 0.6, sees="words"),
    ]
    candidates += [
        candidate(4, 0.7, drawn=False),
        candidate(5, 0.585, sees="words", prior=2.0),
        candidate(6, 0.595, sees="words", prior=2.0),
    ]
    assert kernel.blend_of(candidates, lab.problem(), 0.0) == [1, 1, 0, 1, 1, 0, 2]
