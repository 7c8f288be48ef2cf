"""Commands and kernel runs as processes that do not pay for `import torch` each time: they are forked, not started.

A fork is a process like any other: it has a number, arguments, a folder, output files, limits and signals of its own,
can be killed at any moment, and ends with an exit code; nothing that it changes in memory comes back. All that it does
not show is a script's start from nothing, which `tests/tools/test_commands.py` tries for every command.

`Tool` forks the test's own process, so that what a test has changed for itself (a folder, a server that is stood in
for, a function that is to fail) holds in the command as well. `KernelServer` forks a process that computes nothing,
since a network that was trained in a test's process would leave its threads behind.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "tools"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal that killed it) and what it said."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The last line on stderr, which of a failure is the one that counts."""
        return self.stderr.rstrip("\n").rpartition("\n")[2]


def succeeded(ended: Ended) -> Ended:
    """The end of a process, which has to be a success."""
    assert ended.returncode == 0, f"exit code {ended.returncode}: {ended.stderr}"
    return ended


def failed(ended: Ended, code: int, words: str = "") -> Ended:
    """The end of a process, which has to be a failure with this code and one line that matches `words`."""
    assert ended.returncode == code, f"exit code {ended.returncode}: {ended.stderr}"
    assert ended.error.startswith("error: "), ended.stderr
    assert re.search(words, ended.error), ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith(("error: ", "Traceback"))] == [ended.error]
    return ended


def failed_in_one_line(ended: Ended, code: int, words: str = "") -> Ended:
    """The same, and it has said nothing else on stderr."""
    failed(ended, code, words)
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended


class Forked:
    """A process that does `work` and ends with the exit code that it returns; what it says goes into two files."""

    def __init__(self, work: Callable[[], int | None], stdout: Path, stderr: Path) -> None:
        self.stdout, self.stderr, self.code = stdout, stderr, None
        self.number = os.fork()
        if not self.number:
            do_and_end(work, stdout, stderr)

    def poll(self) -> int | None:
        """Its exit code, None while it works."""
        if self.code is None:
            number, status = os.waitpid(self.number, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if number else None
        return self.code

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.number, number)

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
        """Wait until `condition` holds; a process that does not get there is killed."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"{what}: not within {seconds} s; {self.stderr.read_text()[-2000:]}")
            time.sleep(0.002)

    def join(self, seconds: float = 120) -> int:
        """Its exit code, once it has ended."""
        self.wait_for(lambda: self.poll() is not None, "end of the process", seconds)
        return self.code

    def wait(self) -> Ended:
        """Its end."""
        self.join()
        said = [path.read_text() if path.is_file() else "" for path in (self.stdout, self.stderr)]  # no file: /dev/full
        return Ended(self.code, *said)

    def stop(self, number: int, after: str) -> Ended:
        """Its end after a signal that is sent as soon as it has said `after`."""
        self.wait_for(lambda: self.stdout.is_file() and after in self.stdout.read_text(), f"'{after}'")
        self.send(number)
        return self.wait()


def do_and_end(work: Callable[[], int | None], stdout: Path, stderr: Path) -> NoReturn:
    """The rest of a fork's life: streams and signals as of a process that was started, then the work."""
    code: object = 1
    try:
        gc.freeze()  # what was there before is not looked through, which would copy its memory
        sys.stdout = sys.__stdout__ = redirected(1, stdout, buffering=-1)
        sys.stderr = sys.__stderr__ = redirected(2, stderr, buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None  # is asked of the environment again
        code = work() or 0
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:  # whatever happens: a fork that came back would be a second test
        try:
            sys.stdout.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)  # the interpreter's own end would copy all memory


def redirected(number: int, path: Path, buffering: int) -> TextIO:
    """A standard stream of this process, which goes into a file from now on."""
    os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    return open(number, "w", buffering, encoding="utf-8", closefd=False)


class Tool:
    """Runs the commands of tools/ as a user does, in one folder: `tool("submit", "runs/x", "--json")`."""

    def __init__(self, folder: Path, said: Path) -> None:
        self.folder, self.said, self.started = folder, said, 0

    def start(self, name: str, *arguments: object, stdout: Path | None = None) -> Forked:
        """A command, started; `stdout` takes the place of the file into which it speaks."""
        script = TOOLS / f"{name}.py"
        self.started += 1

        def work() -> None:
            os.chdir(self.folder)
            sys.argv = [str(script), *map(str, arguments)]
            runpy.run_path(str(script), run_name="__main__")

        said = self.said / f"{self.started}-{script.name}"
        return Forked(work, stdout or said.with_suffix(".out"), said.with_suffix(".err"))

    def __call__(self, name: str, *arguments: object) -> Ended:
        """A command, run to its end."""
        return self.start(name, *arguments).wait()

    def from_nothing(self, name: str, *arguments: object, **environment: str) -> Ended:
        """The same without a fork, for tests of the start itself: a new interpreter, which imports all anew."""
        done = subprocess.run(
            [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)],
            env=os.environ | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ended(done.returncode, done.stdout, done.stderr)


