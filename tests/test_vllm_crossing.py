"""GLM-5.2 loads under PP, and its shared layers read indices that another stage computes: seen in the built model."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from conftest import ROOT

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.cuts.crossing import crossings
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.messages import Run, StageResult
from glmpp.dryrun.stage_report import CROSSES, LOADS
from glmpp.formats.glm5 import reduced_config
from glmpp.layouts.search import layouts
from glmpp.partition import Stage, make_stages

pytest.importorskip("vllm")
from vllm.model_executor.models.utils import PPMissingLayer

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_partition_variable")]
BUFFER = "topk_indices_buffer"
SCHEDULED = tuple(map(int, vllm_version().split(".")[:2])) >= (0, 30)  # the class knows layers without an indexer
needs_schedule = pytest.mark.skipif(not SCHEDULED, reason="vLLM has no GLM-5.2")


@pytest.fixture(scope="module")
def tiny_52(config_52, tmp_path_factory) -> Checkpoint:
    """12 layers, of which 0, 1, 2, 6 and 10 compute their indices; a config alone."""
    path = tmp_path_factory.mktemp("glm52") / "config.json"
    path.write_text(json.dumps(reduced_config(config_52)))
    return Checkpoint.from_config(path)


@pytest.mark.parametrize("gpu", ["h200", "cpu"])
def test_where_every_layer_has_an_indexer_the_buffer_is_seen_and_nothing_is_read_across(tiny, gpu):
    report = dry_run(tiny, Deployment(3, guard="helper", gpu=gpu), progress=False)
    assert report.loads and report.crossings == []
    if gpu == "h200":
        held = report.control.result.carried[BUFFER]
        assert len(held) == 12 and len({str(modules) for modules in held.values()}) == 1


class Reader(torch.nn.Module):
    def __init__(self, buffer: torch.Tensor, at: int, ratio: int):
        super().__init__()
        self.buffer, self.layer, self.ratio = buffer, at, ratio


def model_of(kinds: str, buffer: torch.Tensor, here: range) -> torch.nn.Module:
    """A stage of layers that compute ("c"), read ("r", by a view), or refer to the buffer for another reason ("o")."""
    model, layers = torch.nn.Module(), []
    for at, kind in enumerate(kinds):
        layer = Reader(buffer[:] if kind == "r" else buffer, at, 128 if kind == "o" else 4)
        if kind == "c":
            layer.indexer = Reader(buffer, at, 4)
        layers.append(layer if at in here else PPMissingLayer())
    model.layers, model.buffer = torch.nn.ModuleList(layers), buffer
    return model


@pytest.mark.parametrize("kinds", ["crrc", "cror", "cccc", "coco"])
@pytest.mark.parametrize("counts", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_views_and_stages_of_one_layer_are_seen(kinds, counts):
    from glmpp.dryrun.child.built_model import carried

    stages = make_stages({"num_hidden_layers": 4}, len(counts), counts)
    seen = [carried(model_of(kinds, torch.zeros(8), stage.layers), 4) for stage in stages]
    results = [StageResult(run=Run(stage=at, pp_size=len(counts)), carried=one) for at, one in enumerate(seen)]
    expected = [stage.rank for stage in stages[1:] if "c" in kinds[: stage.layers[0]] and reads_first(kinds, stage)]
    assert [one.stage for one in crossings(results, stages)] == expected


def reads_first(kinds: str, stage: Stage) -> bool:
    return next((kinds[at] for at in stage.layers if kinds[at] != "o"), "") == "r"


@needs_schedule
@pytest.mark.parametrize(
    ("counts", "crossed"),
    [([6, 6], []), ([5, 7], [(1, 5, 2)]), ([7, 5], [(1, 7, 6)]), ([8, 4], [(1, 8, 6)]), ([2, 4, 4, 2], []),
     ([6, 2, 2, 2], [(2, 8, 6)]), ([3, 1, 8], [(1, 3, 2), (2, 4, 2)]),
     ([1] * 12, [(at, at, max(one for one in (2, 6, 10) if one < at)) for at in (3, 4, 5, 7, 8, 9, 11)])],
)  # fmt: skip
def test_a_stage_that_begins_with_a_shared_layer_reads_across(tiny_52, counts, crossed):
    deployment = Deployment(len(counts), layer_counts=counts, gpu="h200")
    report = dry_run(tiny_52, deployment, control=False, progress=False)
    assert [(one.stage, one.layer, one.computed_by) for one in report.crossings] == crossed
    assert {one.verdict for one in report.all} == {LOADS} and {one.tensor for one in report.crossings} <= {BUFFER}
    assert report.overall() == (CROSSES if crossed else LOADS) and report.loads == (not crossed)


@needs_schedule
def test_the_command_says_so_and_gives_a_split_that_cuts_nothing(tiny_52, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_52.config))
    asked = ["check", str(tmp_path / "config.json"), "--pp", "3", "--gpu", "h200"]
    assert cli.main(asked) == 1
    out = capsys.readouterr().out
    assert f"    stage 1 reads {BUFFER} that stage 0 computes: layer 4 reads what layer 2 writes\n" in out
    assert f"\nPP=3: loads, and stage 1 reads {BUFFER} that stage 0 computes; 1 more stage does so\n" in out
    said, line = out.splitlines()[-2:]
    assert said == "with a split that cuts nothing it loads, and nothing is read across:"
    assert line == "    VLLM_PP_LAYER_PARTITION=6,4,2 vllm serve MODEL --pipeline-parallel-size 3"
    assert "glmpp" not in line and "does not cure" not in out
    assert cli.main([*asked, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    jsonschema.validate(told, json.loads((ROOT / "tests" / "check.schema.json").read_text()))
    assert told["verdict"] == CROSSES and told["split_that_cuts_nothing"] == {"partition": "6,4,2", "most_stages": 5}
    assert cli.main([*asked, "--layer-partition", "6,4,2"]) == 0
    assert cli.main(["check", str(tmp_path / "config.json"), "--pp", "6", "--gpu", "h200"]) == 1
    assert capsys.readouterr().out.endswith("\nno split into 6 stages cuts nothing; into 5 there is one\n")


@needs_schedule
def test_layouts_serve_with_a_split_that_cuts_nothing(tiny_52):
    found = layouts(tiny_52, 4, "h200", context=512, progress=False).layouts
    assert {one.deployment.layout: one.deployment.partition for one in found if one.deployment.pp > 1 and one.serves}
    for one in found:
        starts = {stage.layers[0] for stage in one.deployment.stages(tiny_52.config)}
        assert one.verdict != LOADS or starts <= {0, 1, 2, 6, 10}, one.deployment
