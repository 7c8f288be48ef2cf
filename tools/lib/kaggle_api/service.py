"""How a service's calls are made: repeated where that is safe, looked up where it is not, read to the last page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lib.kaggle_api.errors import Ambiguous, KaggleError, MachineFailed, ServerError
from lib.kaggle_api.http import Transport
from lib.project import InputError

T = TypeVar("T")
PAGE = 200


def fill(request: Any, **values: Any) -> Any:
    """An SDK request with its fields set; None and "" mean: not given."""
    for name, value in values.items():
        if value is not None and value != "":
            setattr(request, name, value)
    return request


def split_ref(ref: str) -> tuple[str, str]:
    """`owner/slug` as a pair."""
    owner, _, slug = ref.partition("/")
    if not owner or not slug or "/" in slug:
        raise InputError(f"{ref!r} is not owner/slug")
    return owner, slug


class Service:
    """One service of the SDK over the transport: its calls, `api`, and the module of its requests, `types`."""

    def __init__(self, transport: Transport, api: Any, types: Any) -> None:
        self._transport, self._api, self._types = transport, api, types
        self.patience = transport.patience

    def call(self, what: str, method: Callable[[Any], T], request: Any) -> T:
        """A call that may be repeated."""
        return self._transport.retry(what, lambda: method(request))

    def pages(self, what: str, method: Callable[[Any], T], request: Any) -> list[T]:
        """Every page of a listing."""
        pages, seen, token = [], set(), ""
        request.page_size = PAGE
        while True:
            page: Any = self.call(what, method, fill(request, page_token=token))
            pages.append(page)
            token = page.next_page_token
            if not token:
                return pages
            if token in seen:
                raise ServerError(f"{what}: Kaggle repeats a page for ever")
            seen.add(token)

    def items(self, what: str, method: Callable[[Any], Any], request: Any, field: str) -> list[Any]:
        """What all pages of a listing have in their `field`."""
        return [item for page in self.pages(what, method, request) for item in getattr(page, field) or []]

    def once(self, what: str, act: Callable[[], T], look: Callable[[], T | None]) -> T:
        """`act`, never repeated blindly: after a failure that leaves its outcome open, `look` whether it happened."""
        try:
            return self._transport.retry(what, act, repeat=False)
        except Ambiguous as error:
            print(f"{error}; looking whether it happened", file=sys.stderr)
            try:
                found = self.patience.look(look, what)
            except KaggleError as second:
                hint = f"; nor could it be looked up ({second}): look again before you repeat it"
                raise error.with_hint(hint) from None
            if found is None:
                hint = "; it did not happen as far as Kaggle shows, so running this again is safe"
                raise error.with_hint(hint) from None
            return found

    def upload(self, path: Path, method: Callable, request: Any) -> str:
        """Send a file to the session that `method` opens; the token that stands for it."""
        what, stat = f"upload of {path.name}", path.stat()
        fill(request, content_length=stat.st_size, last_modified_epoch_seconds=int(stat.st_mtime))

        def start() -> tuple[str, str]:
            session = self.call(what, method, request)
            return session.token, session.create_url

        token = self._transport.upload(what, path, start)
        if [path.stat().st_size, path.stat().st_mtime_ns] != [stat.st_size, stat.st_mtime_ns]:
            raise MachineFailed(f"{what}: was changed while it was sent; run this again")
        return token
