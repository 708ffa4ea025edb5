"""Every finding of `upstream/` on the release that it is of: real without its fix, gone with it, and nothing else moves.

`make test-upstream` runs this in the environment of the newest release. The first two say what vLLM's own developers
would see; the others ask the sweep's functions, on both targets of the record. Bytes are real where they are compared.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from findings import FINDINGS, FIXED, RELEASE, UPSTREAM, Entry
from quantised import quantised
from sweep.cases import Case, Sweep
from sweep.run import VARIANTS, dry_runs, judge, tiny_checkpoint

from glmpp.dryrun.advice import failures
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.report import DryRunReport
from glmpp.ledger import digest
from glmpp.serving import fixes

pytestmark = pytest.mark.skipif(vllm_version() != RELEASE, reason=f"findings of vLLM {RELEASE}")
NAMES = [entry.name for entry in FIXED]
UNFIXED = [entry.name for entry in FINDINGS if entry.why]
RECORDED = UPSTREAM.parent / "data" / "recorded"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FILTER = "stage_filter"  # no finding: a proposal, with a test and a fix.py of its own
SWEPT = [entry for entry in FIXED if entry.variants]  # others are about checkpoints that the sweep does not make
each_finding = pytest.mark.parametrize("entry", FIXED, ids=NAMES)
each_swept = pytest.mark.parametrize("entry", SWEPT, ids=[entry.name for entry in SWEPT])


@functools.cache
def outcomes(fixed: bool) -> dict[str, list[str]]:
    """Finding -> "passed" or "failed" of each of its tests in vLLM's style, all findings in one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.xml")
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", f"--junitxml={out}", *(["--fixed"] if fixed else [])]
        ends: dict[str, list[str]] = {name: [] for name in (*NAMES, FILTER, *([] if fixed else UNFIXED))}
        tests = [str(UPSTREAM / name) for name in ends]
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=folder, capture_output=True)
        cases = list(ElementTree.parse(out).iter("testcase"))
    for case in cases:
        (name,) = {name for name in ends if f"test_{name}" in case.get("classname", "").split(".")}
        ends[name].append("failed" if len(case) else "passed")
    return ends


