"""A store for every test."""

import pytest

from remote.toy_store import ToyStore


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The directory that holds the objects of toy://."""
    place = tmp_path / "store"
    place.mkdir()
    monkeypatch.setenv("TOY_STORE", str(place))
    monkeypatch.setattr(ToyStore, "requests", [])
    monkeypatch.setattr(ToyStore, "faults", {})
    return place
