"""Fixtures shared with the tests of the pipeline."""

from pipeline.conftest import plain_report as plain_report
