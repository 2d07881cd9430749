"""One base error, one type per boundary.

A message says what was given, what was expected and what to do. The command line prints it as one line and
exits with status 2.
"""

from __future__ import annotations


class SearchR3Error(Exception):
    """Base of every error that a user can cause and can mend."""


class ConfigError(SearchR3Error):
    """A setting, a recipe or an override that cannot be used."""


class MissingExtraError(ConfigError, ImportError):
    """What was asked for needs packages that are not installed."""


class DataError(SearchR3Error):
    """A collection, a query or a document that cannot be used."""


class ModelError(SearchR3Error):
    """A model directory, a tokenizer or a chat template that cannot be used."""


class UntrainedError(ModelError):
    """A mode that a model was not trained for, or that nothing computes for it."""


class VectorIndexError(SearchR3Error):
    """Vectors, ids or a saved index that cannot be used."""


class StoreError(SearchR3Error):
    """A store of documents that cannot be opened, read or written, or that another model made."""


class NotFoundError(SearchR3Error):
    """A model, a document or a page that a server does not have."""


class TooLargeError(SearchR3Error):
    """A request, or a text of it, that is larger than a server's limit."""


class OverloadedError(SearchR3Error):
    """A full queue; `retry_after` says in how many seconds to ask again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(SearchR3Error):
    """A request that was not answered in its time."""


class UnavailableError(SearchR3Error):
    """A server that ends, or whose engine has ended."""


class RewardError(SearchR3Error):
    """A reward that cannot be computed; it is never replaced by 0."""


class RunError(SearchR3Error):
    """A run directory or a checkpoint that cannot be used, or a training that cannot go on."""


class StoppedError(SearchR3Error):
    """A training that was asked to stop, and has saved everything."""


class HubError(SearchR3Error):
    """A repository on the hub that cannot be reached, read or written."""
