"""What an application uses: `App`, tasks, handles, and how a call becomes a body."""

from __future__ import annotations

from leveret.client.app import App, LifespanFunction
from leveret.client.chains import Chain, ChainHandle, Step
from leveret.client.client import Client
from leveret.client.handle import Handle, as_finished, gather_results
from leveret.client.limits import Limit
from leveret.client.loading import load_app, not_loaded
from leveret.client.settings import OF_AN_APPLICATION, Project, check, project, resolve_url
from leveret.client.task import P, R, Task
from leveret.client.unique import by

__all__ = [
    "OF_AN_APPLICATION", "App", "Chain", "ChainHandle", "Client", "Handle", "LifespanFunction", "Limit", "P",
    "Project", "R", "Step", "Task", "as_finished", "by", "check", "gather_results", "load_app", "not_loaded",
    "project", "resolve_url",
]  # fmt: skip
