"""The client against the stand-in: what each call returns, and what each fault ends in."""

from __future__ import annotations

import email.utils
import time

import pytest
import requests

from account import COMPETITION, MARK, META, version, write
from lib.kaggle_api.errors import (
    Ambiguous,
    Conflict,
    ConnectionFailed,
    Forbidden,
    NotFound,
    RateLimited,
    Refused,
    ServerError,
    Timeout,
    Unauthorized,
)
from lib.kaggle_api.http import error_of, retry_after
from lib.kaggle_api.patience import Patience
from lib.kaggle_api.service import split_ref
from lib.project import InputError
from stand_in import Fault, Plan

# Every way in which a call can fail to be answered; `after`: Kaggle carried it out all the same.
PASSING = {
    "503": Fault(503),
    "500": Fault(500),
    "html 502": Fault(502, html=True),
    "html 200": Fault(html=True),
    "429": Fault(429, retry_after="0"),
    "dropped": Fault(drop="before"),
    "silent": Fault(silent=0.6),
    "cut": Fault(truncate=3),
    "503 in 200": Fault(503, as_code=True),
}
AMBIGUOUS = {
    "dropped": Fault(drop="after"),
    "503": Fault(503, after=True),
    "cut": Fault(truncate=3),
    "html": Fault(html=True, after=True),
}
BEFORE = {"dropped": Fault(drop="before"), "503": Fault(503), "silent": Fault(silent=0.6), "html": Fault(html=True)}


def faults(table: dict[str, Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", table.values(), ids=table.keys())


# ---- what the calls return ----


def test_kernel_from_push_to_output(kaggle, client, tmp_path, capsys):
    kaggle.plans = [Plan(queued=1, running=1, outputs={f"f{n}.txt": b"x" * n for n in range(1, 30)}, log="a\n±b\n")]
    assert client.kernels.shown("tester/aml-align").number == 0
    saved = client.kernels.push(META, "print(1)\n", MARK, timeout_seconds=900)
    assert (saved.ref, saved.number, client.kernels.shown("tester/aml-align").number) == ("tester/aml-align", 1, 1)
    assert kaggle.kernels["tester/aml-align"][0].request["sessionTimeoutSeconds"] == 900
    states = [client.kernels.status(version(1))[0] for _ in range(3)]
    assert states == ["queued", "running", "complete"]
    files, log = client.kernels.output(version(1))
    assert len(files) == 29
    assert log == "a\n±b\n"
    name, url = list(files.items())[-1]
    client.kernels.download(url, tmp_path / name, lambda: url)
    assert (tmp_path / name).read_bytes() == kaggle.kernels["tester/aml-align"][0].outputs[name]
    assert "".join(client.kernels.log_stream(version(1))) == "a\n±b\n"
    assert capsys.readouterr().out == ""


def test_the_version_that_is_asked_for_is_the_one_that_answers(kaggle, client):
    kaggle.plans = [Plan(outcome="ERROR", failure="out of memory", log="one"), Plan(outputs={"b": b"2"}, log="two")]
    client.kernels.push(META, "first", MARK)
    client.kernels.push(META, "second", MARK)
    assert client.kernels.status(version(1)) == ("error", "out of memory")
    assert client.kernels.status(version(2)) == ("complete", "")
    assert client.kernels.output(version(1))[1] == "one"
    with pytest.raises(NotFound, match="version 9"):
        client.kernels.status(version(9))


def test_dataset_and_its_versions(kaggle, client, tmp_path):
    files = [write(tmp_path / "a.bin", b"a" * 1000), write(tmp_path / "b.txt", b""), write(tmp_path / "c.txt", b"c")]
    assert client.datasets.create("tester/weights", "weights title", "CC0-1.0", files) == 1
    assert kaggle.datasets["tester/weights"].private
    assert client.datasets.status("tester/weights") == ("ready", 1)
    assert client.datasets.files("tester/weights") == {"a.bin": 1000, "b.txt": 0, "c.txt": 1}
    assert client.datasets.create_version("tester/weights", "second", files[:1]) == 2
    assert client.datasets.status("tester/weights") == ("ready", 2)
    assert client.datasets.files("tester/weights") == {"a.bin": 1000}


def test_submission_is_scored(kaggle, client, tmp_path):
    kaggle.competitions[COMPETITION].others = {"best": 0.9}
    ref = client.competitions.submit_file(COMPETITION, write(tmp_path / "s.csv", b"id\n"), "message", "message")
    found = client.competitions.wait_for_score(ref, 3600)
    assert (found.public_score, found.description, found.status) == (0.5, "message", "complete")
    assert client.competitions.leaderboard(COMPETITION) == [0.9, 0.5]
    assert client.competitions.limits(COMPETITION).allowed_now == 4
    assert client.kernels.quota()["GPU"].left_hours == 28.5


def test_lists_are_read_to_their_last_page(kaggle, client):
    kaggle.add_dataset("tester/many", {f"{n}.bin": b"x" for n in range(450)})
    assert len(client.datasets.files("tester/many")) == 450
    kaggle.competitions[COMPETITION].others = {f"team {n}": n / 1000 for n in range(450)}
    assert len(client.competitions.leaderboard(COMPETITION)) == 450


def test_kernel_output_is_a_submission(kaggle, client):
    kaggle.plans = [Plan(outputs={"pipeline_submission.csv": b"id,embedding\n"})]
    client.kernels.push(META, "text", MARK)
    ref = client.competitions.submit_kernel(
        COMPETITION, version(1), "pipeline_submission.csv", "from the kernel", "from"
    )
    assert client.competitions.wait_for_score(ref, 3600).public_score == 0.5
    with pytest.raises(Refused, match="no such output file"):
        client.competitions.submit_kernel(COMPETITION, version(1), "other.csv", "from the kernel", "from")


# ---- calls that may be repeated ----


@faults(PASSING)
def test_a_passing_fault_is_retried_to_success(kaggle, client, fault):
    client.kernels.push(META, "text", MARK)
    kaggle.fail("GetKernelSessionStatus", fault)
    assert client.kernels.status(version(1)) == ("complete", "")
    assert kaggle.count("GetKernelSessionStatus") == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(503), ServerError),
        (Fault(drop="before"), ConnectionFailed),
        (Fault(429), RateLimited),
        (Fault(silent=0.6), Timeout),
    ],
)
def test_a_lasting_fault_ends_in_one_typed_error(kaggle, client, fault, error):
    kaggle.fail("GetSubmissionLimits", *[fault] * 9)
    with pytest.raises(error, match=f"submission limits of {COMPETITION}") as caught:
        client.competitions.limits(COMPETITION)
    assert kaggle.count("GetSubmissionLimits") == Patience().tries
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [(400, Refused, 1), (401, Unauthorized, 2), (403, Forbidden, 1), (404, NotFound, 1), (409, Conflict, 1)],
)
@pytest.mark.parametrize("as_code", [False, True])
def test_a_refusal_is_not_retried_and_has_its_own_type(kaggle, client, status, error, code, as_code):
    kaggle.fail("GetSubmissionLimits", Fault(status, "said so", as_code=as_code))
    with pytest.raises(error, match="said so") as caught:
        client.competitions.limits(COMPETITION)
    assert (kaggle.count("GetSubmissionLimits"), caught.value.exit_code) == (1, code)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(kaggle, client, status):
    kaggle.fail("GetSubmissionLimits", Fault(status, retry_after="200"))
    start = client.patience.now()
    client.competitions.limits(COMPETITION)
    assert client.patience.now() - start >= 200


