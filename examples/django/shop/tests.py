"""``python manage.py test``: with the tasks on a broker in memory."""

from django.test import TransactionTestCase

from leveret.contrib.django.worker import app
from leveret.testing import under_test
from shop.models import Order
from shop.tasks import confirm


class Ordering(TransactionTestCase):
    """A task runs in a thread with a connection of its own: it sees what is committed."""

    def test_an_order_is_confirmed(self) -> None:
        with under_test(app) as test:
            self.client.post("/orders", {"text": "book"})
            order = Order.objects.get()
            test.assert_enqueued(confirm, order.pk)
            assert not order.confirmed
            test.drain_sync()
        order.refresh_from_db()
        assert order.confirmed
