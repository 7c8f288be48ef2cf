"""Which data a tool takes: what the kernel finds, or the drawn sample where there is none, and never in silence."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.data import FILES, choose_data
from lib.project import InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without data, with a sample that is drawn in no time; its draws are logged in `drawn`."""

    def make_sample(folder: Path) -> None:
        time.sleep(0.05)
        folder.mkdir(parents=True)
        with (tmp_path / "drawn").open("a") as file:
            print(folder, file=file)

    monkeypatch.setattr("lib.data.DATA", tmp_path / "data")
    monkeypatch.setattr("lib.data.SAMPLE", tmp_path / "build" / "sample")
    monkeypatch.setattr("lib.sample.layout.make_sample", make_sample)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_sample_is_drawn_once_and_said(home, capsys):
    assert choose_data(None) == choose_data(None) == home / "build" / "sample"
    lines = capsys.readouterr().err.splitlines()
    assert len((home / "drawn").read_text().splitlines()) == 1
    assert len(lines) == 2
    assert [line for line in lines if "download_data.py" not in line] == []


def test_two_that_need_the_sample_at_once_draw_it_once(home):
    with ThreadPoolExecutor(2) as pool:
        assert {*pool.map(choose_data, [None, None])} == {home / "build" / "sample"}
    assert len((home / "drawn").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", FILES)
def test_data_that_is_there_wins(home, capsys, name):
    (home / "data" / "deep").mkdir(parents=True)
    (home / "data" / "deep" / name).touch()
    assert choose_data(None) == home / "data"
    assert not capsys.readouterr().err


def test_links_to_another_disk_are_followed_as_the_kernel_does(home):
    (home / "disk" / "train").mkdir(parents=True)
    (home / "disk" / "train" / "train.npz").touch()
    (home / "data").mkdir()
    (home / "data" / "competition").symlink_to(home / "disk")
    assert choose_data(None) == home / "data"
    (home / "data" / "competition").unlink()
    (home / "data").rmdir()
    (home / "data").symlink_to(home / "disk")
    assert choose_data(None) == home / "data"
    assert not (home / "drawn").exists()


def test_a_data_folder_without_data_is_an_error(home):
    (home / "data").mkdir()
    (home / "data" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no train.npz below it \(it holds notes.txt\).*download_data.py"):
        choose_data(None)
    assert not (home / "drawn").exists()


def test_a_dangling_link_is_an_error(home):
    (home / "data").symlink_to(home / "unmounted")
    with pytest.raises(InputError, match=r"data: links to .*unmounted, which is not there"):
        choose_data(None)
    assert not (home / "drawn").exists()


def test_a_checkout_that_cannot_be_written_gets_its_sample_in_the_cache(home):
    (home / "build").write_text("not a folder")
    assert choose_data(None) == choose_data(None) == home / "cache" / "aml-text-to-image-alignment" / "sample"


def test_a_named_folder_has_to_be_there(home):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        choose_data(home / "nowhere")
