"""submit: a wrong csv never leaves, a right one is submitted once, and its score ends up in the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from account import COMPETITION
from drawn import TEST, drawn_competition, write_tree
from forked import Ended, failed, succeeded
from lib import record
from lib.data import KNOWN
from lib.jobs.submission import Entry, read_message
from lib.project import sha256_of
from stand_in import Fault, Plan, metric_score
from stopping import stop_at

FILES, VECTORS = drawn_competition()
IDS = np.array(sorted(VECTORS))
RIGHT = np.array([VECTORS[i] for i in IDS], np.float32)
RIGHT /= np.linalg.norm(RIGHT, axis=1, keepdims=True)  # of one length: the raw dot product ranks each first
SOLUTION = dict(zip(IDS.tolist(), RIGHT.tolist(), strict=True))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_tree(tmp_path / "data", {TEST: FILES[TEST]})


@pytest.fixture
def run_folder(tmp_path, kernel) -> Path:
    """A finished run whose predictions are the images themselves: the metric gives 1."""
    folder = tmp_path / "runs" / "align-1"
    folder.mkdir(parents=True)
    kernel.write_submission(folder / kernel.SUBMISSION, IDS, RIGHT)
    (folder / kernel.METRICS).write_text(json.dumps({"validation": {"pool100_raw": {"mrr": 0.75, "mrr_se": 0.007}}}))
    write_manifest(folder, kernel)
    return folder


def write_manifest(folder: Path, kernel, inputs: dict | None = None) -> None:
    outputs = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (kernel.SUBMISSION, kernel.METRICS)
    }
    (folder / kernel.MANIFEST).write_text(json.dumps({"complete": True, "outputs": outputs, "inputs": inputs or {}}))


@pytest.fixture
def competition(kaggle, kernel):
    kaggle.competitions[COMPETITION].score = metric_score(kernel, SOLUTION)
    return kaggle.competitions[COMPETITION]


@pytest.fixture
def submit(tool, competition, run_folder, data, tmp_path) -> Callable[..., Ended]:
    """The tool, on that run or another csv."""

    def run(*arguments: object, csv: Path | None = run_folder) -> Ended:
        return tool("submit", *([csv] if csv else []), "--runs", tmp_path / "runs", "--data", data, *arguments)

    return run


def events(tmp_path) -> list[str]:
    return [entry["event"] for entry in record.read(tmp_path / "runs")]


# ---- what a submission is ----


def test_a_submission_is_scored_by_the_real_metric_and_recorded(submit, competition, tmp_path, run_folder, kernel):
    done = succeeded(submit())
    assert "public score 1.0" in done.stdout
    assert "validation 0.7500 +- 0.0070" in done.stdout
    assert "5 submissions left today" in done.stderr
    assert "4 submissions left today" in done.stdout
    made, scored = (record.find(tmp_path / "runs", event=event)[0] for event in ("submitted", "scored"))
    digest = sha256_of(run_folder / kernel.SUBMISSION)
    assert (made["run"], made["sha256"], made["validation"], made["competition"]) == (
        "align-1",
        digest,
        0.75,
        COMPETITION,
    )
    assert (scored["ref"], scored["public"]) == (made["ref"], 1.0)
    assert read_message(competition.submissions[0].description) == {
        "run": "align-1",
        "commit": made["commit"],
        "dirty": made["dirty"],
        "validation": 0.75,
        "validation_se": 0.007,
        "kernel": None,
        "version": None,
        "sha": digest[:12],
    }


def test_json_is_all_there_is_on_stdout(submit):
    assert json.loads(succeeded(submit("--json")).stdout)["public"] == 1.0


def test_a_csv_by_its_path_without_a_run_around_it(submit, tmp_path, kernel, competition):
    kernel.write_submission(tmp_path / "mine.csv", IDS, RIGHT)
    succeeded(submit(csv=tmp_path / "mine.csv"))
    assert "val MRR" not in competition.submissions[0].description


def test_a_new_reference_that_cannot_be_read_yet_is_pending(submit, competition):
    competition.missing_after, competition.score_after = 2, 3
    succeeded(submit())


def test_without_the_test_set_the_csv_is_checked_for_itself(submit, tmp_path, monkeypatch, competition):
    monkeypatch.setattr("lib.jobs.submission.IMAGE_DIM", RIGHT.shape[1])
    done = succeeded(submit("--data", tmp_path / "nowhere"))
    assert f"checked for itself ({len(IDS)} ids of its own, {RIGHT.shape[1]} numbers each)" in done.stderr


# ---- a csv that must not leave ----


def broken(name: str) -> str:
    rows = [f'{i},"{json.dumps([round(float(x), 4) for x in RIGHT[n]])}"' for n, i in enumerate(IDS)]
    lines = {
        "header": ["id,embeddings", *rows],
        "missing id": ["id,embedding", *rows[:7], *rows[8:]],
        "dimension": ["id,embedding", '1,"[1.0, 2.0]"', *rows[1:]],
        "NaN": ["id,embedding", f'1,"{json.dumps([float("nan")] * RIGHT.shape[1])}"', *rows[1:]],
        "no id": ["id,embedding", "one,two"],
        "no rows": ["id,embedding"],
        "empty": [],
    }[name]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("header", "id,embeddings"),
        ("missing id", "8"),
        ("dimension", "48"),
        ("NaN", "NaN"),
        ("no rows", "rows"),
        ("empty", "header"),
    ],
)
@pytest.mark.parametrize("with_data", [True, False])
def test_a_wrong_csv_is_refused_before_anything_is_sent(submit, kaggle, tmp_path, monkeypatch, name, said, with_data):
    monkeypatch.setattr("lib.jobs.submission.IMAGE_DIM", RIGHT.shape[1])
    csv = tmp_path / "wrong.csv"
    csv.write_text(broken(name))
    done = failed(submit(*([] if with_data else ["--data", tmp_path / "nowhere"]), csv=csv), 2)
    assert done.error.startswith(f"error: {csv}")
    assert said in done.error
    assert kaggle.calls == []
    assert events(tmp_path) == []


def test_lines_without_an_id_and_a_missing_file_are_named(submit, tmp_path):
    (tmp_path / "wrong.csv").write_text(broken("no id"))
    checked_for_itself = submit("--data", tmp_path / "nowhere", csv=tmp_path / "wrong.csv")
    failed(checked_for_itself, 2, "line 2 does not begin with an integer id")
    failed(submit(csv=tmp_path / "wrong.csv"), 2, "expected id 1 ")
    failed(submit(csv=tmp_path / "none"), 2, "no such file")


def test_a_csv_that_was_changed_after_its_run_is_refused(submit, run_folder, kernel, kaggle):
    kernel.write_submission(run_folder / kernel.SUBMISSION, IDS, RIGHT * 2)
    failed(submit(), 2, "was changed after the run")
    assert kaggle.calls == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", {"validation": 0.8}),
        ("metrics.json", {"validation": {"pool100_raw": 0.8}}),
        ("manifest.json", {"outputs": ["a.csv"], "inputs": ["b.npz"]}),
        ("manifest.json", {"outputs": {}, "inputs": {"test.clean.npz": "c"}}),
    ],
)
def test_files_of_these_names_that_are_no_run_s_say_nothing_of_a_csv(submit, kernel, tmp_path, name, content):
    mine = write_tree(tmp_path / "mine", {name: json.dumps(content).encode()})
    kernel.write_submission(mine / "mine.csv", IDS, RIGHT)
    assert json.loads(succeeded(submit("--json", csv=mine / "mine.csv")).stdout)["validation"] is None


def test_another_csv_in_a_run_s_folder_does_not_get_the_run_s_score(submit, run_folder, kernel, kaggle):
    kernel.write_submission(run_folder / "mine.csv", IDS, RIGHT * 2)
    failed(submit(csv=run_folder / "mine.csv"), 2, r"mine\.csv: is no output of the run, by manifest\.json beside it")
    assert kaggle.calls == []


def test_a_csv_that_answers_other_captions_is_refused_before_credentials_are_asked_for(
    submit, run_folder, kernel, kaggle
):
    """That of the drawn sample, say."""
    write_manifest(run_folder, kernel, {"test.clean.npz": {"sha256": "0" * 64}})
    failed(submit(), 2, "answers other test captions than those of aml-competition")
    assert kaggle.calls == []


@pytest.mark.parametrize(("digest", "slug"), [(KNOWN[TEST].sha256, COMPETITION), ("0" * 64, "another-competition")])
def test_a_csv_that_answers_the_competition_s_captions_is_submitted(submit, run_folder, kernel, kaggle, digest, slug):
    kaggle.competitions["another-competition"] = kaggle.competitions[COMPETITION]
    write_manifest(run_folder, kernel, {"test.clean.npz": {"sha256": digest}})
    succeeded(submit("--competition", slug))


def test_a_csv_that_a_run_replaces_meanwhile_is_not_sent_under_the_other_s_name(
    submit, run_folder, kernel, competition, monkeypatch
):
    check = Entry.made_before

    def meanwhile(entry: Entry) -> list[int]:
        kernel.write_submission(run_folder / kernel.SUBMISSION, IDS, RIGHT * 2)
        write_manifest(run_folder, kernel)
        return check(entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entry, "made_before", meanwhile)
        failed(submit(), 2, "was changed after its check; run this again")
    assert competition.submissions == []
    succeeded(submit())


# ---- once ----


@pytest.mark.parametrize("lost", [False, True])
def test_the_same_bytes_are_refused_also_without_the_record(submit, competition, tmp_path, lost):
    succeeded(submit())
    if lost:
        (tmp_path / "runs" / record.RECORD).unlink()
    done = failed(submit(), 2, "submitted before as")
    assert "--again" in done.error
    assert len(competition.submissions) == 1
    succeeded(submit("--again"))
    assert len(competition.submissions) == 2


def test_other_bytes_are_not_refused(submit, competition, run_folder, kernel):
    succeeded(submit())
    kernel.write_submission(run_folder / kernel.SUBMISSION, IDS, RIGHT + 1)
    write_manifest(run_folder, kernel)
    succeeded(submit())
    assert len(competition.submissions) == 2


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize("place", ["record_submitted", "scored"])
def test_an_interrupted_run_is_taken_up_not_repeated(submit, competition, tmp_path, place, again):
    with stop_at(Entry, place):
        assert submit(*again).returncode == 130
    done = succeeded(submit(*again))
    assert len(competition.submissions) == 1
    assert "going on with it" in done.stderr
    assert events(tmp_path) == ["submitting", "submitted", "scored"]
    failed(submit(), 2)


@pytest.mark.parametrize("fault", [Fault(drop="after"), Fault(503, after=True), Fault(truncate=4)])
def test_a_lost_answer_is_no_second_submission(submit, kaggle, competition, fault):
    kaggle.fail("CreateSubmission", fault)
    succeeded(submit())
    assert (len(competition.submissions), kaggle.count("CreateSubmission")) == (1, 1)


@pytest.mark.parametrize("fault", [Fault(drop="before"), Fault(503), Fault(502, html=True), Fault(silent=0.6)])
def test_a_submission_that_did_not_happen_is_made_by_the_next_run(submit, kaggle, competition, fault):
    kaggle.fail("CreateSubmission", fault)
    failed(submit(), 1, "running this again is safe")
    assert competition.submissions == []
    succeeded(submit())
    assert len(competition.submissions) == 1


def test_one_that_happened_after_all_is_found_by_the_next_run(submit, kaggle, competition):
    kaggle.fail("CreateSubmission", Fault(drop="after"))
    kaggle.fail("ListSubmissions", None, None, *[Fault(503)] * 200)
    failed(submit(), 1, "look again before you repeat it")
    kaggle.faults.clear()
    succeeded(submit())
    assert len(competition.submissions) == 1


# ---- the way there ----


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("PUT blob", Fault(503, keep=5000)),
        ("PUT blob", Fault(drop="before")),
        ("StartSubmissionUpload", Fault(503)),
        ("ListSubmissions", Fault(429, retry_after="0")),
        ("GetSubmission", Fault(drop="before")),
        ("GetSubmission", Fault(503)),
        ("GetSubmissionLimits", Fault(truncate=3)),
        ("CreateSubmission", Fault(429)),
        ("PUT blob", Fault(silent=0.6)),
        ("GetSubmission", Fault(silent=0.6)),
        ("GetSubmission", Fault(html=True)),
    ],
)
def test_passing_faults_are_retried(submit, kaggle, competition, call, fault, run_folder, kernel):
    kaggle.fail(call, fault)
    succeeded(submit())
    assert [state.data for state in competition.submissions] == [(run_folder / kernel.SUBMISSION).read_bytes()]


def test_an_expired_upload_is_begun_again(submit, kaggle, competition):
    kaggle.fail("PUT blob", Fault(503, keep=5000))
    kaggle.fail("PUT probe", Fault(404))
    succeeded(submit())
    assert kaggle.count("StartSubmissionUpload") == 2
    assert len(competition.submissions) == 1


def test_a_failed_upload_submits_nothing(submit, kaggle, competition, tmp_path):
    kaggle.fail("PUT blob", Fault(403, xml=True))
    failed(submit(), 1, r"upload of pipeline_submission\.csv")
    assert competition.submissions == []
    assert events(tmp_path) == ["submitting", "not_submitted"]
    succeeded(submit())


def test_no_submissions_left_today(submit, kaggle, competition):
    competition.daily_limit = 1
    succeeded(submit())
    failed(submit("--again"), 1, r"no submissions left today \(1 made\)")
    assert kaggle.count("CreateSubmission") == 1


def test_a_csv_that_kaggle_cannot_score(submit, competition, tmp_path):
    def fail(data: bytes) -> float:
        raise ValueError("Submission must contain 1500 rows")

    competition.score = fail
    failed(submit(), 1, "scoring failed: Submission must contain 1500 rows")
    assert events(tmp_path)[-1] == "score_failed"


def test_a_score_that_does_not_come_is_waited_for_by_the_next_run(submit, competition):
    competition.score_after = 50
    failed(submit("--timeout-minutes", "0.003"), 1, "not done after")
    competition.submissions[0].polls_left = 0
    succeeded(submit())
    assert len(competition.submissions) == 1


def test_unaccepted_rules_name_the_page(submit, competition):
    competition.rules_accepted = False
    failed(submit(), 1, "competitions/aml-competition/rules")


def test_an_unknown_competition_is_named(submit):
    failed(submit("--competition", "no-such"), 2, "no-such")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run's folder"),
        (["x.csv", "--kernel", "a/b", "--version", "1"], "name a run's folder"),
        (["--kernel", "a/b"], "--kernel and --version go together"),
        (["x.csv", "--version", "1"], "--kernel and --version go together"),
    ],
)
def test_either_a_run_or_a_kernel_version_is_named(tool, arguments, message):
    done = failed(tool("submit", *arguments), 2, message)
    assert done.stderr.count("\n") == 1


# ---- from a kernel's output ----


def push(kaggle, run_folder: Path, kernel) -> None:
    kaggle.plans = [Plan(outputs={path.name: path.read_bytes() for path in run_folder.iterdir()})]
    kaggle.rpc("SaveKernel", {"slug": "tester/aml-align", "text": "print()"})


def test_the_output_of_a_kernel_version_is_submitted_on_kaggle(submit, kaggle, competition, run_folder, kernel):
    push(kaggle, run_folder, kernel)
    succeeded(submit("--kernel", "tester/aml-align", "--version", "1", csv=None))
    assert kaggle.count("CreateCodeSubmission") == 1
    assert kaggle.count("StartSubmissionUpload") == 0
    told = read_message(competition.submissions[0].description)
    assert (told["kernel"], told["version"], told["validation"]) == ("tester/aml-align", "1", 0.75)
    failed(submit("--kernel", "tester/aml-align", "--version", "1", csv=None), 2)


def test_a_refused_kernel_submission_names_the_other_way(submit, kaggle, run_folder, kernel):
    push(kaggle, run_folder, kernel)
    kaggle.fail("CreateCodeSubmission", Fault(400, "This is not a code competition"))
    done = failed(submit("--kernel", "tester/aml-align", "--version", "1", csv=None), 1, "not a code competition")
    assert "python tools/submit.py " in done.error


def test_a_kernel_version_that_is_not_there(submit, kaggle, run_folder, kernel):
    push(kaggle, run_folder, kernel)
    failed(submit("--kernel", "tester/aml-align", "--version", "9", csv=None), 2, "version 9")
    failed(submit("--kernel", "tester/none", "--version", "1", csv=None), 2)


# ---- an unreliable server ----


def test_a_killed_submission_whose_history_lags_is_found(submit, kaggle, competition):
    kaggle.habits.history_lag = 60
    with stop_at(Entry, "record_submitted"):
        assert submit().returncode == 130
    succeeded(submit())
    assert len(competition.submissions) == 1


@pytest.mark.slow
def test_one_that_the_history_hides_but_the_count_tells_of_is_not_repeated(submit, kaggle, competition):
    kaggle.habits.history_lag = 10**7
    with stop_at(Entry, "record_submitted"):
        assert submit().returncode == 130
    done = failed(submit(), 1, "look at https")
    assert "--again submits it anew" in done.error
    assert len(competition.submissions) == 1
    succeeded(submit("--again"))
    assert len(competition.submissions) == 2


@pytest.mark.slow
def test_without_a_count_there_is_no_proof(submit, kaggle, competition):
    kaggle.fail("CreateSubmission", Fault(drop="before"))
    failed(submit(), 1)
    kaggle.fail("GetSubmissionLimits", *[Fault(500)] * 100)
    failed(submit(), 1, "--again submits it anew")
    assert competition.submissions == []


def test_a_message_that_comes_back_cut_is_known_again(submit, kaggle, competition, tmp_path):
    kaggle.habits.description_limit = 30
    kaggle.fail("CreateSubmission", Fault(drop="after"))
    succeeded(submit())
    (tmp_path / "runs" / record.RECORD).unlink()
    failed(submit(), 2, "submitted before as")
    assert len(competition.submissions) == 1


def test_limits_that_fail_neither_stop_the_submission_nor_lose_its_score(submit, kaggle, competition):
    kaggle.fail("GetSubmissionLimits", *[Fault(500)] * 100)
    done = succeeded(submit())
    assert "public score 1.0" in done.stdout
    assert "the submissions left are not known" in done.stdout


@pytest.mark.slow
def test_a_score_is_waited_for_through_minutes_of_failures(submit, kaggle, competition):
    kaggle.fail("GetSubmission", *[Fault(503)] * 40, *[Fault(404)] * 5, Fault(json={"ref": 1, "status": "JUDGED"}))
    succeeded(submit())
    assert len(competition.submissions) == 1


@pytest.mark.parametrize("score", [float("nan"), None])
def test_complete_without_a_score_is_no_success(submit, competition, score):
    competition.score = lambda data: score
    failed(submit("--timeout-minutes", "2"), 1, "score of submission")


def test_the_total_limit_is_told_as_such(submit, competition):
    competition.total_limit = 1
    succeeded(submit())
    failed(submit("--again"), 1, r"total number of submissions is used up \(1 made\)")


def test_a_bare_400_names_the_likely_causes(submit, kaggle):
    kaggle.fail("CreateSubmission", Fault(400, "Bad Request"))
    done = failed(submit(), 1, "rules are not accepted")
    assert "has closed" in done.error


def test_two_submits_of_the_same_make_one(tool, run_folder, competition, data, tmp_path):
    command = ["submit", run_folder, "--runs", tmp_path / "runs", "--data", data]
    both = [one.wait() for one in [tool.start(*command) for _ in range(2)]]
    assert sorted(one.returncode for one in both) in ([0, 0], [0, 2]), both
    assert len(competition.submissions) == 1
