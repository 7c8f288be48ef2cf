"""Knobs, recipes and candidates: what may be set, in which order it counts, and what a wrong value says."""

from __future__ import annotations

import dataclasses
import random

import pytest


@pytest.mark.parametrize(
    ("knob", "near"), [("epoch", "epochs"), ("drop_out", "dropout"), ("lerning_rate", ""), ("val_frac", "val_fraction")]
)
def test_an_unknown_knob_names_the_nearest(kernel, knob: str, near: str):
    with pytest.raises(kernel.UserError, match=f"unknown knob '{knob}'; did you mean .*{near}"):
        kernel.parse_setting(f"{knob}=3")


@pytest.mark.parametrize(
    "setting",
    [
        "epochs",
        "epochs=",
        "epochs=three",
        "epochs=3.5",
        "refit=maybe",
        "lr=nan",
        "lr=inf",
        "hidden=0",
        "epochs=-1",
        "dropout=1",
        "val_fraction=0",
        "device=tpu",
        "schedule=linear",
        "network=transformer",
        "recipe=best",
        "mode=test",
        "batch=1e3",
        "hidden=10000000",
        "raw_weight=1.1",
        "=3",
        "workers=-1",
        "sees=all",
        "max_minutes=0",
        "repulsion=1",
    ],
)
def test_a_value_that_is_none_of_a_knobs(kernel, setting: str):
    with pytest.raises(kernel.UserError) as error:
        kernel.resolve_knobs(dict([kernel.parse_setting(setting)]))
    assert setting.partition("=")[0] in str(error.value)


def test_values_take_the_type_of_their_knob(kernel):
    found = dict(map(kernel.parse_setting, ["epochs = 5", "lr=3e-4", "refit=False", "sees= both "]))
    assert found == {"epochs": 5, "lr": 3e-4, "refit": False, "sees": "both"}


def test_an_option_and_a_setting_of_one_knob_say_the_same(kernel):
    assert kernel.beside({"epochs": 5}, recipe="align", mode=None) == {"epochs": 5, "recipe": "align"}
    assert kernel.beside({"recipe": "align"}, recipe="align") == {"recipe": "align"}
    with pytest.raises(kernel.UserError, match="--recipe search and --set recipe=align: give one of them"):
        kernel.beside({"recipe": "align"}, recipe="search")


def test_command_line_beats_overrides_beats_recipe_beats_default(kernel, monkeypatch: pytest.MonkeyPatch):
    assert kernel.resolve_knobs({}).batch == 1024
    assert kernel.resolve_knobs({"recipe": "baseline"}).batch == 64
    monkeypatch.setattr(kernel, "OVERRIDES", {"recipe": "baseline", "batch": 32, "refit": False})
    assert [getattr(kernel.resolve_knobs({}), key) for key in ("recipe", "batch", "refit", "epochs")] == [
        "baseline",
        32,
        False,
        20,
    ]
    assert kernel.resolve_knobs({"batch": 16}).batch == 16
    monkeypatch.setattr(kernel, "OVERRIDES", {"bacth": 32})
    with pytest.raises(kernel.UserError, match="did you mean batch"):
        kernel.resolve_knobs({})


@pytest.mark.parametrize("recipe", ["baseline", "closed_form", "align", "ensemble", "search"])
def test_every_candidate_of_every_recipe_lies_within_the_bounds(kernel, recipe: str):
    candidates = kernel.resolve_candidates({"recipe": recipe})
    assert len(candidates) == len(kernel.RECIPES[recipe])
    for one in candidates:
        assert one.recipe == recipe
        for key, value in dataclasses.asdict(one).items():
            assert kernel.typed(key, value) == value


@pytest.mark.parametrize("recipe", ["closed_form", "align", "ensemble", "search"])
def test_the_closed_form_comes_first(kernel, recipe: str):
    assert [one.network == "linear" for one in kernel.resolve_candidates({"recipe": recipe})].index(True) == 0


