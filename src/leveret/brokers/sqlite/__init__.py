"""The SQLite broker: one file, nothing to install."""

from __future__ import annotations

from leveret.brokers.sqlite.broker import SQLiteBroker
from leveret.brokers.sqlite.joining import insert_within

__all__ = ["SQLiteBroker", "insert_within"]
