"""The parts of the scaling benchmark that count: collectives in a program, names of meetings, ratios within rounds."""

import pytest

from experiments.benchmarks import scaling

PROGRAM = """
  %all-reduce.3 = f32[13,256]{1,0} all-reduce(f32[13,256]{1,0} %x), replica_groups={}
  %sum = (f32[], f32[4,5]{1,0}) all-reduce-start(f32[] %a, f32[4,5]{1,0} %b)
  ROOT %g = f32[8,7]{1,0} all-gather(f32[1,7]{1,0} %y), dimensions={0}
  %fusion = f32[100,100]{1,0} fusion(f32[100,100]{1,0} %all-reduce.3), kind=kLoop
"""


def test_collectives_of_a_program_are_counted_with_their_largest():
    assert scaling.list_collectives(PROGRAM) == {
        "all-reduce": {"count": 2, "largest": 13 * 256},
        "all-gather": {"count": 1, "largest": 56},
    }
    assert scaling.list_collectives("%fusion = f32[100]{0} fusion(f32[100]{0} %x)") == {}


def test_meetings_of_one_merge_are_not_those_of_another():
    met = []

    class Team:
        index, count, kept = 0, 2, "nothing"
        check = say = fail = print

        def meet(self, name, work, conclude, *, long):
            met.append((name, long))
            return work()

    for number in (0, 1):
        team = scaling.Numbered(Team(), number)
        assert team.meet("opened", lambda: 7, long=bool(number)) == 7
        assert (team.index, team.count) == (0, 2)
    assert met == [("0-opened", False), ("1-opened", True)]


def test_ratios_are_taken_within_rounds():
    """A busy round slows both sides: a ratio of medians would say 1.5 here."""
    one, two = scaling.SETTINGS[0], scaling.Setting(1, 2)
    work = {"bytes_read": [3, 4], "seconds": [1, 2], "predicted_imbalance": 1.1, "measured_imbalance": 1.2}
    alone = [{"wall": w, "cpu": 1.0, "work": None, "bytes_in": 7} for w in (1.0, 10.0, 2.0)]
    both = [{"wall": w, "cpu": 3.0, "work": work, "bytes_in": 7} for w in (2.0, 20.0, 3.0)]
    times = {("average", one): alone, ("average", two): both}
    row = scaling.describe("average", two, times, {})
    assert (row["wall"], row["wall_ratio"], row["cpu_ratio"]) == (3.0, 2.0, 3.0)
    assert (row["bytes_read"], row["measured_imbalance"]) == ([3, 4], 1.2)
    row = scaling.describe("average", one, times, {})
    assert (row["wall_ratio"], row["bytes_read"], row["predicted_imbalance"]) == (1.0, [7], 1.0)


def test_predictions_are_made_for_the_models_that_are_merged(tmp_path):
    models = scaling.make_models(tmp_path / "models", 2, 16)
    kind = scaling.replace_figures(scaling.measure_host(), {"read": 1e6, "write": 1e6, "fixed": 0.5})
    found = {s: scaling.predict(s, "average", models, kind) for s in scaling.SETTINGS}
    one, four = found[scaling.SETTINGS[0]], found[scaling.Setting(1, 4)]
    size = sum(own["bytes_read"] for own in one["by_process"])
    assert one["seconds"] > 0.5 + size / 1e6
    assert sum(own["bytes_read"] for own in four["by_process"]) == size and len(four["by_process"]) == 4
    with pytest.raises(FileExistsError):
        scaling.make_models(tmp_path / "models", 2, 16)
