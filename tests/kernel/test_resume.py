"""Runs that are killed, stopped or moved: the best so far stays, and they end in the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from drawn import BENT, IMAGE, JOINED, LEARNING, draw_data
from forked import KernelServer, failed_in_one_line, same_weights, succeeded
from lib.project import sha256_of
from outputs import FINAL, MANIFEST, METRICS, SUBMISSION, assert_same, check_submitted, mrr, read_json
from stopping import stopped_at_its_end

RECIPES = {"align": JOINED, "ensemble": ["--recipe=ensemble", *LEARNING, "--set=epochs=5"]}
COMMON = ["--set=eval_every=10", "--set=checkpoint_every=1000"]
EVERY_STEP = "--set=checkpoint_seconds=0"
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SUBMITTED, GOING_ON = "submission: ", "going on from epoch"


def command(source: Path, output: Path, recipe: str = "align") -> list[str]:
    return ["--input", str(source), "--output", str(output), *RECIPES[recipe], *COMMON]


@pytest.fixture(scope="module")
def undisturbed(server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a run of a recipe that nobody touched, made once."""
    made: dict[str, Path] = {}

    def output(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("undisturbed") / "out"
            succeeded(server.run(*command(data, made[recipe], recipe)))
        return made[recipe]

    return output


# ------------------------------------------------------------------------------------------------- killed
def kill_and_go_on(
    kernel: ModuleType, server: KernelServer, arguments: list[str], output: Path, expected: Path, kills: int
) -> None:
    """Killed at random moments, at last left alone; whatever it was doing, what is submitted is whole."""
    draw, score, killed, unvouched = random.Random(kills), 0.0, 0, 0
    for attempt in range(2 * kills):
        after = "recipe:" if attempt % 5 else ""  # now and then while it is still reading
        ended = server.kill(*arguments, EVERY_STEP, after=after, delay=draw.uniform(0, 0.6))
        if ended.returncode == 0:  # it came to its end before the kill
            assert_same(output, expected)
            shutil.rmtree(output)
            score = 0.0
            continue
        killed += 1
        if (output / MANIFEST).exists():
            if check_submitted(kernel, output)["complete"]:  # killed behind its last word
                assert same_weights(output / FINAL, expected / FINAL)
            assert mrr(output) >= score, "a submission made way for a worse one"
            score = mrr(output)
        elif SUBMITTED in ended.stdout or score:  # between the files of a publication: those are whole, yet unvouched
            kernel.check_submission(output / SUBMISSION, np.arange(1, 101), IMAGE)
            unvouched += 1
        if killed == kills:
            break
    assert killed == kills
    assert unvouched <= kills // 2  # a moment like others, not the rule
    ended = succeeded(server.run(*arguments))
    assert not ended.stderr
    assert_same(output, expected)


@pytest.mark.parametrize(
    ("recipe", "kills"), [("ensemble", 4), *(pytest.param(recipe, 20, marks=pytest.mark.slow) for recipe in RECIPES)]
)
def test_kills_in_a_row_change_no_bit(kernel, server, data: Path, undisturbed, tmp_path: Path, recipe: str, kills: int):
    output = tmp_path / "out"
    kill_and_go_on(kernel, server, command(data, output, recipe), output, undisturbed(recipe), kills)


@pytest.mark.parametrize("after", [" refit ", pytest.param("done in", marks=pytest.mark.slow)])
def test_a_kill_in_the_second_half(kernel, server, data: Path, undisturbed, tmp_path: Path, after: str):
    """During the refit, which goes on from its last state, and behind the last word of all."""
    arguments = command(data, tmp_path / "out")
    server.stop(signal.SIGKILL, *arguments, EVERY_STEP, after=after)
    check_submitted(kernel, tmp_path / "out")
    ended = succeeded(server.run(*arguments))
    assert (f"refit 1: {GOING_ON}" in ended.stdout) == (after == " refit ")
    assert_same(tmp_path / "out", undisturbed("align"))


def test_between_two_files_nothing_false_is_vouched_for(data: Path, tmp_path: Path, run_here, monkeypatch):
    """Wherever a kill falls: no manifest, or one that is true of every file that it lists."""
    right, moves, output = Path.replace, [], tmp_path / "out"

    def replace(path: Path, target: Path) -> Path:
        moved = right(path, target)
        if target.parent == output and (output / MANIFEST).exists():
            moves.append(target.name)
            for name, facts in read_json(output / MANIFEST)["outputs"].items():
                assert facts["sha256"] == sha256_of(output / name), f"{name}, after {target.name} was moved"
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    assert run_here(*command(data, output)) == 0
    assert moves.count(MANIFEST) >= 3


# ------------------------------------------------------------------------------------------------ stopped
@pytest.mark.parametrize("number", STOPPING)
def test_a_stopped_run_keeps_its_best_and_goes_on(kernel, server, data, undisturbed, tmp_path: Path, number: int):
    arguments, output = command(data, tmp_path / "out"), tmp_path / "out"
    ended = server.stop(number, *arguments, EVERY_STEP, after=" validate ")
    assert ended.returncode == 128 + number, ended
    assert not ended.stderr, ended
    name = signal.Signals(number).name
    assert f"{name}: ending this step" in ended.stdout
    assert "go on from here" in ended.stdout
    manifest = check_submitted(kernel, output)
    assert manifest["complete"] is False
    assert manifest["stopped"] == name
    assert ["network=linear" in one["knobs"] for one in manifest["predicted_by"]] == [True]
    ended = succeeded(server.run(*arguments))
    assert f"validate 1: {GOING_ON}" in ended.stdout
    assert_same(output, undisturbed("align"))


@pytest.mark.parametrize(
    "after", ["data:", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("recipe:", SUBMITTED, " refit "))]
)
def test_a_stop_at_any_moment_leaves_a_submission(kernel, server, data, undisturbed, tmp_path: Path, after: str):
    """Also one that comes before there is any: the closed form's takes no time."""
    arguments, output = command(data, tmp_path / "out"), tmp_path / "out"
    ended = server.stop(signal.SIGTERM, *arguments, EVERY_STEP, after=after)
    assert ended.returncode == 143, ended
    assert not ended.stderr, ended
    assert check_submitted(kernel, output)["complete"] is False
    assert (output / "resume_run.json").exists()
    succeeded(server.run(*arguments))
    assert_same(output, undisturbed("align"))


