"""The shop's addresses."""

from django.contrib import admin
from django.urls import path, re_path

from leveret.contrib.django.views import dashboard_view
from shop import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("orders", views.order),
    path("tasks/<str:task>", views.state),
    re_path(r"^leveret/(?P<page>.*)$", dashboard_view()),
]
