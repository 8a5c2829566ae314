"""A pytest plugin that writes each result at once, for suites that may be cut.

python -m pytest -p studies.suite_record --record FILE
"""

import json
from pathlib import Path
from typing import Any

import pytest

# Errors of a machine that has not all packages of the suite.
_MISSING = ("ModuleNotFoundError", "PackageNotFoundError")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--record`."""
    parser.addoption("--record", type=Path, help="file that gets a line per result")


def pytest_configure(config: pytest.Config) -> None:
    """Record results, but not in the workers of pytest-xdist, which report them."""
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(path))


class Record:
    """Writes a line of JSON for each test, and for each file that is not collected.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        # Line by line: what is written stays if the suite is killed.
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a call, and what fails or is skipped before or after one."""
        if report.when == "call" or not report.passed:
            self._write(report, seconds=round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record what could not be collected."""
        if report.failed:
            self._write(report)

    def _write(self, report: Any, **others: Any) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome} | others
        if not report.passed:
            why = report.longreprtext[-2000:]
            if any(error in why for error in _MISSING):
                line["outcome"] = "package missing"
            line["why"] = why
        print(json.dumps(line), file=self._file)
