"""Cards that no test machine has: which device and number type is taken, and states that move between them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drawn import LEARNING
from forked import KernelServer, succeeded


# ---------------------------------------------------------------------------------------------- device
@pytest.fixture(autouse=True)
def no_changed_memory(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator and the rounding of this process stay as they are."""
    monkeypatch.setattr(kernel, "keep_memory", lambda: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: True)


def test_a_failing_cuda_probe_falls_back_and_says_why(kernel, monkeypatch: pytest.MonkeyPatch, capsys):
    """A P100 says 'available' and then has no kernel image for the first product."""
    ones = torch.ones

    def failing(*size: int, device: str = "cpu", **options: Any) -> torch.Tensor:
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")
        return ones(*size, device=device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", failing)
    assert kernel.choose_device(kernel.Knobs()).type == "cpu"
    line = capsys.readouterr().out
    assert line.startswith("device: cpu (CUDA probe failed: CUDA error: no kernel image")
    assert line.count("\n") == 1
    with pytest.raises(kernel.UserError, match="device=cuda was asked for, but CUDA probe failed"):
        kernel.choose_device(kernel.Knobs(device="cuda"))


def test_cuda_that_is_not_there(kernel, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.choose_device(kernel.Knobs()).type == "cpu"
    assert "torch sees no CUDA device" in capsys.readouterr().out
    with pytest.raises(kernel.UserError, match="use --set device=cpu"):
        kernel.choose_device(kernel.Knobs(device="cuda"))


# ----------------------------------------------------------------------------------------- number type
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_bf16_only_where_it_is_native(kernel, monkeypatch: pytest.MonkeyPatch, capsys, capability: tuple, dtype: Any):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel.choose_dtype(torch.device("cuda"), "auto") == dtype
    assert f"CUDA capability {capability[0]}.{capability[1]}" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "dtype"), [(5.0, torch.bfloat16), (1.1, torch.float32), (0.1, torch.float32)])
def test_a_cpu_takes_bf16_where_a_timing_shows_it(kernel, monkeypatch, capsys, rate: float, dtype: Any):
    monkeypatch.setattr(kernel, "product_rate", lambda kind, *_: rate if kind == torch.bfloat16 else 1.0)
    assert kernel.choose_dtype(torch.device("cpu"), "auto") == dtype
    assert "times the speed of float32" in capsys.readouterr().out
    assert kernel.choose_dtype(torch.device("cpu"), "float16") == torch.float16


def test_a_timing_measures(kernel):
    assert 1e6 < kernel.product_rate(torch.float32, torch.device("cpu"), 64) < 1e14


