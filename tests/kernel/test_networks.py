"""Objectives against autograd, the closed form against numpy, networks, and weights that are kept and taken up."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drawn import IMAGE, TEXT


# -------------------------------------------------------------------------------------------- objectives
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gallery_loss_is_autograds_cross_entropy(kernel, block: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    gallery = torch.randn(50, 6, generator=draw, dtype=dtype)
    label = torch.randint(50, (64,), generator=draw)
    queries = [(torch.randn(64, 6, generator=draw.manual_seed(1), dtype=dtype) / 2).requires_grad_() for _ in "ab"]
    ours = kernel.GalleryLoss.apply(queries[0], gallery, label, block)
    theirs = F.cross_entropy(queries[1] @ gallery.T, label, reduction="none")
    weight = torch.rand(64, generator=draw, dtype=dtype)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.allclose(queries[0].grad, queries[1].grad, atol=1e-6)


@pytest.mark.parametrize("distance", [1.0, 16.0, 17.0, 40.0, 80.0])
def test_a_hopeless_query_has_the_exact_loss_and_gradient(kernel, distance: float):
    query, gallery = torch.tensor([[distance, 0.0]], requires_grad=True), torch.eye(2)
    (loss,) = kernel.GalleryLoss.apply(query, gallery, torch.tensor([1]), 16)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-distance)) + distance, rel=1e-5)
    share = 1 / (1 + math.exp(-distance))
    assert torch.allclose(query.grad, torch.tensor([[share, -share]]), atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_gradient_is_close_in_half_precision(kernel, dtype: torch.dtype, error: float, scale: float):
    """Also of queries that are all but solved, whose 1 - p half precision could not hold."""
    draw = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(300, 16, generator=draw), dim=1).to(dtype)
    label = torch.randint(300, (64,), generator=draw)
    start = gallery[label].float() * scale + torch.randn(64, 16, generator=draw) / 2
    ours, theirs = (start.clone().requires_grad_() for _ in "ab")
    loss = kernel.GalleryLoss.apply(ours, gallery, label, 50).sum()
    loss.backward()
    exact = F.cross_entropy(theirs @ gallery.float().T, label, reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=20 * error, abs=0.2)
    assert (ours.grad - theirs.grad).norm() < 4 * error * theirs.grad.norm() + 2 * error


@pytest.mark.parametrize("negatives", [1, 3, 100])
def test_triplets_are_the_hinge_against_the_hardest_other_images(kernel, lab, negatives: int):
    problem = lab.problem()
    task, knobs = lab.task(problem), lab.knobs(loss="triplet", margin=0.3, negatives=negatives)
    captions = torch.cat([task.captions[:40], task.captions[300:310]])  # ten images, some with all their captions
    label, query = task.label[captions], torch.randn(50, IMAGE, generator=torch.Generator().manual_seed(0))
    found = kernel.triplet_loss(learner_of(kernel, knobs), query, task, label)
    scores = F.normalize(query, dim=1) @ task.galleries[0].T
    for i, own in enumerate(label):
        others = sorted((float(scores[i, j]) for j in label.unique() if j != own), reverse=True)[:negatives]
        hinges = [max(0.0, 0.3 + other - float(scores[i, own])) for other in others]
        assert found[i].item() == pytest.approx(np.mean(hinges), rel=1e-4, abs=1e-6)


def learner_of(kernel: Any, knobs: Any, seed: int = 0) -> Any:
    """As far as an objective looks at it."""
    network = torch.nn.Module()
    network.logit_scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    return SimpleNamespace(knobs=knobs, network=network, random=torch.Generator().manual_seed(seed), block=16)


def test_the_share_of_raw_lengths_is_what_each_caption_is_scored_on(kernel, lab):
    task = lab.task(lab.problem())
    label, query = task.label[task.captions[:64]], torch.randn(64, IMAGE, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.25, 1.0):
        learner = learner_of(kernel, lab.knobs(raw_weight=share))
        scale = learner.network.logit_scale.exp()
        cut, unit = round(64 * share), F.normalize(query, dim=1)
        expected = [
            F.cross_entropy(unit[rows] * scale[k] @ task.galleries[k].T, label[rows], reduction="none")
            for k, rows in ((0, slice(cut)), (1, slice(cut, None)))
        ]
        found = kernel.softmax_loss(learner, query, task, label)
        assert torch.allclose(found, torch.cat(expected), rtol=1e-4)


@pytest.mark.parametrize("gallery", [0, 216, 9999])
def test_a_gallery_that_is_large_enough_is_all_images(kernel, lab, gallery: int):
    task = lab.task(lab.problem())
    label, query = task.label[task.captions[:64]], torch.randn(64, IMAGE, generator=torch.Generator().manual_seed(0))
    found = [
        kernel.softmax_loss(learner_of(kernel, lab.knobs(gallery=gallery), seed), query, task, label) for seed in (0, 1)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("gallery", [1, 100, 200])
def test_a_sampled_gallery_holds_the_own_images_and_others_by_chance(kernel, lab, gallery: int):
    """Fewer to be told from: a smaller loss; and what is drawn follows the network's own generator."""
    task = lab.task(lab.problem())
    captions = task.captions[torch.randperm(1080, generator=torch.Generator().manual_seed(1))[:64]]
    label, query = task.label[captions], torch.randn(64, IMAGE, generator=torch.Generator().manual_seed(0))
    whole, first, again, other = (
        kernel.softmax_loss(learner_of(kernel, lab.knobs(gallery=size), seed), query, task, label)
        for size, seed in ((0, 0), (gallery, 0), (gallery, 0), (gallery, 1))
    )
    assert (first <= whole + 1e-5).all()
    assert (first < whole - 1e-3).any()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_baselines_loss_is_one_minus_cosine(kernel, lab):
    task = lab.task(lab.problem())
    label, query = task.label[task.captions[:20]], torch.randn(20, IMAGE, generator=torch.Generator().manual_seed(0))
    image = task.images[label]
    expected = 1 - (query * image).sum(1) / query.norm(dim=1) / image.norm(dim=1)
    found = kernel.cosine_loss(None, query, task, label)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_task_holds_only_its_own_images(lab):
    problem = lab.problem()
    task = lab.task(problem)
    image_of = problem.train.image_of[task.captions.numpy()]
    assert set(image_of) == set(problem.train_images)
    assert (problem.train_images[task.label[task.captions]] == image_of).all()
    assert not task.galleries[0].mean(0).abs().max() > 1e-5


