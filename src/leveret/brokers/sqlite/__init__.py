"""The SQLite broker: one file, nothing to install."""

from __future__ import annotations

from leveret.brokers.sqlite.broker import SQLiteBroker

__all__ = ["SQLiteBroker"]
