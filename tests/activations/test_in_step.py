"""Passes that wait for each other."""

import threading

import pytest

from rgsp_jax.activations.in_step import run_in_step


def visit(*sites):
    def run(receive):
        for number, site in enumerate(sites):
            receive(site, number)

    return run


def test_all_that_come_to_a_site_meet_there_and_others_are_not_waited_for():
    met = []
    runs = {"image": visit("tower", "first", "last"), "text": visit("first", "last"), "short": visit("first")}
    run_in_step(runs, ["tower", "first", "last"], lambda site, here: met.append((site, here)))
    assert met == [
        ("tower", {"image": 0}),
        ("first", {"image": 1, "text": 0, "short": 0}),
        ("last", {"image": 2, "text": 1}),
    ]


def test_what_is_changed_at_a_meeting_is_seen_behind_it():
    value, seen = [0], []

    def run(receive):
        receive("a", None)
        seen.append(value[0])
        receive("b", None)
        seen.append(value[0])

    def meet(site, here):
        value[0] += 1

    run_in_step(dict.fromkeys(range(3), run), ["a", "b"], meet)
    assert seen == [1, 1, 1, 2, 2, 2]


def test_sites_that_come_again_and_unknown_ones_meet_last():
    met = []
    run_in_step({"x": visit("b", "new", "b"), "y": visit("b")}, ["b"], lambda site, here: met.append((site, len(here))))
    assert met == [("b", 2), ("new", 1), ("b", 1)]


def test_only_one_pass_runs_at_a_time():
    inside, most = [0], [0]

    def run(receive):
        for site in range(20):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            sum(range(1000))
            inside[0] -= 1
            receive(site, None)

    run_in_step(dict.fromkeys(range(5), run), range(20), lambda site, here: None)
    assert most == [1]


@pytest.mark.parametrize("where", ["pass", "meeting"])
def test_a_failure_ends_every_pass(where):
    before = threading.active_count()

    def fail(*_):
        raise ArithmeticError(where)

    def run(receive):
        receive("a", None)
        fail()

    meet = fail if where == "meeting" else lambda site, here: None
    with pytest.raises(ArithmeticError, match=where):
        run_in_step({"good": visit("a", "b"), "bad": run, "late": visit("b")}, ["a", "b"], meet)
    assert threading.active_count() == before
