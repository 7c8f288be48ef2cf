"""What kernel/embed.py reads: captions in either format, photos by name, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forked import Tool, failed_in_one_line, succeeded
from tiny_encoders import CAPTIONS, write_csv


def test_damaged_photos_are_counted_named_and_left_out(kernel, encoders, start, source: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (source / "photos").rglob("*.jpg"):
        (photos / path.name).write_bytes(path.read_bytes())
    (photos / "2.jpg").write_bytes((photos / "2.jpg").read_bytes()[:300])
    (photos / "5.jpg").write_text("<html>not found</html>")
    (photos / "8.jpg").write_bytes(b"")
    done = succeeded(start("--photos", photos))
    assert "3 damaged photo(s) left out with their captions: 2.jpg, 5.jpg, 8.jpg" in done.stdout
    pairs = kernel.read_train(tmp_path / "out" / "pairs.npz")
    left = [name for name in CAPTIONS if name not in ("2.jpg", "5.jpg", "8.jpg")]
    assert pairs.image_names == left
    assert pairs.captions == [text for name in left for text in CAPTIONS[name]]
    np.testing.assert_allclose(pairs.text, encoders[1].encode(pairs.captions), atol=1e-5)
    np.testing.assert_allclose(
        pairs.images, encoders[0].encode([encoders[0].read(photos / name) for name in left]), atol=1e-5
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["damaged"] == ["2.jpg", "5.jpg", "8.jpg"]


def test_nothing_but_damaged_photos_is_an_error(fails, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for name in CAPTIONS:
        (tmp_path / "photos" / name).touch()
    assert "no photo is left" in fails("--photos", tmp_path / "photos")


def test_missing_photos_are_an_error_or_skipped_and_a_limit_is_kept(kernel, start, fails, source: Path, tmp_path: Path):
    some = write_csv(tmp_path / "some.csv", {"gone.jpg": ["a ghost"], **CAPTIONS})
    assert "1 of 12 photos are not below" in fails("--captions", some)
    succeeded(start("--captions", some, "--missing", "skip", "--limit", 3))
    assert kernel.read_train(tmp_path / "out" / "pairs.npz").image_names == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_folder_in_a_name_tells_photos_apart(embed, tmp_path: Path):
    for name in ("cats/1.jpg", "dogs/1.jpg", "more/cats/2.jpg", "birds/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path / "birds")  # one file shown twice
    (tmp_path / "birds" / "up").symlink_to(tmp_path)  # a loop
    names = ["cats/1.jpg", "dogs/1.jpg", "2.jpg", "3.jpg", "4.jpg", "../1.jpg"]
    found = embed.find_files([tmp_path, tmp_path / "birds"], names)
    assert sorted(found, key=names.index) == names[:4]
    assert found["2.jpg"] == tmp_path / "more/cats/2.jpg"
    with pytest.raises(embed.UserError, match=r"1\.jpg: more than one such file: .*1\.jpg and .*1\.jpg"):
        embed.find_files([tmp_path], ["1.jpg"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("photo,text\n1.jpg,a dog\n", "its header is photo,text, not image,caption"),
        ("", "its header is empty, not image,caption"),
        ("image,caption\n", "holds no caption"),
        ("image,caption\n,a dog\n", "line 2: no photo's name"),
        ("image,caption\n1.jpg,a\n2.jpg," + "a" * 2001 + "\n", "line 3: a caption of 2001 characters"),
        ("image,caption\n1.jpg,a\n1.jpg,a dog, it runs\n", "line 3: a comma or a quote in the caption"),
        ('image,caption\n1.jpg,"a dog\n2.jpg,a cat\n', "line 3: a comma or a quote in the caption"),
        ("image,caption\n1.jpg,caf\udce9\n", "the captions cannot be read (UnicodeDecodeError"),
        ('{"images": [], "annotations": ', "the captions cannot be read (JSONDecodeError"),
        ("[]", "this is not COCO's captions json"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}', "has no caption"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]}',
            "is not listed",
        ),
        ('{"images": [{"id": 1}], "annotations": []}', "the captions cannot be read (KeyError: 'file_name')"),
    ],
)
def test_wrong_captions_are_one_line(embed, tmp_path: Path, content: str, problem: str):
    path = tmp_path / ("captions.json" if content[:1] in ("{", "[") else "captions.csv")
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(embed.UserError) as error:
        embed.read_captions(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)


def test_captions_are_stripped_and_empty_ones_counted(embed, tmp_path: Path, capsys):
    (tmp_path / "captions.csv").write_text('\ufeffimage,caption\n1.jpg," a ""dog"", it runs "\n2.jpg,  \n1.jpg,b\n')
    assert embed.read_captions(tmp_path / "captions.csv") == {"1.jpg": ['a "dog", it runs', "b"]}
    assert "2 captions of 1 photos; 1 empty ones left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ command line
def test_settings_of_a_pushed_copy_are_options(embed):
    settings = dict(embed.parse_setting(text) for text in ("limit=25000", "image_model = /kaggle/input/dinov2"))
    knobs = embed.resolve_knobs(settings, ["--limit", "3"])
    assert settings["limit"] == 25000  # a number stays one in the script
    assert (knobs.limit, knobs.image_model, knobs.captions) == (3, "/kaggle/input/dinov2", "captions_train2017.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"limits": "x"},
        {"photo": "x"},
        {"limit": "many"},
        {"limit": -1},
        {"missing": "perhaps"},
        {"max_minutes": 0},
        {"max_minutes": "nan"},
    ],
)
def test_wrong_settings_are_refused(embed, wrong):
    with pytest.raises(embed.UserError):
        embed.resolve_knobs(wrong)


def test_a_setting_without_a_value_is_refused(embed):
    with pytest.raises(embed.UserError, match="expected KEY=VALUE"):
        embed.parse_setting("limit")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder in which the script works."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.slow
def test_the_script_runs_on_its_own(models: Path, source: Path, empty: Path):
    given = ["--captions", source / "captions.csv", "--photos", source, "--output", "made"]
    models_of_ours = ["--image-model", models / "photos", "--text-model", models / "captions"]
    done = succeeded(Tool(empty, empty).from_nothing("../kernel/embed", *given, *models_of_ours))
    assert done.stderr == ""
    assert "captions        21 of 21 " in done.stdout
    assert "done: made/pairs.npz" in done.stdout
    assert {path.name for path in empty.rglob("*")} == {"made", "pairs.npz", "manifest.json"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--photos", "nowhere"], "nowhere: no such folder"),
        (["--photos", "."], "none of the 11 photos is there, such as 0.jpg"),
        (["--photos", "SOURCE/photos/a"], "5 of 11 photos are not below"),
        (["--photos", "SOURCE", "--captions", "SOURCE/photos/a/0.jpg"], "0.jpg: the captions cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(source: Path, empty: Path, tmp_path: Path, options: list[str], problem: str):
    given = ["--captions", source / "captions.csv", *(text.replace("SOURCE", str(source)) for text in options)]
    failed_in_one_line(Tool(empty, tmp_path)("../kernel/embed", *given), 2, problem)
    assert not list(empty.iterdir())
