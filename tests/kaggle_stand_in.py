"""A stand-in for Kaggle on 127.0.0.1: the parts that the tools use, with state and injectable faults.

    with StandIn(tmp_path / "server") as kaggle:        # or the fixture `kaggle` of conftest.py
        env = kaggle.environment(home)                  # for a sub-process; the fixture sets it for this process too
        kaggle.fail("SaveKernel", Fault(drop="after"))  # the next push takes effect, then the connection breaks
        ...
        assert kaggle.count("SaveKernel") == 1

The real client reaches it by environment variables alone (KAGGLE_API_ENVIRONMENT=LOCALHOST and HTTP_PROXY), so
request lines come in absolute form. Names of calls, for `fail`, `calls` and `count`: the RPC methods ("GetKernel",
"SaveKernel", "CreateSubmission", ...) and "PUT blob" (uploads), "PUT probe" (how far an upload got), "GET data"
(competition files), "GET output" (kernel outputs), "GET log" (the log stream).

State, all of it open to a test:
  kaggle.user, key, token        the credentials it accepts
  kaggle.competitions[slug]      Competition: files {name: bytes}, rules_accepted, daily_limit, score (csv -> float,
                                 see metric_score), others {team: score}, score_after (polls), missing_after (404s of a
                                 new ref), zip_files (names served as name.zip), submissions [SubmissionState]
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
from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

NOW = "2026-11-23T12:00:00.000Z"


@dataclass
class Fault:
    """One thing that goes wrong in one call; see the fields."""

    status: int = 0  # answer this status ...
    message: str = "injected"  # ... with this message (200 with `code` in the body if as_code)
    as_code: bool = False
    retry_after: str = ""  # header of the answer
    html: bool = False  # an HTML page instead of JSON; with status 0: HTTP 200
    xml: bool = False  # the XML error page of the storage
    json: dict | None = None  # HTTP 200 with this body
    drop: str = ""  # "before" or "after" the effect: close the connection without an answer
    after: bool = False  # take effect, then answer as said above
    silent: float = 0.0  # say nothing for so many seconds, then drop the connection
    truncate: int | None = None  # announce the whole body, send so many bytes of it, close
    keep: int = 0  # PUT blob: bytes of the body that arrive before the fault


@dataclass
class DatasetVersion:
    files: dict[str, bytes]
    notes: str = ""
    polls_left: int = 0  # status polls until READY
    failed: bool = False

    def tree(self) -> dict[str, bytes]:
        """The files as Kaggle shows and mounts them: a zip is unpacked into a folder of its name."""
        tree = {}
        for name, data in self.files.items():
            if not name.endswith(".zip"):
                tree[name] = data
                continue
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                tree |= {f"{name[:-4]}/{member}": archive.read(member) for member in archive.namelist()
                         if not member.endswith("/")}
        return tree


@dataclass
class Dataset:
    title: str = ""
    license: str = ""
    private: bool = True
    versions: list[DatasetVersion] = field(default_factory=list)
    request: dict = field(default_factory=dict)  # of CreateDataset

    @property
    def current(self) -> int:
        """The newest READY version, 0 when there is none yet."""
        return max((n for n, version in enumerate(self.versions, 1) if version.polls_left <= 0 and not version.failed),
                   default=0)


@dataclass
class Plan:
    queued: int = 0  # status polls in QUEUED, then in RUNNING
    running: int = 0
    outcome: str = "COMPLETE"  # or ERROR, CANCEL_ACKNOWLEDGED
    failure: str = ""
    outputs: dict[str, bytes] = field(default_factory=dict)
    log: str = "started\nfinished\n"
    run: bool = False  # run the pushed script as a sub-process; outcome, outputs and log are then real


@dataclass
class KernelRun:
    request: dict
    plan: Plan
    polls: int = 0
    outputs: dict[str, bytes] = field(default_factory=dict)
    log: str = ""
    process: threading.Thread | None = None
    exit_code: int | None = None

    @property
    def text(self) -> str:
        return self.request.get("text", "")

    @property
    def status(self) -> str:
        if self.polls < self.plan.queued:
            return "QUEUED"
        if self.polls < self.plan.queued + self.plan.running or (self.process and self.process.is_alive()):
            return "RUNNING"
        if self.process:
            return "COMPLETE" if self.exit_code == 0 else "ERROR"
        return self.plan.outcome


@dataclass
class SubmissionState:
    ref: int
    file_name: str
    description: str
    data: bytes
    polls_left: int
    missing_left: int = 0
    public: float | None = None
    private: float | None = None
    error: str = ""

    def public_view(self) -> dict:
        done = self.polls_left <= 0
        view = {"ref": self.ref, "fileName": self.file_name, "date": NOW, "description": self.description,
                "totalBytes": len(self.data), "status": "PENDING", "publicScore": "", "privateScore": ""}
        if done and self.error:
            view |= {"status": "ERROR", "errorDescription": self.error}
        elif done:
            view |= {"status": "COMPLETE", "publicScore": f"{self.public:.5f}",
                     "privateScore": "" if self.private is None else f"{self.private:.5f}"}
        return view


@dataclass
class Competition:
    files: dict[str, bytes] = field(default_factory=dict)
    rules_accepted: bool = True
    daily_limit: int = 5
    score: Callable[[bytes], float] = lambda data: 0.5
    score_after: int = 1
    missing_after: int = 0
    others: dict[str, float] = field(default_factory=dict)
    zip_files: set[str] = field(default_factory=set)
    submissions: list[SubmissionState] = field(default_factory=list)


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def metric_score(kernel, solution: dict[int, list[float]]) -> Callable[[bytes], float]:
    """The competition's metric, of the kernel module: `solution` maps caption ids to image vectors."""
    import numpy as np

    def score(data: bytes) -> float:
        csv.field_size_limit(1 << 30)
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        ids = [int(row["id"]) for row in rows]
        if set(ids) != set(solution):
            raise ValueError("Submission must contain the ids of the test set")
        predictions = np.array([json.loads(row["embedding"]) for row in rows], np.float32)
        gallery = np.array([solution[i] for i in ids], np.float32)
        return float(kernel.retrieval_metrics(predictions, gallery)["mrr"])

    return score


