"""The caption's words: of training's vocabulary, cut as the test's are, learnt where the vectors say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drawn import LEARNING, draw_data
from forked import succeeded
from outputs import check_outputs, mrr, read_json

CAPTIONS = ["A dog runs.", "a DOG, asleep", "the dog", "a a a cat", "Ünïcödé 漢字 🐕"]


def test_the_vocabulary_holds_the_words_of_enough_captions(kernel):
    assert kernel.make_vocabulary(CAPTIONS, 3) == ["a", "dog"]  # twice in a caption is once
    assert kernel.make_vocabulary(CAPTIONS, 1) == sorted(
        ["a", "dog", "runs", "asleep", "the", "cat", "ünïcödé", "漢字"]
    )
    assert kernel.make_vocabulary(CAPTIONS, 4) == kernel.make_vocabulary([], 1) == []


def test_words_are_rows_of_the_vocabulary_the_same_for_ever(kernel):
    """Published weights were trained on these numbers."""
    ids = kernel.word_ids([*CAPTIONS, ""], ["a", "cat", "dog"])
    assert ids.shape == (6, kernel.WORDS_KEPT)
    assert ids.dtype == np.int32
    assert [row[row > 0].tolist() for row in ids] == [[1, 3], [1, 3], [3], [1, 1, 1, 2], [], []]
    assert all(not row[len(row[row > 0]) :].any() for row in ids)


def test_long_captions_are_cut_and_no_vocabulary_is_no_word(kernel):
    caption = " ".join(f"word{k}" for k in range(500))
    ids = kernel.word_ids([caption], kernel.make_vocabulary([caption], 1))
    assert (ids > 0).all()
    assert not kernel.word_ids([caption], []).any()


def test_the_vocabulary_owes_nothing_to_validation(kernel, lab):
    def spoil(train: dict) -> None:
        held_out = kernel.split_images(240, 0.1, 0)[1]
        rows = train["captions/label"][:, held_out].any(axis=1)
        train["captions/text"] = np.where(rows, "secret words", train["captions/text"])

    problem = lab.problem(spoil)
    assert "more3" in problem.vocabulary
    assert not {"secret", "words"} & set(problem.vocabulary)
    assert problem.dims == (32, 48, len(problem.vocabulary))
    assert problem.words.max() == len(problem.vocabulary)


# ------------------------------------------------------------------------------------------------ cutting
WITH_COMMAS = [f"a dog, number {k}" for k in range(80)] + ["a cat"] * 20


def test_a_test_cut_at_commas_cuts_the_training_texts(kernel, capsys):
    cut = kernel.cut_as_the_test(WITH_COMMAS, ["a dog"] * 50, 0)
    assert cut == ["a dog"] * 80 + ["a cat"] * 20
    assert not capsys.readouterr().out
    kernel.log_texts(WITH_COMMAS, ["a dog"] * 50, cut)
    said = capsys.readouterr().out
    assert "80.0%" in said
    assert "0.0%" in said
    assert "cut at a comma: so are the words of 80 captions" in said


def test_a_test_cut_in_part_cuts_a_like_share_of_training(kernel):
    test = ["a dog, here"] * 20 + ["a dog"] * 80
    cut = kernel.cut_as_the_test(WITH_COMMAS * 20, test, 0)
    assert np.mean(["," in caption for caption in cut]) == pytest.approx(0.2, abs=0.03)
    assert cut == kernel.cut_as_the_test(WITH_COMMAS * 20, test, 0)
    assert cut != kernel.cut_as_the_test(WITH_COMMAS * 20, test, 1)


def test_words_that_were_cut_off_are_not_learnt(lab):
    def longer(train: dict) -> None:
        train["captions/text"] = np.array([f"{text}, more3 zebra" for text in train["captions/text"]])

    plain, cut = lab.problem(), lab.problem(longer)
    assert cut.vocabulary == plain.vocabulary
    assert (cut.words == plain.words).all()


@pytest.mark.parametrize("test", [WITH_COMMAS, [caption.replace("dog", "cat") for caption in WITH_COMMAS]])
def test_texts_of_one_kind_are_left_alone(kernel, test: list[str], capsys):
    assert kernel.cut_as_the_test(WITH_COMMAS, test, 0) == WITH_COMMAS
    kernel.log_texts(WITH_COMMAS, test, WITH_COMMAS)
    said = capsys.readouterr().out
    assert "cut at a comma" not in said
    assert "captions are used whole" in said


def test_training_texts_without_commas_are_left_alone(kernel):
    assert kernel.cut_as_the_test(["a dog"] * 50, ["a cat, black"] * 50, 0) == ["a dog"] * 50


def test_stray_quotes_and_lengths_are_told(kernel, capsys):
    kernel.log_texts(["a dog runs"] * 10, ['"a dog'] * 5 + ["a cat"] * 5, ["a dog runs"] * 10)
    said = capsys.readouterr().out.splitlines()
    assert "3.0 words" in said[0]
    assert "50.0% open with a quote" in said[1]
    assert "2.0 words" in said[1]


# ---------------------------------------------------------------------------------------------- the branch
def test_the_bag_is_a_normalised_sum_without_order(kernel, lab):
    random = torch.Generator().manual_seed(0)
    bag = kernel.WordBag(20, lab.knobs(), random).eval()
    one, other = torch.tensor([[3, 5, 9, 0]]), torch.tensor([[9, 3, 5, 0]])
    assert torch.allclose(bag(one), bag(other), atol=1e-6)
    assert bag(one).shape == (1, 16)
    assert bag(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()  # a caption without words
    expected = bag.norm(bag.table.weight[[3, 5, 9]].sum(0) / 3**0.5)
    assert torch.allclose(bag(one)[0], expected, atol=1e-5)


def test_word_dropout_leaves_words_out_in_training_alone(kernel, lab):
    bag = kernel.WordBag(40, lab.knobs(word_dropout=0.5), torch.Generator().manual_seed(0))
    words = torch.arange(1, 41).repeat(50, 1)
    assert not torch.allclose(bag.train()(words)[0], bag(words)[1])
    assert torch.equal(bag.eval()(words)[0], bag(words)[1])


def test_words_are_learnt_where_vectors_are_noise(kernel, server, tmp_path: Path):
    """The choice gives them weight by itself, and the submission is theirs."""

    def noise(array: np.ndarray) -> np.ndarray:
        return np.random.default_rng(len(array)).normal(size=array.shape).astype(np.float32)

    root = draw_data(tmp_path / "data", {"captions/embeddings": noise}, {"captions/embeddings": noise})
    succeeded(server.run("--input", root, "--output", tmp_path / "out", "--recipe=ensemble", *LEARNING))
    metrics = read_json(tmp_path / "out" / "metrics.json")
    weights = {one["knobs"]: one["weight"] for one in metrics["members"]}
    closed_form = next(one for one in metrics["members"] if "network=linear" in one["knobs"])
    assert closed_form["pool100_raw"] < 0.12
    assert mrr(tmp_path / "out") > 0.3
    assert sum(weight for knobs, weight in weights.items() if "sees=" in knobs) > 0.9
    check_outputs(kernel, tmp_path / "out", checkpoints=(5,))


def test_predictions_follow_the_words(kernel, lab):
    problem = lab.problem()
    trained = lab.train(problem, sees="words")
    member = kernel.member_of(lab.knobs(sees="words"), trained.weights, 1.0)
    bundle, text = kernel.make_bundle(problem, lab.knobs(), [member], 0.0), problem.test.text[:2]
    same = kernel.predict(bundle, text, ["more3 less5", "more3 less5"])
    assert np.allclose(same[0], same[1])
    other = kernel.predict(bundle, text, ["more3 less5", ""])
    assert np.allclose(other[0], same[0])
    assert not np.allclose(other[1], same[1])
    assert np.isfinite(other).all()
