"""Adapters for frameworks: a server's address, a store, or a model is all that they need to be told."""

from __future__ import annotations

from .source import InProcess

__all__ = ["InProcess"]
