"""Several processes at one merge: where they meet, what they agree on, and how one's end becomes the end of all.

Every process merges tensors of its own on its own devices and writes them to files of its own (MPMD): there is nothing
that one needs of another's arrays, so no collective is compiled, and a process waits for none while it works. What they
say to each other are a few short texts, through the key-value store of JAX's coordination service, which process 0 runs
(`jax.distributed`); that service also knows who is alive.

One key, `stop`, ends all: whoever fails writes there why. Every process has two threads, one that waits for this key
and one that asks for the living. The main thread looks up what they found between two items, and where it does not
within GRACE_SECONDS the process ends all the same: the journals hold what is done, as after a kill.
"""

import json
import os
import sys
import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from rgsp_jax.errors import NotFiniteError, RefusedError

HEARTBEAT_TIMEOUT, START_TIMEOUT = 20, 300
"""Seconds without a sign of life after which a process is lost; seconds for all to arrive."""
GRACE_SECONDS = 5.0
WAIT_MILLISECONDS = 1000
LIVE_SECONDS = 1.0
CHUNK = 1 << 20
"""Characters of one value in the store."""
REFUSED = 2
"""Exit code, as of any refusal."""
STOP = "rgsp/stop"
NOTHING_KEPT = "nothing was written"

Meeting = Callable[[list[Any]], Any]


class Team(Protocol):
    """The processes of one merge as one of them sees it."""

    index: int
    count: int
    kept: str
    """Half a sentence on the work done so far, for when all must stop."""

    def meet(self, name: str, work: Callable[[], Any], conclude: Meeting | None = None, *, long: bool = False) -> Any:
        """All do `work`; what process 0 concludes from their results, in order, is what all return.

        Results and conclusion are data as JSON has them. Refusals of all are joined and raised in every process; those
        of `long` work stop the others at once.
        """
        ...

    def check(self) -> None:
        """RefusedError where another process has failed or is gone."""
        ...

    def say(self, text: str) -> None:
        """A remark for whoever started the run, once."""
        ...

    def fail(self, error: BaseException) -> None:
        """Tell the others that all is over, and why; process 0 returns when they have left."""
        ...


