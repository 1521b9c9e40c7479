"""What the shop keeps."""

from django.db import models


class Order(models.Model):
    """An order, confirmed or not yet."""

    text = models.CharField(max_length=200)
    confirmed = models.BooleanField(default=False)