def test_a_stop_before_the_refits_leaves_them_to_be_done(
    kernel, server, data, undisturbed, run_here, tmp_path, monkeypatch
):
    arguments, right = command(data, tmp_path / "out"), kernel.Plan.next_refit

    def stopped(plan: Any) -> Any:
        job = right(plan)
        if job and job.candidate.number == 1:
            plan.stop.signal = signal.SIGTERM
        return job

    with monkeypatch.context() as patch:
        patch.setattr(kernel.Plan, "next_refit", stopped)
        assert run_here(*arguments) == 143
    assert check_submitted(kernel, tmp_path / "out")["complete"] is False
    succeeded(server.run(*arguments))
    assert_same(tmp_path / "out", undisturbed("align"))


def test_a_stop_of_an_ensemble_submits_the_best_blend_so_far(kernel, server, data: Path, undisturbed, tmp_path: Path):
    arguments, output = command(data, tmp_path / "out", "ensemble"), tmp_path / "out"
    ended = server.stop(signal.SIGINT, *arguments, EVERY_STEP, after=" validate          3")
    assert ended.returncode == 130, ended
    assert {one["candidate"] for one in check_submitted(kernel, output)["predicted_by"]} <= {0, 1, 2, 3}
    succeeded(server.run(*arguments))
    assert_same(output, undisturbed("ensemble"))


