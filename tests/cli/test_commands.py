"""The commands as a whole: help, version, methods, and real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.toy_models import toy_family, tree_bytes, write_family
from rgsp_jax import __version__, cli, methods

SLOWLY = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells start their children without it
from rgsp_jax.checkpoint import ShardWriter
from rgsp_jax.pipeline import plan
plan.ITEM_ELEMENTS = 160
write = ShardWriter.write
def slow_write(*args):
    time.sleep(0.3)
    return write(*args)
ShardWriter.write = slow_write
from rgsp_jax.cli import main
main()
"""
PLAINLY = """
from rgsp_jax.pipeline import plan
plan.ITEM_ELEMENTS = 160
from rgsp_jax.cli import main
main()
"""


def test_help(rgsp):
    outcome = rgsp("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert all(name in outcome.out for name in ("merge", "methods", "demo", "--version"))
    outcome = rgsp("merge", "-h")
    assert (outcome.code, outcome.err) == (0, "")
    flags = (
        "--out --method --base --rank --scale --beta --epsilon --set --include --exclude --override --config --dtype"
    )
    for flag in (*flags.split(), "--max-shard-size", "--memory", "--seed", "--plan", "--resume", "--json"):
        assert flag in outcome.out


def test_version(rgsp):
    assert rgsp("--version")[:2] == (0, f"rgsp, version {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["mrge"], ["--flag"]])
def test_what_is_no_command(rgsp, arguments):
    outcome = rgsp(*arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.err and "Usage" in outcome.err


def test_methods_lists_every_method(rgsp):
    outcome = rgsp("methods")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    for name, method in methods.items():
        assert any(name in line.split() and method.summary.split()[0] in line for line in lines)


@pytest.mark.parametrize("name", list(methods))
def test_methods_tells_every_hyperparameter(rgsp, name):
    outcome = rgsp("methods", name)
    assert outcome.code == 0
    for key, value in methods[name].defaults.items():
        assert key in outcome.out and str(value) in outcome.out


def test_methods_of_unknown_name(rgsp):
    outcome = rgsp("methods", "average", "tied", "knotted")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no method tied, knotted; there are average" in outcome.err


def test_compilations_are_kept_where_the_user_says(monkeypatch, tmp_path):
    import jax

    before = {
        n: jax.config.values[n] for n in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cli.keep_compilations()
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "rgsp_jax")
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        cli.keep_compilations()
        assert jax.config.values["jax_compilation_cache_dir"] == "/elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def start(tmp_path):
    """Start `rgsp` in a process of its own, with a home of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path, start):
    models = write_family(tmp_path, toy_family(2))
    out, journal = tmp_path / "out", tmp_path / "out.incomplete/journal.jsonl"
    arguments = ["merge", *models, "--method", "average", "--out", out]
    process = start(SLOWLY, *arguments)
    deadline = time.monotonic() + 90
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line]
    assert lines == [
        f"stopped; finish with the same command and --resume ({out}.incomplete keeps what is done)",
        "interrupted",
    ]
    assert not out.exists()
    done = journal.read_bytes().count(b"\n") - 1
    processes = [start(PLAINLY, *arguments, "--resume", "--json")]
    (tmp_path / "else").mkdir()
    processes.append(start(PLAINLY, *arguments[:-1], tmp_path / "else/out"))
    printed, errors = processes[0].communicate(timeout=120)
    assert (processes[0].returncode, errors) == (0, "")
    assert json.loads(printed)["resumed_items"] == done
    printed, errors = processes[1].communicate(timeout=120)
    assert (processes[1].returncode, errors) == (0, "")
    assert tree_bytes(out) == tree_bytes(tmp_path / "else/out")


def test_the_console_script(tmp_path, start):
    script = Path(sys.executable).with_name("rgsp")
    if not script.exists():
        pytest.skip("not installed as a script")
    done = subprocess.run(
        [script, "merge", tmp_path / "absent", tmp_path, "-o", "out"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "does not exist" in done.stderr


@pytest.mark.slow
def test_a_second_run_finds_its_compilations_and_stays_quiet(tmp_path, start):
    """Kernels kept from the first run give the same bytes; XLA has nothing to say on stderr."""
    models = write_family(tmp_path, toy_family(3))
    outcomes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        began = time.monotonic()
        process = start(PLAINLY, "merge", *models, "--rank", "2", "--out", tmp_path / name / "out", "--json")
        printed, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        outcomes.append((json.loads(printed)["seconds"], time.monotonic() - began))
    assert list((tmp_path / "home/.cache/rgsp_jax").iterdir())
    assert outcomes[1][0] < outcomes[0][0] / 2
    assert tree_bytes(tmp_path / "first/out") == tree_bytes(tmp_path / "second/out")