# ------------------------------------------------------------------------------------------- closed form
def closed_form_task(kernel, text: np.ndarray, images: np.ndarray, image_of: np.ndarray, weight: Any = 1.0) -> Any:
    """All of it is to be learnt."""
    text, images = torch.from_numpy(text).float(), torch.from_numpy(images).float()
    nothing, label = torch.zeros(0), torch.from_numpy(image_of)
    return kernel.Task(
        0,
        (nothing, nothing),
        text,
        nothing,
        torch.arange(len(text)),
        nothing,
        label,
        images,
        torch.ones(len(images)) * torch.as_tensor(weight, dtype=torch.float32),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_is_a_direct_solve(kernel, weighted: bool):
    draw = np.random.default_rng(0)
    image_of = draw.permutation(np.concatenate([np.arange(40), draw.integers(40, size=90)]))
    text, images = draw.normal(2, 1, size=(130, 7)), draw.normal(5, 2, size=(40, 9))
    weight = draw.uniform(0.2, 3, 40) if weighted else np.ones(40)
    knobs = kernel.Knobs(ridge=0.2, whiten=0.4)
    state = kernel.fit_closed_form(closed_form_task(kernel, text, images, image_of, weight), knobs)
    share = weight[image_of][:, None] / weight[image_of].sum()
    mean = (share * text).sum(0)
    x, y = text - mean, (images - images.mean(0))[image_of]
    covariance = (share * x).T @ x
    found = np.linalg.inv(covariance + 0.2 * np.trace(covariance) / 7 * np.eye(7)) @ (share * x).T @ y
    scatter = (share * (y - x @ found)).T @ (y - x @ found)
    expected = np.linalg.inv(scatter + 0.4 * np.trace(scatter) / 9 * np.eye(9)) @ found.T
    assert np.allclose(state["map.weight"], expected, rtol=1e-3, atol=1e-4)
    new = draw.normal(2, 1, size=(3, 7))
    prediction = new @ state["map.weight"].double().numpy().T + state["map.bias"].double().numpy()
    assert np.allclose(prediction, (new - mean) @ expected.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", ["zero", "equal"])
def test_a_closed_form_without_a_solution_is_one_line(kernel, images: str):
    vectors = np.zeros((6, 4)) if images == "zero" else np.ones((6, 4))
    text = np.random.default_rng(0).normal(size=(30, 3))
    with pytest.raises((kernel.TrainingFailed, torch.linalg.LinAlgError)):
        kernel.fit_closed_form(closed_form_task(kernel, text, vectors, np.arange(30) % 6), kernel.Knobs())


# ---------------------------------------------------------------------------------------------- networks
def test_dropout_keeps_the_mean_and_follows_its_generator(kernel):
    values = torch.ones(200, 300)
    one, other = (kernel.Dropout(0.6, torch.Generator().manual_seed(1)).train() for _ in "ab")
    dropped = one(values)
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert (dropped == 0).float().mean() == pytest.approx(0.6, abs=0.01)
    assert torch.equal(dropped, other(values))
    assert not torch.equal(dropped, one(values))
    assert one.eval()(values) is values
    assert kernel.Dropout(0.0, None).train()(values) is values


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"network": "mlp"},
        {"sees": "both"},
        {"sees": "words"},
        {"activation": "gate"},
        {"activation": "square", "skip": False},
    ],
    ids=str,
)
def test_initial_weights_follow_the_generator_and_no_global_state(kernel, lab, knobs: dict):
    """So that networks may be made side by side."""
    task, name, networks = lab.task(lab.problem()), "validate 1", []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        networks.append(kernel.Learner(name, lab.knobs(**knobs), task).network.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    other = kernel.Learner("validate 2", lab.knobs(**knobs), task).network.state_dict()
    weights = [key for key, value in other.items() if "expand" in key or "project" in key or "table" in key]
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])
    assert weights
    assert not any(torch.equal(networks[0][key], other[key]) for key in weights)
    assert all(value.isfinite().all() for value in networks[0].values())