def test_a_long_retry_after_is_told_not_slept(kaggle, client):
    kaggle.fail("GetSubmissionLimits", Fault(429, retry_after="7200"))
    with pytest.raises(RateLimited, match="wait 120 minutes"):
        client.competitions.limits(COMPETITION)


def test_an_error_whose_code_is_no_number_counts_by_its_status():
    answer = requests.Response()
    answer.status_code, answer.reason, answer._content = 404, "Not Found", b'{"code": "gone"}'
    error = error_of("it", answer)
    assert (type(error), str(error)) == (NotFound, "it: Kaggle answered 404 (Not Found)")


def test_retry_after_may_be_a_date_by_the_servers_clock():
    response = requests.Response()
    response.headers["Retry-After"] = email.utils.formatdate(time.time() + 100)
    assert 90 < retry_after(response) <= 100
    ahead = time.time() + 7200
    response.headers["Date"] = email.utils.formatdate(ahead)
    response.headers["Retry-After"] = email.utils.formatdate(ahead + 40)
    assert retry_after(response) == 40
    response.headers["Retry-After"] = "soon"
    assert retry_after(response) is None


def test_a_state_that_the_client_does_not_know_is_not_known_yet(kaggle, client, capsys):
    client.kernels.push(META, "text", MARK)
    kaggle.fail("GetKernelSessionStatus", Fault(json={"status": "PAUSED_BY_ADMIN"}))
    assert client.kernels.status(version(1)) == ("queued", "")
    assert "PAUSED_BY_ADMIN" in capsys.readouterr().err
    kaggle.fail(
        "ListSubmissions",
        Fault(
            json={
                "submissions": [
                    {"ref": 1, "status": "PAUSED", "publicScore": "NaN"},
                    {"ref": 2, "status": "COMPLETE", "publicScore": ".5"},
                ]
            }
        ),
    )
    assert [(one.status, one.public_score) for one in client.competitions.history(COMPETITION)] == [
        ("pending", None),
        ("complete", 0.5),
    ]


# ---- calls that must not be repeated ----


@faults(AMBIGUOUS)
def test_a_push_that_happened_is_found_not_repeated(kaggle, client, fault):
    client.kernels.push(META, "first", MARK)
    kaggle.fail("SaveKernel", fault)
    assert client.kernels.push(META, "second", MARK).number == 2
    assert len(kaggle.kernels["tester/aml-align"]) == 2


