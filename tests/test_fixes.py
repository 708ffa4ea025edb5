"""Fixes of single classes: which fit, what is refused, and that none is active by itself. None is applied here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

from glmpp.dryrun.advice import other_layouts, serve_line
from glmpp.dryrun.deployment import Deployment
from glmpp.errors import GlmppError
from glmpp.serving import fixes

GRANITE, ROUTER = "GraniteMoeHybridForCausalLM", "granite_moe_hybrid_router"
FOLDER = Path(fixes.__file__).parent


@pytest.fixture
def applied(monkeypatch):
    """The router's fix with an `apply` that only counts, in a process where nothing was applied yet."""
    times: list[str] = []
    monkeypatch.setattr(fixes.fix(ROUTER), "apply", lambda: times.append(ROUTER))
    monkeypatch.setattr(fixes, "_applied", set())
    return times


def test_an_unknown_name_is_refused_wherever_it_is_given():
    for give in (lambda: fixes.chosen(["nobodys"], "0.33.0", [GRANITE]), lambda: Deployment(2, fixes=("nobodys",))):
        with pytest.raises(GlmppError, match=rf"fix 'nobodys' is unknown; there are .*{ROUTER}.*'known' for all that fit"):
            give()


@pytest.mark.parametrize("release", ["0.34.0", "0.33.1", "0.33", None])
def test_a_release_that_a_fix_was_not_tried_on_is_refused_and_nothing_is_applied(applied, release):
    with pytest.raises(GlmppError, match=rf"{ROUTER} was tried on vLLM .*0\.33\.0, not on {release}"):
        fixes.apply([ROUTER], release, [GRANITE])
    assert applied == [] and fixes.known(release, [GRANITE]) == []


def test_a_build_of_a_release_is_that_release(applied):
    assert fixes.apply(ROUTER, "0.33.0+cu129", [GRANITE]) == [ROUTER]


def test_a_fix_for_another_model_is_refused_by_name_and_left_out_of_known(applied):
    with pytest.raises(GlmppError, match=f"{ROUTER} is for {GRANITE}; this model is of LlamaForCausalLM"):
        fixes.apply([ROUTER], "0.33.0", ["LlamaForCausalLM"])
    assert fixes.apply("known", "0.33.0", ["LlamaForCausalLM"]) == [] == applied


def test_known_is_all_that_fit(applied):
    assert fixes.apply("known", "0.33.0", [GRANITE]) == [ROUTER] == applied
    for name in fixes.NAMES:
        for architecture in fixes.fix(name).ARCHITECTURES:
            assert name in fixes.known("0.33.0", ["SomethingElse", architecture])


def test_a_fix_is_applied_once_in_a_process_and_said_to_be_active_each_time(applied):
    assert [fixes.apply(["known", ROUTER], "0.33.0", [GRANITE]) for _ in range(2)] == [[ROUTER]] * 2
    assert applied == [ROUTER]


def test_none_is_active_by_itself():
    assert Deployment(2).fixes == () and fixes.chosen([], "0.33.0", [GRANITE]) == [] and fixes._applied == set()


def test_the_line_to_paste_has_the_fixes():
    line = "vllm serve m --pipeline-parallel-size 2 --load-format glmpp"
    assert serve_line("m", Deployment(2, guard="loader")) == line
    assert serve_line("m", Deployment(2, fixes=[ROUTER])) == (
        f"{line} --model-loader-extra-config '" + '{"fixes": ["' + ROUTER + "\"]}'"
    )


@pytest.mark.parametrize("name", fixes.NAMES)
def test_a_fix_is_short_says_what_it_is_for_and_imports_vllm_only_when_applied(name):
    source = (FOLDER / f"{name}.py").read_text()
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    lines = [line for f in functions for line in ast.get_source_segment(source, f).splitlines() if line.strip()]
    assert len(lines) < 30 and len(fixes.about(name)) > 20 and fixes.fix(name).RELEASES and fixes.fix(name).ARCHITECTURES
    imported = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imported for alias in node.names} | {getattr(node, "module", "") for node in imported}
    assert not any(each.startswith(("vllm", "glmpp", "torch")) for each in names)


@pytest.mark.parametrize("name", fixes.NAMES)
def test_the_folder_for_its_maintainers_has_the_same_fix(name):
    folder = ROOT / "upstream" / name
    assert (folder / "fix.py").resolve() == FOLDER / f"{name}.py" and (folder / "fix.py").is_symlink()
    assert (folder / "ISSUE.md").exists() and (folder / f"test_{name}.py").exists()


MOE, GLM = "Qwen3MoeForCausalLM", "GlmMoeDsaForCausalLM"
CHANNEL = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"strategy": "channel", "num_bits": 4}}}}


@pytest.mark.parametrize(
    ("architecture", "quantised", "failure", "offered"),
    [
        (MOE, CHANNEL, ("AssertionError", "vllm/x.py"), ["w4a16_channel_experts"]),
        (MOE, {"quant_method": "fp8"}, ("AssertionError", "vllm/x.py"), []),
        (MOE, CHANNEL, ("ValueError", "vllm/x.py"), []),
        (GLM, {}, ("KeyError", "vllm/models/deepseek_v32/nvidia/model.py"), []),
        (GLM, {}, ("untied", "lm_head.weight"), ["tied_head_left_at_init"]),
        (GLM, {}, ("absent", "lm_head.weight"), []),
        ("GraniteMoeHybridForCausalLM", {}, ("KeyError", "vllm/model_executor/models/granitemoehybrid.py"), [ROUTER]),
        ("GraniteMoeHybridForCausalLM", {}, ("ValueError", "vllm/distributed/utils.py"), []),
    ],
)
def test_a_fix_is_offered_for_the_failure_that_it_cures_alone(architecture, quantised, failure, offered):
    config = {"architectures": [architecture], "quantization_config": quantised}
    assert fixes.curing("0.33.0", config, [failure]) == offered


def test_every_fix_says_what_it_cures():
    assert all(fixes.fix(name).CURES for name in fixes.NAMES)


def test_other_layouts_take_as_many_gpus_and_the_nearest_comes_first():
    asked = Deployment(2, 8, gpu="h200", layer_counts="1,1")
    found = other_layouts(asked, 80, experts=True)
    assert [one.layout for one in found[:3]] == ["TP=8 PP=2 EP", "TP=4 PP=4", "TP=2 PP=8"]
    assert all(one.gpus == 16 and one.layer_counts is None for one in found) and asked not in found
    assert [one.layout for one in other_layouts(Deployment(4, gpu="h200"), 4, False)] == ["TP=2 PP=2", "TP=4"]
    assert other_layouts(Deployment(gpu="h200"), 4, True) == []
