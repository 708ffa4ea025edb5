"""The record of releases: its control, who is the nearest, and how it is made from sweeps."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from sweep.cases import Case, Finding, Sweep
from sweep.releases import cases_of, known_of, release_of, renewed, save

from glmpp.dryrun import releases
from glmpp.dryrun.releases import NOT_KNOWN, NOT_THERE, Known, Record, Release, nearest_release, number, record
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.ledger import UnloadedParam

AFFECTED = ("0.20.2", "0.21.0", "0.22.1")


def made(verdicts: dict[str, str], architecture: str = "A") -> Record:
    """A record of one architecture: release -> verdict."""
    return Record(
        {
            name: Release({"vllm": name}, "on 2026-01-01", "m", "h100", {architecture: Known(one)})
            for name, one in verdicts.items()
        }
    )


def test_the_control_dies_at_the_reported_parameter_up_to_0_22_1_and_loads_from_0_23_0():
    for name, release in record().releases.items():
        glm = release.architectures["GlmMoeDsaForCausalLM"]
        if name in AFFECTED:
            assert (glm.verdict, glm.variant) == (DIES, "fp8")
            assert glm.place.startswith("vllm/model_executor/models/deepseek_v2.py:")
            assert re.fullmatch(r"KeyError: (model\.)?layers\.\d\.self_attn\.indexer\.wk_weights_proj\.weight", glm.why)
        else:
            assert glm == Known(LOADS)


def test_the_record_has_eight_releases_or_more_and_a_verdict_of_each_on_every_architecture():
    found = record().releases
    assert len(found) >= 8 and {*AFFECTED[::2], "0.23.0", "0.33.0"} <= found.keys()
    assert list(found) == sorted(found, key=number)
    names = [set(release.architectures) for release in found.values()]
    assert all(one == names[0] for one in names) and len(names[0]) > 70
    for name, release in found.items():
        assert release.versions["vllm"] == name and release.gpu == "h100" and release.recorded.startswith("on 20")
        for known in release.architectures.values():
            assert known.verdict in (DIES, CANNOT_BUILD, INCOMPLETE, NOT_KNOWN, LOADS, NOT_THERE)
            assert known.place or known.why or known.verdict in (LOADS, NOT_THERE)


def test_the_newest_releases_share_is_what_its_sweep_says():
    (path,) = (ROOT / "data" / "recorded").glob("sweep-*-h100.json")
    swept = Sweep.load(path)
    share = record().releases[swept.versions["vllm"]]
    assert share == release_of(swept, share.architectures.keys())


NEAREST = {"0.1.0": "0.23.0", "0.20.2": "0.23.0", "0.22.1": "0.23.0", "0.22.1+cpu": "0.23.0", "0.24.1": "0.23.0"}
NEAREST |= {"0.25.0": "0.28.0", "0.26.0": "0.28.0", "0.23.0": None, "0.28.1": None, "0.40.0": None}


@pytest.mark.parametrize("at", NEAREST)
def test_the_nearest_release_that_loads(at):
    """0.25.0 lies between two as near: the newer. 0.24.1 is not recorded: what holds of 0.24.0 is taken to hold of it."""
    verdicts = {"0.20.2": NOT_THERE, "0.22.1": DIES, "0.23.0": LOADS, "0.24.0": INCOMPLETE, "0.26.0": NOT_KNOWN}
    verdicts |= {"0.28.0": LOADS, "0.25.0": CANNOT_BUILD}
    assert made(verdicts).nearest("A", at) == NEAREST[at]


def test_the_record_speaks_of_the_failure_that_it_knows_and_of_no_other():
    one = made({"0.22.1": DIES, "0.23.0": INCOMPLETE, "0.24.0": NOT_THERE, "0.25.0": LOADS})
    one.releases["0.22.1"].architectures["A"] = Known(DIES, "fp8", "KeyError: layers.3.x", "vllm/a.py:7")
    one.releases["0.23.0"].architectures["A"] = Known(INCOMPLETE, "plain", "lost: layers.1.bias")
    dead, left = {("KeyError", "vllm/a.py")}, {("lost", "layers.0.bias"), ("absent", "x")}
    assert one.knows("A", "0.22.1", dead) and not one.knows("A", "0.22.1", left | {("ValueError", "vllm/a.py")})
    assert not one.knows("A", "0.22.1", dead | left) and not one.knows(
        "A", "0.23.0", dead | left
    )  # something else fails, too
    assert one.knows("A", "0.23.0", left) and not one.knows("A", "0.23.0", dead)
    assert one.knows("A", "0.24.0", dead) and not one.knows("A", "0.25.0", dead) and not one.knows("B", "0.22.1", dead)


def test_where_none_is_known_to_load_none_is_named():
    assert made({"0.22.1": DIES, "0.23.0": INCOMPLETE}).nearest("A", "0.22.1") is None
    assert made({"0.22.1": DIES, "0.23.0": LOADS}).nearest("B", "0.22.1") is None


def test_what_a_config_names_decides_whatever_stands_there(monkeypatch):
    monkeypatch.setattr(releases, "record", lambda: made({"0.22.1": DIES, "0.23.0": LOADS}))
    found = {
        "vllm": "0.23.0",
        "architecture": "A",
        "pp_size": 2,
        "source": "from the record of 2026-01-01, tiny checkpoints",
    }
    assert nearest_release({"architectures": ["B", 3, "A"]}, "0.22.1") == found
    for strange in ({}, {"architectures": None}, {"architectures": "A"}, {"architectures": {"A": 1}}, {"architectures": 7}):
        assert nearest_release(strange, "0.22.1") is None


def test_of_the_variants_the_worst_is_kept_with_where_it_dies():
    finding = Finding(2, 1, DIES, "KeyError", "layers.0.x", "m", "vllm/a.py:7", "t", [], LOADS)
    at_3 = Finding(3, 1, DIES, "KeyError", "layers.0.x", "m", "vllm/a.py:7", "t", [], LOADS)
    cases = [
        Case("A", "plain"),
        Case("A", "fp8", findings=[finding]),
        Case("B", "plain", findings=[at_3]),
        Case("C", "plain", left={"head": UnloadedParam("untied", "w")}),
        Case("C", "fp8", why="PP=1 dies: ValueError"),
        Case("D", "fp8", why="cannot be imported: (/opt/site/vllm-1/x.py)"),
        Case("F", "plain", why="PP=1 cannot be built"),
        Case("F", "tied"),
    ]
    assert known_of(cases, {"A", "B", "C", "D", "E", "F"}) == {
        "A": Known(DIES, "fp8", "KeyError: layers.0.x", "vllm/a.py:7"),
        "B": Known(LOADS),
        "C": Known(INCOMPLETE, "plain", "untied: head"),
        "D": Known(NOT_KNOWN, "fp8", "cannot be imported: (…)"),
        "E": Known(NOT_THERE),
        "F": Known(LOADS),
    }


def test_tied_is_tried_only_where_nothing_else_counts(tmp_path):
    cases = [Case("A", one) for one in ("plain", "tied", "fp8")] + [Case("B", "plain", why="x"), Case("B", "tied")]
    assert cases_of(Sweep(cases, {}, "", 0.0)) == [("A", "plain"), ("A", "fp8"), ("B", "tied")]


def test_a_saved_record_is_read_back(tmp_path):
    one = made({"0.23.0": LOADS, "0.22.1": DIES})
    one.releases["0.22.1"].architectures["C"] = Known(DIES, "fp8", "KeyError: x", "vllm/a.py:7")
    save(one, tmp_path / "r.json")
    again = Record.load(tmp_path / "r.json")
    assert again.releases == one.releases and list(again.releases) == ["0.22.1", "0.23.0"]
    assert '"A": "loads"' in (tmp_path / "r.json").read_text()


def test_a_record_is_renewed_whole_or_for_some_architectures_alone():
    before, later = made({"0.22.1": DIES, "0.23.0": LOADS}), made({"0.23.0": INCOMPLETE, "0.24.0": LOADS})
    before.releases["0.23.0"].architectures["B"] = Known(LOADS)
    part, whole = renewed(before, later, whole=False), renewed(before, later)
    assert list(part.releases) == list(whole.releases) == ["0.22.1", "0.23.0", "0.24.0"]
    assert part.releases["0.23.0"].architectures == {"A": Known(INCOMPLETE), "B": Known(LOADS)}
    assert whole.releases["0.23.0"].architectures == {"A": Known(INCOMPLETE)}
    assert before.releases["0.23.0"].verdict("A") == LOADS


def test_a_sweep_is_renewed_for_some_cases_and_keeps_the_order_and_seconds_of_the_whole():
    before = Sweep([Case("A", "plain", why="x"), Case("B", "plain")], {}, "m", 100.0)
    after = before.renewed(Sweep([Case("C", "plain"), Case("A", "plain")], {}, "m", 3.0))
    assert [(case.architecture, case.why) for case in after.cases] == [("A", ""), ("B", ""), ("C", "")]
    assert after.seconds == 100.0 and before.cases[0].why == "x" and (before.tried, after.tried) == (2, 3)


def test_beside_another_targets_sweep_only_what_differs_is_kept(tmp_path):
    def found(key: str) -> list[Finding]:
        return [Finding(2, 1, DIES, "KeyError", key, key, "vllm/a.py:7", None, [], LOADS)]

    def one(**changed) -> Case:
        return Case(
            "A", "plain", **{"model_class": "vllm.a.A", "verdicts": {1: LOADS, 2: DIES}, "findings": found("k"), **changed}
        )

    changes = [
        {"model_class": "vllm.b.A"},
        {"verdicts": {1: LOADS, 2: CANNOT_BUILD}},
        {"why": "PP=1 dies"},
        {"left": {"w": UnloadedParam("absent", "")}},
        {"findings": found("other")},
    ]
    here = Sweep([one()], {}, "m", 0.0, "h100")
    assert Sweep([one(seconds=9.0, stand_ins=["driver"])], {}, "m", 0.0, "b200").beside(here).cases == []
    for changed in changes:
        there = Sweep([one(**changed), one()], {}, "m", 0.0, "b200")
        assert there.beside(here).cases == [one(**changed)], changed
    assert Sweep([Case("B", "plain")], {}, "m", 0.0).beside(here).cases == [Case("B", "plain")]
    there.beside(here).save(tmp_path / "s.json")
    again = Sweep.load(tmp_path / "s.json")
    assert (again.tried, again.cases) == (2, [one(**changes[-1])])


def test_the_command_renews_what_is_recorded():
    import versions

    tried = {environment.name for environment in [*versions.RELEASES, versions.NEWEST]}
    assert tried == {f"vllm-{name}" for name in record().releases}
