"""Runs that are killed, stopped or moved end in the same bits as one that nobody touched."""
from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from drawn import IMAGE, draw_data
from forked import Ended, KernelServer, same_weights
from lib.project import sha256_of

FINAL, VALIDATED, SUBMISSION = "pipeline_final_model.pth", "pipeline_validated_model.pth", "pipeline_submission.csv"
COMMON = ["hidden=32", "batch=64", "device=cpu", "dtype=float32", "eval_every=10", "checkpoint_every=1000"]
RECIPES = {"align": ["epochs=20"], "ensemble": ["epochs=12", "members=3", "variants=; raw_weight=1; network=linear"]}
EVERY_STEP = "--set=checkpoint_seconds=0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelServer]:
    server = KernelServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


def command(source: Path, output: Path, recipe: str = "align") -> list[str]:
    settings = [f"--set={setting}" for setting in COMMON + RECIPES[recipe]]
    return ["--input", str(source), "--output", str(output), "--recipe", recipe, *settings]


@pytest.fixture(scope="module")
def undisturbed(server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a run of a recipe that nobody touched, made once."""
    made: dict[str, Path] = {}

    def output(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("undisturbed") / "out"
            ended = server.run(*command(data, made[recipe], recipe))
            assert ended.returncode == 0, ended.stderr
        return made[recipe]

    return output


def wait_for(server: KernelServer, text: str, seconds: float = 60) -> None:
    """Until the running run has said `text`."""
    end = time.monotonic() + seconds
    while text not in (server.folder / "stdout").read_text():
        assert time.monotonic() < end, f"no '{text}' within {seconds} s"
        time.sleep(0.005)


def stop(server: KernelServer, number: int, *arguments: object, after: str = " validate ", delay: float = 0) -> Ended:
    """Start a run and send it a signal once it has said `after`."""
    process = server.start(*arguments)
    wait_for(server, after)
    time.sleep(delay)
    os.kill(process, number)
    return server.wait()


def assert_same(output: Path, expected: Path) -> None:
    """Weights, submission, figures and history are those of the undisturbed run, and nothing is left over."""
    for name in (FINAL, VALIDATED):
        assert same_weights(output / name, expected / name), name
    assert sha256_of(output / SUBMISSION) == sha256_of(expected / SUBMISSION)
    figures, histories = [], []
    for folder in (output, expected):
        figures.append(json.loads((folder / "metrics.json").read_text())["validation"])
        with (folder / "training_log.csv").open(newline="") as file:
            histories.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert figures[0] == figures[1] and histories[0] == histories[1]
    assert json.loads((output / "manifest.json").read_text())["complete"] is True
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}


# ------------------------------------------------------------------------------------------------- killed
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_kills_in_a_row_change_no_bit(server, data: Path, undisturbed, tmp_path: Path, recipe: str):
    arguments, draw = command(data, tmp_path / "out", recipe), random.Random(recipe)
    resumed = 0
    for kill in range(10):
        moment = {"after": "", "delay": draw.uniform(0, 0.3)} if kill % 5 == 4 else {
            "after": "recipe:", "delay": draw.uniform(0, 0.35)}  # now and then while it is still reading
        ended = stop(server, signal.SIGKILL, *arguments, EVERY_STEP, **moment)
        assert ended.returncode == -signal.SIGKILL, "it ended before the kill: the run is too short for this test"
        assert not (tmp_path / "out" / "manifest.json").exists()
        resumed += "going on from epoch" in ended.stdout
    assert resumed >= 4
    ended = server.run(*arguments)
    assert ended.returncode == 0 and not ended.stderr and "going on from epoch" in ended.stdout
    assert_same(tmp_path / "out", undisturbed(recipe))


@pytest.mark.parametrize("after", [" refit ", "submission:", "done in"])
def test_a_kill_in_the_second_half(server, data: Path, undisturbed, tmp_path: Path, after: str):
    """During the refit, between the outputs, and while the last states are removed."""
    arguments = command(data, tmp_path / "out")
    stop(server, signal.SIGKILL, *arguments, EVERY_STEP, after=after)
    assert server.run(*arguments).returncode == 0
    assert_same(tmp_path / "out", undisturbed("align"))


# ------------------------------------------------------------------------------------------------ stopped
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on(server, data: Path, undisturbed, tmp_path: Path, number: int, code: int):
    arguments = command(data, tmp_path / "out")
    ended = stop(server, number, *arguments, EVERY_STEP, "--set=submit_on_stop=false", delay=0.05)
    assert ended.returncode == code and not ended.stderr, ended
    assert f"{signal.Signals(number).name}: ending this step" in ended.stdout and "goes on from here" in ended.stdout
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"resume_run.json", "resume_validate_0.pth"} <= left and not {SUBMISSION, "manifest.json"} & left
    ended = server.run(*arguments)
    assert ended.returncode == 0 and "validate, member 0: going on from epoch" in ended.stdout
    assert_same(tmp_path / "out", undisturbed("align"))


@pytest.mark.parametrize("phase", [" validate ", " refit "])
def test_a_stopped_run_still_submits_its_best_state(kernel, server, data, undisturbed, tmp_path: Path, phase: str):
    arguments, output = command(data, tmp_path / "out"), tmp_path / "out"
    ended = stop(server, signal.SIGTERM, *arguments, EVERY_STEP, "--set=submit_on_stop=true", after=phase)
    assert ended.returncode == 143 and not ended.stderr, ended
    kernel.check_submission(output / SUBMISSION, np.arange(1, 101), IMAGE)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["complete"] is False and manifest["stopped"] == "SIGTERM"
    assert manifest["outputs"][SUBMISSION]["sha256"] == sha256_of(output / SUBMISSION)
    assert same_weights(output / FINAL, output / VALIDATED)  # half a refit is worse than none
    assert server.run(*arguments).returncode == 0
    assert_same(output, undisturbed("align"))


def test_a_stopped_ensemble_submits_the_members_it_has(kernel, server, data: Path, undisturbed, tmp_path: Path):
    arguments = command(data, tmp_path / "out", "ensemble")
    ended = stop(server, signal.SIGINT, *arguments, EVERY_STEP, "--set=submit_on_stop=true")
    assert ended.returncode == 130, ended
    kernel.check_submission(tmp_path / "out" / SUBMISSION, np.arange(1, 101), IMAGE)
    assert len(kernel.load_weights(tmp_path / "out" / FINAL)["members"]) < 3
    assert server.run(*arguments).returncode == 0
    assert_same(tmp_path / "out", undisturbed("ensemble"))


def test_too_little_time_plans_less_and_submits(kernel, server, data: Path, tmp_path: Path):
    arguments = command(data, tmp_path / "out", "ensemble")
    ended = server.run(*arguments, "--set=max_minutes=0.02")
    assert ended.returncode == 0 and not ended.stderr, ended
    assert "time budget: all of it would train for" in ended.stdout and "1 member(s) of 1 epochs fit" in ended.stdout
    kernel.check_submission(tmp_path / "out" / SUBMISSION, np.arange(1, 101), IMAGE)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["stopped"] == "time budget"
    ended = server.run(*arguments)  # more time: what was planned is finished
    assert ended.returncode == 0 and "1 member(s), 1 epochs" in ended.stdout
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is True


# --------------------------------------------------------------------------------------- changed or damaged
@pytest.fixture
def interrupted(server, data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The output of a run that was killed in the middle of validating, with two states, and its command."""
    arguments, output = command(data, tmp_path / "out"), tmp_path / "out"
    stop(server, signal.SIGKILL, *arguments, EVERY_STEP, delay=0.1)
    states = [output / "resume_validate_0.pth", output / "resume_validate_0.previous"]
    if not states[0].exists():  # killed while one became the other
        shutil.copy(states[1], states[0])
    return output, arguments


def test_changed_knobs_are_refused_and_those_of_carrying_out_are_not(server, undisturbed, interrupted):
    output, arguments = interrupted
    for setting in ("epochs=21", "seed=1", "split_seed=1", "lr=0.002", "infer_batch=7", "recipe=closed_form"):
        ended = server.run(*arguments, f"--set={setting}")
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, setting
        assert ended.stderr.startswith(f"error: {output}: holds an unfinished run of other data or knobs")
    ended = server.run(*arguments, "--set=checkpoint_seconds=50", "--set=max_minutes=60")
    assert ended.returncode == 0 and "going on from epoch" in ended.stdout
    assert_same(output, undisturbed("align"))


def test_changed_data_are_refused(server, tmp_path: Path, interrupted):
    output, arguments = interrupted
    other = draw_data(tmp_path / "other", {"images/embeddings": lambda images: images + np.float32(1e-3)})
    ended = server.run(*arguments, "--input", other)
    assert ended.returncode == 2 and "unfinished run of other data or knobs" in ended.stderr
    assert (output / "resume_validate_0.pth").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def replace(path: Path) -> None:
    torch.save({"fingerprint": "that of another run"}, path)


@pytest.mark.parametrize("damage", [truncate, replace, Path.unlink])
def test_a_damaged_state_falls_back_on_the_one_before(server, undisturbed, interrupted, damage: Callable):
    output, arguments = interrupted
    damage(output / "resume_validate_0.pth")
    ended = server.run(*arguments)
    assert ended.returncode == 0 and not ended.stderr and "going on from epoch" in ended.stdout
    assert ("resume_validate_0.pth: not usable" in ended.stdout) == (damage is not Path.unlink)
    assert_same(output, undisturbed("align"))


def test_two_damaged_states_are_a_new_start(server, undisturbed, interrupted):
    output, arguments = interrupted
    for state in output.glob("resume_validate_0.*"):
        truncate(state)
    ended = server.run(*arguments)
    assert ended.returncode == 0 and "validate, member 0: going on" not in ended.stdout
    assert_same(output, undisturbed("align"))


def test_a_damaged_index_is_one_line(server, interrupted):
    output, arguments = interrupted
    for text in ("", "{", "[]", "null", '{"fingerprint": 1}', '{"epochs": 1e999, "members": 1}'):
        (output / "resume_run.json").write_text(text)
        ended = server.run(*arguments)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, text
        assert ended.stderr.startswith(f"error: {output}/resume_run.json: damaged"), text
        assert "delete resume_*" in ended.stderr


# -------------------------------------------------------------------------------------------------- moved
def test_a_run_goes_on_from_the_output_of_an_earlier_version(server, data, undisturbed, interrupted, tmp_path: Path):
    """On Kaggle an earlier version's output is attached below the input root, read-only."""
    earlier, _ = interrupted
    root = tmp_path / "input"
    shutil.copytree(data, root / "competitions")
    shutil.copytree(earlier, root / "notebooks" / "pipeline")
    ended = server.run(*command(root, tmp_path / "new"))
    assert ended.returncode == 0 and "validate, member 0: going on from epoch" in ended.stdout
    assert_same(tmp_path / "new", undisturbed("align"))
    assert (root / "notebooks" / "pipeline" / "resume_run.json").exists()


def test_a_finished_run_is_not_resumed_but_done_again(server, data: Path, undisturbed, tmp_path: Path):
    shutil.copytree(undisturbed("align"), tmp_path / "out")
    ended = server.run(*command(data, tmp_path / "out"))
    assert ended.returncode == 0 and "going on" not in ended.stdout
    assert_same(tmp_path / "out", undisturbed("align"))


# ------------------------------------------------------------------------------------------ helper processes
def helpers_of(output: Path) -> list[int]:
    """Processes that were started to help with this output folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--helper" in words and str(output).encode() in words:
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_train_the_same_members_and_stop_together(server, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    arguments = [*command(data, output, "ensemble"), "--set=refit=false", "--set=processes=2"]
    process = server.start(*arguments, EVERY_STEP, "--set=submit_on_stop=false", "--set=epochs=300")
    wait_until((output / "resume_validate_1.pth").exists)  # the helper's member
    os.kill(process, signal.SIGTERM)
    ended = server.wait()
    assert ended.returncode == 143 and not helpers_of(output), ended
    assert "validate, member 1: going on from epoch" in ended.stdout  # it checkpointed, and its state is read
    for state in output.glob("resume_*"):
        state.unlink()
    assert server.run(*arguments).returncode == 0
    alone = [*command(data, tmp_path / "alone", "ensemble"), "--set=refit=false", "--set=processes=1"]
    assert server.run(*alone).returncode == 0
    assert_same(output, tmp_path / "alone")


def test_a_helper_does_not_outlive_a_killed_run(server, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    process = server.start(*command(data, output, "ensemble"), "--set=processes=2", "--set=epochs=3000", EVERY_STEP)
    wait_until((output / "resume_validate_1.pth").exists)
    os.kill(process, signal.SIGKILL)
    assert server.wait().returncode == -signal.SIGKILL
    wait_until(lambda: not helpers_of(output), seconds=20)


# --------------------------------------------------------------------------------------------- warm start
def test_a_warm_start_begins_where_a_run_ended(server, data: Path, undisturbed, tmp_path: Path):
    root = tmp_path / "input"
    shutil.copytree(data, root / "data")
    shutil.copytree(undisturbed("align"), root / "earlier")
    scores = {}
    for warm in ("true", "false"):
        ended = server.run(*command(root, tmp_path / warm), "--set=epochs=1", f"--set=warm_start={warm}")
        assert ended.returncode == 0, ended.stderr
        metrics = json.loads((tmp_path / warm / "metrics.json").read_text())
        scores[warm] = metrics["validation"]["pool100_raw"]["mrr"]
    assert scores["true"] > scores["false"] + 0.1
    for setting, message in (("split_seed=1", "was validated on other images; --set split_seed=0"),
                             ("hidden=16", "has other members or dimensions"), ("members=2", "has other members")):
        ended = server.run(*command(root, tmp_path / "refused"), "--set=warm_start=true", f"--set={setting}")
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1, setting
    ended = server.run(*command(data, tmp_path / "refused"), "--set=warm_start=true")
    assert ended.returncode == 2 and f"no {VALIDATED} below it" in ended.stderr
