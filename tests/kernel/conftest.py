"""What the kernel's tests share: runs in other processes and in this one, data on which networks earn their place."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from drawn import BENT, JOINED, KNOBS, draw_arrays, draw_data
from forked import Ended, KernelServer, succeeded

QUICK = {"recipe": "align", **KNOBS}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files, on disk."""
    return draw_data(tmp_path_factory.mktemp("data"), **BENT)


@pytest.fixture(scope="session")
def first(server: KernelServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """One finished run: where it wrote and what it said."""
    output = tmp_path_factory.mktemp("first") / "out"
    ended = succeeded(server.run("--input", data, "--output", output, *JOINED, "--set=checkpoint_every=3"))
    assert not ended.stderr, ended
    return output, ended


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel in this process takes over no signal: pytest's own handlers stay."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


class Lab:
    """Problems and trainings without files or processes."""

    def __init__(self, kernel: ModuleType, folder: Path) -> None:
        self.kernel, self.folder, self.rows = kernel, folder, []

    def knobs(self, **changed: Any) -> Any:
        """Of a network, small and quick."""
        return self.kernel.Knobs(**{**QUICK, **changed})

    def problem(self, change: Callable[[dict], None] = lambda train: None, **size: Any) -> Any:
        train, test = draw_arrays(**{**BENT, **size})
        change(train)
        kernel, ids = self.kernel, "captions/ids"
        sets = (
            kernel.TrainSet(
                train[ids],
                train["captions/text"].tolist(),
                train["captions/embeddings"],
                train["captions/label"].argmax(axis=1),
                train["images/names"].tolist(),
                train["images/embeddings"],
            ),
            kernel.TestSet(
                test[ids],
                test["captions/text"].tolist(),
                test["captions/embeddings"],
                train["images/embeddings"].shape[1],
            ),
        )
        both = self.knobs(sees="both")
        return kernel.make_problem(*sets, both, [both], [])

    def task(self, problem: Any, dtype: str = "float32", phase: str = "validate", **knobs: Any) -> Any:
        device, kind = torch.device("cpu"), self.kernel.DTYPES[dtype]
        return self.kernel.make_task(problem, phase, self.knobs(**knobs), device, kind)

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pth"

    def train(
        self,
        problem: Any = None,
        dtype: str = "float32",
        allotted: float = math.inf,
        name: str = "validate 1",
        again: bool = False,
        stop: Any = None,
        **knobs: Any,
    ) -> Any:
        """A trained network; `self.rows`: when it was watched. `again`: as a run does it when the loss is NaN."""
        problem = problem or self.problem()
        learn = self.kernel.train_again_if_diverged if again else self.kernel.train_network
        self.rows = []

        def watch(epoch: int, network: torch.nn.Module, last: bool) -> dict[str, Any]:
            network.eval()  # as validation leaves it
            self.rows.append((epoch, last))
            return {"phase": "validate", "candidate": 1}

        return learn(
            name,
            self.knobs(**knobs),
            task=self.task(problem, dtype, **knobs),
            allotted=allotted,
            state_file=self.state_file,
            stop=stop or self.kernel.Stop(1e6),
            watch=watch,
        )

    def score(self, problem: Any, trained: Any, **knobs: Any) -> float:
        """Raw MRR of a trained network on the validation images."""
        network = self.kernel.network_of(self.knobs(**knobs), trained.weights, problem.dims)
        predictions = self.kernel.predictions_of(network, problem, 256)
        return self.kernel.evaluate(predictions, problem.val_vectors)["pool100_raw"]["mrr"]


@pytest.fixture
def ticking(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's clock goes on by five milliseconds whenever it is asked, however busy the machine is."""
    ticks = itertools.count()
    monkeypatch.setattr(kernel, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 200))


@pytest.fixture
def run_here(kernel: ModuleType, calm: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A run in this process, where the kernel may be changed: run_here("--input", ...); its exit code. No pictures."""
    monkeypatch.setattr(kernel, "keep_memory", lambda: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: True)
    monkeypatch.setattr(kernel, "draw_curves", lambda path, *_: path.write_bytes(b""))
    monkeypatch.setattr(kernel, "product_rate", lambda *_: 5e10)  # a guess, until a training was timed

    def run(*arguments: object) -> int:
        monkeypatch.setattr(kernel, "STARTED", kernel.time.monotonic())
        return kernel.main(list(map(str, arguments)))

    return run


@pytest.fixture
def lab(kernel: ModuleType, tmp_path: Path, calm: None) -> Lab:
    return Lab(kernel, tmp_path)
