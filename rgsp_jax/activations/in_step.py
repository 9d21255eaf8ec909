"""Several forward passes that advance together, site by site."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any


class Stopped(Exception):
    """Raised inside a pass that nobody waits for any more."""


class Pass:
    """One forward pass in a thread of its own that runs only while it is told to advance, up to its next site."""

    def __init__(self, run: Callable[[Callable[[Any, Any], None]], None]):
        self.at: tuple[Any, Any] | None = None
        """(site, rows) where it waits; None before it began and after it ended."""
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run to the next site or to the end; raises what the pass raised."""
        self.at = None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it, wherever it is."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                self._run(self._receive)
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._back.release()

    def _receive(self, site: Any, rows: Any) -> None:
        self.at = site, rows
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise Stopped


def run_in_step(
    runs: Mapping[Hashable, Callable[[Callable[[Any, Any], None]], None]],
    order: Sequence[Any],
    meet: Callable[[Any, dict[Hashable, Any]], None],
) -> None:
    """Run forward passes that wait for each other at every site.

    Only one of them runs at a time. Passes that do not come to a site, such as texts at a vision tower, are not waited
    for there.

    Args:
        runs: name of a pass -> function that makes it, calling `receive(site, rows)` at every site.
        order: of the sites in the model; others go last, as they come.
        meet: `meet(site, rows by pass)`, called once all passes that come to a site have come.

    Raises:
        Whatever a pass or `meet` raises; the other passes are ended then.
    """
    place = {site: i for i, site in enumerate(order)}
    passes = {name: Pass(run) for name, run in runs.items()}
    try:
        for each in passes.values():
            each.advance()
        while waiting := {name: each.at for name, each in passes.items() if each.at is not None}:
            site = min((at[0] for at in waiting.values()), key=lambda site: place.get(site, len(place)))
            here = {name: at[1] for name, at in waiting.items() if at[0] == site}
            meet(site, here)
            for name in here:
                passes[name].advance()
    finally:
        for each in passes.values():
            each.stop()
