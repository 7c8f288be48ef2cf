"""Datasets: uploads that are made once, their processing, their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.kaggle_api.errors import Conflict, Forbidden, NotFound, Refused, ServerError
from lib.kaggle_api.http import Transport, safe_name
from lib.kaggle_api.login import Login
from lib.kaggle_api.service import Service, fill


class Datasets(Service):
    """The service of datasets; every method raises a KaggleError when the thing did not happen."""

    def __init__(self, transport: Transport, login: Login) -> None:
        from kagglesdk.datasets.types import dataset_api_service as types

        super().__init__(transport, login.sdk.datasets.dataset_api_client, types)
        self._blobs = login.sdk.blobs.blob_api_client

    def create(self, owner: str, slug: str, title: str, license_name: str, files: list[Path], **about: str) -> int:
        """Upload `files` as a new private dataset; the version it will have (1). Conflict when the name is in use.

        `about`: subtitle, description.
        """
        request = fill(self._types.ApiCreateDatasetRequest(), owner_slug=owner, slug=slug, title=title, **about)
        fill(request, license_name=license_name, is_private=True, files=self._new_files(files))
        what = f"creating dataset {owner}/{slug}"

        def look() -> int | None:
            return 1 if self.exists(owner, slug) else None

        return self.once(what, lambda: _answer(what, self._api.create_dataset(request)), look)

    def create_version(self, owner: str, slug: str, notes: str, files: list[Path], **about: str) -> int:
        """Upload `files` as the next version (they replace all earlier ones); the number it will have."""
        status, before = self.status(owner, slug)
        body = fill(self._types.ApiCreateDatasetVersionRequestBody(), version_notes=notes, **about)
        fill(body, files=self._new_files(files))
        request = fill(self._types.ApiCreateDatasetVersionRequest(), owner_slug=owner, dataset_slug=slug, body=body)

        def look() -> int | None:
            now, version = self.status(owner, slug)
            return before + 1 if version > before or (status == "ready" and now != "ready") else None

        what = f"new version of dataset {owner}/{slug}"
        self.once(what, lambda: _answer(what, self._api.create_dataset_version(request)), look)
        return before + 1

    def exists(self, owner: str, slug: str) -> bool:
        """Whether Kaggle shows it: it answers 403 or 404 for what does not exist, and for a while for what is new."""
        try:
            self.current_version(owner, slug)
        except (NotFound, Forbidden):
            return False
        return True

    def status(self, owner: str, slug: str) -> tuple[str, int]:
        """(status in lower case, current version; 0 while the first is being processed)."""
        request = fill(self._types.ApiGetDatasetStatusRequest(), owner_slug=owner, dataset_slug=slug)
        found = self.call(f"status of dataset {owner}/{slug}", self._api.get_dataset_status, request)
        return found.status.name.lower(), self.current_version(owner, slug)

    def current_version(self, owner: str, slug: str) -> int:
        """The newest version that is ready."""
        request = fill(self._types.ApiGetDatasetRequest(), owner_slug=owner, dataset_slug=slug)
        return self.call(f"dataset {owner}/{slug}", self._api.get_dataset, request).current_version_number or 0

    def files(self, owner: str, slug: str) -> dict[str, int]:
        """Every file of a dataset's current version with its size."""
        request = fill(self._types.ApiListDatasetFilesRequest(), owner_slug=owner, dataset_slug=slug)
        what = f"files of dataset {owner}/{slug}"
        listed = self.items(what, self._api.list_dataset_files, request, "dataset_files")
        return {safe_name(file.name or ""): file.total_bytes for file in listed}

    def _new_files(self, paths: list[Path]) -> list:
        """Upload files for a dataset; what stands for each, once every byte of it was acknowledged."""
        from kagglesdk.blobs.types.blob_api_service import ApiBlobType, ApiStartBlobUploadRequest

        made = []
        for path in paths:
            start = fill(ApiStartBlobUploadRequest(), type=ApiBlobType.DATASET, name=path.name)
            token = self.upload(path, self._blobs.start_blob_upload, start)
            made.append(fill(self._types.ApiDatasetNewFile(), token=token))
        return made


def _answer(what: str, answer: Any) -> int:
    """1 when Kaggle took the upload; an empty answer says nothing of the kind."""
    if answer.error or (answer.status or "").lower() == "error":
        said = answer.error or "no reason given"
        raise (Conflict if "in use" in said else Refused)(f"{what}: {said}")
    if not (answer.status or answer.ref or answer.url):
        raise ServerError(f"{what}: Kaggle answered with nothing at all")
    return 1