@functools.cache
def reproduced() -> dict[str, list[str]]:
    program = [sys.executable, Path(__file__).with_name("reproduce.py"), UPSTREAM, *NAMES]
    done = subprocess.run([str(part) for part in program], capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def recorded(gpu: str) -> dict[tuple[str, str], Case]:
    (path,) = RECORDED.glob(f"sweep-vllm-{RELEASE}-{gpu}.json")
    return {(case.architecture, case.variant): case for case in Sweep.load(path).cases}


@dataclass
class Tried:
    """A case of a finding as it is and with the fix, with real bytes, at PP=1, 2 and 3; and the file's own tensors."""

    gpu: str
    found: Case
    cured: Case
    before: list[DryRunReport]
    after: list[DryRunReport]
    tensors: dict[str, torch.Tensor]


def try_with(entry: Entry, architecture: str, variant: str, gpu: str) -> Tried | None:
    """None where the record has no verdict."""
    if not recorded(gpu)[architecture, variant].counts:
        return None
    found, cured = Case(architecture, variant), Case(architecture, variant)
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
        before = dry_runs(checkpoint, Deployment(gpu=gpu), weights="real")
        after = dry_runs(checkpoint, Deployment(gpu=gpu, fixes=[entry.name]), weights="real")
        judge(found, before)
        judge(cured, after)
        wanted = {one.tensor for one in before[0].stages[0].left.values() if one.tensor}
        tensors = {name: tensor.clone() for name, tensor in checkpoint.read() if name in wanted}
    return Tried(gpu, found, cured, before, after, tensors)


@functools.cache
def tried(name: str) -> list[Tried]:
    """All cases of a finding, two at a time."""
    (entry,) = (entry for entry in FIXED if entry.name == name)
    cases = [
        (entry, one, variant, gpu) for gpu in entry.targets for one in entry.architectures for variant in entry.variants
    ]
    with ThreadPoolExecutor(2) as pool:
        return [one for one in pool.map(lambda case: try_with(*case), cases) if one]


@pytest.mark.parametrize("name", [*NAMES, FILTER])
def test_its_test_fails_and_passes_with_the_fix(name):
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(outcomes, (False, True))
    assert "failed" in before[name] and set(after[name]) == {"passed"}


@pytest.mark.parametrize("name", UNFIXED)
def test_what_has_no_fix_is_still_there_and_its_test_has_a_control(name):
    assert set(outcomes(False)[name]) == {"failed", "passed"}


@each_finding
def test_its_reproduction_ends_as_it_says_and_well_with_the_fix(entry):
    """At most 20 lines; the last is a comment with the exception, or how it begins."""
    (block,) = re.findall(r"```python\n(.*?)```", (UPSTREAM / entry.name / "ISSUE.md").read_text(), re.DOTALL)
    *code, said = block.strip().splitlines()
    assert len(code) <= 20 and said.startswith("# ")
    before, after = reproduced()[entry.name]
    assert before.startswith(said.removeprefix("# ")) and after == ""


@each_swept
def test_the_verdict_is_the_finding(entry):
    """On every target and in every variant as recorded, place and parameters included."""
    assert {one.gpu for one in tried(entry.name)} == set(entry.targets)
    for one in tried(entry.name):
        record = recorded(one.gpu)[one.found.architecture, one.found.variant]
        assert (one.found.verdicts, one.found.left.keys()) == (record.verdicts, record.left.keys())
        assert [found.place for found in one.found.findings] == [found.place for found in record.findings]
        assert {found.place for found in record.findings} & set(entry.places) or any(map(entry.covers, record.left))


@each_swept
def test_with_the_fix_every_stage_loads(entry):
    """At PP=1, 2 and 3; left at init is only what another entry accounts for."""
    for one in tried(entry.name):
        assert one.cured.counts and one.cured.verdicts.keys() == {1, 2, 3}
        assert [found.place for found in one.cured.findings if found.place in entry.places] == []
        assert one.cured.left.keys() == {name for name in one.found.left if not entry.covers(name)}
        if not one.cured.left:
            assert set(one.cured.verdicts.values()) == {"loads"}


@each_swept
def test_the_fix_is_offered_for_what_it_cures(entry):
    for one in tried(entry.name):
        config = {"architectures": [one.found.architecture]}
        cured = [before for before, after in zip(one.before, one.after) if failures(before) - failures(after)]
        assert cured and all(entry.name in fixes.curing(RELEASE, config, failures(report)) for report in cured)


@each_swept
def test_bytes_equal_those_of_pp_1_and_of_the_file(entry):
    """A tied head is one parameter with the embedding at PP=1 and has a name of its own on a last stage. What vLLM pads is
    not compared: the padding holds what memory held."""
    for one in tried(entry.name):
        (whole,), (as_it_was,) = one.after[0].stages, one.before[0].stages
        held = whole.digests
        for report in one.after[1:]:
            for stage in report.stages:
                for name in stage.digests.keys() - set(one.cured.left) - set(stage.ledger.padding):
                    assert stage.digests[name] == held[name] if name in held else stage.digests[name] in held.values(), name
            assert held.keys() <= {name for stage in report.stages for name in stage.digests}
        for name, was in as_it_was.digests.items():
            if name not in one.found.left and name not in whole.ledger.padding:
                assert held[name] == was, name
        for name in filter(entry.covers, one.found.left):
            tensor = one.tensors[one.found.left[name].tensor]
            values = {digest(tensor.to(dtype)) for dtype in DTYPES}
            assert held[name] in values if name in held else values & set(held.values()), name


@each_swept
def test_no_other_case_of_its_classes_changes(entry):
    """The variants that the finding is not about, on an h100: verdict, exceptions and parameters as recorded."""
    gpu = "h100"

    def with_fix(architecture: str, variant: str) -> Case | None:
        if not recorded(gpu)[architecture, variant].counts:
            return None
        case = Case(architecture, variant)
        with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
            checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
            judge(case, dry_runs(checkpoint, Deployment(gpu=gpu, fixes=[entry.name])))
        return case

    others = [(one, variant) for one in entry.architectures for variant in VARIANTS if variant not in entry.variants]
    with ThreadPoolExecutor(2) as pool:
        for case in filter(None, pool.map(lambda other: with_fix(*other), others)):
            record = recorded(gpu)[case.architecture, case.variant]
            assert case.left.keys() >= record.left.keys()  # real bytes, as in the record, account for some
            assert [found.place for found in case.findings] == [found.place for found in record.findings]
            if case.left.keys() == record.left.keys():
                assert case.verdicts == record.verdicts


@pytest.mark.parametrize(("gpu", "as_it_is"), [("h100", "AssertionError"), ("b200", None)])
def test_experts_in_w4a16_with_scales_of_channels_load_with_the_fix_and_elsewhere_as_before(gpu, as_it_is):
    """The sweep makes no such checkpoint."""
    checkpoint = quantised("compressed-tensors, W4A16 channel", "moe")
    before, after = (
        dry_run(checkpoint, Deployment(2, gpu=gpu, fixes=names), progress=False) for names in ([], ["w4a16_channel_experts"])
    )
    assert {stage.exception for stage in before.stages} == {as_it_is} and before.loads == (as_it_is is None)
    assert after.loads and after.control.loads
    offered = [] if as_it_is is None else ["w4a16_channel_experts"]
    assert fixes.curing(RELEASE, checkpoint.config, failures(before)) == offered
