"""The objective against autograd, the closed form against numpy, and training when numbers or memory go wrong."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drawn import IMAGE, TEXT, draw_data

QUICK = {"recipe": "align", "hidden": 32, "epochs": 3, "batch": 64, "min_steps": 0, "device": "cpu",
         "dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def prepare(kernel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run that is ready to train: prepare(epochs=5, ...)."""
    monkeypatch.setattr(kernel.signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def run(source: Path = data, **knobs: Any) -> Any:
        return kernel.prepare(source, tmp_path / "out", kernel.resolve_knobs({**QUICK, **knobs}))

    return run


def trained(kernel, run: Any, phase: str = "validate") -> list[dict]:
    return kernel.train_phase(run, phase, run.train_images)


# -------------------------------------------------------------------------------------------- objective
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gallery_loss_is_autograds_cross_entropy(kernel, block: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    gallery = torch.randn(50, 6, generator=draw, dtype=dtype)
    label = torch.randint(50, (64,), generator=draw)
    queries = [(torch.randn(64, 6, generator=draw.manual_seed(1), dtype=dtype) / 2).requires_grad_() for _ in "ab"]
    ours = kernel.GalleryLoss.apply(queries[0], gallery, label, block) * 0.3
    theirs = F.cross_entropy(queries[1] @ gallery.T, label, reduction="sum") * 0.3
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(queries[0].grad, queries[1].grad, atol=1e-6)


def test_a_hopeless_query_has_a_floored_value_and_the_exact_gradient(kernel):
    query, gallery = torch.tensor([[40.0, 0.0]], requires_grad=True), torch.eye(2)
    loss = kernel.GalleryLoss.apply(query, gallery, torch.tensor([1]), 16)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-7), rel=1e-4)  # 40 by autograd
    assert torch.allclose(query.grad, torch.tensor([[1.0, -1.0]]))


def test_the_closed_form_is_a_direct_solve(kernel):
    draw = np.random.default_rng(0)
    image_of = draw.permutation(np.concatenate([np.arange(40), draw.integers(40, size=90)]))
    text, images = draw.normal(2, 1, size=(130, 7)), draw.normal(5, 2, size=(40, 9))
    knobs = kernel.Knobs(ridge=0.2, whiten=0.4)
    state = kernel.fit_closed_form(torch.from_numpy(text).float(), torch.from_numpy(images).float(),
                                   torch.from_numpy(image_of), knobs)
    x, y = text - text.mean(0), (images - images.mean(0))[image_of]
    covariance = x.T @ x / len(x)
    weight = np.linalg.inv(covariance + 0.2 * np.trace(covariance) / 7 * np.eye(7)) @ x.T @ y / len(x)
    scatter = (y - x @ weight).T @ (y - x @ weight) / len(x)
    expected = np.linalg.inv(scatter + 0.4 * np.trace(scatter) / 9 * np.eye(9)) @ weight.T
    assert np.allclose(state["weight"], expected, rtol=1e-3, atol=1e-4)
    new = draw.normal(2, 1, size=(3, 7))
    prediction = new @ state["weight"].double().numpy().T + state["bias"].double().numpy()
    assert np.allclose(prediction, (new - text.mean(0)) @ expected.T, rtol=1e-3, atol=1e-3)


def test_align_beats_the_closed_form_and_the_baseline(kernel, prepare, tmp_path: Path):
    """On photos whose captions are bent, noisy views of a shared latent; raw, the board's score."""
    source = draw_data(tmp_path / "larger", images=800, captions=4)
    scores = {}
    for recipe, knobs in (("baseline", {}), ("closed_form", {}), ("align", {"dropout": 0.1, "input_dropout": 0.0})):
        run = prepare(source, recipe=recipe, hidden=256, epochs=12, val_fraction=0.25, repulsion=0.0, **knobs)
        predictions = kernel.validation_predictions(run, trained(kernel, run))
        scores[recipe] = kernel.validate(run, predictions)["pool100_raw"]["mrr"]
        for state in run.output.glob("resume_*"):
            state.unlink()
    assert scores["align"] > scores["closed_form"] + 0.02
    assert scores["align"] > scores["baseline"] + 0.1
    assert scores["align"] < 0.99  # no trivial task


