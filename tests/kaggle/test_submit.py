"""submit: a wrong csv never leaves, a right one is submitted once, and its score ends up in the record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import submit
from kaggle_runs import competition_files, write_tree
from lib import record
from lib.data import KNOWN
from lib.jobs.submission import read_message
from lib.project import REPO, sha256_of
from stand_in import Fault, Plan, metric_score

SLUG = "aml-competition"
FILES, VECTORS = competition_files()
IDS = np.array(sorted(VECTORS))
RIGHT = np.array([VECTORS[i] for i in IDS], np.float32)
RIGHT /= np.linalg.norm(RIGHT, axis=1, keepdims=True)  # of one length: the raw dot product ranks each first
SOLUTION = dict(zip(IDS.tolist(), RIGHT.tolist(), strict=True))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_tree(tmp_path / "data", {"test/test/test.clean.npz": FILES["test/test/test.clean.npz"]})


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
    kaggle.competitions[SLUG].score = metric_score(kernel, SOLUTION)
    return kaggle.competitions[SLUG]


@pytest.fixture
def go(tool, competition, run_folder, data, tmp_path):
    def run(*arguments: object, csv: Path | None = run_folder):
        return tool(submit.main, *([csv] if csv else []), "--runs", tmp_path / "runs", "--data", data, *arguments)

    return run


def events(tmp_path) -> list[str]:
    return [entry["event"] for entry in record.read(tmp_path / "runs")]


# ---- what a submission is ----


def test_a_submission_is_scored_by_the_real_metric_and_recorded(go, competition, tmp_path, run_folder, kernel):
    done = go()
    assert done.code == 0
    assert "public score 1.0" in done.out
    assert "validation 0.7500 +- 0.0070" in done.out
    assert "5 submissions left today" in done.err
    assert "4 submissions left today" in done.out
    made, scored = (record.find(tmp_path / "runs", event=event)[0] for event in ("submitted", "scored"))
    digest = sha256_of(run_folder / kernel.SUBMISSION)
    assert (made["run"], made["sha256"], made["validation"], made["competition"]) == ("align-1", digest, 0.75, SLUG)
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


def test_json_is_all_there_is_on_stdout(go):
    done = go("--json")
    assert json.loads(done.out)["public"] == 1.0
    assert done.code == 0


def test_a_csv_by_its_path_without_a_run_around_it(go, tmp_path, kernel, competition):
    kernel.write_submission(tmp_path / "mine.csv", IDS, RIGHT)
    assert go(csv=tmp_path / "mine.csv").code == 0
    assert "val MRR" not in competition.submissions[0].description


def test_a_new_reference_that_cannot_be_read_yet_is_pending(go, competition):
    competition.missing_after, competition.score_after = 2, 3
    assert go().code == 0


def test_without_the_test_set_the_csv_is_checked_for_itself(go, tmp_path, kernel, monkeypatch, competition):
    monkeypatch.setattr("lib.jobs.submission.IMAGE_DIM", RIGHT.shape[1])
    done = go("--data", tmp_path / "nowhere")
    assert done.code == 0
    assert f"checked for itself ({len(IDS)} ids of its own, 16 numbers each)" in done.err


# ---- a csv that must not leave ----


def broken(name: str) -> str:
    rows = [f'{i},"{json.dumps([round(float(x), 4) for x in RIGHT[n]])}"' for n, i in enumerate(IDS)]
    lines = {
        "header": ["id,embeddings", *rows],
        "missing id": ["id,embedding", *rows[:7], *rows[8:]],
        "dimension": ["id,embedding", '1,"[1.0, 2.0]"', *rows[1:]],
        "NaN": ["id,embedding", f'1,"{json.dumps([float("nan")] * RIGHT.shape[1])}"', *rows[1:]],
        "no id": ["id,embedding", "one,two"],
        "empty": [],
    }[name]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [("header", "id,embeddings"), ("missing id", "8"), ("dimension", "16"), ("NaN", "NaN"), ("empty", "header")],
)
@pytest.mark.parametrize("with_data", [True, False])
def test_a_wrong_csv_is_refused_before_anything_is_sent(go, kaggle, tmp_path, monkeypatch, name, said, with_data):
    monkeypatch.setattr("lib.jobs.submission.IMAGE_DIM", RIGHT.shape[1])
    csv = tmp_path / "wrong.csv"
    csv.write_text(broken(name))
    done = go(*([] if with_data else ["--data", tmp_path / "nowhere"]), csv=csv)
    assert done.code == 2
    assert done.error.startswith(f"error: {csv}")
    assert said in done.error
    assert kaggle.calls == []
    assert events(tmp_path) == []


def test_lines_without_an_id_and_a_missing_file_are_named(go, tmp_path):
    (tmp_path / "wrong.csv").write_text(broken("no id"))
    assert (
        "line 2 does not begin with an integer id" in go("--data", tmp_path, csv=tmp_path / "wrong.csv").error
        or "expected id 1" in go(csv=tmp_path / "wrong.csv").error
    )
    assert "no such file" in go(csv=tmp_path / "none").error


def test_a_csv_that_was_changed_after_its_run_is_refused(go, run_folder, kernel, kaggle):
    kernel.write_submission(run_folder / kernel.SUBMISSION, IDS, RIGHT * 2)
    done = go()
    assert done.code == 2
    assert "was changed after the run" in done.error
    assert kaggle.calls == []


@pytest.mark.parametrize(
    ("digest", "slug", "code"),
    [
        ("0" * 64, SLUG, 2),
        (next(known.sha256 for name, known in KNOWN.items() if name.endswith("clean.npz")), SLUG, 0),
        ("0" * 64, "another-competition", 0),
    ],
)
def test_a_csv_belongs_to_the_competition_whose_captions_it_answers(go, run_folder, kernel, kaggle, digest, slug, code):
    """The drawn sample's csv is refused before credentials are asked for."""
    kaggle.competitions["another-competition"] = kaggle.competitions[SLUG]
    write_manifest(run_folder, kernel, {"test.clean.npz": {"sha256": digest}})
    done = go("--competition", slug)
    assert done.code == code
    assert code == 0 or ("answers other test captions than those of aml-competition" in done.error and not kaggle.calls)


