"""Everything that can go wrong with Kaggle, by what a caller can do about it."""

from __future__ import annotations

from lib.project import InputError, ToolError


class KaggleError(ToolError):
    """Kaggle did not do what was asked; the sub-class says in which way."""

    status = 0  # of the HTTP answer
    retry_after: float | None = None  # seconds that the server asks to wait

    def with_hint(self, hint: str) -> KaggleError:
        """The same error with more behind its text."""
        made = type(self)(f"{self}{hint}")
        made.__dict__ |= self.__dict__
        return made


class MachineFailed(ToolError):
    """This machine's failure in what goes to or comes from Kaggle: a full disk, no permission, a changed file."""


class Unauthorized(KaggleError, InputError):
    """401, or credentials that cannot be used."""


class NoCredentials(Unauthorized):
    """There are none in any place where the official client looks for them."""


class Forbidden(KaggleError):
    """403: no permission, rules not accepted, or a name that Kaggle hides."""


class NotFound(KaggleError):
    """404."""


class Conflict(KaggleError):
    """409, or a name that is already in use."""


class Refused(KaggleError):
    """Kaggle understood and said no: HTTP 200 with an error in it, or another 4xx."""


class SourcesRefused(Refused):
    """Kaggle does not know sources of a push, and made a version that runs without them."""

    sources: tuple[str, ...] = ()


class RateLimited(KaggleError):
    """429; the request was not carried out, so it may always be repeated."""


class Ambiguous(KaggleError):
    """A failure after which nobody knows whether the request was carried out."""


class ServerError(Ambiguous):
    """5xx, or an answer that is not what the API sends (an error page)."""


class Timeout(Ambiguous):
    """The server stayed silent."""


class ConnectionFailed(Ambiguous):
    """No connection, or it broke."""


class Expired(Ambiguous):
    """A signed URL was refused: it has had its time, and a fresh one does."""


class NotDone(KaggleError):
    """What was waited for is not there at the deadline."""


BY_STATUS = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 429: RateLimited}
