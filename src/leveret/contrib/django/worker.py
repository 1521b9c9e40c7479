"""What ``manage.py leveret`` names to the command line: the project's application with all of its tasks."""

from __future__ import annotations

import django
from django.apps import apps
from django.utils.module_loading import autodiscover_modules

# A child of a worker begins here.
if not apps.ready:
    django.setup()

from leveret.contrib.django.application import app

autodiscover_modules("tasks")

__all__ = ["app"]
