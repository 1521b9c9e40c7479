"""What the programs of the tests inherit, whatever the tests were started from: `nohup`, a cron job, a script."""

from __future__ import annotations

import os
import signal

#: They change what a program prints, or where its tasks go.
_VARIABLES = (
    "LEVERET_URL",
    "PYTHONWARNINGS",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
    "LINES",
    "TERM",
    "PYTHONUNBUFFERED",
)
#: The signals that this run ignores itself, for xdist's workers.
_IGNORED = "LEVERET_TEST_IGNORES"


def settle() -> None:
    """Default signals, the usual umask and no settings; the run itself goes on ignoring what it was told to ignore."""
    inherited = os.environ.get(_IGNORED, "").split()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN or number.name in inherited:
            # A handler, not SIG_IGN, which what is started here would inherit.
            signal.signal(number, lambda *_: None)
            inherited.append(number.name)
    if inherited:
        os.environ[_IGNORED] = " ".join(dict.fromkeys(inherited))
    os.umask(0o022)
    for name in _VARIABLES:
        os.environ.pop(name, None)
    os.environ.setdefault("HOME", os.path.expanduser("~"))  # noqa: PTH111 - from the system's list of users