# ---- once ----


@pytest.mark.parametrize("lost", [False, True])
def test_the_same_bytes_are_refused_also_without_the_record(go, competition, tmp_path, lost):
    go()
    if lost:
        (tmp_path / "runs" / record.RECORD).unlink()
    done = go()
    assert done.code == 2
    assert "submitted before as" in done.error
    assert "--again" in done.error
    assert len(competition.submissions) == 1
    assert go("--again").code == 0
    assert len(competition.submissions) == 2


def test_other_bytes_are_not_refused(go, competition, run_folder, kernel):
    go()
    kernel.write_submission(run_folder / kernel.SUBMISSION, IDS, RIGHT + 1)
    write_manifest(run_folder, kernel)
    assert go().code == 0
    assert len(competition.submissions) == 2


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize("place", ["record_submitted", "scored"])
def test_an_interrupted_run_is_taken_up_not_repeated(go, competition, tmp_path, monkeypatch, place, again):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"lib.jobs.submission.{place}", interrupt)
        assert go(*again).code == 130
    done = go(*again)
    assert (done.code, len(competition.submissions)) == (0, 1)
    assert "going on with it" in done.err
    assert events(tmp_path) == ["submitting", "submitted", "scored"]
    assert go().code == 2


@pytest.mark.parametrize("fault", [Fault(drop="after"), Fault(503, after=True), Fault(truncate=4)])
def test_a_lost_answer_is_no_second_submission(go, kaggle, competition, fault):
    kaggle.fail("CreateSubmission", fault)
    assert go().code == 0
    assert (len(competition.submissions), kaggle.count("CreateSubmission")) == (1, 1)


@pytest.mark.parametrize("fault", [Fault(drop="before"), Fault(503), Fault(502, html=True), Fault(silent=0.6)])
def test_a_submission_that_did_not_happen_is_made_by_the_next_run(go, kaggle, competition, fault):
    kaggle.fail("CreateSubmission", fault)
    done = go()
    assert done.code == 1
    assert "running this again is safe" in done.error
    assert competition.submissions == []
    assert go().code == 0
    assert len(competition.submissions) == 1


