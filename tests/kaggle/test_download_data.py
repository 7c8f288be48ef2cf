"""download_data: the right files in the right place, whatever happens on the way."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest

from forked import failed, succeeded
from lib.data import Known
from lib.jobs import download
from lib.jobs.download import unpack
from lib.project import ToolError
from stand_in import Fault
from stopping import stop_at

FILES = {
    "train/train/train.npz": bytes(range(256)) * 1000,
    "test/test/test.clean.npz": b"PK" + b"test" * 100,
    "test/test/captions.txt": b"1,a dog\n",
}
PHOTO = "train/train/Images/1000.jpg"


def known_of(files: dict[str, bytes]) -> dict[str, Known]:
    return {name: Known(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


@pytest.fixture(autouse=True)
def small_files(kaggle, monkeypatch):
    kaggle.competitions["aml-competition"].files = FILES | {PHOTO: b"jpeg"}
    monkeypatch.setattr("lib.jobs.download.KNOWN", known_of(FILES))
    monkeypatch.setattr("lib.jobs.download.ARCHIVE_BYTES", 1000)


@pytest.fixture
def fetch(tool, tmp_path):
    return lambda *arguments: tool("download_data", "--data", tmp_path / "data", *arguments)


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_needed_files_come_verified_and_only_once(kaggle, fetch, tmp_path):
    first = succeeded(fetch())
    assert tree(tmp_path / "data") == FILES
    assert "train.npz: size and sha256 are right" in first.stdout
    assert str(tmp_path / "data") in first.stdout
    assert "already there" in fetch().stdout
    assert kaggle.count("DownloadDataFile") == 3
    succeeded(fetch("--force"))
    assert kaggle.count("DownloadDataFile") == 6


def test_without_credentials_no_empty_folder_is_left(kaggle, fetch, tmp_path, monkeypatch):
    """The other tools would take it for data without files."""
    monkeypatch.delenv("KAGGLE_KEY")
    failed(fetch(), 2, "no Kaggle credentials")
    assert not (tmp_path / "data").exists()


def test_a_damaged_file_is_replaced(kaggle, fetch, tmp_path):
    succeeded(fetch())
    (tmp_path / "data/test/test/captions.txt").write_bytes(b"1,a cat\n")
    done = fetch()
    assert "captions.txt: has another sha256" in done.stdout
    assert tree(tmp_path / "data") == FILES
    assert kaggle.count("DownloadDataFile") == 4


@pytest.mark.parametrize("call", ["DownloadDataFile", "GET data"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(503),
        Fault(drop="before"),
        Fault(html=True),
        Fault(silent=0.6),
        Fault(429, retry_after="0"),
        Fault(502, html=True),
    ],
)
def test_passing_faults_are_retried(kaggle, fetch, tmp_path, call, fault):
    kaggle.fail(call, fault)
    done = succeeded(fetch())
    assert tree(tmp_path / "data") == FILES
    assert "try 2 of 5" in done.stderr


def test_a_download_that_is_cut_goes_on(kaggle, fetch, tmp_path):
    kaggle.fail("GET data", Fault(truncate=150_000))
    succeeded(fetch())
    assert tree(tmp_path / "data") == FILES
    assert [body["range"] for name, body in kaggle.calls if name == "GET data"][:2] == ["", "bytes=131072-"]


def test_urls_that_expire_again_and_again_are_no_rules_that_are_not_accepted(kaggle, fetch, tmp_path):
    kaggle.habits.url_bytes = 70_000
    succeeded(fetch())
    for name, data in FILES.items():
        assert (tmp_path / "data" / name).read_bytes() == data


def test_a_rerun_goes_on_where_a_broken_one_stopped(kaggle, fetch, tmp_path):
    kaggle.fail("GET data", Fault(truncate=150_000))
    kaggle.fail("DownloadDataFile", None, *[Fault(503)] * 5)
    broken = failed(fetch(), 1)
    assert broken.error.startswith("error: download of train/train/train.npz")
    assert not (tmp_path / "data/train/train/train.npz").exists()
    succeeded(fetch())
    assert tree(tmp_path / "data") == FILES
    assert any(body["range"].startswith("bytes=131072") for name, body in kaggle.calls if name == "GET data")


def test_a_file_that_kaggle_zips_is_unpacked(kaggle, fetch, tmp_path):
    kaggle.competitions["aml-competition"].zip_files = {"train/train/train.npz", "test/test/captions.txt"}
    succeeded(fetch())
    assert tree(tmp_path / "data") == FILES


@pytest.mark.parametrize("changed", [b"other" * 51_200, b"short"])
def test_a_file_that_is_not_the_known_one_is_not_kept(kaggle, fetch, tmp_path, changed):
    kaggle.competitions["aml-competition"].files = FILES | {"train/train/train.npz": changed}
    done = failed(fetch(), 1, r"train/train/train\.npz")
    assert " instead of " in done.error
    assert tree(tmp_path / "data") == {}


def test_unaccepted_rules_name_the_page(kaggle, fetch):
    kaggle.competitions["aml-competition"].rules_accepted = False
    failed(fetch(), 1, r"https://www\.kaggle\.com/competitions/aml-competition/rules")


def test_an_unknown_competition_is_named(kaggle, fetch):
    done = failed(fetch("--competition", "no-such"), 2, "no-such")
    assert "https://www.kaggle.com/competitions/no-such" in done.error


def test_images_bring_everything(kaggle, fetch, tmp_path):
    kaggle.fail("GET data", Fault(truncate=150_000))
    succeeded(fetch("--images"))
    assert tree(tmp_path / "data") == FILES | {PHOTO: b"jpeg"}
    assert "already complete" in fetch("--images").stdout


def test_photos_that_are_half_unpacked_are_no_complete_data(kaggle, fetch, tmp_path):
    files = {PHOTO: b"jpeg", PHOTO.replace("1000", "1001"): b"jpeg too"} | FILES
    kaggle.competitions["aml-competition"].files = files
    succeeded(fetch())
    with stop_at(download, "extract", call=2):
        assert fetch("--images").returncode == 130
    succeeded(fetch("--images"))
    assert tree(tmp_path / "data") == files
    assert kaggle.count("DownloadDataFiles") == 1


def test_an_archive_with_damaged_content_is_removed(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 10)
    damaged = bytearray(path.read_bytes())
    damaged[31:40] = b"\xff" * 9  # behind the header of 30 bytes and the name
    path.write_bytes(damaged)
    with pytest.raises(ToolError, match="a broken zip"):
        unpack(path, tmp_path / "data")
    assert not path.exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_an_archive_that_would_leave_its_folder_is_not_unpacked(kaggle, fetch, tmp_path, name):
    kaggle.competitions["aml-competition"].files = {name: b"x"} | FILES
    failed(fetch("--images"), 1, "nothing was written")
    assert set(tree(tmp_path / "data")) == {"aml-competition.zip"}
    assert not (tmp_path / "evil").exists()


def test_a_link_in_an_archive_is_not_unpacked(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "x.zip").write_bytes(packed.getvalue())
    with pytest.raises(ToolError, match="is a link"):
        unpack(tmp_path / "x.zip", tmp_path / "data")


def test_a_full_disk_is_told_before_the_download(kaggle, fetch, monkeypatch):
    monkeypatch.setattr("lib.jobs.download.KNOWN", {"train/train/train.npz": Known(10**18, "0")})
    failed(fetch(), 1, "GB free")
    assert kaggle.count("DownloadDataFile") == 0