@pytest.mark.parametrize("recipe", ["baseline", "align"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(kernel, prepare, recipe: str, dtype: str):
    run = prepare(recipe=recipe, dtype=dtype)
    trained(kernel, run)
    losses = [row["loss"] for row in run.history]
    assert len(losses) == 3 and losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_the_baseline_is_the_original_to_the_letter(kernel):
    knobs = kernel.resolve_knobs({"recipe": "baseline"})
    first, relu, dropout, last = kernel.NETWORKS[knobs.network](1024, 1536, knobs)
    assert (first.in_features, first.out_features, last.out_features) == (1024, 4096, 1536)
    assert isinstance(relu, torch.nn.ReLU) and dropout.p == 0.2
    assert (knobs.epochs, knobs.batch, knobs.lr, knobs.weight_decay, knobs.schedule) == (20, 64, 1e-3, 0, "constant")
    assert (knobs.infer_batch, knobs.checkpoint_every, knobs.members) == (256, 5, 1)


def test_the_baselines_loss_is_one_minus_cosine(kernel, prepare):
    run = prepare(recipe="baseline")
    trainer = kernel.Trainer(run, kernel.make_task(run, run.train_images), "validate", 0)
    trainer.model.eval()
    captions = trainer.task.captions[:20]
    label = trainer.task.label[captions]
    prediction, image = trainer.model(run.text[captions]), trainer.task.images[label]
    expected = 1 - ((prediction * image).sum(1) / prediction.norm(dim=1) / image.norm(dim=1)).mean()
    assert trainer.loss(run.text[captions], label).item() == pytest.approx(expected.item(), abs=1e-6)
    assert type(trainer.optimizer) is torch.optim.Adam


def test_the_learning_rate_rises_and_falls_to_zero(kernel, prepare):
    run = prepare(epochs=10)
    trainer = kernel.Trainer(run, kernel.make_task(run, run.train_images), "validate", 0)
    rates = []
    for done in range(10 * trainer.steps):
        trainer.epoch, trainer.step = divmod(done, trainer.steps)
        rates.append(trainer.learning_rate())
    top = rates.index(max(rates))
    assert rates[0] < 0.2 * 1e-3 and max(rates) == pytest.approx(1e-3, rel=0.05) and rates[-1] < 1e-6
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_a_task_holds_only_its_own_images(kernel, prepare):
    run = prepare()
    task = kernel.make_task(run, run.train_images)
    image_of = run.train.image_of[task.captions.numpy()]
    assert set(image_of) == set(run.train_images)
    assert (run.train_images[task.label[task.captions]] == image_of).all()
    assert not task.galleries[0].mean(0).abs().max() > 1e-5


# ------------------------------------------------------------------------------------------- prediction
def test_one_baseline_keeps_its_lengths_and_members_share_one(kernel, prepare):
    run = prepare(recipe="baseline", epochs=1, val_fraction=0.5)
    member = trained(kernel, run)[0]
    text = run.test.text[:4]
    model = kernel.NETWORKS["mlp"](TEXT, IMAGE, kernel.Knobs(**member["knobs"]))
    model.load_state_dict(member["state"])
    expected = model.eval()(torch.from_numpy(text)).detach().numpy()
    assert np.allclose(kernel.predict(kernel.make_bundle(run, [member]), text), expected, atol=1e-5)
    length = np.linalg.norm(run.train.images, axis=1).mean()
    two = kernel.predict(kernel.make_bundle(run, [member, member]), text)
    assert np.allclose(np.linalg.norm(two, axis=1), length, rtol=1e-4)


def test_members_differ_by_variant_and_seed(kernel, prepare):
    run = prepare(epochs=1, members=3, variants="; hidden=16 dropout=0")
    members = trained(kernel, run)
    assert [(m["knobs"]["hidden"], m["knobs"]["dropout"]) for m in members] == [(32, 0.6), (16, 0.0), (32, 0.6)]
    first, third = members[0]["state"]["expand.weight"], members[2]["state"]["expand.weight"]
    assert not torch.equal(first, third)


def test_weights_of_other_dimensions_are_refused(kernel, prepare):
    run = prepare(epochs=1)
    bundle = kernel.make_bundle(run, trained(kernel, run))
    with pytest.raises(kernel.UserError, match="weights take 32-d captions, the data has 31-d"):
        kernel.predict(bundle, run.test.text[:, 1:])


def test_weights_are_read_back_checked(kernel, prepare, tmp_path: Path):
    run = prepare(epochs=1)
    bundle = kernel.make_bundle(run, trained(kernel, run))
    path = tmp_path / "weights.pth"
    kernel.save_torch(path, bundle)
    loaded = kernel.load_weights(path)
    assert np.array_equal(kernel.predict(loaded, run.test.text), kernel.predict(bundle, run.test.text))
    assert loaded["val_images"] == [run.train.image_names[i] for i in run.val_images] and loaded["dims"] == [32, 48]
    broken = [{key: value for key, value in bundle.items() if key != left_out} for left_out in bundle]
    broken += [bundle | {"dims": [TEXT, IMAGE + 1]}, bundle | {"members": [{}]}, bundle | {"knobs": None}]
    for content in [*broken, {}, {"model": 1}]:
        torch.save(content, path)
        with pytest.raises(kernel.UserError, match="holds no weights of this script"):
            kernel.load_weights(path)


def test_weights_that_claim_a_huge_network_take_no_memory(kernel, prepare, tmp_path: Path):
    run = prepare(epochs=1)
    bundle = kernel.make_bundle(run, trained(kernel, run))
    bundle["members"][0]["knobs"]["hidden"] = 1 << 40
    torch.save(bundle, tmp_path / "weights.pth")
    with pytest.raises(kernel.UserError, match="holds no weights"):
        kernel.load_weights(tmp_path / "weights.pth")


def test_repulsion_stays_within_a_pool_and_moves_no_length(kernel):
    predictions = np.random.default_rng(0).normal(size=(230, 8)).astype(np.float32)
    bundle = {"knobs": {"repulsion": 0.3}, "length": 5.0}
    whole = kernel.repel(bundle, predictions)
    assert whole.shape == predictions.shape and np.allclose(np.linalg.norm(whole, axis=1), 5, rtol=1e-4)
    parts = [kernel.repel(bundle, predictions[s:s + 100]) for s in (0, 100, 200)]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-6)
    assert kernel.repel(bundle, predictions[:1]).shape == (1, 8) and np.isfinite(kernel.repel(bundle, whole[:1])).all()
    assert kernel.repel({"knobs": {"repulsion": 0.0}}, predictions) is predictions


# ------------------------------------------------------------------------------------------- submission
@pytest.fixture
def written(kernel, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    ids, predictions = np.arange(1, 41), np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    path = tmp_path / "pipeline_submission.csv"
    kernel.write_submission(path, ids, predictions)
    return path, ids, predictions


def test_a_written_submission_passes_its_check(kernel, written):
    path, ids, _ = written
    kernel.check_submission(path, ids, 8)
    lines = path.read_text().splitlines()
    assert lines[0] == "id,embedding" and len(lines) == 41
    assert lines[1].startswith('1,"[') and lines[1].endswith(']"')
    assert max(len(number.strip().lstrip("-")) for number in lines[1][4:-2].split(",")) <= 12


def test_six_digits_keep_every_rank(kernel, tmp_path: Path):
    draw = np.random.default_rng(0)
    gallery = draw.normal(size=(300, 64)).astype(np.float32) + 3
    predictions = gallery + 4 * draw.normal(size=(300, 64)).astype(np.float32)
    kernel.write_submission(tmp_path / "s.csv", np.arange(300), predictions)
    rows = [line.split(",", 1)[1] for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
    read = np.array([[float(x) for x in row.strip('"[]').split(",")] for row in rows])
    assert np.allclose(read, predictions, rtol=1e-5)
    assert (kernel.true_ranks(read, gallery) == kernel.true_ranks(predictions, gallery)).all()


def rows_changed(change: Callable[[list[str]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        lines = text.splitlines()
        changed = change(lines)
        return "\n".join(lines if changed is None else changed) + "\n"
    return edit


def put(number: str) -> Callable[[str], str]:
    """The first number of row 3 becomes `number`."""
    return rows_changed(lambda lines: lines.__setitem__(3, '3,"[' + number + lines[3][lines[3].index(","):][1:]
                        .split(",", 1)[1].join([", ", ""])))


WRONG_FILES = {
    "header": (lambda text: text.replace("embedding", "embeddings", 1), "header is 'id,embeddings', expected"),
    "no header": (rows_changed(lambda lines: lines[1:]), "header is"),
    "empty": (lambda text: "", "header is ''"),
    "row missing": (rows_changed(lambda lines: lines[:-1]), "39 rows, expected 40; the first missing id is 40"),
    "row too many": (rows_changed(lambda lines: [*lines, lines[-1]]), "more than 40 rows"),
    "row twice": (rows_changed(lambda lines: lines.__setitem__(5, lines[4])), "row 5: expected id 5"),
    "order": (rows_changed(lambda lines: [lines[0], *lines[:0:-1]]), "row 1: expected id 1"),
    "unquoted": (lambda text: text.replace('"', ""), "row 1: expected id 1 and one quoted list"),
    "single quotes": (lambda text: text.replace('"', "'"), "row 1: expected id 1 and one quoted list"),
    "one column": (rows_changed(lambda lines: lines.__setitem__(2, "2")), "row 2: expected id 2"),
    "no list": (rows_changed(lambda lines: lines.__setitem__(2, '2,"7"')), "row 2 (id 2): expected a list of 8"),
    "short": (rows_changed(lambda lines: lines.__setitem__(2, '2,"[1, 2]"')), "row 2 (id 2): expected a list of 8"),
    "no json": (rows_changed(lambda lines: lines.__setitem__(2, '2,"[1, 2"')), "not a readable submission"),
    "NaN": (put("NaN"), "row 3 (id 3): NaN, infinity or no number"),
    "infinity": (put("1e999"), "row 3 (id 3): NaN, infinity or no number"),
    "text": (put('""a""'), "row 3 (id 3): NaN, infinity or no number"),
    "true": (put("true"), "row 3 (id 3): NaN, infinity or no number"),
    "huge integer": (put("9" * 500), "not a readable submission"),
    "deep": (put("[" * 100_000), "not a readable submission"),
    "binary": (lambda text: "\udcff\udcfe" + text, "not a readable submission"),
    "all equal": (rows_changed(lambda lines: [lines[0], *(f'{i},"[1, 2, 3, 4, 5, 6, 7, 8]"' for i in range(1, 41))]),
                  "all predictions are equal"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_submission_is_refused(kernel, written, case: str):
    path, ids, _ = written
    edit, message = WRONG_FILES[case]
    path.write_text(edit(path.read_text()), errors="surrogateescape")
    with pytest.raises(kernel.UserError) as error:
        kernel.check_submission(path, ids, 8)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_submission_is_refused(kernel, tmp_path: Path):
    with pytest.raises(kernel.UserError, match="not a readable submission"):
        kernel.check_submission(tmp_path / "none.csv", np.arange(3), 8)


def test_predictions_that_are_no_numbers_are_not_written(kernel, tmp_path: Path):
    with pytest.raises(kernel.UserError, match="not written"):
        kernel.write_submission(tmp_path / "s.csv", np.arange(2), np.array([[1, np.nan], [1, 2]]))
    assert not list(tmp_path.glob("*s.csv*"))


# ---------------------------------------------------------------------------------------- device and type
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
    assert line.startswith("device: cpu (CUDA probe failed: CUDA error: no kernel image") and line.count("\n") == 1
    with pytest.raises(kernel.UserError, match="device=cuda was asked for, but CUDA probe failed"):
        kernel.choose_device(kernel.Knobs(device="cuda"))


def test_cuda_that_is_not_there(kernel, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.choose_device(kernel.Knobs()).type == "cpu"
    assert "torch sees no CUDA device" in capsys.readouterr().out
    with pytest.raises(kernel.UserError, match="use --set device=cpu"):
        kernel.choose_device(kernel.Knobs(device="cuda"))


@pytest.mark.parametrize(("capability", "dtype"), [((6, 0), torch.float16), ((7, 5), torch.float16),
                                                   ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_bf16_only_where_it_is_native(kernel, monkeypatch: pytest.MonkeyPatch, capsys, capability: tuple, dtype: Any):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel.choose_dtype(torch.device("cuda"), kernel.Knobs()) == dtype
    assert f"CUDA capability {capability[0]}.{capability[1]}" in capsys.readouterr().out


@pytest.mark.parametrize(("bf16_seconds", "dtype"), [(0.2, torch.bfloat16), (0.9, torch.float32), (9, torch.float32)])
def test_a_cpu_takes_bf16_where_a_timing_shows_it(kernel, monkeypatch, capsys, bf16_seconds: float, dtype: Any):
    monkeypatch.setattr(kernel, "matmul_seconds", lambda kind: bf16_seconds if kind == torch.bfloat16 else 1.0)
    assert kernel.choose_dtype(torch.device("cpu"), kernel.Knobs()) == dtype
    assert "times the speed of float32" in capsys.readouterr().out
    assert kernel.choose_dtype(torch.device("cpu"), kernel.Knobs(dtype="float16")) == torch.float16


def test_a_timing_measures(kernel):
    assert 0 < kernel.matmul_seconds(torch.float32, size=64, rounds=2) < 10


# ------------------------------------------------------------------------------- numbers and memory gone wrong
class Fault:
    """Trainer.loss that goes wrong on the given calls."""

    def __init__(self, kernel, monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], bool], effect: Any) -> None:
        self.calls, right = 0, kernel.Trainer.loss

        def loss(trainer: Any, text: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if not happens(self.calls):
                return right(trainer, text, label)
            if isinstance(effect, Exception):
                raise effect
            return right(trainer, text, label) * effect

        monkeypatch.setattr(kernel.Trainer, "loss", loss)


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def test_out_of_memory_halves_the_block_and_goes_on(kernel, prepare, monkeypatch: pytest.MonkeyPatch, capsys):
    run = prepare()
    Fault(kernel, monkeypatch, lambda call: call in (3, 4, 9), MEMORY)
    member = trained(kernel, run)[0]
    assert member["finished"] and len(run.history) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.split("blocks of ")[1].split()[0] for line in lines] == ["256", "128", "64"]


def test_memory_that_never_suffices_ends_in_one_line(kernel, prepare, monkeypatch: pytest.MonkeyPatch):
    run = prepare()
    Fault(kernel, monkeypatch, lambda call: True, MEMORY)
    with pytest.raises(kernel.TrainingFailed, match="out of memory") as error:
        trained(kernel, run)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_another_error_is_not_taken_for_memory(kernel, prepare, monkeypatch: pytest.MonkeyPatch):
    run = prepare()
    Fault(kernel, monkeypatch, lambda call: True, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(kernel, run)


@pytest.mark.parametrize(("seconds", "epoch"), [(1e5, 0), (0.0, 1)])  # never a checkpoint; one after each step
def test_a_nan_goes_back_at_half_the_rate_once(kernel, prepare, monkeypatch, capsys, seconds: float, epoch: int):
    run = prepare(checkpoint_seconds=seconds)
    steps = math.ceil(len(run.train_images) * 5 / 64)
    Fault(kernel, monkeypatch, lambda call: call == steps + 5, math.nan)
    member = trained(kernel, run)[0]
    assert f"the loss is no number; back to epoch {epoch} at half the rate" in capsys.readouterr().out
    assert member["finished"] and [row["epoch"] for row in run.history] == [1, 2, 3]
    assert all(value.isfinite().all() for value in member["state"].values())
    assert all(math.isfinite(row["loss"]) for row in run.history)


def test_a_nan_again_stops_with_the_reason(kernel, prepare, monkeypatch: pytest.MonkeyPatch):
    run = prepare()
    Fault(kernel, monkeypatch, lambda call: call > 3, math.nan)
    with pytest.raises(kernel.TrainingFailed, match="no number, at half the rate as well; try --set lr=") as error:
        trained(kernel, run)
    assert error.value.exit_code == 1


def test_weights_that_become_nan_in_the_very_last_step_are_noticed(kernel, prepare, monkeypatch: pytest.MonkeyPatch):
    run = prepare(epochs=1)
    steps = math.ceil(len(run.train_images) * 5 / 64)
    update, broken = kernel.Trainer.update, []

    def poisoned(trainer: Any, captions: torch.Tensor) -> None:
        update(trainer, captions)
        if trainer.step == steps and not broken:
            broken.append(True)
            with torch.no_grad():
                trainer.model.skip.weight[0, 0] = math.nan

    monkeypatch.setattr(kernel.Trainer, "update", poisoned)
    assert all(value.isfinite().all() for value in trained(kernel, run)[0]["state"].values())


def test_a_singular_closed_form_is_one_line(kernel, prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def singular(*_: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.solve: The solver failed because the input matrix is singular.")

    run = prepare(recipe="closed_form")
    monkeypatch.setattr(kernel, "fit_closed_form", singular)
    with pytest.raises(kernel.TrainingFailed, match="raise --set ridge"):
        trained(kernel, run)


# ------------------------------------------------------------------------------------------ time and knobs
def test_the_plan_fits_the_time(kernel, prepare, monkeypatch: pytest.MonkeyPatch, capsys):
    run = prepare(members=4, variants="; ; ; network=linear", epochs=10)
    monkeypatch.setattr(kernel, "step_seconds", lambda trainer: 1.0)
    steps = math.ceil(len(run.train_images) * 5 / 64)
    everything = 3 * 10 * steps * (1 + len(run.train.images) / len(run.train_images))  # the linear member costs nothing
    for share, members, epochs in ((1.1, 4, 10), (0.65, 4, 6), (0.35, 3, 4), (0.055, 1, 2), (1e-6, 1, 1)):
        run.stop.deadline = kernel.time.monotonic() + share * everything
        planned = kernel.plan(run)
        assert (planned.members, planned.epochs) == (members, epochs), share
    assert f"training for {everything / 60:.1f} min" not in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(("knob", "near"), [("epoch", "epochs"), ("drop_out", "dropout"), ("lerning_rate", ""),
                                            ("val_frac", "val_fraction")])
def test_an_unknown_knob_names_the_nearest(kernel, knob: str, near: str):
    with pytest.raises(kernel.UserError, match=f"unknown knob '{knob}'; did you mean .*{near}"):
        kernel.parse_setting(f"{knob}=3")


@pytest.mark.parametrize("setting", ["epochs", "epochs=", "epochs=three", "epochs=3.5", "refit=maybe", "lr=nan",
                                     "lr=inf", "epochs=0", "epochs=-1", "dropout=1", "val_fraction=0", "device=tpu",
                                     "schedule=linear", "network=transformer", "recipe=best", "mode=test", "batch=1e3",
                                     "hidden=10000000", "raw_weight=1.1", "=3", "members=0"])
def test_a_value_that_is_none_of_a_knobs(kernel, setting: str):
    with pytest.raises(kernel.UserError) as error:
        kernel.resolve_knobs(dict([kernel.parse_setting(setting)]))
    assert setting.partition("=")[0] in str(error.value)


def test_values_take_the_type_of_their_knob(kernel):
    found = dict(map(kernel.parse_setting, ["epochs = 5", "lr=3e-4", "refit=False", "variants=; lr=1 epochs=2"]))
    assert found == {"epochs": 5, "lr": 3e-4, "refit": False, "variants": "; lr=1 epochs=2"}


def test_command_line_beats_overrides_beats_recipe_beats_default(kernel, monkeypatch: pytest.MonkeyPatch):
    assert kernel.resolve_knobs({}).batch == 1024
    assert kernel.resolve_knobs({"recipe": "baseline"}).batch == 64
    monkeypatch.setattr(kernel, "OVERRIDES", {"recipe": "baseline", "batch": 32, "refit": False})
    assert [getattr(kernel.resolve_knobs({}), key) for key in ("recipe", "batch", "refit", "epochs")] == [
        "baseline", 32, False, 20]
    assert kernel.resolve_knobs({"batch": 16}).batch == 16
    monkeypatch.setattr(kernel, "OVERRIDES", {"bacth": 32})
    with pytest.raises(kernel.UserError, match="did you mean batch"):
        kernel.resolve_knobs({})


@pytest.mark.parametrize("recipe", ["baseline", "closed_form", "align", "ensemble"])
def test_every_recipe_and_each_of_its_members_resolves(kernel, recipe: str):
    knobs = kernel.resolve_knobs({"recipe": recipe})
    for member in range(knobs.members):
        assert dataclasses.asdict(kernel.member_knobs(knobs, member))["recipe"] == recipe


def test_a_variant_with_an_unknown_knob(kernel):
    with pytest.raises(kernel.UserError, match="unknown knob 'hiden'; did you mean hidden"):
        kernel.member_knobs(kernel.resolve_knobs({"variants": "hiden=5"}), 0)
