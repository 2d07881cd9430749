"""The HTTP server: one model, one store, several contracts."""

from __future__ import annotations

from .app import create_app
from .service import ServerSettings

__all__ = ["ServerSettings", "create_app"]
