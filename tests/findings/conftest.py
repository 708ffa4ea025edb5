"""The table at the end of `make test-upstream`: a row for each finding, a column for each of what is said of it."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter):
    cells: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            test, _, name = report.nodeid.rpartition("::")[2].partition("[")
            if name:
                cells.setdefault(name.rstrip("]"), {})[test.removeprefix("test_").replace("_", " ")] = outcome.upper()
    columns = list(dict.fromkeys(test for row in cells.values() for test in row))
    for number, column in enumerate(columns, 1):
        terminalreporter.write_line(f"{number}: {column}")
    for name, row in sorted(cells.items()):
        said = "  ".join(f"{number} {row.get(column, '-').lower():<6}" for number, column in enumerate(columns, 1))
        terminalreporter.write_line(f"{name:<30}{said}")
