"""Processes that meet, disagree, refuse and are lost, as threads around a store that behaves as JAX's does."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from rgsp_jax.errors import NotFiniteError, RefusedError
from rgsp_jax.pipeline import native_messages
from rgsp_jax.pipeline import processes as processes_module
from rgsp_jax.pipeline.agreement import require_agreement, require_one_platform
from rgsp_jax.pipeline.launch import check_flags, connect_processes
from rgsp_jax.pipeline.processes import Alone, Processes, describe_lost, join_problems


class Store:
    """Keys and values, and who is alive, of one run."""

    def __init__(self, count):
        self.values, self.living, self.changed = {}, set(range(count)), threading.Condition()
        self.gone = False


class Client:
    """One process's view of the store, with the methods and the error texts of JAX's client."""

    def __init__(self, store, index):
        self.store, self.index = store, index

    def key_value_set(self, key, value):
        with self.store.changed:
            if key in self.store.values:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.store.values[key] = value
            self.store.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.store.changed:
            ready = self.store.changed.wait_for(
                lambda: key in self.store.values or self.store.gone, timeout_in_ms / 1000
            )
            if self.store.gone:
                raise RuntimeError("UNAVAILABLE: Socket closed")
            if not ready:
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.store.values[key]

    def get_live_nodes(self, process_ids):
        return dict.fromkeys(self.store.living & set(process_ids), 1)


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes_module, "WAIT_MILLISECONDS", 50)
    monkeypatch.setattr(processes_module, "LIVE_SECONDS", 0.02)
    monkeypatch.setattr(processes_module, "GRACE_SECONDS", 0.3)


def together(count, act, store=None):
    """What `act(team)` returns or raises in every one of `count` processes."""
    store = store or Store(count)
    outcomes = [None] * count

    def live(index):
        team = Processes(Client(store, index), index, count, say=lambda text: None, error=lambda problems: None)
        try:
            outcomes[index] = act(team)
        except RefusedError as refusal:
            outcomes[index] = refusal
            team.fail(refusal)
        finally:
            if index:
                store.living.discard(index)
            team.close()

    threads = [threading.Thread(target=live, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcomes


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_return_what_process_0_concludes(count):
    def act(team):
        first = team.meet("a", lambda: team.index**2, sum)
        return first, team.meet("b", lambda: None, lambda found: {"all": len(found)}), team.meet("c", lambda: 3)

    assert together(count, act) == [(sum(i**2 for i in range(count)), {"all": count}, None)] * count


def test_one_process_needs_no_store():
    team = Alone()
    assert team.meet("a", lambda: 4, lambda found: found[0] + 1) == 5
    team.check()


def test_long_results_come_whole(monkeypatch):
    monkeypatch.setattr(processes_module, "CHUNK", 100)
    text = "".join(chr(33 + (i * i) % 90) for i in range(20_000)) + "ä"
    assert (
        together(2, lambda team: team.meet("a", lambda: text * (team.index + 1), lambda found: found[1]))
        == [text * 2] * 2
    )


def test_refusals_of_all_are_joined():
    def act(team):
        def work():
            raise RefusedError(["the same for all", f"only of {team.index}"])

        team.meet("a", work if team.index != 1 else lambda: None)

    outcomes = together(3, act)
    wanted = ("process 0, 2: the same for all", "process 0: only of 0", "process 2: only of 2")
    assert [outcome.problems for outcome in outcomes] == [wanted] * 3


def test_a_refusal_of_the_conclusion_is_everyones():
    def conclude(found):
        raise NotFiniteError("no number")

    outcomes = together(2, lambda team: team.meet("a", lambda: 1, conclude))
    assert [(type(outcome), outcome.problems) for outcome in outcomes] == [(NotFiniteError, ("no number",))] * 2


def test_a_refusal_of_long_work_stops_the_others_at_once():
    def act(team):
        def work():
            if team.index == 1:
                raise RefusedError("the disk is full")
            for _ in range(2000):
                time.sleep(0.01)
                team.check()

        team.meet("a", work, long=True)

    started = time.monotonic()
    outcomes = together(3, act)
    assert [outcome.problems for outcome in outcomes] == [("the disk is full",)] * 3
    assert time.monotonic() - started < 10


def test_a_lost_process_stops_the_others():
    store = Store(3)

    def act(team):
        team.kept = "what is done is in X"
        if team.index == 2:
            store.living.discard(2)
            team._closing.set()  # its threads are gone, too
            return "killed"
        team.meet("a", lambda: 1)

    outcomes = together(3, act, store)
    assert outcomes[2] == "killed"
    sentence = "process 2 of 3 was lost (killed, out of memory, or cut off); what is done is in X"
    assert [outcome.problems for outcome in outcomes[:2]] == [(sentence,)] * 2


def test_a_process_whose_main_thread_is_busy_ends_by_itself(monkeypatch):
    ended, said = threading.Event(), []

    def end(code):
        said.append(code)
        ended.set()
        raise Ended

    monkeypatch.setattr(processes_module.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    store = Store(2)
    team = Processes(Client(store, 1), 1, 2, error=said.extend)
    team.kept = "kept"
    with store.changed:
        store.gone = True  # process 0, and with it the store
        store.changed.notify_all()
    assert ended.wait(5)
    assert said == ["process 0 of 2 was lost (killed, out of memory, or cut off); kept", 2]

    ended.clear(), said.clear()
    store = Store(2)
    busy = Processes(Client(store, 1), 1, 2, error=said.extend)
    Client(store, 0).key_value_set("rgsp/stop", json.dumps({"problems": ["the disk is full"]}))
    assert ended.wait(5)
    assert said == ["the disk is full", 2] and busy.problems == ("the disk is full",)
    team._closing.set(), busy._closing.set()


def test_processes_are_named():
    assert describe_lost([1, 3], 8, "kept").startswith("processes 1, 3 of 8 were lost")
    assert join_problems([["a"], ["a"], []]) == ["process 0, 1: a"]
    assert join_problems([["a", "b"], ["b", "a"]]) == ["a", "b"]


def test_disagreement_is_named():
    same = {"other settings": "x", "other files of m": "1"}
    require_agreement([same, dict(same)])
    with pytest.raises(RefusedError) as refusal:
        require_agreement([same, {**same, "other files of m": "2"}, {**same, "other files of m": "3", "more": "x"}])
    assert refusal.value.problems == (
        "processes 1, 2 have other files of m than process 0: start all alike",
        "process 2 has more than process 0: start all alike",
    )
    require_one_platform(["cpu", "cpu"])
    with pytest.raises(RefusedError, match=r"tpu in process 0, 2; cpu in process 1"):
        require_one_platform(["tpu", "cpu", "tpu"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("host", 2, 0), "must be HOST:PORT"),
        (("host:0", 2, 1), "must be HOST:PORT"),
        ((":99", 2, 1), "must be HOST:PORT"),
        ((None, 0, 0), "give at least 1"),
        (("host:99", 2, 2), "numbered from 0"),
        (("host:99", None, -1), "numbered from 0"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, expected):
    with pytest.raises(RefusedError, match=expected):
        check_flags(*flags)


def test_a_port_that_is_taken_is_refused():
    import socket

    with socket.create_server(("", 0)) as server, pytest.raises(RefusedError, match="the port is taken"):
        check_flags(f"localhost:{server.getsockname()[1]}", 2, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("coordinator_address should be defined."), r"knows no cluster here.*--coordinator.*address should"),
        (RuntimeError("It is too late.\nAnd more."), r"cannot meet at the coordinator .* names: It is too late\.$"),
    ],
)
def test_what_jax_cannot_do_is_one_sentence(monkeypatch, error, expected):
    def initialize(*args, **kwargs):
        raise error

    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(RefusedError, match=expected) as refusal, connect_processes():
        pass
    assert len(refusal.value.problems) == 1


NATIVE = """
import importlib.util, os, sys, threading
spec = importlib.util.spec_from_file_location("native_messages", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.set_aside(lambda: "error: process 0 was lost\\n", 2):
    print("from Python", file=sys.stderr)
    os.write(2, b"W1122 19:02:03.190269   28595 coordination_service.cc:185] some task\\nis recoverable\\n")
    os.write(2, b"W1122 19:02:03.190269   28595 compiler.cc:18] slow\\nto compile\\n")
    if sys.argv[2] == "lost":
        os.write(2, b"F1122 19:02:34.042553 28960 client.h:80] Terminating process because the JAX distributed service"
                    b" detected fatal errors. This most\\n*** Check failure stack trace: ***\\n    @ 0x7f\\n")
    if sys.argv[2] != "fine":
        thread = threading.Thread(target=os.abort)
        thread.start()
        thread.join()
print("afterwards", file=sys.stderr)
"""
SLOW = "W1122 19:02:03.190269   28595 compiler.cc:18] slow\nto compile\n"
COORDINATION = "W1122 19:02:03.190269   28595 coordination_service.cc:185] some task\nis recoverable\n"


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [
        ("fine", 0, "from Python\n" + SLOW + "afterwards\n"),
        ("lost", 2, "from Python\nerror: process 0 was lost\n"),
        ("aborted", -signal.SIGABRT, "from Python\n" + COORDINATION + SLOW),
    ],
)
def test_native_messages(how, code, expected):
    """The native log waits for the end; an abort over a lost coordinator is a sentence, any other what it ever was."""
    command = [sys.executable, "-c", NATIVE, native_messages.__file__, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, expected)