def test_the_baseline_is_the_original_to_the_letter(kernel):
    knobs = kernel.resolve_knobs({"recipe": "baseline"})
    network = kernel.NETWORKS[knobs.network]((1024, 1536, 0), knobs)
    assert (network.expand.in_features, network.expand.out_features) == (1024, 4096)
    assert (network.project.in_features, network.project.out_features) == (4096, 1536)
    text = torch.randn(3, 1024)
    assert torch.equal(network.eval()(text, None), network.project(F.relu(network.expand(text))))
    assert (knobs.epochs, knobs.batch, knobs.lr, knobs.weight_decay, knobs.schedule) == (20, 64, 1e-3, 0, "constant")
    assert (knobs.dropout, knobs.infer_batch, knobs.checkpoint_every, knobs.loss) == (0.2, 256, 5, "cosine")


# --------------------------------------------------------------------------------------- weights, predicting
@pytest.fixture
def bundle(kernel, lab) -> tuple[dict[str, Any], Any]:
    """A bundle of two members, one of which sees words, and the problem that they were trained on."""
    problem, members = lab.problem(), []
    for knobs in ({"epochs": 1}, {"epochs": 1, "sees": "both"}):
        weights = lab.train(problem, **knobs).weights
        members.append(kernel.member_of(lab.knobs(**knobs), weights, 0.5))
    return kernel.make_bundle(problem, lab.knobs(), members, 0.2), problem


