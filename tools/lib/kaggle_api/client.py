"""Kaggle as the tools need it: the official SDK, a service at a time, behind typed errors.

    client = connect()
    client.kernels.status(Version("USER/aml-align", 3))

What the SDK does not do is done in the services: credentials found and checked, timeouts, bounded retries, uploads
and downloads that are verified, versions that are really asked for. A push or a submission is never repeated blindly:
after a failure that leaves its outcome open they look first whether it happened.
Nothing is printed on stdout; notes on retries go to stderr.
"""

from __future__ import annotations

from lib.kaggle_api.competitions import Competitions
from lib.kaggle_api.datasets import Datasets
from lib.kaggle_api.http import Transport
from lib.kaggle_api.kernels import Kernels
from lib.kaggle_api.login import Login, sign_in
from lib.kaggle_api.patience import Patience


class KaggleClient:
    """The signed-in account and its services."""

    def __init__(self, transport: Transport, login: Login) -> None:
        self.username, self.credentials, self.patience = login.username, login.source, transport.patience
        self.competitions = Competitions(transport, login)
        self.datasets = Datasets(transport, login)
        self.kernels = Kernels(transport, login)


def connect(patience: Patience | None = None) -> KaggleClient:
    """Sign in and return the client; NoCredentials, or Unauthorized where those that there are cannot be used."""
    transport = Transport(patience or Patience.from_environment())
    return KaggleClient(transport, sign_in(transport))
