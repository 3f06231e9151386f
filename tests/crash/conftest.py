"""The crash tests need strace and the right to trace; where they are missing, that is said at the end of the run."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = {
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    }
    for reason in sorted(r for r in reasons if "THE CRASH TESTS DID NOT RUN" in r):
        terminalreporter.write_line(reason, red=True, bold=True)