def test_what_is_set_counts_for_every_candidate(kernel):
    for one in kernel.resolve_candidates({"recipe": "ensemble", "hidden": 7, "lr": 0.5, "epochs": 3}):
        assert (one.hidden, one.lr, one.epochs) == (7, 0.5, 3)


def test_candidates_that_settings_make_equal_are_trained_once(kernel):
    names = [one.activation for one in kernel.resolve_candidates({"recipe": "ensemble"}) if one.loss == "triplet"]
    assert names == ["silu", "square"]
    same = kernel.resolve_candidates({"recipe": "ensemble", "activation": "square"})
    assert sum(one.loss == "triplet" for one in same) == 1
    assert len(same) == len(kernel.RECIPES["ensemble"]) - 1


def test_a_runs_knobs_are_what_its_candidates_share(kernel):
    assert kernel.resolve_knobs({"recipe": "baseline"}).network == "mlp"
    assert kernel.resolve_knobs({"recipe": "ensemble"}).network == "align"
    assert kernel.resolve_knobs({"recipe": "closed_form"}).network == "linear"


def test_every_knob_says_why_and_every_number_has_bounds(kernel):
    for field in dataclasses.fields(kernel.Knobs):
        assert field.metadata["why"], field.name
        assert kernel.typed(field.name, field.default) == field.default


def test_epochs_grow_with_the_photos_by_default(kernel):
    counts = [100, 2_000, 6_000, 12_000, 25_000]
    epochs = [kernel.with_epochs(kernel.Knobs(), count).epochs for count in counts]
    assert epochs == sorted(epochs)
    assert epochs[0] >= 1
    assert epochs[-1] > 1.5 * epochs[2]
    assert epochs[-1] <= 60
    assert kernel.with_epochs(kernel.Knobs(epochs=3, epoch_factor=2.0), 6_000).epochs == 3
    assert kernel.with_epochs(kernel.Knobs(epoch_factor=2.0), 6_000).epochs == 2 * epochs[2]


def test_draws_change_what_the_user_left_free(kernel, lab):
    base, problem = kernel.resolve_knobs({"recipe": "search", "hidden": 64}), lab.problem()
    base = kernel.with_epochs(base, 240)
    drawn = [kernel.draw_candidate(base, {"hidden": 64}, problem, random.Random(seed)) for seed in range(60)]
    assert {one.hidden for one in drawn} == {64}
    assert len(set(drawn)) > 30
    changed = {key for one in drawn for key, value in dataclasses.asdict(one).items() if value != getattr(base, key)}
    assert changed - {"epochs"} == set(kernel.DRAWS) - {"hidden"}
    assert all(one == kernel.with_epochs(dataclasses.replace(one, epochs=0), 240) for one in drawn)
    for one in drawn:
        for key, value in dataclasses.asdict(one).items():
            assert kernel.typed(key, value) == value


def test_what_the_user_set_may_leave_one_draw_or_none(kernel, lab):
    given = {key: values[0] for key, values in kernel.DRAWS.items()}
    base, problem = kernel.resolve_knobs({"recipe": "search", **given}), lab.problem()
    drawn = {kernel.draw_candidate(base, given, problem, random.Random(seed)) for seed in range(9)}
    assert drawn == {kernel.with_epochs(base, 240)}
    del given["hidden"]
    drawn = {kernel.draw_candidate(base, given, problem, random.Random(seed)) for seed in range(20)}
    assert {one.hidden for one in drawn} == set(kernel.DRAWS["hidden"])
    assert len(drawn) == len(kernel.DRAWS["hidden"])


def test_a_description_names_what_differs(kernel):
    assert kernel.describe(kernel.Knobs(hidden=3, sees="both"), kernel.Knobs()) == "sees=both hidden=3"
    assert "hidden" not in kernel.describe(kernel.Knobs(hidden=3, lr=1.0), kernel.Knobs(hidden=3))