def test_one_that_happened_after_all_is_found_by_the_next_run(go, kaggle, competition):
    kaggle.fail("CreateSubmission", Fault(drop="after"))
    kaggle.fail("ListSubmissions", None, None, *[Fault(503)] * 200)
    done = go()
    assert done.code == 1
    assert "look again before you repeat it" in done.error
    kaggle.faults.clear()
    assert go().code == 0
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
def test_passing_faults_are_retried(go, kaggle, competition, call, fault, run_folder, kernel):
    kaggle.fail(call, fault)
    assert go().code == 0
    assert [state.data for state in competition.submissions] == [(run_folder / kernel.SUBMISSION).read_bytes()]


def test_an_expired_upload_is_begun_again(go, kaggle, competition):
    kaggle.fail("PUT blob", Fault(503, keep=5000))
    kaggle.fail("PUT probe", Fault(404))
    assert go().code == 0
    assert kaggle.count("StartSubmissionUpload") == 2
    assert len(competition.submissions) == 1


def test_a_failed_upload_submits_nothing(go, kaggle, competition, tmp_path):
    kaggle.fail("PUT blob", Fault(403, xml=True))
    done = go()
    assert done.code == 1
    assert "upload of pipeline_submission.csv" in done.error
    assert competition.submissions == []
    assert events(tmp_path) == ["submitting", "not_submitted"]
    assert go().code == 0


def test_no_submissions_left_today(go, kaggle, competition):
    competition.daily_limit = 1
    go()
    done = go("--again")
    assert done.code == 1
    assert "no submissions left today (1 made)" in done.error
    assert kaggle.count("CreateSubmission") == 1


def test_a_csv_that_kaggle_cannot_score(go, competition, tmp_path):
    def fail(data: bytes) -> float:
        raise ValueError("Submission must contain 1500 rows")

    competition.score = fail
    done = go()
    assert done.code == 1
    assert "scoring failed: Submission must contain 1500 rows" in done.error
    assert events(tmp_path)[-1] == "score_failed"


def test_a_score_that_does_not_come_is_waited_for_by_the_next_run(go, competition):
    competition.score_after = 50
    done = go("--timeout-minutes", "0.003")
    assert done.code == 1
    assert "not done after" in done.error
    competition.submissions[0].polls_left = 0
    assert go().code == 0
    assert len(competition.submissions) == 1


def test_unaccepted_rules_unknown_competition_and_wrong_key(go, competition, monkeypatch):
    competition.rules_accepted = False
    assert "competitions/aml-competition/rules" in go().error
    competition.rules_accepted = True
    done = go("--competition", "no-such")
    assert done.code == 2
    assert "no-such" in done.error
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    done = go()
    assert done.code == 2
    assert "credentials were refused" in done.error
    monkeypatch.delenv("KAGGLE_KEY")
    assert "KAGGLE_API_TOKEN" in go().error


