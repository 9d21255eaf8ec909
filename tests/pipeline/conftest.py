"""What tests of the pipeline share: toy methods in the registry, items of a few tensors, a page without plots."""

import importlib

import pytest

from pipeline.toy_methods import EXTENDED, USERS
from pipeline.toy_models import HIDDEN, INNER
from rgsp_jax.pipeline import overview, plan


@pytest.fixture
def toy_methods(monkeypatch):
    """Register the toy methods."""
    for name in USERS:
        monkeypatch.setattr(importlib.import_module(f"rgsp_jax.pipeline.{name}"), "methods", EXTENDED)


@pytest.fixture
def small_items(monkeypatch):
    """Items of one chunk or one or two matrices, so that small models make many."""
    monkeypatch.setattr(plan, "ITEM_ELEMENTS", INNER * HIDDEN)


@pytest.fixture
def plain_report(monkeypatch):
    """A page without plots, which have tests of their own and take most of a small merge's time."""
    monkeypatch.setattr(overview, "render_report", lambda summary, records: f"<p>{len(records)}</p>")
