"""What the shop's customers ask."""

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from leveret.contrib.django import app, enqueue_on_commit
from leveret.errors import TaskNotFound
from shop.models import Order
from shop.tasks import confirm


@csrf_exempt
@require_POST
def order(request: HttpRequest) -> JsonResponse:
    with transaction.atomic():
        stored = Order.objects.create(text=request.POST["text"])
        # Not before the order can be seen: the worker may be quicker than the commit.
        handle = enqueue_on_commit(confirm, stored.pk)
    return JsonResponse({"order": stored.pk, "task": handle.id}, status=202)


def state(_: HttpRequest, task: str) -> JsonResponse:
    try:
        status = app.wait(app.handle(task).status())
    except TaskNotFound:
        return JsonResponse({"error": "there is no such task"}, status=404)
    return JsonResponse({"state": status.state, "result": status.result})
