"""Uploads of the stand-in, and the signed URLs under which its storage gives files out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import quote

from stand_in.common import ApiError, Habits


@dataclass
class Signed:
    """What a signed URL serves, until its time or its bytes are used up."""

    end: float
    data: bytes
    served: int = 0


class Storage:
    """Blobs on their way in, files on their way out; `StandIn` has the state."""

    port: int
    habits: Habits
    url_lifetime: float
    _blobs: dict[str, dict]  # session -> {"name", "size", "data", "token"}
    _urls: dict[str, Signed]

    def start_upload(self, name: str, size: int) -> dict:
        session = f"u{self.next_number()}"
        token = f"blob-{session}"
        self._blobs[session] = {"name": name, "size": size, "data": b"", "token": token}
        return {"token": token, "createUrl": f"http://127.0.0.1:{self.port}/upload/{session}"}

    def rpc_StartBlobUpload(self, body: dict) -> dict:
        return self.start_upload(body["name"], body.get("contentLength", 0))

    def blob_session(self, session: str) -> dict | None:
        return self._blobs.get(session)

    def expire_uploads(self) -> None:
        """Every open upload session is gone from now on."""
        self._blobs = {session: blob for session, blob in self._blobs.items() if len(blob["data"]) == blob["size"]}

    def take_blob(self, token: str) -> tuple[str, bytes]:
        for blob in self._blobs.values():
            if blob["token"] == token:
                if len(blob["data"]) != blob["size"]:
                    raise ApiError(400, f"The upload of {blob['name']} is not complete")
                return blob["name"], blob["data"]
        raise ApiError(400, "Unknown blob token")

    def sign(self, kind: str, name: str, data: bytes) -> str:
        """A signed URL under which `data` can be fetched until it expires."""
        signature = f"s{self.next_number()}"
        self._urls[signature] = Signed(time.monotonic() + self.url_lifetime, data)
        return f"http://127.0.0.1:{self.port}/storage/{kind}/{quote(name, safe='')}?X-Goog-Signature={signature}"

    def signed(self, signature: str) -> Signed | None:
        """What the URL serves, None when it has expired."""
        found = self._urls.get(signature)
        if found is None or found.end <= time.monotonic():
            return None
        return None if self.left(found) == 0 else found

    def left(self, found: Signed) -> int | None:
        """Bytes that the URL may still serve; None: all."""
        return None if self.habits.url_bytes is None else max(0, self.habits.url_bytes - found.served)

    def expire_urls(self) -> None:
        """Every signed URL given out so far is refused from now on."""
        self._urls.clear()
