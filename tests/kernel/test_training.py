"""Training one network: what it learns, when it ends, and what happens when numbers or memory go wrong."""

from __future__ import annotations

import math
import signal
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LEARNT = {"epochs": 8, "hidden": 64, "lr": 4e-3, "dropout": 0.1, "input_dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sampled": {"gallery": 50},
    "words": {"sees": "words"},
    "both": {"sees": "both"},
    "triplet": {"loss": "triplet", "skip": False, "batch": 100},
    "gate": {"activation": "gate"},
    "square": {"activation": "square"},
    "baseline": {"network": "mlp", "loss": "cosine", "weight_decay": 0.0, "schedule": "constant"},
}


def equal_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


# ------------------------------------------------------------------------------------------- what is learnt
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(lab, kind: str, dtype: str):
    trained = lab.train(dtype=dtype, **KINDS[kind])
    losses = [row["loss"] for row in trained.history]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, losses))
    assert trained.epochs == 3
    assert 0 <= trained.watched < trained.seconds
    assert all(weights.dtype == torch.float32 and weights.device.type == "cpu" for weights in trained.weights.values())


def test_a_network_beats_the_closed_form_and_the_baseline(kernel, lab):
    """On photos whose captions are bent, noisy views of a shared latent; raw, the board's score."""
    problem = lab.problem(images=800, captions=4, bend=0.9)
    knobs = LEARNT | {"hidden": 128}
    align = lab.score(problem, lab.train(problem, **knobs), **knobs)
    original = knobs | KINDS["baseline"]
    baseline = lab.score(problem, lab.train(problem, **original), **original)
    closed_form = kernel.fit_candidate(lab.task(problem), lab.knobs(network="linear"))
    assert align > baseline + 0.1  # no trivial task
    assert align < 0.99
    assert align > lab.score(problem, closed_form, network="linear") + 0.02


def test_the_same_name_and_seed_are_the_same_bits_whatever_the_global_state(lab):
    problem = lab.problem()
    torch.manual_seed(1)
    first = lab.train(problem)
    torch.manual_seed(2)
    assert equal_weights(first, lab.train(problem))
    assert not equal_weights(first, lab.train(problem, seed=1))
    assert not equal_weights(first, lab.train(problem, name="validate 2"))


def test_training_leaves_the_global_generator_alone(lab):
    before = torch.get_rng_state()
    lab.train(sees="both")
    assert torch.equal(torch.get_rng_state(), before)


def test_training_sees_no_caption_of_a_validation_image(kernel, lab):
    """Other validation captions, the same weights."""

    def spoil(train: dict) -> None:
        held_out = kernel.split_images(240, 0.1, 0)[1]
        rows = train["captions/label"][:, held_out].any(axis=1)
        train["captions/embeddings"][rows] = 7.0
        train["images/embeddings"][held_out] = -3.0

    assert equal_weights(lab.train(lab.problem(), sees="vector"), lab.train(lab.problem(spoil), sees="vector"))


