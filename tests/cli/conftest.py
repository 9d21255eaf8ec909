"""Running the command line in this process, as a shell would see it."""

import sys
from typing import NamedTuple

import pytest

import rgsp_jax.cli
from rgsp_jax.pipeline import overview


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def rgsp(monkeypatch, capsys):
    """`rgsp(*arguments)` -> exit code and what was printed; any exception but SystemExit fails the test."""
    monkeypatch.setattr(rgsp_jax.cli, "keep_compilations", lambda: None)
    monkeypatch.setattr(overview, "render_report", lambda summary, records: f"<p>{len(records)}</p>")
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["rgsp", *map(str, arguments)])
        code = 0
        try:
            rgsp_jax.cli.main()
        except SystemExit as ending:
            code = ending.code or 0
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run
