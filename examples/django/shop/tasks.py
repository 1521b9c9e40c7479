"""The tasks. A worker imports the tasks.py of each installed application."""

import django

from leveret.contrib.django import app
from shop.models import Order


@app.task
def confirm(order: int) -> str:
    changed = Order.objects.filter(pk=order).update(confirmed=True)
    return f"{changed} confirmed"


@app.task
async def count_confirmed() -> int:
    return await Order.objects.filter(confirmed=True).acount()


if django.VERSION >= (6, 0):
    from django.tasks import task

    @task
    def describe(order: int) -> str:
        return Order.objects.get(pk=order).text

    @task(priority=10, takes_context=True)
    async def attempt(context: object) -> int:
        return context.attempt  # type: ignore[attr-defined]
