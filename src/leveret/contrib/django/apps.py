"""What Django knows Leveret by."""

from __future__ import annotations

from django.apps import AppConfig


class LeveretConfig(AppConfig):
    """For ``manage.py leveret``."""

    name = "leveret.contrib.django"
    label = "leveret"
    verbose_name = "Leveret"