def hide(folder: Path, *packages: str) -> str:
    """A PYTHONPATH with which a new interpreter finds these packages as little as if they were not installed."""
    folder.mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in packages)]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return str(folder)


class KernelServer:
    """Starts runs of the kernel: `server.run("--input", ...)`, `stop`, or `start` and `wait`. One at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder), "HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: object, **limits: Any) -> int:
        """Start a run; its process id.

        Limits: file_limit (bytes), env; waits_after: words; pasted: a source, as in a notebook.
        """
        for name in ("stdout", "stderr"):  # what an earlier run said is no sign of this one
            (self.folder / name).write_text("")
        return self.ask(arguments=list(map(str, arguments)), folder=str(self.folder), **limits)

    def wait(self) -> Ended:
        return Ended(self.ask(wait=True), *((self.folder / name).read_text() for name in ("stdout", "stderr")))

    def run(self, *arguments: object, **limits: Any) -> Ended:
        self.start(*arguments, **limits)
        return self.wait()

    def stop(self, number: int, *arguments: object, after: str, **limits: Any) -> Ended:
        """Start a run and send it a signal when it has said `after`: it waits for it, so it never comes too late."""
        process = self.start(*arguments, waits_after=after, **limits)
        self.wait_for(after)
        os.kill(process, number)
        return self.wait()

    def kill(self, *arguments: object, after: str, delay: float, **limits: Any) -> Ended:
        """Start a run and kill it at work, `delay` seconds after it has said `after`, unless it has ended."""
        process = self.start(*arguments, **limits)
        self.wait_for(after)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        return self.wait()

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Wait until the run has said these words."""
        end = time.monotonic() + seconds
        while words not in (self.folder / "stdout").read_text():
            assert time.monotonic() < end, f"no '{words}' within {seconds} s"
            time.sleep(0.005)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two bundles hold the same members, bit for bit."""
    import torch

    members = [torch.load(path, weights_only=True)["members"] for path in (one, other)]
    return len(members[0]) == len(members[1]) and all(
        a["state"].keys() == b["state"].keys() and all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
        for a, b in zip(*members, strict=True)
    )


def serve() -> None:
    """The server's own work: a run for each line of stdin, its number or its exit code as a line of stdout."""
    sys.path.insert(0, str(TOOLS))
    from lib.kernel import load_kernel

    kernel, child = load_kernel(), None
    kernel.torch.optim.Adam([kernel.torch.zeros(1)])  # the first optimiser imports for more than a second
    kernel.product_rate = functools.cache(kernel.product_rate)  # this machine is timed once for all runs
    for kind, size in ((kernel.torch.float32, 768), (kernel.torch.bfloat16, 768), (kernel.torch.float32, 1536)):
        kernel.product_rate(kind, kernel.torch.device("cpu"), size)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(child.join(600), flush=True)
        else:
            folder = Path(request["folder"])
            child = Forked(functools.partial(run, kernel, request), folder / "stdout", folder / "stderr")
            print(child.number, flush=True)


def run(kernel: Any, request: dict[str, Any]) -> int:
    """A run in its fork: as the script started afresh."""
    os.chdir(request["folder"])
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    os.environ.update(request.get("env", {}))
    kernel.draw_curves = lambda path, *_: path.write_bytes(b"")  # drawing one takes a third of a short run
    if "waits_after" in request:
        wait_for_a_signal(kernel, request["waits_after"])
    kernel.STARTED = time.monotonic()
    sys.argv = ["pipeline.py", *request["arguments"]]
    if "pasted" in request:
        try:
            exec(compile(request["pasted"], "<cell>", "exec"), {"__name__": "__main__"})
        except SystemExit:  # to a notebook an error like any other
            traceback.print_exc()
            return 1
        return 0
    return kernel.main(request["arguments"])


def wait_for_a_signal(kernel: Any, words: str) -> None:
    """Whichever thread says these words goes on when a signal has been noted."""
    log, note, noted = kernel.log, kernel.Stop.note, []

    def say(text: str) -> None:
        log(text)
        end = time.monotonic() + 120
        while words in text and not noted and time.monotonic() < end:
            time.sleep(0.002)

    def note_it(stop: Any, number: int, frame: object) -> None:
        note(stop, number, frame)
        noted.append(number)

    kernel.log, kernel.Stop.note = say, note_it


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking torch apart would take a second