class StandIn:
    """See the module's docstring."""

    def __init__(self, root: Path, user: str = "tester", key: str = "0123456789abcdef", token: str = "token-1") -> None:
        self.root, self.user, self.key, self.token = root, user, key, token
        self.competitions: dict[str, Competition] = {"aml-competition": Competition()}
        self.datasets: dict[str, Dataset] = {}
        self.kernels: dict[str, list[KernelRun]] = defaultdict(list)
        self.plans: list[Plan] = [Plan()]
        self.ready_after = 1
        self.mount_layout = "new"
        self.push_error = ""
        self.session_limit = 1000
        self.gpu_used_hours, self.gpu_total_hours = 1.5, 30.0
        self.output_page = 20
        self.url_lifetime = 3600.0
        self.calls: list[tuple[str, dict]] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self._blobs: dict[str, dict] = {}  # session -> {"name", "size", "data", "token"}
        self._urls: dict[str, tuple[float, bytes]] = {}  # signature -> (end of life, content)
        self._counter = 0
        self.lock = threading.RLock()

    # ---- life ----

    def __enter__(self) -> StandIn:
        self.root.mkdir(parents=True, exist_ok=True)
        handler = type("Handler", (Handler,), {"kaggle": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What brings the real client here, in a fresh HOME and TMPDIR; add to a clean environment."""
        for folder in (home, home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        return {"HOME": str(home), "TMPDIR": str(home / "tmp"), "KAGGLE_CONFIG_DIR": str(home / ".kaggle"),
                "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "HTTP_PROXY": f"http://127.0.0.1:{self.port}",
                "http_proxy": f"http://127.0.0.1:{self.port}", "KAGGLE_USERNAME": self.user, "KAGGLE_KEY": self.key,
                "NO_PROXY": "", "no_proxy": "", "ALIGN_TIMEOUT_SECONDS": "2", "ALIGN_RETRY_SECONDS": "0.02",
                "ALIGN_LOOK_SECONDS": "0.05", "ALIGN_LOOKS": "2", "ALIGN_POLL_SECONDS": "0.02",
                "ALIGN_POLL_LIMIT_SECONDS": "0.1"}

    # ---- what a test does ----

    def fail(self, call: str, *faults: Fault | None) -> None:
        """The next calls of this name meet these faults, in order; None stands for a call that goes well."""
        self.faults[call].extend(faults)

    def count(self, call: str) -> int:
        """How often this call was made."""
        return sum(1 for name, _ in self.calls if name == call)

    def add_dataset(self, ref: str, files: dict[str, bytes]) -> Dataset:
        """A dataset that is READY."""
        dataset = self.datasets.setdefault(ref, Dataset(title=ref))
        dataset.versions.append(DatasetVersion(files))
        return dataset

    def expire_urls(self) -> None:
        """Every signed URL given out so far is refused from now on."""
        self._urls.clear()

    def mount(self, request: dict, folder: Path) -> Path:
        """The inputs of a push below `folder`, as Kaggle lays them out."""
        new = self.mount_layout == "new"
        for slug in request.get("competitionDataSources", []):
            self._write_tree(folder / ("competitions/" if new else "") / slug, self.competitions[slug].files)
        for source in request.get("datasetDataSources", []):
            owner, slug = source.split("/")[:2]
            dataset = self.datasets[f"{owner}/{slug}"]
            tree = dataset.versions[dataset.current - 1].tree()
            self._write_tree(folder / (f"datasets/{owner}/{slug}" if new else slug), tree)
        for source in request.get("kernelDataSources", []):
            owner, slug = source.split("/")[:2]
            complete = [run for run in self.kernels[f"{owner}/{slug}"] if run.status == "COMPLETE"]
            for run in complete[-1:]:
                self._write_tree(folder / (f"notebooks/{owner}/{slug}" if new else slug), run.outputs)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def _write_tree(folder: Path, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    # ---- the service ----

    def rpc(self, method: str, body: dict) -> dict | Redirect:
        """Carry out a call by the method of the same name."""
        handler = getattr(self, f"rpc_{method}", None)
        if handler is None:
            raise ApiError(404, f"{method} is not part of this stand-in")
        with self.lock:
            return handler(body)

    def next_number(self) -> int:
        self._counter += 1
        return self._counter

    def sign(self, kind: str, name: str, data: bytes) -> str:
        """A signed URL under which `data` can be fetched until it expires."""
        signature = f"s{self.next_number()}"
        self._urls[signature] = (time.monotonic() + self.url_lifetime, data)
        return f"http://127.0.0.1:{self.port}/storage/{kind}/{quote(name, safe='')}?X-Goog-Signature={signature}"

    def signed(self, signature: str) -> bytes | None:
        end, data = self._urls.get(signature, (0.0, b""))
        return data if end > time.monotonic() else None

    def _page(self, items: list, body: dict, default: int = 20) -> tuple[list, dict]:
        start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or default)
        rest = {"nextPageToken": str(start + size)} if start + size < len(items) else {}
        return items[start:start + size], rest

    def rpc_IntrospectToken(self, body: dict) -> dict:
        return {"active": body.get("token") == self.token, "username": self.user}

    # competitions

    def _competition(self, body: dict, rules: bool = False) -> Competition:
        slug = body.get("competitionName", "")
        if slug not in self.competitions:
            raise ApiError(404, f"Competition not found: {slug}")
        competition = self.competitions[slug]
        if rules and not competition.rules_accepted:
            raise ApiError(403, "You must accept this competition's rules before you can continue")
        return competition

    def rpc_DownloadDataFile(self, body: dict) -> Redirect:
        competition, name = self._competition(body, rules=True), body.get("fileName", "")
        if name not in competition.files:
            raise ApiError(404, f"File not found: {name}")
        data = competition.files[name]
        if name in competition.zip_files:
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(Path(name).name, data)
            name, data = name + ".zip", packed.getvalue()
        return Redirect(self.sign("data", name, data))

    def rpc_DownloadDataFiles(self, body: dict) -> Redirect:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in self._competition(body, rules=True).files.items():
                archive.writestr(name, data)
        return Redirect(self.sign("data", f"{body['competitionName']}.zip", packed.getvalue()))

    def rpc_StartSubmissionUpload(self, body: dict) -> dict:
        self._competition(body, rules=True)
        return self._start_upload(body["fileName"], body.get("contentLength", 0))

    def rpc_CreateSubmission(self, body: dict) -> dict:
        name, data = self.take_blob(body.get("blobFileTokens", ""))
        return self._create_submission(body, name, data)

    def rpc_CreateCodeSubmission(self, body: dict) -> dict:
        run = self._run(body["kernelOwner"], body["kernelSlug"], f"v{body.get('kernelVersion', 0)}")
        if body.get("fileName") not in run.outputs:
            raise ApiError(400, "Submission not allowed: the notebook version has no such output file")
        return self._create_submission(body, body["fileName"], run.outputs[body["fileName"]])

    def _create_submission(self, body: dict, name: str, data: bytes) -> dict:
        competition = self._competition(body, rules=True)
        if len(competition.submissions) >= competition.daily_limit:
            raise ApiError(400, "You have used all of your daily submissions")
        state = SubmissionState(1000 + self.next_number(), name, body.get("submissionDescription", ""), data,
                                competition.score_after, competition.missing_after)
        try:
            state.public = competition.score(data)
        except Exception as error:  # what the server tells about a csv that it cannot score
            state.error = str(error)
        competition.submissions.insert(0, state)
        return {"message": f"Successfully submitted to {body['competitionName']}", "ref": state.ref}

    def rpc_ListSubmissions(self, body: dict) -> dict:
        views = [state.public_view() for state in self._competition(body).submissions if state.missing_left <= 0]
        page, rest = self._page(views, body)
        return {"submissions": page} | rest

    def rpc_GetSubmission(self, body: dict) -> dict:
        for competition in self.competitions.values():
            for state in competition.submissions:
                if state.ref == body.get("ref"):
                    if state.missing_left > 0:
                        state.missing_left -= 1
                        break
                    state.polls_left -= 1
                    return state.public_view()
        raise ApiError(404, "Submission not found")

    def rpc_GetSubmissionLimits(self, body: dict) -> dict:
        competition = self._competition(body)
        used = len(competition.submissions)
        return {"numToday": used, "numTotal": used, "numAllowedNow": max(0, competition.daily_limit - used)}

    def rpc_GetLeaderboard(self, body: dict) -> dict:
        competition = self._competition(body)
        own = [state.public for state in competition.submissions if state.public is not None and state.polls_left <= 0]
        teams = competition.others | ({self.user: max(own)} if own else {})
        rows = [{"teamId": number, "teamName": team, "submissionDate": NOW, "score": f"{score:.5f}"}
                for number, (team, score) in enumerate(sorted(teams.items(), key=lambda item: -item[1]), 1)]
        page, rest = self._page(rows, body)
        return {"submissions": page} | rest

    # blobs

    def _start_upload(self, name: str, size: int) -> dict:
        session = f"u{self.next_number()}"
        token = f"blob-{session}"
        self._blobs[session] = {"name": name, "size": size, "data": b"", "token": token}
        return {"token": token, "createUrl": f"http://127.0.0.1:{self.port}/upload/{session}"}

    def rpc_StartBlobUpload(self, body: dict) -> dict:
        return self._start_upload(body["name"], body.get("contentLength", 0))

    def blob_session(self, session: str) -> dict | None:
        return self._blobs.get(session)

    def expire_uploads(self) -> None:
        """Every open upload session is gone from now on."""
        self._blobs = {session: blob for session, blob in self._blobs.items() if len(blob["data"]) == blob["size"]}

    def take_blob(self, token: str) -> tuple[str, bytes]:
        for blob in self._blobs.values():
            if blob["token"] == token:
                if len(blob["data"]) != blob["size"]:
                    raise ApiError(400, f"The upload of {blob['name']} is not complete")
                return blob["name"], blob["data"]
        raise ApiError(400, "Unknown blob token")

    # datasets

    def _dataset(self, body: dict) -> Dataset:
        ref = f"{body.get('ownerSlug')}/{body.get('datasetSlug')}"
        if ref not in self.datasets:
            raise ApiError(403, "Permission 'datasets.get' was denied")
        return self.datasets[ref]

    def rpc_CreateDataset(self, body: dict) -> dict:
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if ref in self.datasets:
            return {"status": "error", "error": f"The requested title {body['title']!r} is already in use."}
        files = dict(self.take_blob(file["token"]) for file in body.get("files", []))
        self.datasets[ref] = Dataset(body["title"], body.get("licenseName", ""), body.get("isPrivate", False),
                                     [DatasetVersion(files, "Initial release", self.ready_after)], body)
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "Ok"}

    def rpc_CreateDatasetVersion(self, body: dict) -> dict:
        dataset = self._dataset(body)
        if dataset.versions and dataset.versions[-1].polls_left > 0:
            raise ApiError(403, "The dataset is still being processed")
        inner = body.get("body", {})
        files = dict(self.take_blob(file["token"]) for file in inner.get("files", []))
        dataset.versions.append(DatasetVersion(files, inner.get("versionNotes", ""), self.ready_after))
        return {"ref": f"{body['ownerSlug']}/{body['datasetSlug']}", "status": "Ok", "url": ""}

    def rpc_GetDatasetStatus(self, body: dict) -> dict:
        newest = self._dataset(body).versions[-1]
        newest.polls_left -= 1
        if newest.failed:
            return {"status": "FAILED"}
        return {"status": "READY" if newest.polls_left <= 0 else "BLOBS_RECEIVED"}

    def rpc_GetDataset(self, body: dict) -> dict:
        dataset = self._dataset(body)
        return {"ref": f"{body['ownerSlug']}/{body['datasetSlug']}", "title": dataset.title,
                "isPrivate": dataset.private, "licenseName": dataset.license,
                "currentVersionNumber": dataset.current}

    def rpc_ListDatasetFiles(self, body: dict) -> dict:
        dataset = self._dataset(body)
        number = body.get("datasetVersionNumber") or dataset.current
        tree = dataset.versions[number - 1].tree() if number else {}
        page, rest = self._page([{"name": name, "totalBytes": len(data)} for name, data in tree.items()], body)
        return {"datasetFiles": page} | rest

    # kernels

    def rpc_SaveKernel(self, body: dict) -> dict:
        if self.push_error:
            return {"error": self.push_error}
        active = [one for runs in self.kernels.values() for one in runs if one.status in ("QUEUED", "RUNNING")]
        if len(active) >= self.session_limit:
            return {"error": f"Maximum batch GPU session count of {self.session_limit} reached."}
        invalid = {
            "invalidDatasetSources": [s for s in body.get("datasetDataSources", [])
                                   if "/".join(s.split("/")[:2]) not in self.datasets],
            "invalidCompetitionSources": [s for s in body.get("competitionDataSources", [])
                                       if s not in self.competitions],
            "invalidKernelSources": [s for s in body.get("kernelDataSources", []) if s not in self.kernels],
            "invalidModelSources": list(body.get("modelDataSources", []))}
        plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        run = KernelRun(body, plan, outputs=dict(plan.outputs), log=plan.log)
        versions = self.kernels[body["slug"]]
        versions.append(run)
        if plan.run and not any(invalid.values()):
            run.process = threading.Thread(target=self._execute, args=(run, len(versions)), daemon=True)
            run.process.start()
        return {"ref": f"/code/{body['slug']}", "url": f"https://www.kaggle.com/code/{body['slug']}",
                "versionNumber": len(versions), "kernelId": 7} | {key: v for key, v in invalid.items() if v}

    def _execute(self, run: KernelRun, version: int) -> None:
        """Run the pushed script with a /kaggle tree of its own."""
        folder = self.root / run.request["slug"].replace("/", "-") / f"v{version}"
        shutil.rmtree(folder, ignore_errors=True)
        working = folder / "working"
        working.mkdir(parents=True)
        script = folder / "script.py"
        script.write_text(run.text)
        inputs = self.mount(run.request, folder / "input")
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        done = subprocess.run([sys.executable, str(script), "--input", str(inputs), "--output", str(working)],
                              capture_output=True, text=True, cwd=working,
                              env=environment | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
        run.outputs = {str(path.relative_to(working)): path.read_bytes()
                       for path in sorted(working.rglob("*")) if path.is_file()}
        run.log, run.exit_code = done.stdout + done.stderr, done.returncode

    def _run(self, owner: str, slug: str, label: str | None) -> KernelRun:
        versions = self.kernels.get(f"{owner}/{slug}", [])
        if not versions:
            raise ApiError(403, "Permission 'kernels.get' was denied")
        if not label:
            return versions[-1]
        number = re.fullmatch(r"v(\d+)", label)
        if not number or not 1 <= int(number[1]) <= len(versions):
            raise ApiError(404, f"No kernel version {label}")
        return versions[int(number[1]) - 1]

    def rpc_GetKernel(self, body: dict) -> dict:
        run = self._run(body["userName"], body["kernelSlug"], body.get("versionLabel"))
        ref = f"{body['userName']}/{body['kernelSlug']}"
        return {"metadata": {"ref": ref, "title": run.request.get("newTitle", ""), "slug": body["kernelSlug"],
                             "currentVersionNumber": len(self.kernels[ref])},
                "blob": {"source": run.text, "language": "python", "kernelType": "script", "slug": body["kernelSlug"]}}

    def rpc_GetKernelSessionStatus(self, body: dict) -> dict:
        run = self._run(body["userName"], body["kernelSlug"], body.get("versionLabel"))
        status = run.status
        run.polls += 1
        answer = {} if status == "QUEUED" else {"status": status}  # QUEUED is the default value: left out
        failure = run.plan.failure or ("Your notebook exited with an error" if status == "ERROR" else "")
        return answer | ({"failureMessage": failure} if failure and status not in ("QUEUED", "RUNNING") else {})

    def kernel_log(self, run: KernelRun) -> list[dict]:
        return [{"stream_name": "stdout", "time": index / 10, "data": line}
                for index, line in enumerate(run.log.splitlines(keepends=True))]

    def rpc_ListKernelSessionOutput(self, body: dict) -> dict:
        run = self._run(body["userName"], body["kernelSlug"], body.get("versionLabel"))
        if run.status in ("QUEUED", "RUNNING"):
            return {}
        body = body | {"pageSize": min(int(body.get("pageSize") or 20), self.output_page)}
        page, rest = self._page(sorted(run.outputs), body)
        return {"files": [{"fileName": name, "url": self.sign("output", name, run.outputs[name])} for name in page],
                "log": json.dumps(self.kernel_log(run))} | rest

    def rpc_GetAcceleratorQuotaStatistics(self, body: dict) -> dict:
        def quota(used: float, total: float) -> dict:
            return {"timeUsed": f"{int(used * 3600)}s", "timeReserved": "0s",
                    "totalTimeAllowed": f"{int(total * 3600)}s"}

        return {"quotaRefreshTime": NOW, "gpuQuota": quota(self.gpu_used_hours, self.gpu_total_hours),
                "tpuQuota": quota(0, 20)}


@dataclass
class Redirect:
    url: str


class Handler(BaseHTTPRequestHandler):
    """The wire: absolute request lines, authentication, faults, uploads, storage and the log stream."""

    kaggle: StandIn
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: no waiting for delayed acknowledgements
    disable_nagle_algorithm = True  # headers and body go apart: 40 ms a call otherwise

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self._read_body()
        method = urlsplit(self.path).path.rpartition("/")[2]
        self._serve(method, json.loads(body or b"{}"), lambda data: self._rpc(method, data))

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.startswith("/storage/"):
            kind = url.path.split("/")[2]
            self._serve(f"GET {kind}", {"path": unquote(url.path), "range": self.headers.get("Range", "")},
                        lambda _: self._storage(url))
        elif "/kernels/logs/stream/" in url.path:
            self._serve("GET log", {"path": url.path}, lambda _: self._log_stream(url))
        else:
            self._answer(404, {"code": 404, "message": f"no such page {url.path}"})

    def do_PUT(self) -> None:
        session = urlsplit(self.path).path.rpartition("/")[2]
        asks = self.headers.get("Content-Range", "")
        name = "PUT probe" if asks.startswith("bytes */") else "PUT blob"
        self._serve(name, {"session": session, "range": asks}, lambda _: self._upload(session, asks))

    def _read_body(self) -> bytes:
        if hasattr(socket, "TCP_QUICKACK"):  # the client sends its body only after the acknowledgement of its headers
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _serve(self, name: str, body: dict, act: Callable[[dict], Answer]) -> None:
        with self.kaggle.lock:
            self.kaggle.calls.append((name, body))
            fault = self.kaggle.faults[name].pop(0) if self.kaggle.faults[name] else None
        try:
            if fault is None:
                self._send(act(body))
            else:
                self._fail(fault, body, act)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:  # a crashed handler would look like a dropped connection
            self._answer(500, {"code": 500, "message": f"stand-in: {error!r}"})

    def _fail(self, fault: Fault, body: dict, act: Callable[[dict], Answer]) -> None:
        if fault.keep:
            self._keep(body["session"], fault.keep)
        if fault.silent:
            time.sleep(fault.silent)
            self._hang_up()
            return
        answer = act(body) if fault.drop == "after" or fault.after or fault.truncate is not None else None
        if fault.drop:
            self._hang_up()
        elif fault.truncate is not None:
            self._send(answer, fault.truncate)
        else:
            if answer is None and not fault.keep and self.command == "PUT":
                self._read_body()
            self._send(self._faulty(fault))

    @staticmethod
    def _faulty(fault: Fault) -> Answer:
        headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        if fault.html:
            return Answer(fault.status or 200, b"<!DOCTYPE html><html><body>Sorry</body></html>", "text/html", headers)
        if fault.xml:
            return Answer(fault.status or 200, b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code></Error>",
                          "application/xml", headers)
        data = fault.json if fault.json is not None else {"code": fault.status, "message": fault.message}
        status = 200 if fault.as_code or fault.json is not None else fault.status
        return Answer(status, json.dumps(data).encode(), "application/json", headers)

    def _keep(self, session: str, count: int) -> None:
        blob = self.kaggle.blob_session(session)
        if blob is not None:
            blob["data"] += self.rfile.read(count)
        self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _rpc(self, method: str, body: dict) -> Answer:
        try:
            self._check_credentials()
            result = self.kaggle.rpc(method, body)
        except ApiError as error:
            return Answer.json(error.status, {"code": error.status, "message": error.message})
        if isinstance(result, Redirect):
            return Answer(302, b"", "text/plain", {"Location": result.url})
        return Answer.json(200, result)

    def _check_credentials(self) -> None:
        given = self.headers.get("Authorization", "")
        basic = base64.b64encode(f"{self.kaggle.user}:{self.kaggle.key}".encode()).decode()
        if given not in (f"Basic {basic}", f"Bearer {self.kaggle.token}"):
            raise ApiError(401, "Unauthenticated")

    def _storage(self, url) -> Answer:
        if "Authorization" in self.headers:  # the storage refuses a request that is signed twice
            return Answer(400, b"<Error>InvalidArgument</Error>", "application/xml")
        data = self.kaggle.signed(parse_qs(url.query).get("X-Goog-Signature", [""])[0])
        if data is None:
            return Answer(403, b"<Error><Code>AccessDenied</Code><Message>expired</Message></Error>", "application/xml")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked:
            return Answer(200, data, "application/octet-stream")
        start = int(asked[1])
        if start >= len(data):
            return Answer(416, b"", "text/plain", {"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[start:], "application/octet-stream",
                      {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

    def _upload(self, session: str, asks: str) -> Answer:
        body = self._read_body()
        blob = self.kaggle.blob_session(session)
        if blob is None:
            return Answer(404, b"session not found", "text/plain")
        if not asks.startswith("bytes */"):
            start = int(asks.removeprefix("bytes ").partition("-")[0]) if asks else 0
            blob["data"] = blob["data"][:start] + body
        if len(blob["data"]) == blob["size"]:
            return Answer.json(200, {"name": blob["name"], "size": str(blob["size"])})
        got = {"Range": f"bytes=0-{len(blob['data']) - 1}"} if blob["data"] else {}
        return Answer(308, b"", "text/plain", got)

    def _log_stream(self, url) -> Answer:
        try:
            self._check_credentials()
            owner, slug = url.path.rstrip("/").split("/")[-2:]
            run = self.kaggle._run(owner, slug, parse_qs(url.query).get("versionLabel", [None])[0])
        except ApiError as error:
            return Answer.json(error.status, {"code": error.status, "message": error.message})
        events = self.kaggle.kernel_log(run)
        if run.status not in ("QUEUED", "RUNNING"):
            url = self.kaggle.sign("finished-log", "log", json.dumps(events, ensure_ascii=False).encode())
            return Answer(302, b"", "text/plain", {"Location": url})
        lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
        return Answer(200, "".join([*lines, "data: END_OF_LOG\n\n"]).encode(), "text/event-stream")

    def _answer(self, status: int, body: dict) -> None:
        self._send(Answer.json(status, body))

    def _send(self, answer: Answer, truncate: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": answer.kind, "Content-Length": str(len(answer.body)),
                            **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body if truncate is None else answer.body[:truncate])
        self.wfile.flush()
        if truncate is not None:
            self._hang_up()


@dataclass
class Answer:
    status: int
    body: bytes
    kind: str
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, status: int, body: object) -> Answer:
        return cls(status, json.dumps(body).encode(), "application/json")

