"""Kernels of the stand-in: versions, sessions that are queued, run and end, outputs, logs and the quota."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from drawn import read_tree, write_tree
from stand_in.common import NOW, ApiError, Clock, Habits, page_of
from stand_in.competitions import Competition
from stand_in.datasets import Dataset

ACTIVE = ("QUEUED", "RUNNING")


@dataclass
class Plan:
    queued: int = 0  # status polls in QUEUED, then in RUNNING
    running: int = 0
    outcome: str = "COMPLETE"  # or ERROR, CANCEL_ACKNOWLEDGED, or a status that no client knows
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
    made: float = 0.0
    ended: float | None = None  # when it was first seen complete

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


class KernelCalls:
    """The RPC methods of kernels; `StandIn` has the state."""

    root: Path
    habits: Habits
    clock: Clock
    kernels: dict[str, list[KernelRun]]
    datasets: dict[str, Dataset]
    competitions: dict[str, Competition]
    plans: list[Plan]

    def mount(self, request: dict, folder: Path) -> Path:
        """The inputs of a push below `folder`, as Kaggle lays them out."""
        new = self.mount_layout == "new"
        for slug in request.get("competitionDataSources", []):
            write_tree(folder / ("competitions/" if new else "") / slug, self.competitions[slug].files)
        for source in request.get("datasetDataSources", []):
            owner, slug = source.split("/")[:2]
            dataset = self.datasets[f"{owner}/{slug}"]
            tree = dataset.versions[dataset.current - 1].tree()
            write_tree(folder / (f"datasets/{owner}/{slug}" if new else slug), tree)
        for source in request.get("kernelDataSources", []):
            owner, slug = source.split("/")[:2]
            complete = [run for run in self.kernels[f"{owner}/{slug}"] if run.status == "COMPLETE"]
            for run in complete[-1:]:
                write_tree(folder / (f"notebooks/{owner}/{slug}" if new else slug), run.outputs)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def rpc_SaveKernel(self, body: dict) -> dict:
        if self.push_error:
            return {"error": self.push_error}
        if self.habits.broken_datasets & set(body.get("datasetDataSources", [])):
            raise ApiError(500, "Internal error")
        active = [one for runs in self.kernels.values() for one in runs if one.status in ACTIVE]
        if len(active) >= self.session_limit:
            return {"error": f"Maximum batch GPU session count of {self.session_limit} reached."}
        ref = f"{body['slug'].partition('/')[0]}/{self.habits.renames_to}" if self.habits.renames_to else body["slug"]
        invalid = self._invalid_sources(body)
        plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        run = KernelRun(body, plan, outputs=dict(plan.outputs), log=plan.log, made=self.clock.now())
        versions = self.kernels[ref]
        versions.append(run)
        if plan.run and not any(invalid.values()):
            run.process = threading.Thread(target=self._execute, args=(run, len(versions)), daemon=True)
            run.process.start()
        return {
            "ref": f"/code/{ref}",
            "url": f"https://www.kaggle.com/code/{ref}",
            "versionNumber": len(versions),
            "kernelId": 7,
        } | {key: v for key, v in invalid.items() if v}

    def _invalid_sources(self, body: dict) -> dict[str, list[str]]:
        return {
            "invalidDatasetSources": [s for s in body.get("datasetDataSources", []) if not self.bound(s)],
            "invalidCompetitionSources": [
                s for s in body.get("competitionDataSources", []) if s not in self.competitions
            ],
            "invalidKernelSources": [s for s in body.get("kernelDataSources", []) if s not in self.kernels],
            "invalidModelSources": list(body.get("modelDataSources", [])),
        }

    def bound(self, source: str) -> bool:
        """Whether a push can attach the dataset: not at once after it has become READY."""
        dataset = self.datasets.get("/".join(source.split("/")[:2]))
        return dataset is not None and self.clock.older(dataset.versions[-1].ready, self.habits.binding)

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
        done = subprocess.run(
            [sys.executable, str(script), "--input", str(inputs), "--output", str(working)],
            capture_output=True,
            text=True,
            cwd=working,
            env=environment | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"},
        )
        run.outputs = read_tree(working)
        run.log, run.exit_code = done.stdout + done.stderr, done.returncode

    def _shown(self, ref: str) -> list[KernelRun]:
        """The versions that the server lists by now."""
        return [run for run in self.kernels.get(ref, []) if self.clock.older(run.made, self.habits.kernel_lag)]

    def run_of(self, owner: str, slug: str, label: str | None) -> KernelRun:
        """The version with this label, the current one without."""
        versions = self.kernels.get(f"{owner}/{slug}", [])
        if not versions:
            raise ApiError(403, "Permission 'kernels.get' was denied")
        if not label:
            return versions[-1]
        if self.habits.refuse_labels:
            raise ApiError(self.habits.refuse_labels, "versionLabel is not supported")
        number = re.fullmatch(r"v(\d+)", label)
        if not number or not 1 <= int(number[1]) <= len(versions):
            raise ApiError(404, f"No kernel version {label}")
        return versions[int(number[1]) - 1]

    def rpc_GetKernel(self, body: dict) -> dict:
        ref = f"{body['userName']}/{body['kernelSlug']}"
        shown = self._shown(ref)
        if not shown:
            raise ApiError(self.habits.absent_kernel, "Permission 'kernels.get' was denied")
        label = body.get("versionLabel")
        run = self.run_of(body["userName"], body["kernelSlug"], label) if label else shown[-1]
        sources = {
            key: run.request.get(key, [])
            for key in ("datasetDataSources", "competitionDataSources", "kernelDataSources", "modelDataSources")
        }
        metadata = {
            "ref": ref,
            "title": run.request.get("newTitle", ""),
            "slug": body["kernelSlug"],
            "currentVersionNumber": len(shown),
        } | sources
        return ({} if self.habits.no_metadata else {"metadata": metadata}) | {
            "blob": {
                "source": self.habits.stores(run.text),
                "language": "python",
                "kernelType": "script",
                "slug": body["kernelSlug"],
            }
        }

    def rpc_ListKernels(self, body: dict) -> dict:
        views = [
            {
                "ref": ref,
                "title": shown[-1].request.get("newTitle", ""),
                "slug": ref.partition("/")[2],
                "lastRunTime": NOW,
                "enableGpu": shown[-1].request.get("enableGpu", False),
                "currentVersionNumber": len(shown),
            }
            for ref in self.kernels
            if (shown := self._shown(ref))
        ]
        page, rest = page_of(views, body)
        return {"kernels": page} | rest

    def rpc_GetKernelSessionStatus(self, body: dict) -> dict:
        run = self.run_of(body["userName"], body["kernelSlug"], body.get("versionLabel"))
        if not self.clock.older(run.made, self.habits.session_lag):
            raise ApiError(404, "No session of this kernel")
        status = run.status
        run.polls += 1
        answer = {} if status == "QUEUED" else {"status": status}  # QUEUED is the default value: left out
        failure = run.plan.failure or ("Your notebook exited with an error" if status == "ERROR" else "")
        return answer | ({"failureMessage": failure} if failure and status not in ACTIVE else {})

    def kernel_log(self, run: KernelRun) -> list[dict]:
        return [
            {"stream_name": "stdout", "time": index / 10, "data": line}
            for index, line in enumerate(run.log.splitlines(keepends=True))
        ]

    def rpc_ListKernelSessionOutput(self, body: dict) -> dict:
        run = self.run_of(body["userName"], body["kernelSlug"], body.get("versionLabel"))
        if run.status in ACTIVE:
            return {}
        run.ended = run.ended or self.clock.now()
        if not self.clock.older(run.ended, self.habits.output_lag):
            return {}
        early = not self.clock.older(run.ended, self.habits.manifest_lag)
        names = [name for name in sorted(run.outputs) if not (early and name == "manifest.json")]
        body = body | {"pageSize": min(int(body.get("pageSize") or 20), self.output_page)}
        page, rest = page_of(names, body)
        log = "" if self.habits.empty_log else json.dumps(self.kernel_log(run))
        return {
            "files": [{"fileName": name, "url": self.sign("output", name, run.outputs[name])} for name in page],
            "log": log,
        } | rest

    def rpc_GetAcceleratorQuotaStatistics(self, body: dict) -> dict:
        def quota(used: float, total: float) -> dict:
            return {
                "timeUsed": f"{int(used * 3600)}s",
                "timeReserved": "0s",
                "totalTimeAllowed": f"{int(total * 3600)}s",
            }

        return {
            "quotaRefreshTime": NOW,
            "gpuQuota": quota(self.gpu_used_hours, self.gpu_total_hours),
            "tpuQuota": quota(0, 20),
        }
