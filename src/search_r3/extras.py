"""Packages that not everybody needs: they are imported where they are used, and one error names the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingExtraError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what the extra of this name brings; `pyproject.toml` lists its packages.

    Example:
        >>> with extra("train"):
        ...     import a_package_that_nobody_has
        Traceback (most recent call last):
        search_r3.errors.MissingExtraError: the package a_package_that_nobody_has is not installed; it comes with the \
extra `train`: pip install 'search-r3[train]'

    Raises:
        MissingExtraError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingExtraError(
            f"the package {package} is not installed; it comes with the extra `{name}`: pip install 'search-r3[{name}]'"
        ) from error
