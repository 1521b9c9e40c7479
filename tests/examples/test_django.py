"""The Django example: its server, its worker and its database, each a process or a file of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import django
import httpx
import pytest

from tests.examples.programs import EXAMPLES, PATIENCE, Program, running
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Place

MANAGE = str(EXAMPLES / "django" / "manage.py")
