"""A stand-in for Kaggle on 127.0.0.1: the parts that the tools use, with state, injectable faults and bad habits.

    with StandIn(tmp_path / "server") as kaggle:        # or the fixture `kaggle` of conftest.py
        env = kaggle.environment(home)                  # for a sub-process; the fixture sets it for this process too
        kaggle.fail("SaveKernel", Fault(drop="after"))  # the next push takes effect, then the connection breaks
        kaggle.habits.history_lag = 20                  # a new submission shows in the history after 20 s
        ...
        assert kaggle.count("SaveKernel") == 1

The real client reaches it by environment variables alone (KAGGLE_API_ENVIRONMENT=LOCALHOST and HTTP_PROXY), so
request lines come in absolute form. Names of calls, for `fail`, `calls` and `count`: the RPC methods ("GetKernel",
"SaveKernel", "CreateSubmission", ...) and "PUT blob" (uploads), "PUT probe" (how far an upload got), "GET data"
(competition files), "GET output" (kernel outputs), "GET log" (the log stream).

A `Fault` is one thing that goes wrong in one call; `Habits` is how the server is, for as long as a test wants it so.
Seconds in it are those of the tools' waits: at PACE, 1 s of Kaggle's time takes 2 ms here and there alike.

State, all of it open to a test:
  kaggle.user, key, token        the credentials it accepts
  kaggle.competitions[slug]      Competition: files {name: bytes}, rules_accepted, daily_limit, score (csv -> float,
                                 see metric_score), others {team: score}, score_after (polls), missing_after (404s of a
                                 new ref), zip_files (names served as name.zip), submissions [SubmissionState],
                                 private_board {team: score} once it is open, total_limit
  kaggle.datasets["owner/slug"]  Dataset: versions [DatasetVersion], title, license, private, request
  kaggle.ready_after             status polls until a version is READY; add_dataset(ref, {name: bytes}) is READY at once
  kaggle.kernels["owner/slug"]   list of KernelRun, one a version: request (as sent), text, plan, status, outputs, log
  kaggle.plans                   list of Plan, one for each coming push, the last one stays: queued, running (polls in
                                 each state), outcome, failure, outputs {name: bytes}, log; run=True runs the script
  kaggle.mount_layout            "new" (input/competitions/slug, input/datasets/owner/slug, input/notebooks/owner/slug)
                                 or "old" (input/slug)
  kaggle.mount(request, folder)  mounts the sources of a push as Kaggle does: zips unpacked, of a kernel the output of
                                 its newest complete version
  kaggle.push_error              SaveKernel answers 200 with this error (quota, verification)
  kaggle.session_limit           sessions at once; SaveKernel refuses one more, as Kaggle words it
  kaggle.gpu_used_hours, gpu_total_hours, output_page (files a page), url_lifetime (seconds)
  kaggle.expire_urls()           every signed URL given out so far now answers 403 with XML
  kaggle.expire_uploads()        every upload that is not complete is forgotten: 404
A script that is run gets `--input <mount> --output <working>` appended, since tests cannot write to /kaggle.
"""

from stand_in.common import PACE, Fault, Habits
from stand_in.competitions import Competition, SubmissionState, metric_score
from stand_in.datasets import Dataset, DatasetVersion
from stand_in.kernels import KernelRun, Plan
from stand_in.server import StandIn

__all__ = [
    "PACE",
    "Competition",
    "Dataset",
    "DatasetVersion",
    "Fault",
    "Habits",
    "KernelRun",
    "Plan",
    "StandIn",
    "SubmissionState",
    "metric_score",
]
