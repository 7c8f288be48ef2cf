"""Files and logs on their way: uploads, downloads and streams that break go on, and nothing wrong is kept."""

from __future__ import annotations

import pytest

from account import MARK, META, version, write
from lib.kaggle_api.errors import ConnectionFailed, Expired, Forbidden, MachineFailed, NotFound, Refused, ServerError
from lib.kaggle_api.http import Transport, safe_name
from lib.kaggle_api.kernels import Version
from stand_in import Fault, Plan

DATA = bytes(range(256)) * 1000


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, keep=70_000),
        Fault(drop="before", keep=70_000),
        Fault(silent=0.6),
        Fault(503),
        Fault(429, retry_after="0"),
        Fault(drop="after"),
    ],
)
def test_a_broken_upload_goes_on_where_it_stopped(kaggle, client, fault, tmp_path):
    kaggle.fail("PUT blob", fault)
    client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", DATA)])
    assert kaggle.datasets["tester/weights"].versions[0].files == {"a.bin": DATA}
    ranges = [body["range"] for name, body in kaggle.calls if name == "PUT blob"]
    if fault.keep:
        assert ranges == ["", f"bytes 70000-{len(DATA) - 1}/{len(DATA)}"]


def test_an_upload_of_which_nothing_is_kept_ends(kaggle, client, tmp_path):
    """308 is "go on", also from a storage that never comes on."""
    kaggle.fail("PUT blob", *[Fault(308)] * 30)
    with pytest.raises(ServerError, match=r"upload of a\.bin: Kaggle has no more than 0 of 256,000 bytes"):
        client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", DATA)])
    assert kaggle.count("PUT blob") == client.patience.tries


def test_a_file_that_changes_on_its_way_is_not_used(kaggle, client, tmp_path, monkeypatch):
    """An upload that goes on would be half of the one and half of the other."""
    path, pause = write(tmp_path / "a.bin", DATA), Transport.pause

    def meanwhile(transport: Transport, *arguments: object) -> None:
        write(path, DATA[::-1])
        pause(transport, *arguments)

    monkeypatch.setattr(Transport, "pause", meanwhile)
    kaggle.fail("PUT blob", Fault(503, keep=70_000))
    with pytest.raises(MachineFailed, match=r"a\.bin: was changed while it was sent"):
        client.datasets.create("tester/weights", "weights", "other", [path])
    assert kaggle.datasets == {}


@pytest.mark.parametrize("status", [404, 410])
def test_an_expired_upload_is_begun_again(kaggle, client, status, tmp_path):
    kaggle.fail("PUT blob", Fault(503, keep=70_000))
    kaggle.fail("PUT probe", Fault(status))
    client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", DATA)])
    assert kaggle.datasets["tester/weights"].versions[0].files == {"a.bin": DATA}
    assert kaggle.count("StartBlobUpload") == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(403, xml=True), Forbidden),
        (Fault(400), Refused),
        (Fault(500), ServerError),
        (Fault(404), NotFound),
        (Fault(drop="before"), ConnectionFailed),
    ],
)
def test_a_failed_upload_makes_no_dataset_without_its_file(kaggle, client, fault, error, tmp_path):
    kaggle.fail("PUT blob", *[fault] * 9)
    with pytest.raises(error, match=r"upload of a\.bin"):
        client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", DATA)])
    assert kaggle.count("CreateDataset") == 0


@pytest.fixture
def output(kaggle, client):
    """(url, content) of a kernel's output file."""
    kaggle.plans = [Plan(outputs={"model.pt": DATA})]
    client.kernels.push(META, "text", MARK)
    return client.kernels.output(version(1))[0]["model.pt"], DATA


@pytest.mark.parametrize(
    "fault",
    [
        Fault(truncate=150_000),
        Fault(503),
        Fault(drop="before"),
        Fault(silent=0.6),
        Fault(html=True),
        Fault(429, retry_after="0"),
    ],
)
def test_a_broken_download_goes_on(kaggle, client, output, fault, tmp_path):
    kaggle.fail("GET output", fault)
    client.kernels.download(output[0], tmp_path / "model.pt", lambda: output[0], len(DATA))
    assert (tmp_path / "model.pt").read_bytes() == DATA
    assert kaggle.calls[-1][1]["range"] == ("bytes=131072-" if fault.truncate else "")
    assert not (tmp_path / "model.pt.partial").exists()


def test_an_interrupted_download_is_taken_up_by_the_next_run(kaggle, client, output, tmp_path):
    write(tmp_path / "model.pt.partial", DATA[:60_000])
    client.kernels.download(output[0], tmp_path / "model.pt", lambda: output[0], len(DATA))
    assert (tmp_path / "model.pt").read_bytes() == DATA
    assert kaggle.calls[-1][1]["range"] == "bytes=60000-"


def test_an_expired_url_is_renewed(kaggle, client, output, tmp_path):
    renewals = []

    def renew() -> str:
        renewals.append(client.kernels.output(version(1))[0]["model.pt"])
        return renewals[-1]

    kaggle.expire_urls()
    client.kernels.download(output[0], tmp_path / "model.pt", renew, len(DATA))
    assert (tmp_path / "model.pt").read_bytes() == DATA
    assert len(renewals) == 1


@pytest.mark.parametrize(
    ("fault", "error"), [(Fault(403, xml=True), Expired), (Fault(html=True), ServerError), (Fault(404), Expired)]
)
def test_an_error_page_is_never_saved_as_data(kaggle, client, output, fault, error, tmp_path):
    kaggle.fail("GET output", *[fault] * 9)
    with pytest.raises(error, match=r"download of model\.pt"):
        client.kernels.download(output[0], tmp_path / "new" / "model.pt", lambda: output[0])
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_of_the_wrong_size_is_not_kept(kaggle, client, output, tmp_path):
    with pytest.raises(ServerError, match="instead of 7"):
        client.kernels.download(output[0], tmp_path / "new" / "model.pt", lambda: output[0], 7)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "", "a\0b", "."])
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(Refused, match="nothing was written"):
        safe_name(name)


def test_a_kernel_that_names_such_a_file_is_refused(kaggle, client):
    kaggle.plans = [Plan(outputs={"../../evil": b"x"})]
    client.kernels.push(META, "text", MARK)
    with pytest.raises(Refused, match="evil"):
        client.kernels.output(version(1))


def test_the_log_stream_goes_on_after_a_break_without_repeating(kaggle, client):
    kaggle.plans = [Plan(running=99, log="one\ntwo\n±3\n")]
    client.kernels.push(META, "text", MARK)
    kaggle.fail("GET log", Fault(truncate=120), Fault(503))
    assert list(client.kernels.log_stream(version(1))) == ["one\n", "two\n", "±3\n"]
    assert kaggle.count("GET log") == 3


def test_a_log_that_cannot_be_streamed_is_a_typed_error(kaggle, client):
    with pytest.raises(Forbidden, match="log of kernel tester/none"):
        list(client.kernels.log_stream(Version("tester/none", 1)))
