"""A record answers the question that it was made for, and no other. No vLLM: it is what stands in for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.report import DryRunReport
from glmpp.errors import GlmppError
from glmpp.lab import engine
from glmpp.lab.layouts import logged, parts_of_layer
from glmpp.lab.load_time import GLMPP, STOCK, LoadTimes, load_times
from glmpp.layouts.search import layouts
from glmpp.records import digest

RECORDED = ROOT / "data" / "recorded"
PP8 = Deployment(8, gpu="h200")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")


def test_the_question_of_a_record_is_answered_and_of_its_ranks_those_that_are_asked_for(full):
    whole = dry_run(full, PP8, recorded=RECORDED / "pp8_installed.json")
    assert [stage.rank for stage in whole.stages] == PP8.representative_ranks and whole.control and whole.deployment == PP8
    part = dry_run(full, PP8, ranks=[6, 3], control=False, recorded=RECORDED / "pp8_installed.json")
    assert [stage.stage.rank for stage in part.stages] == [6, 3] and part.control is None
    assert part.stages[1].ledger == whole.stages[3].ledger and part.source == whole.source


@pytest.mark.parametrize(
    ("deployment", "options", "word"),
    [
        (Deployment(4, tp=2, gpu="b200"), {}, "pp_size"),
        (Deployment(8, tp=2, gpu="h200"), {}, "tp_size"),
        (Deployment(8, dp=2, gpu="h200"), {}, "dp_size"),
        (Deployment(8, gpu="h200", ep=True), {}, "ep"),
        (Deployment(8, gpu="b200"), {}, "gpu: 'b200' is asked for, 'h200' is recorded"),
        (Deployment(8, gpu="h200", guard="loader"), {}, "guard"),
        (Deployment(8, gpu="h200", guard="helper"), {}, "helper"),
        (Deployment(8, gpu="h200", fixes=["laguna_router_bias"]), {}, "fixes"),
        (Deployment(8, gpu="h200", drafter=True), {}, "drafter"),
        (Deployment(8, gpu="h200", layer_counts=[10] * 7 + [8]), {}, "layer_counts"),
        (PP8, {"strict": True}, "strict"),
        (PP8, {"all_failures": True}, "all_failures"),
        (PP8, {"context": 4096}, "context"),
        (PP8, {"real_group": True}, "real_group"),
    ],
)
def test_another_question_is_an_error_that_says_in_what(full, deployment, options, word):
    with pytest.raises(GlmppError, match=word):
        dry_run(full, deployment, recorded=RECORDED / "pp8_installed.json", **options)


def test_runs_that_are_not_recorded_are_missed(full, tiny):
    with pytest.raises(GlmppError, match=r"it has no run of stage 5"):
        dry_run(full, PP8, ranks=[3, 5], control=False, all_failures=True, recorded=RECORDED / "pp8_all_failures.json")
    with pytest.raises(GlmppError, match=r"it has no run of the PP=1 control"):
        dry_run(full, Deployment(8, gpu="h200", guard="loader"), recorded=RECORDED / "pp8_loader.json")
    with pytest.raises(GlmppError, match="weights"):
        dry_run(tiny, Deployment(4, gpu="h200", guard="helper"), weights="real", recorded=RECORDED / "tiny_pp4_helper.json")


@pytest.mark.parametrize("guard", ["helper", Helper("glmpp.loader:load_fp8_indexer_wk_unguarded"), Helper(callers=("x",))])
def test_a_helper_is_known_by_its_place_and_its_callers(tiny, guard):
    record = {"helper": "tiny_pp4_unguarded.json"}.get(guard, "tiny_pp4_helper.json")
    with pytest.raises(GlmppError, match=r"helper: |callers: "):
        dry_run(tiny, Deployment(4, gpu="h200", guard=guard), recorded=RECORDED / record)


def other(checkpoint: Checkpoint, how: str) -> Checkpoint:
    specs, config = list(checkpoint.values()), checkpoint.config
    if how == "a tensor less":
        specs = specs[:-1]
    elif how == "another order":
        specs = specs[::-1]
    elif how == "another name":
        specs[-1] = specs[-1]._replace(name="model.norm.other")
    elif how == "another dtype":
        specs[-1] = specs[-1]._replace(dtype="F16")
    elif how == "another shape":
        specs[-1] = specs[-1]._replace(shape=(1,))
    else:
        config = {**config, "rms_norm_eps": 1e-3}
    return Checkpoint(specs, config)


CHANGES = ["a tensor less", "another order", "another name", "another dtype", "another shape", "another config"]


def test_each_change_of_a_checkpoint_changes_its_digest(tiny):
    same = Checkpoint(list(tiny.values()), dict(reversed(tiny.config.items())), source="elsewhere")
    assert digest(same) == digest(tiny)
    assert len({digest(tiny), *(digest(other(tiny, how)) for how in CHANGES)}) == 1 + len(CHANGES)


@pytest.mark.parametrize("how", CHANGES)
def test_another_checkpoint_is_an_error(full, how, tmp_path):
    with pytest.raises(GlmppError, match="checkpoint"):
        dry_run(other(full, how), PP8, recorded=RECORDED / "pp8_installed.json")
    with pytest.raises(GlmppError, match="checkpoint"):
        DryRunReport.load(RECORDED / "pp8_installed.json", other(full, how))
    with pytest.raises(GlmppError, match="checkpoint"):
        layouts(other(full, how), 4, "h200", recorded=RECORDED / "layouts_4.json")


@pytest.mark.parametrize("change", [lambda record: record.pop("question"), lambda record: record["messages"][1].pop("run")])
def test_what_is_no_record_is_an_error_that_names_the_file(full, tmp_path, change):
    record = json.loads((RECORDED / "pp8_loader.json").read_text())
    change(record)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record))
    with pytest.raises(GlmppError, match=r"old\.json: no record of a Record: .*missing required field"):
        DryRunReport.load(path, full)


def test_the_drafter_of_a_record_is_the_deployments(tiny):
    deployment = Deployment(1, gpu="h200", drafter=True, guard="helper")
    at = RECORDED / "tiny_mtp_both.json"
    ours = Checkpoint(list(tiny.values()), tiny.config)
    assert dry_run(ours, deployment, recorded=at).deployment == deployment
    with pytest.raises(GlmppError, match="drafter"):
        dry_run(ours, Deployment(1, gpu="h200", guard="helper"), recorded=at)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"gpus": 8}, "asked"), ({"gpu": "b200"}, "gpu"), ({"context": 1000}, "asked"), ({"utilization": 0.5}, "utilization")],
)
def test_layouts_of_another_question_are_an_error(full, options, word):
    asked = {"gpus": 4, "gpu": "h200", "recorded": RECORDED / "layouts_4.json"}
    assert layouts(full, **asked).asked == (4, 131_072)
    with pytest.raises(GlmppError, match=f"{word}: "):
        layouts(full, **asked | options)


def test_parts_of_another_layer_and_servers_of_another_release_are_an_error(full, tmp_path):
    path, deployment = RECORDED / "layer_40_tp.json", Deployment(tp=8, pp=2, gpu="h200")
    assert parts_of_layer(full, deployment, 40, path, live=False).shape == (6, 16)
    with pytest.raises(GlmppError, match="layer: 41"):
        parts_of_layer(full, deployment, 41, path, live=False)
    with pytest.raises(GlmppError, match="layout: 'TP=8 PP=2 EP'"):
        parts_of_layer(full, replace(deployment, ep=True), 40, path, live=False)
    shutil.copy(RECORDED / "engine_0.23.0.json", tmp_path / "record.json")
    with pytest.raises(GlmppError, match=r"release: '0.22.1'"):
        engine.evidence("0.22.1", tmp_path / "record.json")
    with pytest.raises(GlmppError, match="config: "):
        engine.evidence("0.23.0", tmp_path / "record.json", {"num_hidden_layers": 3})
    assert engine.evidence("0.23.0", tmp_path / "record.json", full.config).release == "0.23.0"


def test_what_other_logs_say_is_an_error(tmp_path):
    rows = json.loads((RECORDED / "layout_logs.json").read_text())
    assert len(logged(RECORDED / "layout_logs.json")) == len(rows)
    (tmp_path / "logs.json").write_text(json.dumps([{**row, "TP": 3} for row in rows]))
    with pytest.raises(GlmppError, match="logs: "):
        logged(tmp_path / "logs.json")


@pytest.fixture
def measured(tiny, tmp_path):
    """Times of two stages in two formats, two loads each."""
    rows = [
        {"rank": rank, "format": form, "cache": "warm", "total": 1.0}
        for rank in (0, 2)
        for form in (STOCK, GLMPP)
        for _ in "ab"
    ]
    path = tmp_path / "times.json"
    question = {"pp_size": 4, "tp_size": 1, "dp_size": 1, "ep": False, "layer_counts": None}
    LoadTimes(pd.DataFrame(rows), {}, question=question).save(path)
    return path


def test_of_recorded_load_times_those_are_shown_that_are_asked_for(tiny, measured):
    found = load_times(tiny, 4, [2], {GLMPP: 2}, recorded=measured).rows
    assert found[["rank", "format"]].to_numpy().tolist() == [[2, GLMPP]] * 2


@pytest.mark.parametrize(
    ("layout", "options", "word"),
    [
        (8, {}, "pp_size"),
        (Deployment(4, tp=2), {}, "tp_size"),
        (Deployment(4, layer_counts="1,2,3,6"), {}, "layer_counts"),
        (4, {"ranks": [1, 2]}, "loads of stage 1"),
        (4, {"cache": "cold"}, "cold"),
        (4, {"repeats": {STOCK: 2, GLMPP: 3}}, "3 is asked for, 2 is recorded"),
        (4, {"repeats": {"in-memory list": 2}}, "in-memory list"),
    ],
)
def test_load_times_of_another_question_are_an_error(tiny, measured, layout, options, word):
    asked = {"ranks": [0, 2], "repeats": {STOCK: 2, GLMPP: 2}, "recorded": measured}
    with pytest.raises(GlmppError, match=word):
        load_times(tiny, layout, **asked | options)


def test_load_times_of_another_checkpoint_are_an_error(tiny):
    with pytest.raises(GlmppError, match="checkpoint: "):
        load_times(tiny, 8, [0], recorded=RECORDED / "load_time_warm.json")