@pytest.mark.parametrize(
    "arguments", [[], ["--kernel", "a/b"], ["x.csv", "--kernel", "a/b", "--version", "1"], ["x.csv", "--version", "1"]]
)
def test_a_csv_or_a_kernel_version(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        submit.parse(arguments)
    assert ended.value.code == 2


# ---- from a kernel's output ----


def push(kaggle, run_folder: Path, kernel) -> None:
    kaggle.plans = [Plan(outputs={path.name: path.read_bytes() for path in run_folder.iterdir()})]
    kaggle.rpc("SaveKernel", {"slug": "tester/aml-align", "text": "print()"})


def test_the_output_of_a_kernel_version_is_submitted_on_kaggle(go, kaggle, competition, run_folder, kernel, tmp_path):
    push(kaggle, run_folder, kernel)
    assert go("--kernel", "tester/aml-align", "--version", "1", csv=None).code == 0
    assert kaggle.count("CreateCodeSubmission") == 1
    assert kaggle.count("StartSubmissionUpload") == 0
    told = read_message(competition.submissions[0].description)
    assert (told["kernel"], told["version"], told["validation"]) == ("tester/aml-align", "1", 0.75)
    assert go("--kernel", "tester/aml-align", "--version", "1", csv=None).code == 2


def test_a_refused_kernel_submission_names_the_other_way(go, kaggle, run_folder, kernel):
    push(kaggle, run_folder, kernel)
    kaggle.fail("CreateCodeSubmission", Fault(400, "This is not a code competition"))
    done = go("--kernel", "tester/aml-align", "--version", "1", csv=None)
    assert done.code == 1
    assert "not a code competition" in done.error
    assert "python tools/submit.py " in done.error


def test_a_kernel_version_that_is_not_there(go, kaggle, run_folder, kernel):
    push(kaggle, run_folder, kernel)
    done = go("--kernel", "tester/aml-align", "--version", "9", csv=None)
    assert done.code == 2
    assert "version 9" in done.error
    assert go("--kernel", "tester/none", "--version", "1", csv=None).code == 2


def test_help_has_an_example(run_tool_process):
    done = run_tool_process("submit", "--help")
    assert done.returncode == 0
    assert "python tools/submit.py runs/" in done.stdout


# ---- an unreliable server ----


def test_a_killed_submission_whose_history_lags_is_found(go, kaggle, competition, monkeypatch):
    kaggle.habits.history_lag = 60
    with monkeypatch.context() as patched:
        patched.setattr("lib.jobs.submission.record_submitted", interrupt)
        assert go().code == 130
    assert go().code == 0
    assert len(competition.submissions) == 1


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_one_that_the_history_hides_but_the_count_tells_of_is_not_repeated(go, kaggle, competition, monkeypatch):
    kaggle.habits.history_lag = 10**7
    with monkeypatch.context() as patched:
        patched.setattr("lib.jobs.submission.record_submitted", interrupt)
        assert go().code == 130
    done = go()
    assert done.code == 1
    assert "look at https" in done.error
    assert "--again submits it anew" in done.error
    assert len(competition.submissions) == 1
    assert go("--again").code == 0
    assert len(competition.submissions) == 2


@pytest.mark.slow
def test_without_a_count_there_is_no_proof(go, kaggle, competition):
    kaggle.fail("CreateSubmission", Fault(drop="before"))
    assert go().code == 1
    kaggle.fail("GetSubmissionLimits", *[Fault(500)] * 100)
    done = go()
    assert done.code == 1
    assert "--again submits it anew" in done.error
    assert competition.submissions == []


def test_a_message_that_comes_back_cut_is_known_again(go, kaggle, competition, tmp_path):
    kaggle.habits.description_limit = 30
    kaggle.fail("CreateSubmission", Fault(drop="after"))
    assert go().code == 0
    (tmp_path / "runs" / record.RECORD).unlink()
    done = go()
    assert done.code == 2
    assert "submitted before as" in done.error
    assert len(competition.submissions) == 1


def test_limits_that_fail_neither_stop_the_submission_nor_lose_its_score(go, kaggle, competition):
    kaggle.fail("GetSubmissionLimits", *[Fault(500)] * 100)
    done = go()
    assert done.code == 0
    assert "public score 1.0" in done.out
    assert "the submissions left are not known" in done.out


def test_a_score_is_waited_for_through_minutes_of_failures(go, kaggle, competition):
    kaggle.fail("GetSubmission", *[Fault(503)] * 40, *[Fault(404)] * 5, Fault(json={"ref": 1, "status": "JUDGED"}))
    assert go().code == 0
    assert len(competition.submissions) == 1


@pytest.mark.parametrize("score", [float("nan"), None])
def test_complete_without_a_score_is_no_success(go, competition, score):
    competition.score = lambda data: score
    done = go("--timeout-minutes", "2")
    assert done.code == 1
    assert "score of submission" in done.error


def test_the_total_limit_is_told_as_such(go, competition):
    competition.total_limit = 1
    go()
    done = go("--again")
    assert done.code == 1
    assert "total number of submissions is used up (1 made)" in done.error


def test_a_bare_400_names_the_likely_causes(go, kaggle):
    kaggle.fail("CreateSubmission", Fault(400, "Bad Request"))
    done = go()
    assert done.code == 1
    assert "rules are not accepted" in done.error
    assert "has closed" in done.error


def test_two_submits_of_the_same_make_one(run_folder, competition, data, tmp_path):
    command = [
        sys.executable,
        str(REPO / "tools" / "submit.py"),
        str(run_folder),
        "--runs",
        str(tmp_path / "runs"),
        "--data",
        str(data),
    ]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[1] for one in both]
    assert sorted(one.returncode for one in both) in ([0, 0], [0, 2]), said
    assert len(competition.submissions) == 1