@faults(BEFORE)
def test_a_push_that_did_not_happen_is_told_not_repeated(kaggle, client, fault):
    kaggle.fail("SaveKernel", fault)
    with pytest.raises(Ambiguous, match="running this again is safe"):
        client.kernels.push(META, "text", MARK)
    assert (kaggle.count("SaveKernel"), len(kaggle.kernels["tester/aml-align"])) == (1, 0)


def test_a_push_by_somebody_else_at_the_same_time_is_not_taken_for_ours(kaggle, client):
    client.kernels.push(META, "first", MARK)
    kaggle.fail("SaveKernel", Fault(drop="before"))
    other = kaggle.rpc

    def meanwhile(method: str, body: dict) -> object:
        answer = other(method, body)
        if method == "GetKernel" and kaggle.count("GetKernel") == 2:
            kaggle.rpc_SaveKernel({"slug": "tester/aml-align", "text": "theirs"})
        return answer

    kaggle.rpc = meanwhile
    with pytest.raises(Ambiguous):
        client.kernels.push(META, "ours", "# order 2")


def test_a_rate_limited_push_is_repeated_since_it_did_not_happen(kaggle, client):
    kaggle.fail("SaveKernel", Fault(429, retry_after="0"))
    assert client.kernels.push(META, "text", MARK).number == 1


def test_an_outcome_that_cannot_be_looked_up_is_told(kaggle, client):
    kaggle.fail("GetKernel", *[Fault(503)] * 200)
    kaggle.fail("SaveKernel", Fault(drop="after"))
    with pytest.raises(Ambiguous, match="look again before you repeat it"):
        client.kernels.push(META, "text", MARK)
    assert kaggle.count("SaveKernel") == 1


def test_an_answer_without_its_number_is_looked_up(kaggle, client, tmp_path):
    kaggle.fail("SaveKernel", Fault(json={}))
    with pytest.raises(Ambiguous, match="without naming a version"):
        client.kernels.push(META, "text", MARK)
    kaggle.fail("CreateSubmission", Fault(json={"message": "Successfully submitted"}))
    with pytest.raises(Ambiguous, match="without giving a reference"):
        client.competitions.submit_file(COMPETITION, write(tmp_path / "s.csv", b"id\n"), "mine", "mine")
    kaggle.fail("CreateSubmission", Fault(json={"message": "Successfully submitted"}, after=True))
    ref = client.competitions.submit_file(COMPETITION, tmp_path / "s.csv", "mine", "mine")
    assert [state.ref for state in kaggle.competitions[COMPETITION].submissions] == [ref]


@faults(AMBIGUOUS)
def test_a_submission_that_happened_is_found_not_repeated(kaggle, client, fault, tmp_path):
    kaggle.fail("CreateSubmission", fault)
    ref = client.competitions.submit_file(COMPETITION, write(tmp_path / "s.csv", b"id\n"), "mine", "mine")
    assert [state.ref for state in kaggle.competitions[COMPETITION].submissions] == [ref]


@faults(BEFORE)
def test_a_submission_that_did_not_happen_is_told_not_repeated(kaggle, client, fault, tmp_path):
    client.competitions.submit_file(COMPETITION, write(tmp_path / "s.csv", b"id\n"), "mine", "mine")
    kaggle.fail("CreateSubmission", fault)
    with pytest.raises(Ambiguous, match="running this again is safe"):
        client.competitions.submit_file(COMPETITION, tmp_path / "s.csv", "again", "again")
    assert len(kaggle.competitions[COMPETITION].submissions) == 1


@faults(AMBIGUOUS)
def test_a_dataset_that_was_made_is_found_not_repeated(kaggle, client, fault, tmp_path):
    file = write(tmp_path / "a.bin", b"abc")
    kaggle.fail("CreateDataset", fault)
    assert client.datasets.create("tester/weights", "weights", "other", [file]) == 1
    client.datasets.status("tester/weights")
    kaggle.fail("CreateDatasetVersion", fault)
    assert client.datasets.create_version("tester/weights", "more", [file]) == 2
    assert (kaggle.count("CreateDataset"), len(kaggle.datasets["tester/weights"].versions)) == (1, 2)


@faults(BEFORE)
def test_a_dataset_that_was_not_made_is_told_not_repeated(kaggle, client, fault, tmp_path):
    kaggle.fail("CreateDataset", fault)
    with pytest.raises(Ambiguous, match="running this again is safe"):
        client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", b"abc")])
    assert kaggle.datasets == {}


def test_a_dataset_name_in_use_is_a_conflict(kaggle, client, tmp_path):
    kaggle.add_dataset("tester/weights", {})
    with pytest.raises(Conflict, match="in use"):
        client.datasets.create("tester/weights", "weights", "other", [write(tmp_path / "a.bin", b"abc")])


# ---- names ----


@pytest.mark.parametrize("ref", ["tester", "a/b/c", "/b", "a/"])
def test_a_ref_is_owner_and_slug(ref):
    with pytest.raises(InputError, match="is not owner/slug"):
        split_ref(ref)
