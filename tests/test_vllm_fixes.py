"""A fix of one class inside the installed vLLM: it cures, it has to be asked for, and it is gone after the run."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import faulty
import jsonschema
import pytest
from conftest import ROOT
from models import write_model

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import DIES, LOADS
from glmpp.errors import GlmppError
from glmpp.serving import fixes

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
GRANITE, ROUTER = "GraniteMoeHybridForCausalLM", "granite_moe_hybrid_router"
newest = pytest.mark.skipif(ROUTER not in fixes.known(vllm_version(), [GRANITE]), reason="not tried on this release")


@pytest.fixture
def faulty_model(tmp_path, monkeypatch):
    """A model that dies of an unguarded lookup, and a fix for it that this process knows of, too."""
    monkeypatch.setattr(fixes, "NAMES", fixes.NAMES)  # and put back what add_fix changes
    faulty.add_fix()
    return Checkpoint.from_directory(faulty.write_faulty("unguarded lookup", tmp_path))


def verdicts(checkpoint, *names: str) -> set[str]:
    report = dry_run(checkpoint, Deployment(3, fixes=names), control=False, progress=False)
    return {stage.verdict for stage in report.stages}


def test_a_fix_cures_alone_and_is_not_there_in_the_runs_before_and_after(faulty_model):
    assert verdicts(faulty_model) == {DIES}
    assert verdicts(faulty_model, faulty.FIX) == {LOADS}
    assert verdicts(faulty_model) == {DIES}
    assert verdicts(faulty_model, "known") == {LOADS}


@newest
def test_with_the_fix_every_stage_of_granite_has_the_bytes_of_pp_1(tmp_path):
    granite = Checkpoint.from_directory(write_model("granite_hybrid", tmp_path / "granite"))
    report = dry_run(granite, Deployment(2, gpu="cpu", fixes=[ROUTER]), weights="real", progress=False)
    whole = report.control.digests
    for stage in report.stages:
        assert stage.loads and stage.digests.items() <= whole.items()
    assert {name for stage in report.stages for name in stage.digests} == whole.keys()


def test_a_fix_for_another_model_is_refused_before_anything_runs(faulty_model):
    with pytest.raises(GlmppError, match=f"{ROUTER} (is for {GRANITE}|was tried on)"):
        dry_run(faulty_model, Deployment(2, fixes=[ROUTER]), progress=False)


@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.usefixtures("no_partition_variable")
def test_check_names_the_fix_tries_it_and_prints_the_line_to_paste(faulty_model, capsys):
    arguments = ["check", str(faulty_model.directory), "--pp", "3"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    line = f"vllm serve {faulty_model.directory} --pipeline-parallel-size 3 --load-format glmpp"
    extra = "--model-loader-extra-config '" + json.dumps({"fixes": [faulty.FIX]}) + "'"
    assert (
        f"with the fix {faulty.FIX} stages 0-2 load (glmpp has to be installed where vLLM runs):\n    {line} {extra}" in out
    )
    assert f"    {faulty.FIX}: {fixes.about(faulty.FIX)}\n" in out
    assert cli.main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, json.loads((ROOT / "tests" / "check.schema.json").read_text()))
    assert report["fixes"] == [] and report["with_fixes"]["verdict"] == "loads"
    assert report["with_fixes"]["fixes"] == [faulty.FIX]


@pytest.mark.parametrize("names", [faulty.FIX, "known"])
@pytest.mark.usefixtures("no_partition_variable")
def test_check_with_a_fix_says_so_and_ends_with_0(faulty_model, capsys, names):
    assert cli.main(["check", str(faulty_model.directory), "--pp", "3", "--fixes", names]) == 0
    assert f"; fixes: {names}\n" in capsys.readouterr().out


# --- the load format ----------------------------------------------------------------------------------------------


@pytest.fixture
def load_format(monkeypatch):
    """The module, in the place of one stage of one; its fix only notes that it was applied."""
    from glmpp.serving import load_format

    one = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(load_format, "get_pp_group", lambda: one)
    monkeypatch.setattr(load_format, "get_tp_group", lambda: one)
    monkeypatch.setattr(fixes, "_applied", set())
    monkeypatch.setattr(fixes.fix(ROUTER), "apply", lambda: None)
    monkeypatch.setattr(fixes.fix(ROUTER), "RELEASES", (vllm_version(),))
    return load_format


def loader_of(load_format, names=None):
    from vllm.config.load import LoadConfig

    extra = {} if names is None else {"fixes": names}
    return load_format.StageModelLoader(LoadConfig(load_format="glmpp", model_loader_extra_config=extra))


def config_of(architecture=GRANITE, runner="generate") -> SimpleNamespace:
    return SimpleNamespace(architectures=[architecture], runner_type=runner)


def active_when_built(load_format, monkeypatch, names=None, config=None) -> set[str]:
    """The fixes that are applied when vLLM's own `load_model`, which builds the model, is called."""
    seen = []
    monkeypatch.setattr(load_format.DefaultModelLoader, "load_model", lambda *_, **__: seen.append(set(fixes._applied)))
    loader_of(load_format, names).load_model(vllm_config=None, model_config=config or config_of())
    return seen[0]


@pytest.mark.parametrize(("names", "active"), [(None, set()), ([ROUTER], {ROUTER}), ("known", {ROUTER}), ([], set())])
def test_the_load_format_applies_what_is_asked_for_before_the_model_is_built(load_format, monkeypatch, names, active):
    assert active_when_built(load_format, monkeypatch, names) == active


def test_what_the_load_format_applies_is_logged_by_name(load_format, monkeypatch, caplog):
    monkeypatch.setattr(load_format.logger, "propagate", True)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        active_when_built(load_format, monkeypatch, "known")
        active_when_built(load_format, monkeypatch, "known", config_of("LlamaForCausalLM"))
    assert f"glmpp: stage 0 of 1: fix {ROUTER}: {fixes.about(ROUTER)}" in caplog.text
    assert f"no fix is known for LlamaForCausalLM in vLLM {vllm_version()}" in caplog.text


def test_the_load_format_refuses_a_name_that_is_unknown_and_a_fix_for_another_model(load_format, monkeypatch):
    with pytest.raises(GlmppError, match="fix 'nobodys' is unknown"):
        loader_of(load_format, ["nobodys"])
    with pytest.raises(GlmppError, match=f"{ROUTER} is for {GRANITE}"):
        active_when_built(load_format, monkeypatch, [ROUTER], config_of("LlamaForCausalLM"))
    assert fixes._applied == set()


def test_the_load_format_refuses_a_release_that_the_fix_was_not_tried_on(load_format, monkeypatch):
    monkeypatch.setattr(fixes.fix(ROUTER), "RELEASES", ("0.1.0",))
    with pytest.raises(GlmppError, match=f"was tried on vLLM 0.1.0, not on {vllm_version()}"):
        active_when_built(load_format, monkeypatch, [ROUTER])


def test_a_drafter_is_a_model_of_its_own_and_a_fix_for_the_main_model_is_no_error(load_format, monkeypatch):
    assert active_when_built(load_format, monkeypatch, [ROUTER], config_of("SomethingMTPModel", "draft")) == set()