def test_a_prediction_is_as_long_as_photos_are(kernel, lab):
    """Its own length would move no rank."""
    problem, knobs = lab.problem(), {"network": "mlp", "loss": "cosine", "epochs": 1}
    weights = lab.train(problem, **knobs).weights
    member = kernel.member_of(lab.knobs(**knobs), weights, 1.0)
    text, captions = problem.test.text[:4], problem.test.captions[:4]
    found = kernel.predict(kernel.make_bundle(problem, lab.knobs(), [member], 0.0), text, captions)
    output = kernel.network_of(lab.knobs(**knobs), weights, problem.dims).eval()(torch.from_numpy(text), None)
    assert np.allclose(kernel.unit(found), kernel.unit(output.detach().numpy()), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), np.linalg.norm(problem.train.images, axis=1).mean(), rtol=1e-4)


def test_a_prediction_is_the_weighted_mean_direction(kernel, bundle):
    whole, problem = bundle
    text, captions = problem.test.text[:6], problem.test.captions[:6]
    alone = [
        kernel.unit(kernel.predict(whole | {"members": [one | {"weight": 1.0}]}, text, captions))
        for one in whole["members"]
    ]
    members = [one | {"weight": weight} for one, weight in zip(whole["members"], (0.3, 0.7), strict=True)]
    expected = (0.3 * alone[0] + 0.7 * alone[1]) * whole["length"]
    assert np.allclose(kernel.predict(whole | {"members": members}, text, captions), expected, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_captions_are_predicted_one_by_one(kernel, bundle, rows: int):
    """How many at once, and which others, changes nothing."""
    whole, problem = bundle
    whole["knobs"]["infer_batch"] = rows
    found = kernel.predict(whole, problem.test.text, problem.test.captions)
    assert np.allclose(found[3:5], kernel.predict(whole, problem.test.text[3:5], problem.test.captions[3:5]), atol=1e-4)


def test_weights_are_read_back_checked(kernel, bundle, tmp_path: Path):
    whole, problem = bundle
    path = tmp_path / "weights.pth"
    kernel.save_torch(path, whole)
    loaded = kernel.load_weights(path)
    text, captions = problem.test.text, problem.test.captions
    assert np.array_equal(kernel.predict(loaded, text, captions), kernel.predict(whole, text, captions))
    assert loaded["val_images"] == [problem.train.image_names[i] for i in problem.val_images]
    assert loaded["dims"] == [TEXT, IMAGE]
    assert loaded["repulsion"] == 0.2
    broken = [{key: value for key, value in whole.items() if key != left_out} for left_out in whole]
    broken += [whole | {"dims": [TEXT, IMAGE + 1]}, whole | {"members": [{}]}, whole | {"knobs": None}]
    broken += [
        whole | {"repulsion": "much"},
        whole | {"vocabulary": 7},
        whole | {"length": None},
        whole | {"length": float("nan")},
    ]
    for content in [*broken, {}, {"model": 1}]:
        torch.save(content, path)
        with pytest.raises(kernel.UserError, match="the weights of this script cannot be read"):
            kernel.load_weights(path)


def test_a_bit_of_the_weights_that_flipped_is_noticed(kernel, bundle, tmp_path: Path):
    """They would predict, only something else; torch looks at no checksum."""
    path, weight = tmp_path / "weights.pth", bundle[0]["members"][0]["state"]["expand.weight"]
    torch.save(bundle[0], path)
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(kernel.UserError, match="the weights file cannot be read"):
        kernel.load_weights(path)


class Code:
    """What a pickle can do to who reads it: make a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)


def test_code_in_weights_is_never_run(kernel, bundle, tmp_path: Path):
    torch.save(bundle[0] | {"length": Code(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(kernel.UserError, match="the weights file cannot be read"):
        kernel.load_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "made").exists()


def test_weights_that_claim_a_huge_network_take_no_memory(kernel, bundle, tmp_path: Path):
    whole = bundle[0]
    whole["members"][0]["knobs"]["hidden"] = 1 << 40
    torch.save(whole, tmp_path / "weights.pth")
    with pytest.raises(kernel.UserError, match="weights of this script cannot be read"):
        kernel.load_weights(tmp_path / "weights.pth")


def test_weights_of_other_dimensions_are_refused(kernel, bundle):
    whole, problem = bundle
    with pytest.raises(kernel.UserError, match="weights take 32-d captions, the data has 31-d"):
        kernel.predict(whole, problem.test.text[:, 1:], problem.test.captions)
