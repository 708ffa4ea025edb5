"""What README shows of the commands is what they print: from the recorded answers, which a test with vLLM compares."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest
from conftest import ROOT

from glmpp.checkpoint import Checkpoint
from glmpp.cli.advice_text import what_to_do
from glmpp.cli.report_text import as_text
from glmpp.dryrun.report import DryRunReport
from glmpp.layouts.layout import Layouts
from glmpp.layouts.text import layouts_text

RECORDED = ROOT / "data" / "recorded"
MODEL = "zai-org/GLM-5.1-FP8"


def check(full: Checkpoint) -> str:
    report, again = (DryRunReport.load(RECORDED / f"pp8_{name}.json", full) for name in ("installed", "loader"))
    advice = what_to_do(Namespace(model=MODEL, context=None, gpu_memory_utilization=None), full, report, again, None)
    return "\n".join([as_text(full, report), *advice])


def layouts(full: Checkpoint) -> str:
    return layouts_text(MODEL, full, Layouts.load(RECORDED / "layouts_16.json"))


@pytest.mark.parametrize("command", [check, layouts])
def test_readme_shows_what_the_command_prints(full, monkeypatch, command):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    told = (ROOT / "README.md").read_text()
    block = re.search(rf"    \$ glmpp {command.__name__} .*\n((?:    .*\n|\n)*?)(?=    \$|\S)", told)
    printed = iter(command(full).splitlines())
    shown = [line.removeprefix("    ") for line in block[1].splitlines() if line.strip() not in ("", "…")]
    assert len(shown) >= 3
    for line in shown:  # in order, with lines between them left out
        assert line in printed, line


def test_readme_can_be_read_in_four_minutes():
    words = re.sub(r"(?m)^    .*$|\]\([^)]*\)|[|`*#-]", " ", (ROOT / "README.md").read_text()).split()
    assert len(words) < 1100
