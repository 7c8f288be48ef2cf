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
        super().__init__(transport, login.sdk.datasets.dataset_api_client)
        self._blobs = login.sdk.blobs.blob_api_client

    def upload_blob(self, path: Path) -> str:
        """Upload a file for a dataset; the token that stands for it, once every byte was acknowledged."""
        from kagglesdk.blobs.types.blob_api_service import ApiBlobType, ApiStartBlobUploadRequest

        stat = path.stat()
        start = fill(
            ApiStartBlobUploadRequest(),
            type=ApiBlobType.DATASET,
            name=path.name,
            content_length=stat.st_size,
            last_modified_epoch_seconds=int(stat.st_mtime),
        )
        return self.upload(path, self._blobs.start_blob_upload, start)

    def create(
        self,
        owner: str,
        slug: str,
        title: str,
        license_name: str,
        files: list[Path],
        *,
        subtitle: str = "",
        description: str = "",
        private: bool = True,
    ) -> int:
        """Upload `files` as a new dataset; the version it will have (1). Conflict when the name is in use."""
        from kagglesdk.datasets.types.dataset_api_service import ApiCreateDatasetRequest as Request

        request = fill(
            Request(),
            owner_slug=owner,
            slug=slug,
            title=title,
            license_name=license_name,
            is_private=private,
            files=self._new_files(files),
            subtitle=subtitle,
            description=description,
        )
        what = f"creating dataset {owner}/{slug}"
        self.once(
            what,
            lambda: _answer(what, self._api.create_dataset(request)),
            lambda: 1 if self.exists(owner, slug) else None,
        )
        return 1

    def create_version(
        self, owner: str, slug: str, notes: str, files: list[Path], *, subtitle: str = "", description: str = ""
    ) -> int:
        """Upload `files` as the next version (they replace all earlier ones); the number it will have."""
        from kagglesdk.datasets.types.dataset_api_service import (
            ApiCreateDatasetVersionRequest,
            ApiCreateDatasetVersionRequestBody,
        )

        status, before = self.status(owner, slug)
        body = fill(
            ApiCreateDatasetVersionRequestBody(),
            version_notes=notes,
            files=self._new_files(files),
            subtitle=subtitle,
            description=description,
        )
        request = fill(ApiCreateDatasetVersionRequest(), owner_slug=owner, dataset_slug=slug, body=body)

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
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetStatusRequest as Request

        found = self.call(
            f"status of dataset {owner}/{slug}",
            self._api.get_dataset_status,
            fill(Request(), owner_slug=owner, dataset_slug=slug),
        )
        return found.status.name.lower(), self.current_version(owner, slug)

    def current_version(self, owner: str, slug: str) -> int:
        """The newest version that is ready."""
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest as Request

        found = self.call(
            f"dataset {owner}/{slug}", self._api.get_dataset, fill(Request(), owner_slug=owner, dataset_slug=slug)
        )
        return found.current_version_number or 0

    def files(self, owner: str, slug: str, version: int | None = None) -> dict[str, int]:
        """Every file of a dataset (of its current version unless one is named) with its size, all pages."""
        from kagglesdk.datasets.types.dataset_api_service import ApiListDatasetFilesRequest as Request

        files = self.pages(
            f"files of dataset {owner}/{slug}",
            self._api.list_dataset_files,
            Request,
            lambda page: page.dataset_files,
            owner_slug=owner,
            dataset_slug=slug,
            dataset_version_number=version,
        )
        return {safe_name(file.name or ""): file.total_bytes for file in files}

    def _new_files(self, paths: list[Path]) -> list:
        from kagglesdk.datasets.types.dataset_api_service import ApiDatasetNewFile

        return [fill(ApiDatasetNewFile(), token=self.upload_blob(path)) for path in paths]


def _answer(what: str, answer: Any) -> int:
    """1 when Kaggle took the upload; an empty answer says nothing of the kind."""
    if answer.error or (answer.status or "").lower() == "error":
        said = answer.error or "no reason given"
        raise (Conflict if "in use" in said else Refused)(f"{what}: {said}")
    if not (answer.status or answer.ref or answer.url):
        raise ServerError(f"{what}: Kaggle answered with nothing at all")
    return 1
