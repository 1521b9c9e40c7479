"""Leveret in a Django project: ``INSTALLED_APPS = [..., "leveret.contrib.django"]``, and settings in ``LEVERET``.

It needs the extra ``leveret[django]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.contrib.django.application import app, enqueue_on_commit

__all__ = ["app", "enqueue_on_commit"]


def __getattr__(name: str) -> Any:
    # Django imports this package while it reads INSTALLED_APPS; the application needs the settings.
    if name in __all__:
        from leveret.contrib.django import application

        return getattr(application, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
