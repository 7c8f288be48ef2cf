"""The submission file: what is written is checked, what is wrong is refused with its row, and nothing wrong stays."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
    assert lines[0] == "id,embedding"
    assert len(lines) == 41
    assert lines[1].startswith('1,"[')
    assert lines[1].endswith(']"')
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
    return rows_changed(
        lambda lines: lines.__setitem__(
            3, '3,"[' + number + lines[3][lines[3].index(",") :][1:].split(",", 1)[1].join([", ", ""])
        )
    )


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
    "no json": (rows_changed(lambda lines: lines.__setitem__(2, '2,"[1, 2"')), "row 2 (id 2): expected a list of 8"),
    "NaN": (put("NaN"), "row 3 (id 3): NaN, infinity or no number"),
    "infinity": (put("1e999"), "row 3 (id 3): NaN, infinity or no number"),
    "text": (put('""a""'), "row 3 (id 3): NaN, infinity or no number"),
    "true": (put("true"), "row 3 (id 3): NaN, infinity or no number"),
    "huge integer": (put("9" * 500), "not a readable submission"),
    "deep": (put("[" * 100_000), "not a readable submission"),
    "binary": (lambda text: "\udcff\udcfe" + text, "not a readable submission"),
    "all equal": (
        rows_changed(lambda lines: [lines[0], *(f'{i},"[1, 2, 3, 4, 5, 6, 7, 8]"' for i in range(1, 41))]),
        "all predictions are equal",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_submission_is_refused(kernel, written, case: str):
    path, ids, _ = written
    edit, message = WRONG_FILES[case]
    path.write_text(edit(path.read_text()), errors="surrogateescape")
    with pytest.raises(kernel.UserError) as error:
        kernel.check_submission(path, ids, 8)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_submission_is_refused(kernel, tmp_path: Path):
    with pytest.raises(kernel.UserError, match="not a readable submission"):
        kernel.check_submission(tmp_path / "none.csv", np.arange(3), 8)


def test_predictions_that_are_no_numbers_are_not_written(kernel, tmp_path: Path):
    with pytest.raises(kernel.UserError, match="not written"):
        kernel.write_submission(tmp_path / "s.csv", np.arange(2), np.array([[1, np.nan], [1, 2]]))
    assert not list(tmp_path.glob("*s.csv*"))


@pytest.mark.parametrize("error", ["UserError", "MemoryError"])
def test_a_submission_that_fails_its_check_is_removed_and_the_old_one_stays(kernel, written, monkeypatch, error: str):
    """Whatever the check dislikes: nothing half-good lies in the folder."""
    path, ids, predictions = written
    before = path.read_bytes()

    def failing(*_: Any) -> None:
        raise kernel.UserError("no") if error == "UserError" else MemoryError("no")

    monkeypatch.setattr(kernel, "check_submission", failing)
    with pytest.raises((kernel.UserError, MemoryError)):
        kernel.write_submission(path, ids, 2 * predictions)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.glob("*sub*")] == [path.name]
    assert not list(path.parent.glob(".*.part"))


@pytest.mark.parametrize("rows", [1, 2, 99, 199, 1500])
def test_tests_of_any_length_are_judged_by_one_rule(kernel, tmp_path: Path, rows: int):
    """All predictions equal is wrong where there are two; some equal ones are not."""
    ids, same, path = np.arange(rows), np.ones((rows, 3)), tmp_path / "s.csv"
    some = same.copy()
    some[-1] = 2
    kernel.write_submission(path, ids, some)
    kernel.check_submission(path, ids, 3)
    if rows == 1:
        kernel.write_submission(path, ids, same)
    else:
        with pytest.raises(kernel.UserError, match="all predictions are equal"):
            kernel.write_submission(path, ids, same)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(kernel, tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        kernel.write_submission(tmp_path / "s.csv", np.arange(2), np.eye(2))
        kernel.save_torch(tmp_path / "w.pth", {})
        kernel.write_json(tmp_path / "j.json", {})
    finally:
        os.umask(before)
    for name in ("s.csv", "w.pth", "j.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name