class Alone:
    """The team of one process."""

    index, count, kept = 0, 1, NOTHING_KEPT

    def meet(self, name: str, work: Callable[[], Any], conclude: Meeting | None = None, *, long: bool = False) -> Any:
        result = work()
        return conclude([result]) if conclude else None

    def check(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass


class Processes:
    """One of several processes that JAX's coordination service connects; see `Team`.

    Args:
        client: of the service.
        index, count: of this process, and how many there are.
        say: takes remarks, in process 0.
        error: takes the sentences of a process that must end while its main thread is busy.
    """

    def __init__(
        self, client: Any, index: int, count: int, say: Callable[[str], None] = print, error: Any = None
    ) -> None:
        self.index, self.count, self.kept = index, count, NOTHING_KEPT
        self._client, self._say, self._error = client, say, error or write_error
        self._reason: Mapping[str, Any] = {}
        self._stopped, self._heeded, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=watch, name=f"rgsp-{watch.__name__}", daemon=True)
            for watch in (self._listen, self._count_living)
        ]
        for thread in self._threads:
            thread.start()

    def meet(self, name: str, work: Callable[[], Any], conclude: Meeting | None = None, *, long: bool = False) -> Any:
        own = self._attempt(work, stop=long)
        self._put(f"rgsp/{name}/{self.index}", own)
        if self.index == 0:
            self._put(f"rgsp/{name}/conclusion", self._conclude(name, conclude))
        found = self._get(f"rgsp/{name}/conclusion")
        if "problems" in found:
            raise to_refusal(found)
        return found["value"]

    def _attempt(self, work: Callable[[], Any], *, stop: bool = False) -> dict[str, Any]:
        """The result of some work, or its refusal, as data."""
        self.check()
        try:
            return {"value": work()}
        except RefusedError as refusal:
            if stop:
                raise
            return from_refusal(refusal)

    def _conclude(self, name: str, conclude: Meeting | None) -> dict[str, Any]:
        """What process 0 makes of all results."""
        results = [self._get(f"rgsp/{name}/{process}") for process in range(self.count)]
        refusals = [result.get("problems", ()) for result in results]
        if any(refusals):
            return {"problems": join_problems(refusals), "not_finite": all(r.get("not_finite", True) for r in results)}
        if conclude is None:
            return {"value": None}
        return self._attempt(lambda: conclude([result["value"] for result in results]))

    def _put(self, key: str, value: Any) -> None:
        """Set a value, in chunks where it is long."""
        text = json.dumps(value, allow_nan=False)
        if len(text) > CHUNK:
            text = "z" + b64encode(zlib.compress(text.encode())).decode()
        chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
        for number, chunk in enumerate(chunks):
            self._client.key_value_set(f"{key}/{number}", chunk)
        self._client.key_value_set(f"{key}/chunks", str(len(chunks)))

    def _get(self, key: str) -> Any:
        """Wait for a value; RefusedError where it can no longer come."""
        text = "".join(self._wait_for(f"{key}/{i}") for i in range(int(self._wait_for(f"{key}/chunks"))))
        return json.loads(zlib.decompress(b64decode(text[1:])) if text.startswith("z") else text)

    def _wait_for(self, key: str) -> str:
        while True:
            self.check()
            if (found := self._look(key)) is not None:
                return found

    def _look(self, key: str) -> str | None:
        """The text under a key; None where it does not come within a second."""
        try:
            return self._client.blocking_key_value_get(key, WAIT_MILLISECONDS)
        except Exception as error:  # JAX's own error type carries the status in its text alone
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    @property
    def problems(self) -> tuple[str, ...]:
        """Why all stop; empty while they do not."""
        return tuple(self._reason.get("problems", ()))

    def check(self) -> None:
        if self._stopped.is_set():
            self._heeded.set()
            raise to_refusal(self._reason)

    def say(self, text: str) -> None:
        if self.index == 0:
            self._say(text)

    def fail(self, error: BaseException) -> None:
        self._stop(from_refusal(error if isinstance(error, RefusedError) else RefusedError(describe_end(error, self))))
        if self.index == 0:
            self._outlive()

    def _stop(self, reason: Mapping[str, Any]) -> None:
        """End the work of all; the first to say why is heard."""
        self._heeded.set()
        with suppress(Exception):  # said before by another process, or nobody is there to be told
            self._client.key_value_set(STOP, json.dumps(reason))

    def close(self) -> None:
        """Leave; process 0 is the last, since the others cannot do without it."""
        self._heeded.set()
        self._closing.set()
        if self.index == 0:
            self._stop({})
        for thread in self._threads:
            thread.join()

    def _listen(self) -> None:
        """Wait for the word to stop."""
        while not self._closing.is_set():
            try:
                text = self._look(STOP)
            except Exception:
                if not self._closing.is_set():
                    self._end(self._explain_lost([0]), at_once=True)
                return
            if text is not None:
                if reason := json.loads(text):
                    self._end(reason)
                return

    def _count_living(self) -> None:
        """Ask who is alive. The answer comes when all who are have asked, so each asks until the end."""
        everyone = list(range(self.count))
        while True:
            try:
                living = self._client.get_live_nodes(everyone)
            except Exception:
                return
            if self._closing.is_set() and (self.index or len(living) == 1):
                return
            lost = [process for process in everyone if process not in living]
            if lost and not self._closing.is_set() and not self._stopped.is_set() and self._look(STOP) is None:
                self._end(self._explain_lost(lost))
            self._closing.wait(0.05 if self._closing.is_set() else LIVE_SECONDS)

    def _explain_lost(self, lost: Sequence[int]) -> Mapping[str, Any]:
        return from_refusal(RefusedError(describe_lost(lost, self.count, self.kept)))

    def _end(self, reason: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Have the main thread raise; where it is too busy, end the process."""
        self._reason = reason
        self._stopped.set()
        if at_once or not self._heeded.wait(GRACE_SECONDS):
            self._error(self.problems)
            if self.index == 0 and not at_once:
                self._outlive()
            os._exit(REFUSED)

    def _outlive(self) -> None:
        """Wait until the others have left or are lost: they cannot do without process 0."""
        with suppress(Exception):
            while len(self._client.get_live_nodes(list(range(self.count)))) > 1:
                time.sleep(0.05)


def write_error(problems: Sequence[str]) -> None:
    """Sentences as the command line shows them, from any thread."""
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems))
    sys.stderr.flush()


def from_refusal(refusal: RefusedError) -> dict[str, Any]:
    """A refusal as data."""
    return {"problems": list(refusal.problems), "not_finite": isinstance(refusal, NotFiniteError)}


def to_refusal(data: Mapping[str, Any]) -> RefusedError:
    """The refusal that another process met with."""
    return (NotFiniteError if data.get("not_finite") else RefusedError)(data["problems"])


def describe_end(error: BaseException, team: Processes) -> str:
    """What the others are told when a process ends before its time."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"process {team.index} of {team.count} was stopped; {team.kept}"
    what = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return f"process {team.index} of {team.count} failed ({what}), see its output; {team.kept}"


def describe_lost(lost: Sequence[int], count: int, kept: str) -> str:
    """The sentence on processes that are gone."""
    names = ", ".join(map(str, lost))
    who = f"process {names} of {count} was lost" if len(lost) == 1 else f"processes {names} of {count} were lost"
    return f"{who} (killed, out of memory, or cut off); {kept}"


def join_problems(refusals: Sequence[Sequence[str]]) -> list[str]:
    """Sentences of all processes: once where all say the same, by process otherwise."""
    said: dict[str, list[int]] = {}
    for process, problems in enumerate(refusals):
        for problem in problems:
            said.setdefault(problem, []).append(process)
    everyone = len(refusals)
    return [
        problem if len(processes) == everyone else f"process {', '.join(map(str, processes))}: {problem}"
        for problem, processes in said.items()
    ]