def test_on_kaggle_a_stopped_run_that_has_submitted_is_a_success(kernel, server, data: Path, tmp_path: Path):
    """It mounts no output of a failed one."""
    arguments, kaggle = (*command(data, tmp_path / "out"), EVERY_STEP), {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    ended = server.stop(signal.SIGTERM, *arguments, after=" validate ", env=kaggle)
    assert ended.returncode == 0
    assert "stopped by SIGTERM" in ended.stdout
    assert check_submitted(kernel, tmp_path / "out")["stopped"] == "SIGTERM"


def test_signals_of_nohup_are_left_alone_and_the_second_one_does_not_wait(kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "STARTED", time.monotonic())
    before, ended = {number: signal.getsignal(number) for number in STOPPING}, []
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = kernel.Stop(1.0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not stop.reason
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_amid_a_line_of_the_log_is_no_error(kernel, monkeypatch: pytest.MonkeyPatch):
    """Who reads the log is slow, so that a line takes long: Python allows no other one within it."""
    monkeypatch.setattr(kernel, "STARTED", time.monotonic())
    read, write = os.pipe()
    before, said = {number: signal.getsignal(number) for number in STOPPING}, []

    def reader() -> None:
        said.append(os.read(read, 1))  # the line has begun, and is longer than what a pipe holds
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        while part := os.read(read, 1 << 20):
            said.append(part)

    try:
        stop, thread = kernel.Stop(1.0), threading.Thread(target=reader)
        thread.start()
        with os.fdopen(write, "w") as slow, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", slow)
            kernel.log("x" * 1_000_000)
    finally:
        thread.join()
        os.close(read)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.reason == "SIGTERM"
    assert len(b"".join(said)) >= 1_000_000


def test_the_best_blend_is_kept_from_worse_ones_also_when_a_run_goes_on(
    kernel, data, tmp_path: Path, run_here, monkeypatch
):
    """What a run has turned down is turned down again, though all of it is there at once."""
    right = kernel.blend_of

    def blend(members: list, *others: object) -> object:
        found = right(members, *others)
        if len(members) > 1:
            found.tables["pool100_raw"]["mrr"] = 0.01
        return found

    monkeypatch.setattr(kernel, "blend_of", blend)
    arguments = command(data, tmp_path / "out")
    with stopped_at_its_end(kernel):
        assert run_here(*arguments) == 143
    assert [one["candidate"] for one in check_submitted(kernel, tmp_path / "out")["predicted_by"]] == [0]
    before = sha256_of(tmp_path / "out" / SUBMISSION)
    assert run_here(*arguments) == 0
    assert [one["candidate"] for one in check_submitted(kernel, tmp_path / "out")["predicted_by"]] == [0]
    assert sha256_of(tmp_path / "out" / SUBMISSION) == before


def test_candidates_are_judged_again_in_the_order_of_the_run_before(
    kernel, data: Path, tmp_path: Path, run_here, monkeypatch
):
    """Cards finish in an order of their own, and which blend was the best so far depends on it."""
    arguments = [*command(data, tmp_path / "out", "ensemble"), "--set=epochs=1"]
    index = tmp_path / "out" / "resume_run.json"
    with stopped_at_its_end(kernel):
        assert run_here(*arguments) == 143
    content = read_json(index)
    assert content["judged"] == [0, 1, 2, 3, 4, 5]
    order = [3, 0, 5, 1, 4]  # the last one was trained, and not yet judged
    index.write_text(json.dumps(content | {"judged": order}))
    judge, judged = kernel.Run.judge, list[int]()
    monkeypatch.setattr(kernel.Run, "judge", lambda run, one: (judged.append(one.number), judge(run, one)))
    assert run_here(*arguments) == 0
    assert judged == [*order, 2]


def test_a_signal_while_earlier_candidates_are_judged_leaves_what_they_submitted(
    kernel, data: Path, tmp_path: Path, run_here, monkeypatch
):
    """A long search has many: neither are all of them judged first, nor is the blend of a few submitted."""
    arguments, output = [*command(data, tmp_path / "out", "ensemble"), "--set=epochs=1"], tmp_path / "out"
    judge, judged = kernel.Run.judge, list[int]()

    def stopped_at_the_second(run: Any, candidate: Any) -> None:
        judge(run, candidate)
        judged.append(candidate.number)
        run.stop.signal = signal.SIGTERM if len(judged) == 2 else 0

    with stopped_at_its_end(kernel):
        assert run_here(*arguments) == 143
    before = sha256_of(output / SUBMISSION), sha256_of(output / MANIFEST)
    monkeypatch.setattr(kernel.Run, "judge", stopped_at_the_second)
    assert run_here(*arguments) == 143
    assert judged == [0, 1]
    assert (sha256_of(output / SUBMISSION), sha256_of(output / MANIFEST)) == before
    check_submitted(kernel, output)
    assert (output / "resume_run.json").exists()


# --------------------------------------------------------------------------------------- changed or damaged
@pytest.fixture
def interrupted(server, data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The output of a run that was stopped in the middle of validating a network, and its command."""
    arguments, output = command(data, tmp_path / "out"), tmp_path / "out"
    ended = server.stop(signal.SIGTERM, *arguments, EVERY_STEP, after=" validate ")
    assert ended.returncode == 143
    assert (output / "resume_validate_1.pth").exists()
    return output, arguments


def test_changed_knobs_are_refused_and_those_of_carrying_out_are_not(server, undisturbed, interrupted):
    output, arguments = interrupted
    submitted = sha256_of(output / SUBMISSION)
    for setting in ("epochs=21", "seed=1", "split_seed=1", "lr=0.002", "infer_batch=7", "refit=false"):
        key, before = setting.split("=")[0], f"error: {output}: holds an unfinished run of other knobs (there "
        said = re.escape(before) + rf"{key}=\S+\); delete resume_"
        failed_in_one_line(server.run(*arguments, f"--set={setting}"), 2, said)
    failed_in_one_line(server.run(*arguments, "--recipe=closed_form"), 2)
    assert sha256_of(output / SUBMISSION) == submitted
    ended = succeeded(server.run(*arguments, "--set=checkpoint_seconds=50", "--set=max_minutes=60", "--set=workers=2"))
    assert GOING_ON in ended.stdout
    assert_same(output, undisturbed("align"))


def test_changed_data_are_refused(server, tmp_path: Path, interrupted):
    output, arguments = interrupted
    other = draw_data(tmp_path / "other", {"images/embeddings": lambda images: images + 1}, **BENT)
    failed_in_one_line(server.run(*arguments, "--input", other), 2, "unfinished run of other data; delete")
    assert (output / "resume_validate_1.pth").exists()
    assert (output / SUBMISSION).exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def replace(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, pytest.param(replace, marks=pytest.mark.slow), Path.unlink])
def test_a_damaged_state_is_a_new_start_of_its_network(server, undisturbed, interrupted, damage: Callable):
    output, arguments = interrupted
    damage(output / "resume_validate_1.pth")
    ended = succeeded(server.run(*arguments))
    assert not ended.stderr
    assert f"validate 1: {GOING_ON}" not in ended.stdout
    assert ("resume_validate_1.pth: not usable" in ended.stdout) == (damage is not Path.unlink)
    assert_same(output, undisturbed("align"))


def test_a_lost_state_is_a_new_start_of_its_refit_too(kernel, server, data, undisturbed, tmp_path, run_here):
    """The state of a refit that is done is none to go on from, when its network is trained anew."""
    output = tmp_path / "out"
    with stopped_at_its_end(kernel):
        assert run_here(*command(data, output)) == 143
    assert kernel.read_state(output / "resume_refit_1.pth")["at"].weights
    (output / "resume_validate_1.pth").unlink()
    succeeded(server.run(*command(data, output)))
    assert_same(output, undisturbed("align"))


def test_a_damaged_index_is_one_line(server, interrupted):
    output, arguments = interrupted
    for text in ("", "{", "[]", "null", '{"fingerprint": 1}', '{"epochs": 1e999}', '{"drawn": [{"epoch": 3}]}'):
        (output / "resume_run.json").write_text(text)
        said = f"error: {output}/resume_run.json: the state of an unfinished run .*; delete resume_"
        failed_in_one_line(server.run(*arguments), 2, said)


def test_halves_of_files_of_a_killed_run_are_taken_away(server, undisturbed, interrupted):
    output, arguments = interrupted
    (output / ".abc.part").mkdir()
    (output / ".abc.part" / FINAL).write_bytes(b"half")
    succeeded(server.run(*arguments))
    assert_same(output, undisturbed("align"))


# -------------------------------------------------------------------------------------------------- moved
def test_a_run_goes_on_from_the_output_of_an_earlier_version(server, data, undisturbed, interrupted, tmp_path: Path):
    """On Kaggle an earlier version's output is attached below the input root, read-only."""
    earlier, _ = interrupted
    root = tmp_path / "input"
    shutil.copytree(data, root / "competitions")
    shutil.copytree(earlier, root / "notebooks" / "pipeline")
    ended = succeeded(server.run(*command(root, tmp_path / "new")))
    assert f"validate 1: {GOING_ON}" in ended.stdout
    assert_same(tmp_path / "new", undisturbed("align"))
    assert (root / "notebooks" / "pipeline" / "resume_run.json").exists()


def test_a_run_that_moves_finds_no_files_of_another_one(server, data, first, undisturbed, interrupted, tmp_path: Path):
    """Its manifest would vouch for named checkpoints of the run that was there before."""
    earlier, _ = interrupted
    root = tmp_path / "input"
    shutil.copytree(data, root / "competitions")
    shutil.copytree(earlier, root / "notebooks")
    shutil.copytree(first[0], tmp_path / "new")
    assert list((tmp_path / "new").glob("*checkpoint*"))
    ended = succeeded(server.run(*command(root, tmp_path / "new")))
    assert f"validate 1: {GOING_ON}" in ended.stdout
    assert_same(tmp_path / "new", undisturbed("align"))


def test_of_several_unfinished_runs_its_own_is_taken_up(server, data, undisturbed, interrupted, tmp_path: Path):
    """Below the input root, links followed: one of other knobs is left alone, unless there is no other."""
    earlier, _ = interrupted
    other, root = tmp_path / "other", tmp_path / "input"
    arguments = [*command(data, other), "--set=seed=7"]
    server.stop(signal.SIGTERM, *arguments, EVERY_STEP, after=" validate ")
    shutil.copytree(data, root / "competitions")
    shutil.copytree(other, root / "a")
    said = rf"error: {root}/a: holds an unfinished run of other knobs \(there seed=7\)"
    failed_in_one_line(server.run(*command(root, tmp_path / "refused")), 2, said)
    assert not list((tmp_path / "refused").glob("resume_*"))
    (root / "b").symlink_to(earlier)
    ended = succeeded(server.run(*command(root, tmp_path / "new")))
    assert f"validate 1: {GOING_ON}" in ended.stdout
    assert_same(tmp_path / "new", undisturbed("align"))


def test_a_signal_during_the_last_publication_comes_too_late(kernel, data, tmp_path: Path, run_here, monkeypatch):
    right = kernel.Run.publish

    def publish(run: Any, complete: bool = False) -> None:
        if complete:
            run.stop.signal = signal.SIGTERM
        right(run, complete)

    monkeypatch.setattr(kernel.Run, "publish", publish)
    assert run_here(*command(data, tmp_path / "out")) == 0
    manifest = check_submitted(kernel, tmp_path / "out")
    assert manifest["complete"] is True
    assert manifest["stopped"] == ""
    assert not list((tmp_path / "out").glob("resume_*"))


def test_a_finished_run_is_not_resumed_but_done_again(server, data: Path, undisturbed, tmp_path: Path):
    shutil.copytree(undisturbed("align"), tmp_path / "out")
    ended = succeeded(server.run(*command(data, tmp_path / "out")))
    assert GOING_ON not in ended.stdout
    assert_same(tmp_path / "out", undisturbed("align"))


def test_what_another_run_left_makes_way_before_anything_is_written(server, data: Path, undisturbed, tmp_path: Path):
    """Old and new files never lie side by side: killed before its first submission, a run leaves none."""
    shutil.copytree(undisturbed("align"), tmp_path / "out")
    server.stop(signal.SIGKILL, *command(data, tmp_path / "out", "ensemble"), after="recipe:")
    assert not {SUBMISSION, MANIFEST, METRICS, FINAL} & {path.name for path in (tmp_path / "out").iterdir()}
