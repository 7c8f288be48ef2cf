"""Datasets of the stand-in: versions that are processed for a while, and their files."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field

from stand_in.common import ApiError, Clock, Habits, page_of


@dataclass
class DatasetVersion:
    files: dict[str, bytes]
    polls_left: int = 0  # status polls until READY
    failed: bool = False
    made: float = 0.0
    ready: float = 0.0  # when it became READY

    def tree(self) -> dict[str, bytes]:
        """The files as Kaggle shows and mounts them: a zip is unpacked into a folder of its name."""
        tree = {}
        for name, data in self.files.items():
            if not name.endswith(".zip"):
                tree[name] = data
                continue
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                tree |= {
                    f"{name[:-4]}/{member}": archive.read(member)
                    for member in archive.namelist()
                    if not member.endswith("/")
                }
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
        return max(
            (n for n, version in enumerate(self.versions, 1) if version.polls_left <= 0 and not version.failed),
            default=0,
        )


class DatasetCalls:
    """The RPC methods of datasets; `StandIn` has the state."""

    habits: Habits
    clock: Clock
    datasets: dict[str, Dataset]
    ready_after: int

    def add_dataset(self, ref: str, files: dict[str, bytes]) -> Dataset:
        """A dataset that is READY."""
        dataset = self.datasets.setdefault(ref, Dataset(title=ref))
        dataset.versions.append(DatasetVersion(files))
        return dataset

    def _dataset(self, body: dict) -> Dataset:
        ref = f"{body.get('ownerSlug')}/{body.get('datasetSlug')}"
        dataset = self.datasets.get(ref)
        if dataset is None or not self.clock.older(dataset.versions[0].made, self.habits.dataset_lag):
            raise ApiError(self.habits.absent_dataset, "Permission 'datasets.get' was denied")
        return dataset

    def _known(self, dataset: Dataset) -> list[DatasetVersion]:
        """The versions that the server shows by now."""
        return [version for version in dataset.versions if self.clock.older(version.made, self.habits.dataset_lag)]

    def rpc_CreateDataset(self, body: dict) -> dict:
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if ref in self.datasets or body["title"] in self.habits.taken_titles:
            return {"status": "error", "error": f"The requested title {body['title']!r} is already in use."}
        files = dict(self.take_blob(file["token"]) for file in body.get("files", []))
        now = self.clock.now()
        version = DatasetVersion(files, self.ready_after, made=now, ready=now)
        self.datasets[ref] = Dataset(
            body["title"], body.get("licenseName", ""), body.get("isPrivate", False), [version], body
        )
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "Ok"}

    def rpc_CreateDatasetVersion(self, body: dict) -> dict:
        if self.habits.empty_version_answer:
            return {}
        dataset = self._dataset(body)
        if dataset.versions[-1].polls_left > 0:
            raise ApiError(403, "The dataset is still being processed")
        files = dict(self.take_blob(file["token"]) for file in body.get("body", {}).get("files", []))
        now = self.clock.now()
        dataset.versions.append(DatasetVersion(files, self.ready_after, made=now, ready=now))
        return {"ref": f"{body['ownerSlug']}/{body['datasetSlug']}", "status": "Ok", "url": ""}

    def rpc_GetDatasetStatus(self, body: dict) -> dict:
        newest = self._known(self._dataset(body))[-1]
        newest.polls_left -= 1
        if newest.polls_left == 0:
            newest.ready = self.clock.now()
        if newest.failed:
            return {"status": "FAILED"}
        return {"status": "READY" if newest.polls_left <= 0 else "BLOBS_RECEIVED"}

    def _current(self, dataset: Dataset) -> int:
        return min(dataset.current, len(self._known(dataset)))

    def rpc_GetDataset(self, body: dict) -> dict:
        dataset = self._dataset(body)
        return {
            "ref": f"{body['ownerSlug']}/{body['datasetSlug']}",
            "title": dataset.title,
            "isPrivate": dataset.private,
            "licenseName": dataset.license,
            "currentVersionNumber": self._current(dataset),
        }

    def rpc_ListDatasetFiles(self, body: dict) -> dict:
        dataset = self._dataset(body)
        number = body.get("datasetVersionNumber") or self._current(dataset)
        if number and not self.clock.older(dataset.versions[number - 1].ready, self.habits.files_lag):
            number -= 1
        tree = dataset.versions[number - 1].tree() if number else {}
        page, rest = page_of([{"name": name, "totalBytes": len(data)} for name, data in tree.items()], body)
        return {"datasetFiles": page} | rest
