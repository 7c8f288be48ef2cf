"""Runs of the kernel in fresh processes without paying for `import torch` each time.

A server process imports the kernel once and computes nothing; every run is a fork of it that calls `main` with its
own arguments, folder, output files and limits. It may be killed like any process.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass
class Ended:
    """How a run ended: its exit code (negative: the signal that killed it) and what it said."""

    returncode: int
    stdout: str
    stderr: str


class KernelServer:
    """Starts runs of the kernel: `server.run("--input", ...)`, or `start` and `wait`. One at a time."""

    def __init__(self, folder: Path, pictures: bool = True) -> None:
        self.folder, self.pictures = folder, pictures  # drawing one takes a third of a short run
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder), "HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: object, **limits: Any) -> int:
        """Start a run; its process id. Limits: file_limit (bytes), umask, env; pasted: a source, as in a notebook."""
        for name in ("stdout", "stderr"):  # what an earlier run said is no sign of this one
            (self.folder / name).write_text("")
        request = {"arguments": list(map(str, arguments)), "folder": str(self.folder), "pictures": self.pictures}
        return self.ask(**request, **limits)

    def wait(self) -> Ended:
        return Ended(self.ask(wait=True), *((self.folder / name).read_text() for name in ("stdout", "stderr")))

    def run(self, *arguments: object, **limits: Any) -> Ended:
        self.start(*arguments, **limits)
        return self.wait()

    def stop(self, number: int, *arguments: object, after: str = "", delay: float = 0, **limits: Any) -> Ended:
        """Start a run and send it a signal `delay` seconds after it has said `after`."""
        process, end = self.start(*arguments, **limits), time.monotonic() + 60
        while after not in (self.folder / "stdout").read_text():
            assert time.monotonic() < end, f"no '{after}' within a minute"
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(process, number)
        return self.wait()

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
    sys.path.insert(0, str(HERE.parent / "tools"))
    from lib.kernel import load_kernel

    kernel, child = load_kernel(), 0
    kernel.torch.optim.Adam([kernel.torch.zeros(1)])  # the first optimiser imports for more than a second, ...
    kernel.plt.figure().savefig(io.BytesIO())  # ... the first picture reads its fonts
    kernel.product_rate = functools.cache(kernel.product_rate)  # this machine is timed once for all runs
    kernel.product_rate(kernel.torch.float32, kernel.torch.device("cpu"))
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            run(kernel, request)
        print(child, flush=True)


def run(kernel: Any, request: dict[str, Any]) -> None:
    """The forked child: as the script started afresh."""
    os.chdir(request["folder"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    os.umask(request.get("umask", 0o022))
    os.environ.update(request.get("env", {}))
    if not request["pictures"]:
        kernel.draw_curves = lambda path, *_: path.write_bytes(b"")
    kernel.STARTED = time.monotonic()
    sys.argv = ["pipeline.py", *request["arguments"]]
    code = 1
    try:
        if "pasted" in request:
            exec(compile(request["pasted"], "<cell>", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            code = kernel.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # the interpreter's own end would copy all of the server's memory


if __name__ == "__main__":
    serve()
