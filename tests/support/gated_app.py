"""`ledger_app`, the import of which ends when the test says so: by a file with the number of the process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.ledger_app import app, note

__all__ = ["app"]

note(f"import {os.getpid()}")
while not Path(f"{os.environ['LEDGER']}.{os.getpid()}").exists():
    time.sleep(0.02)
