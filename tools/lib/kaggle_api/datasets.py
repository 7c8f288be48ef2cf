"""Datasets: uploads that are made once, their processing, their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.kaggle_api.errors import Conflict, Forbidden, NotFound, Refused, ServerError
from lib.kaggle_api.http import Transport, safe_name
from lib.kaggle_api.login import Login
from lib.kaggle_api.service import Service, fill, split_ref


class Datasets(Service):
    """The service of datasets; every method raises a KaggleError when the thing did not happen."""

    def __init__(self, transport: Transport, login: Login) -> None:
        from kagglesdk.datasets.types import dataset_api_service as types

        super().__init__(transport, login.sdk.datasets.dataset_api_client, types)
        self._blobs = login.sdk.blobs.blob_api_client

    def create(self, ref: str, title: str, license_name: str, files: list[Path], **about: str) -> int:
        """Upload `files` as the new private dataset `ref`, owner/slug; the version it will have (1).

        `about`: subtitle, description. Conflict when the name is in use.
        """
        owner, slug = split_ref(ref)
        request = fill(self._types.ApiCreateDatasetRequest(), owner_slug=owner, slug=slug, title=title, **about)
        fill(request, license_name=license_name, is_private=True, files=self._new_files(files))
        what = f"creating dataset {ref}"

        def look() -> int | None:
            return 1 if self.exists(ref) else None

        return self.once(what, lambda: _answer(what, self._api.create_dataset(request)), look)

    def create_version(self, ref: str, notes: str, files: list[Path], **about: str) -> int:
        """Upload `files` as the next version (they replace all earlier ones); the number it will have."""
        status, before = self.status(ref)
        body = fill(self._types.ApiCreateDatasetVersionRequestBody(), version_notes=notes, **about)
        fill(body, files=self._new_files(files))
        request = self._request_of("ApiCreateDatasetVersionRequest", ref, body=body)

        def look() -> int | None:
            now, version = self.status(ref)
            return before + 1 if version > before or (status == "ready" and now != "ready") else None

        what = f"new version of dataset {ref}"
        self.once(what, lambda: _answer(what, self._api.create_dataset_version(request)), look)
        return before + 1

    def exists(self, ref: str) -> bool:
        """Whether Kaggle shows it: it answers 403 or 404 for what does not exist, and for a while for what is new."""
        try:
            self.current_version(ref)
        except (NotFound, Forbidden):
            return False
        return True

    def status(self, ref: str) -> tuple[str, int]:
        """(status in lower case, current version; 0 while the first is being processed)."""
        request = self._request_of("ApiGetDatasetStatusRequest", ref)
        found = self.call(f"status of dataset {ref}", self._api.get_dataset_status, request)
        return found.status.name.lower(), self.current_version(ref)

    def current_version(self, ref: str) -> int:
        """The newest version that is ready."""
        request = self._request_of("ApiGetDatasetRequest", ref)
        return self.call(f"dataset {ref}", self._api.get_dataset, request).current_version_number or 0

    def files(self, ref: str) -> dict[str, int]:
        """Every file of a dataset's current version with its size."""
        request = self._request_of("ApiListDatasetFilesRequest", ref)
        listed = self.items(f"files of dataset {ref}", self._api.list_dataset_files, request, "dataset_files")
        return {safe_name(file.name or ""): file.total_bytes for file in listed}

    def _request_of(self, kind: str, ref: str, **values: Any) -> Any:
        owner, slug = split_ref(ref)
        return fill(getattr(self._types, kind)(), owner_slug=owner, dataset_slug=slug, **values)

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
