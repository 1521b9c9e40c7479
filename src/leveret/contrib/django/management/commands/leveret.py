"""``manage.py leveret``: Leveret's command line for the project's application."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from django.core.management.base import BaseCommand

from leveret.cli import main

#: The application with its tasks, for the command line and for the children of a worker.
APP = "leveret.contrib.django.worker:app"


class Command(BaseCommand):
    """Hands what follows it to ``leveret``."""

    help = "Leveret's command line: worker, dashboard, queues, dead, ... of this project."

    def run_from_argv(self, argv: list[str]) -> None:
        """All options are Leveret's, but --settings and --pythonpath, which Django has read."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--settings")
        parser.add_argument("--pythonpath")
        self._run(parser.parse_known_args(argv[2:])[1])

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def handle(self, *_: Any, arguments: list[str], **options: Any) -> None:
        """By ``call_command("leveret", "queues")``."""
        del options
        self._run(arguments)

    def _run(self, arguments: list[str]) -> None:
        # A worker's children are programs of their own, which import the project too.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        os.environ.setdefault("LEVERET_APP", APP)
        main(arguments)