# ------------------------------------------------------------------------------------------- a whole machine
@pytest.fixture
def two_cards(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two T4s."""
    monkeypatch.setattr(kernel, "choose_device", lambda knobs: torch.device("cuda", 0))
    monkeypatch.setattr(kernel, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


@pytest.mark.parametrize(("workers", "cards"), [(0, [0, 1]), (1, [0]), (4, [0, 1, 0, 1])])
def test_a_worker_a_card(kernel, two_cards, workers: int, cards: list[int]):
    machine = kernel.choose_machine(kernel.Knobs(workers=workers), {})
    assert [device.index for device in machine.devices] == cards
    assert machine.dtype == torch.float16


def test_the_type_on_resume_is_native_on_this_card(kernel, two_cards):
    """bf16 of an Ampere run is not kept on a T4."""
    assert kernel.choose_machine(kernel.Knobs(), {"device": "cuda", "dtype": "bfloat16"}).dtype == torch.float16
    assert kernel.choose_machine(kernel.Knobs(), {"device": "cpu", "dtype": "float32"}).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_keeps_its_type_on_resume_whatever_the_timing_says(kernel, monkeypatch, dtype: str):
    rates = {torch.bfloat16: 5.0 if dtype == "float32" else 0.1}
    monkeypatch.setattr(kernel, "product_rate", lambda kind, *_: rates.get(kind, 1.0))
    index = {"device": "cpu", "dtype": dtype}
    assert kernel.choose_machine(kernel.Knobs(device="cpu"), index).dtype == kernel.DTYPES[dtype]
    assert kernel.choose_machine(kernel.Knobs(device="cpu", dtype="float16"), index).dtype == torch.float16
    index = {"device": "cuda", "dtype": dtype}
    assert kernel.choose_machine(kernel.Knobs(device="cpu"), index).dtype != kernel.DTYPES[dtype]


# ---------------------------------------------------------------------------------------------- moved states
class Signalled:
    """A stop after so many steps; an epoch has 17."""

    def __init__(self, steps: int) -> None:
        self.steps, self.reason = steps, ""
        self.deadline, self.closing = float("inf"), 0.0

    def __getattribute__(self, name: str) -> Any:
        if name == "reason":  # asked after every step
            self.steps -= 1
        if name == "signal":
            return 15 if self.steps <= 0 else 0
        return object.__getattribute__(self, name)


def stopped(kernel: Any, lab: Any, steps: int, **others: Any) -> None:
    with pytest.raises(kernel.Interrupted):
        lab.train(stop=Signalled(steps), **others)


@pytest.mark.parametrize(("steps", "dtype"), [(0, "float32"), (5, "float16"), (17, "float32"), (40, "float16")])
def test_a_state_goes_on_to_the_same_bits(kernel, lab, steps: int, dtype: str, capsys):
    problem = lab.problem()
    knobs = {"sees": "both", "gallery": 100}
    whole = lab.train(problem, dtype, **knobs)
    stopped(kernel, lab, steps, problem=problem, dtype=dtype, **knobs)
    found = lab.train(problem, dtype, **knobs)
    assert "going on from epoch" in capsys.readouterr().out
    assert all(torch.equal(whole.weights[key], found.weights[key]) for key in whole.weights)
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in found.history]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("float32", "float16"),
        ("bfloat16", "float16"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
def test_a_state_of_another_number_type_is_taken_up(kernel, lab, capsys, before: str, after: str):
    problem = lab.problem()
    stopped(kernel, lab, 30, problem=problem, dtype=before)
    trained = lab.train(problem, after)
    said = capsys.readouterr().out
    assert "going on from epoch 2, step " in said
    assert "not usable" not in said
    assert trained.epochs == 3
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def test_a_state_of_another_device_is_a_new_start(kernel, lab, capsys):
    """Its generator's state has another form there."""
    problem = lab.problem()
    whole = lab.train(problem)
    stopped(kernel, lab, 30, problem=problem)
    content = kernel.load_torch(lab.state_file)
    content["random"] = torch.zeros(16, dtype=torch.uint8)  # a CUDA generator's
    kernel.save_torch(lab.state_file, content | {"device": "cuda"})
    found = lab.train(problem)
    assert "not usable (it is of another kind of device" in capsys.readouterr().out
    assert all(torch.equal(whole.weights[key], found.weights[key]) for key in whole.weights)


def test_a_network_that_is_trained_is_taken_up_on_any_device(kernel, lab):
    kernel.save_torch(lab.state_file, {"at": vars(lab.train())})
    assert kernel.read_state(lab.state_file, "cuda")["at"].weights


# ------------------------------------------------------------------------------------------------ tracing
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"gallery": 50},
        {"sees": "both"},
        {"sees": "words"},
        {"loss": "triplet"},
        {"activation": "gate"},
        {"network": "mlp", "loss": "cosine"},
    ],
    ids=str,
)
def test_no_tensor_of_a_step_lies_on_another_device(kernel, lab, monkeypatch, knobs: dict):
    """Forward, backward and update on a device without memory, which refuses to be mixed with the CPU.

    In place of fake CUDA tensors: a torch that is built for CPUs alone ends the process at their first gradient.
    """
    problem, device, full = lab.problem(), torch.device("meta"), lab.knobs(**knobs)
    task = kernel.make_task(problem, "validate", full, device, torch.float16)
    network = kernel.NETWORKS[full.network](problem.dims, full, None).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.param_groups[0]["rate"] = 1.0
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learner = SimpleNamespace(knobs=full, network=network, optimizer=optimizer, scaler=scaler, random=None, block=16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    monkeypatch.setattr(torch.Tensor, "unique", lambda self, return_inverse: (self[:9], self))  # its size is data
    captions = torch.zeros(64, dtype=torch.int64, device=device)
    loss = kernel.take_step(learner, task, captions)
    assert loss.device == device
    assert not loss.shape
    assert {weights.grad.device.type for weights in network.parameters() if weights.grad is not None} == {"meta"}
    for tensor in (*task.galleries, *vars(task).values()):
        assert not isinstance(tensor, torch.Tensor) or tensor.device == device


# --------------------------------------------------------------------------------------------- side by side
def test_two_workers_train_the_same_weights_as_one(kernel, server: KernelServer, data, tmp_path):
    bundles = []
    for workers in (1, 2):
        output, settings = tmp_path / str(workers), [*LEARNING, "--set=epochs=3", f"--set=workers={workers}"]
        ended = succeeded(server.run("--input", data, "--output", output, "--recipe=ensemble", *settings))
        assert not ended.stderr, ended.stderr
        bundles.append(kernel.load_weights(output / kernel.FINAL_MODEL))
    found = [{str(one["knobs"] | {"workers": 0}): one["state"] for one in bundle["members"]} for bundle in bundles]
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 1
    for key, state in found[0].items():
        assert all(torch.equal(state[name], found[1][key][name]) for name in state)
