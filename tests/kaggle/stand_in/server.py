"""The stand-in as a whole: its state, its life, what a test does with it, and the wire."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from stand_in.blobs import Signed, Storage
from stand_in.common import Answer, ApiError, Clock, Fault, Habits, Redirect
from stand_in.competitions import Competition, CompetitionCalls
from stand_in.datasets import Dataset, DatasetCalls
from stand_in.kernels import ACTIVE, KernelCalls, KernelRun, Plan


class StandIn(CompetitionCalls, DatasetCalls, KernelCalls, Storage):
    """See the package's docstring."""

    def __init__(self, root: Path, user: str = "tester", key: str = "0123456789abcdef", token: str = "token-1") -> None:
        self.root, self.user, self.key, self.token = root, user, key, token
        self.competitions: dict[str, Competition] = {"aml-competition": Competition()}
        self.datasets: dict[str, Dataset] = {}
        self.kernels: dict[str, list[KernelRun]] = defaultdict(list)
        self.plans: list[Plan] = [Plan()]
        self.habits, self.clock = Habits(), Clock()
        self.ready_after = 1
        self.mount_layout = "new"
        self.push_error = ""
        self.session_limit = 1000
        self.gpu_used_hours, self.gpu_total_hours = 1.5, 30.0
        self.output_page = 20
        self.url_lifetime = 3600.0
        self.calls: list[tuple[str, dict]] = []
        self.faults: dict[str, list[Fault | None]] = defaultdict(list)
        self._blobs: dict[str, dict] = {}
        self._urls: dict[str, Signed] = {}
        self._counter = 0
        self.lock = threading.RLock()

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
        proxy = f"http://127.0.0.1:{self.port}"
        return {
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "KAGGLE_CONFIG_DIR": str(home / ".kaggle"),
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "HTTP_PROXY": proxy,
            "http_proxy": proxy,
            "KAGGLE_USERNAME": self.user,
            "KAGGLE_KEY": self.key,
            "NO_PROXY": "",
            "no_proxy": "",
            "ALIGN_TIMEOUT_SECONDS": "2",
            "ALIGN_PACE": str(self.clock.pace),
        }

    def fail(self, call: str, *faults: Fault | None) -> None:
        """The next calls of this name meet these faults, in order; None stands for a call that goes well."""
        self.faults[call].extend(faults)

    def count(self, call: str) -> int:
        """How often this call was made."""
        return sum(1 for name, _ in self.calls if name == call)

    def rpc(self, method: str, body: dict) -> dict | Redirect:
        """Carry out a call by the method of the same name."""
        handler = getattr(self, f"rpc_{method}", None)
        if handler is None:
            raise ApiError(404, f"{method} is not part of this stand-in")
        with self.lock:
            return handler(body)

    def rpc_IntrospectToken(self, body: dict) -> dict:
        return {"active": body.get("token") == self.token, "username": self.user}

    def next_number(self) -> int:
        self._counter += 1
        return self._counter


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
            self._serve(
                f"GET {kind}",
                {"path": unquote(url.path), "range": self.headers.get("Range", "")},
                lambda _: self._storage(url),
            )
        elif "/kernels/logs/stream/" in url.path:
            self._serve("GET log", {"path": url.path}, lambda _: self._log_stream(url))
        else:
            self._send(Answer.json(404, {"code": 404, "message": f"no such page {url.path}"}))

    def do_PUT(self) -> None:
        session = urlsplit(self.path).path.rpartition("/")[2]
        asks = self.headers.get("Content-Range", "")
        name = "PUT probe" if asks.startswith("bytes */") else "PUT blob"
        self._serve(name, {"session": session, "range": asks}, lambda _: self._upload(session, asks))

    def _read_body(self) -> bytes:
        if hasattr(socket, "TCP_QUICKACK"):  # the client sends its body only after the acknowledgement of its headers
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ---- faults ----

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
            self._send(Answer.json(500, {"code": 500, "message": f"stand-in: {error!r}"}))

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
        elif answer is not None and fault.truncate is not None:
            answer.cut = fault.truncate
            self._send(answer)
        else:
            if answer is None and not fault.keep and self.command == "PUT":
                self._read_body()
            self._send(self._faulty(fault))

    @staticmethod
    def _faulty(fault: Fault) -> Answer:
        headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        headers |= {"Date": fault.date} if fault.date else {}
        if fault.html:
            return Answer(fault.status or 200, b"<!DOCTYPE html><html><body>Sorry</body></html>", "text/html", headers)
        if fault.xml:
            return Answer(
                fault.status or 200,
                b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code></Error>",
                "application/xml",
                headers,
            )
        data = fault.json if fault.json is not None else {"code": fault.status, "message": fault.message}
        status = 200 if fault.as_code or fault.json is not None else fault.status
        return Answer(status, json.dumps(data).encode(), "application/json", headers)

    def _keep(self, session: str, count: int) -> None:
        blob, length = self.kaggle.blob_session(session), int(self.headers.get("Content-Length", 0))
        if blob is not None:
            blob["data"] += self.rfile.read(min(count, length))
            self.rfile.read(max(0, length - count))  # what is left unread would be taken for the next request
        self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)  # also where a forked process has the connection, too
        self.connection.close()

    # ---- what is served ----

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
        found = self.kaggle.signed(parse_qs(url.query).get("X-Goog-Signature", [""])[0])
        if found is None:
            return Answer(403, b"<Error><Code>AccessDenied</Code><Message>expired</Message></Error>", "application/xml")
        asked, data = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")), found.data
        start = int(asked[1]) if asked else 0
        if asked and start >= len(data):
            return Answer(416, b"", "text/plain", {"Content-Range": f"bytes */{len(data)}"})
        left = self.kaggle.left(found)
        found.served += len(data) - start if left is None else min(left, len(data) - start)
        cut = left if left is not None and left < len(data) - start else None
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        return Answer(206 if asked else 200, data[start:], "application/octet-stream", headers, cut)

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
            run = self.kaggle.run_of(owner, slug, parse_qs(url.query).get("versionLabel", [None])[0])
        except ApiError as error:
            return Answer.json(error.status, {"code": error.status, "message": error.message})
        events = self.kaggle.kernel_log(run)
        if run.status not in ACTIVE:
            url = self.kaggle.sign("finished-log", "log", json.dumps(events, ensure_ascii=False).encode())
            return Answer(302, b"", "text/plain", {"Location": url})
        lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
        return Answer(200, "".join([*lines, "data: END_OF_LOG\n\n"]).encode(), "text/event-stream")

    def _send(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in {
            "Date": self.date_time_string(),
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            **answer.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: answer.cut])
        self.wfile.flush()
        if answer.cut is not None:
            self._hang_up()