# ---------------------------------------------------------------------------------------------- rate and time
def test_the_learning_rate_rises_and_falls_to_zero(kernel):
    steps = 200
    rates = [kernel.learning_rate(1e-3, "cosine", step, step / steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[0] < 0.2 * 1e-3
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-6
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert kernel.learning_rate(1e-3, "constant", 0, 0.5) == 1e-3


@pytest.fixture
def rates(kernel, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates of all steps."""
    found, right = [], kernel.learning_rate

    def rate(*arguments: Any) -> float:
        found.append(right(*arguments))
        return found[-1]

    monkeypatch.setattr(kernel, "learning_rate", rate)
    return found


def test_what_is_allotted_ends_the_whole_schedule(lab, ticking, rates: list[float]):
    """Fewer epochs, but a rate that still ends near zero."""
    trained = lab.train(epochs=10_000, allotted=1.0)
    assert 1 < trained.epochs < 10_000
    assert 1.0 <= trained.seconds < 1.05
    assert len(trained.history) == len(lab.rows)
    assert [last for _, last in lab.rows] == [False] * (len(lab.rows) - 1) + [True]
    assert rates[-1] < 0.01 * max(rates)


def test_no_time_at_all_is_one_step(lab, rates: list[float]):
    trained = lab.train(allotted=0.0)
    assert len(rates) == 1
    assert 0 < trained.epochs < 1
    assert len(trained.history) == 1


def test_small_data_gets_smaller_batches(kernel, lab):
    assert kernel.batch_size(lab.knobs(batch=1024, min_steps=150, epochs=3), 1000) == 20
    assert kernel.batch_size(lab.knobs(batch=64, min_steps=150, epochs=12), 100_000) == 64
    assert kernel.batch_size(lab.knobs(batch=64, min_steps=150, epochs=1), 7) == 1


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
@pytest.mark.parametrize("batch", [1, 3, 64, 5000])
def test_an_epoch_has_every_caption(kernel, lab, loss: str, batch: int):
    task, knobs = lab.task(lab.problem()), lab.knobs(loss=loss, batch=batch)
    batches = kernel.epoch_batches(task, knobs, 0)
    assert not torch.equal(batches[0], kernel.epoch_batches(task, knobs, 1)[0])
    assert sorted(torch.cat(batches).tolist()) == sorted(task.captions.tolist())
    if loss == "triplet":
        assert all(len(some) % 5 == 0 for some in batches)
        assert (task.label[batches[0]].view(-1, 5) == task.label[batches[0]].view(-1, 5)[:, :1]).all()


def test_every_epoch_has_an_order_of_its_own(kernel, lab, monkeypatch):
    right, seen = kernel.take_step, []

    def step(learner: Any, task: Any, captions: torch.Tensor) -> torch.Tensor:
        seen.append(captions)
        return right(learner, task, captions)

    monkeypatch.setattr(kernel, "take_step", step)
    lab.train(epochs=2)
    first, second = torch.cat(seen).chunk(2)
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)


def test_a_last_step_of_one_image_is_no_divergence(lab):
    """216 images, 43 a step."""
    trained = lab.train(loss="triplet", batch=215, epochs=1)
    assert trained.epochs == 1
    assert math.isfinite(trained.history[0]["loss"])


def test_the_table_of_words_has_a_rate_of_its_own(kernel, lab):
    problem = lab.problem()
    learner = kernel.Learner("validate 1", lab.knobs(sees="both", word_rate=4.0), lab.task(problem))
    rates = {id(weights): group["rate"] for group in learner.optimizer.param_groups for weights in group["params"]}
    for name, weights in learner.network.named_parameters():
        assert rates[id(weights)] == (4.0 if name == "words.table.weight" else 1.0), name
    slow, fast = (lab.train(problem, sees="words", word_rate=rate) for rate in (0.1, 4.0))
    assert fast.history[-1]["loss"] < slow.history[-1]["loss"]


# --------------------------------------------------------------------------------------------- memory
class Fault:
    """An objective that goes wrong on the given calls."""

    def __init__(
        self, kernel: Any, monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], bool], effect: Any
    ) -> None:
        self.calls, self.blocks, self.handled, self.alive = 0, [], [], []
        right, failed = kernel.LOSSES["softmax"], list[weakref.ref]()

        def loss(learner: Any, query: torch.Tensor, task: Any, label: Any) -> torch.Tensor:
            self.calls += 1
            self.blocks.append(learner.block)
            self.handled.append(sys.exc_info()[0])
            self.alive.append(sum(one() is not None for one in failed))
            if not happens(self.calls):
                return right(learner, query, task, label)
            if isinstance(effect, Exception):
                failed.append(weakref.ref(query))
                raise type(effect)(*effect.args)  # a new one: its traceback holds the attempt's tensors
            return right(learner, query, task, label) * effect

        monkeypatch.setitem(kernel.LOSSES, "softmax", loss)


MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("call", [1, 2, 3, 8])
def test_memory_may_run_out_within_the_optimisers_first_step(kernel, lab, monkeypatch, call: int, dtype: str):
    """AdamW makes its moments there, two for each of the weights, and has then some of them, or one of two."""
    problem = lab.problem()
    still = {"dropout": 0.0, "input_dropout": 0.0}  # a repeated step draws other masks
    whole, right, calls = lab.train(problem, dtype, **still), torch.zeros_like, []

    def zeros_like(*others: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*others, **options)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    found = lab.train(problem, dtype, **still)
    assert len(calls) > call
    assert all(torch.allclose(whole.weights[key], found.weights[key], atol=1e-3) for key in whole.weights)


@pytest.mark.parametrize("kind", MEMORY)
def test_out_of_memory_halves_the_block_and_goes_on(kernel, lab, monkeypatch, capsys, kind: str):
    fault = Fault(kernel, monkeypatch, lambda call: call in (3, 4, 9), MEMORY[kind])
    trained = lab.train(logit_block=512)
    assert trained.epochs == 3
    assert len(trained.history) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.split("blocks of ")[1].split()[0] for line in lines] == ["256", "128", "64"]
    assert fault.blocks[:5] == [512, 512, 512, 256, 128]
    assert set(fault.blocks[9:]) == {64}
    assert not any(fault.handled), "tried again within the handler"


def test_a_failed_attempt_is_gone_before_the_next(kernel, lab, monkeypatch):
    fault = Fault(kernel, monkeypatch, lambda call: call in (3, 4, 5), MEMORY["torch"])
    lab.train()
    assert max(fault.alive) == 0


def test_memory_that_runs_out_in_the_optimiser_is_tried_again(lab, monkeypatch, capsys):
    right, calls = torch.optim.AdamW.step, []

    def step(self: Any, *arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory in the optimiser")
        return right(self, *arguments, **others)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert lab.train().epochs == 3
    assert "blocks of 256 rows" in capsys.readouterr().out


def test_memory_that_never_suffices_ends_in_one_line(kernel, lab, monkeypatch):
    fault = Fault(kernel, monkeypatch, lambda call: True, MEMORY["torch"])
    with pytest.raises(kernel.TrainingFailed, match="out of memory") as error:
        lab.train()
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    assert fault.calls < 10


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered", "shapes do not fit"])
def test_another_error_is_not_taken_for_memory(kernel, lab, monkeypatch, message: str):
    fault = Fault(kernel, monkeypatch, lambda call: True, RuntimeError(message))
    with pytest.raises(RuntimeError, match=message):
        lab.train()
    assert fault.calls == 1


# --------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_no_number_starts_anew_at_half_the_rate(kernel, lab, monkeypatch, capsys, rates, dtype: str):
    problem = lab.problem()
    Fault(kernel, monkeypatch, lambda call: call == 5, math.nan)
    trained = lab.train(problem, dtype, again=True)
    assert "the loss is no number at lr=0.001" in capsys.readouterr().out
    assert [row["epoch"] for row in trained.history] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in trained.history)
    assert max(rates[: len(rates) // 2]) > 5e-4 > max(rates[-len(rates) // 3 :])
    assert equal_weights(trained, lab.train(problem, dtype, lr=5e-4))


def test_no_number_at_half_the_rate_as_well_stops_with_the_reason(kernel, lab, monkeypatch):
    Fault(kernel, monkeypatch, lambda call: call > 3, math.nan)
    with pytest.raises(kernel.TrainingFailed) as error:
        lab.train(again=True)
    assert "no number, at half the rate as well; try --set lr=0.00025" in str(error.value)
    assert error.value.exit_code == 1


def test_a_run_resumed_at_half_the_rate_halves_it_no_more(kernel, lab, monkeypatch, capsys):
    stop = kernel.Stop(1e6)
    stop.signal = signal.SIGTERM
    with pytest.raises(kernel.Interrupted):
        lab.train(stop=stop, lr=5e-4)
    Fault(kernel, monkeypatch, lambda call: call > 3, math.nan)
    with pytest.raises(kernel.TrainingFailed, match=r"try --set lr=0\.00025"):
        lab.train(again=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "no number" in line]
    assert said == ["validate 1: the loss is no number at lr=0.0005"]


def test_a_second_attempt_has_what_time_the_first_one_left(kernel, lab, monkeypatch):
    clock, allotted = iter((100.0, 101.0, 131.0)), []

    def train_network(name: str, knobs: Any, **others: Any) -> None:
        allotted.append(others["allotted"])
        raise kernel.Diverged(knobs.lr)

    monkeypatch.setattr(kernel, "train_network", train_network)
    monkeypatch.setattr(kernel, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(kernel.TrainingFailed, match="at half the rate as well"):
        lab.train(again=True, allotted=60.0, stop=object())
    assert allotted == [59.0, 29.0]


def test_weights_that_become_nan_in_the_very_last_step_are_noticed(kernel, lab, monkeypatch):
    right, calls, steps = kernel.take_step, [], math.ceil(216 * 5 / 64)

    def poisoned(learner: Any, *others: Any) -> torch.Tensor:
        loss = right(learner, *others)
        calls.append(1)
        if len(calls) == steps:
            with torch.no_grad():
                learner.network.skip.weight[0, 0] = math.nan
        return loss

    monkeypatch.setattr(kernel, "take_step", poisoned)
    trained = lab.train(again=True, epochs=1)
    assert len(calls) == 2 * steps
    assert all(value.isfinite().all() for value in trained.weights.values())


@pytest.mark.parametrize("effect", [math.inf, math.nan])
def test_float16_whose_every_step_is_skipped_fails_with_a_reason(kernel, lab, monkeypatch, effect: float):
    Fault(kernel, monkeypatch, lambda call: True, effect)
    with pytest.raises(
        kernel.TrainingFailed, match=r"(\d+) of \1 steps had no finite gradients; try --set dtype=float32"
    ):
        lab.train(dtype="float16", again=True)


def test_float16_that_skips_many_steps_is_no_training(kernel, lab, monkeypatch):
    """Nothing else would tell that of a refit, which replaces weights that validation has seen."""
    Fault(kernel, monkeypatch, lambda call: call % 2, math.inf)
    with pytest.raises(kernel.TrainingFailed, match="26 of 51 steps had no finite gradients"):
        lab.train(dtype="float16")


@pytest.mark.parametrize("effect", [math.inf, math.nan])
def test_one_overflow_in_float16_costs_its_step_alone(kernel, lab, monkeypatch, capsys, effect: float):
    Fault(kernel, monkeypatch, lambda call: call == 20, effect)
    trained = lab.train(dtype="float16", again=True)
    assert "1 of 51 steps were left out: gradients beyond float16" in capsys.readouterr().out
    assert trained.epochs == 3
    assert all(math.isfinite(row["loss"]) for row in trained.history)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
