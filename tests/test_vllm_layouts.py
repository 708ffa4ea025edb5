"""Ranks of a layout, tensor x pipeline x expert parallel: put together they are the single rank, bit for bit.

The oracle is written from the rule of Megatron's parallel layers, not from vLLM's attributes: a column-parallel weight is
cut along its output, a row-parallel one along its input, a vocabulary by rows, experts along their inner width, or dealt
out whole; fused parts each for itself. Everything else is the same on all ranks.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import faulty
import jsonschema
import pytest
import torch
from conftest import ROOT
from models import write_model

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.advice import serve_line
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.messages import StageResult
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, LOADS, StageReport
from glmpp.errors import GlmppError
from glmpp.formats.glm5 import reduced_config
from glmpp.gpus import CPU
from glmpp.partition import OTHER_STAGE
from glmpp.synthetic import write_checkpoint

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEWER = tuple(map(int, vllm_version().split(".")[:2])) >= (0, 32)  # than the releases of one class for all platforms
EXPERTS = 6  # on four ranks: 2, 2, 1, 1
SIZED = {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,  # a quarter is a block of 128
}

# Part of a parameter's name -> dimension that it is cut along, and the sizes, in proportion, of the parts that are fused
# along it. Experts are cut like this unless they are dealt out.
GLM = {
    r"(embed_tokens|lm_head)\.weight$": (0, [1]),
    r"(q_b_proj|kv_b_proj)\.weight": (0, [1]),
    r"(o_proj|\.down_proj)\.weight": (1, [1]),
    r"\.gate_up_proj\.weight": (0, [1, 1]),
    r"experts\..*w13_weight": (1, [1, 1]),
    r"experts\..*w2_weight": (2, [1]),
}


def rule(table: dict, name: str) -> tuple[int, list[int]] | None:
    """How a parameter is cut; None: not at all, every rank has it whole."""
    return next((cut for pattern, cut in table.items() if re.search(pattern, name)), None)


def is_expert(name: str) -> bool:
    return re.search(r"experts\..*w(13|2)_weight", name) is not None


def joined(shards: list[torch.Tensor], cut: tuple[int, list[int]] | None) -> torch.Tensor:
    """One tensor from what the ranks hold of it, in order."""
    if cut is None:
        assert all(equal(shard, shards[0]) for shard in shards)
        return shards[0]
    dim, parts = cut
    unit = shards[0].shape[dim] // sum(parts)
    pieces = [bits(shard).split([unit * part for part in parts], dim) for shard in shards]
    return torch.cat([torch.cat(each, dim) for each in zip(*pieces, strict=True)], dim)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 has no `cat`, and NaN is not equal to itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bits(one).equal(bits(other))


def run(checkpoint: Checkpoint, folder: Path, deployment: Deployment, closes: bool = True, **options) -> DryRunReport:
    """A dry run of all ranks on real bytes; `closes`: the books do, by the kit's own rule of who owns what."""
    folder.mkdir(parents=True)
    options = {"ranks": "all", "weights": "real", "control": False, "keep": folder, **options}
    report = dry_run(checkpoint, deployment, progress=False, **options)
    assert [one.verdict for one in report.all] == [LOADS] * len(report.all), [one.message for one in report.all]
    for one in report.stages if closes else ():
        one.ledger.check(checkpoint, one.stage, experts=one.experts)
    return report


def parameters(folder: Path, stage: int, shard: int = 0, replica: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{stage}-{shard}-{replica}.pt")


def assemble(folder: Path, deployment: Deployment, table: dict) -> dict[str, torch.Tensor]:
    """All parameters of the model, from those of the ranks of a layout."""
    whole: dict[str, torch.Tensor] = {}
    for stage in range(deployment.pp):
        ranks = [
            parameters(folder, stage, shard, replica) for replica in range(deployment.dp) for shard in range(deployment.tp)
        ]
        names = list(ranks[0])
        assert all(list(rank) == names for rank in ranks) and whole.keys().isdisjoint(names)
        for name in names:
            shards, cut = [rank[name] for rank in ranks], rule(table, name)
            if is_expert(name) and deployment.ep:
                whole[name] = torch.cat(list(map(bits, shards)))
            elif is_expert(name):
                whole[name] = joined(shards, cut)
            else:  # replicas hold the same
                replicas = [joined(shards[at : at + deployment.tp], cut) for at in range(0, len(shards), deployment.tp)]
                whole[name] = joined(replicas, None)
    return whole


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not equal(bits(found[name]), bits(value))] == []


@pytest.fixture(scope="module")
def glm(config, tmp_path_factory) -> Checkpoint:
    return write_checkpoint(reduced_config(config, **SIZED), tmp_path_factory.mktemp("glm") / "model", progress=False)


@pytest.fixture(scope="module")
def whole(glm, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Parameters of the single rank."""
    folder = tmp_path_factory.mktemp("whole") / "ranks"
    run(glm, folder, Deployment(guard="helper"))
    return parameters(folder, 0)


LAYOUTS = [(tp, pp, ep) for tp in (1, 2, 4) for pp in (1, 2, 3) for ep in (False, True) if tp > ep and tp * pp > 1]


@pytest.mark.parametrize(("tp", "pp", "ep"), LAYOUTS)
def test_the_ranks_of_a_layout_put_together_are_the_single_rank_bit_for_bit(glm, whole, tmp_path, tp, pp, ep):
    deployment = Deployment(pp, tp, ep=ep, guard="helper")
    report = run(glm, tmp_path / "ranks", deployment)
    assert [one.rank for one in report.stages] == [(stage, shard, 0) for stage in range(pp) for shard in range(tp)]
    assert_same(assemble(tmp_path / "ranks", deployment, GLM), whole)
    for stage in range(pp):
        held = [one.experts for one in report.stages if one.stage.rank == stage]
        if ep:
            assert sorted(chain.from_iterable(held)) == [*range(EXPERTS)]
        else:
            assert held == [None] * tp


@pytest.mark.parametrize("ep", [False, True])
def test_replicas_hold_the_same_but_for_the_experts_that_they_share(glm, whole, tmp_path, ep):
    deployment = Deployment(tp=2, dp=2, ep=ep, guard="helper")
    report = run(glm, tmp_path / "ranks", deployment)
    assert [one.rank for one in report.stages] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    # With shards, replicas and dealt-out experts tokens are dealt out, too (`ParallelConfig.use_sequence_parallel_moe`):
    # each rank has the shared expert whole, and in the class for NVIDIA's GPUs every MLP.
    table = {(r"\.mlp\.(shared_experts\.)?(gate_up|down)" if NEWER else "shared_experts"): None, **GLM} if ep else GLM
    assert_same(assemble(tmp_path / "ranks", deployment, table), whole)
    assert [one.experts for one in report.stages] == ([[0, 1], [2, 3], [4], [5]] if ep else [None] * 4)


def seen(one: StageReport) -> list:
    """What was found of a rank, whatever time it took."""
    seconds = ("build_seconds", "load_seconds")
    return [getattr(one.result, name) for name in StageResult.__struct_fields__ if name not in seconds]


@pytest.mark.parametrize("ep", [False, True])
def test_four_real_processes_in_gloo_groups_say_and_hold_the_same(glm, ep):
    """The stand-in for the process groups is honest."""
    deployment = Deployment(pp=2, tp=2, ep=ep, guard="helper")
    options = {"weights": "real", "control": False, "progress": False}
    stand_in = dry_run(glm, deployment, ranks="all", **options)
    real = dry_run(glm, deployment, real_group=True, **options)
    assert "process groups" in stand_in.stand_ins and "process groups" not in real.stand_ins
    for one, other in zip(stand_in.stages, real.stages, strict=True):
        assert one.verdict == other.verdict == LOADS, other.message
        assert (seen(one), one.ledger) == (seen(other), other.ledger)


@pytest.mark.parametrize("gpu", ["h100", CPU])
def test_a_split_by_hand_and_a_pretended_gpu_change_nothing_of_it(glm, whole, tmp_path, gpu):
    deployment = Deployment(pp=3, tp=2, layer_counts=[1, 3, 1], guard="helper", gpu=gpu)
    report = run(glm, tmp_path / "ranks", deployment)
    assert [one.stage.layers for one in report.stages[::2]] == [range(1), range(1, 4), range(4, 5)]
    assert_same(assemble(tmp_path / "ranks", deployment, GLM), whole)


def test_every_shard_of_the_drafter_on_the_last_stage(glm, tmp_path):
    """Before 0.32 vLLM runs no drafter under pipeline parallelism."""
    pp = 2 if NEWER else 1
    for tp in (1, 2):
        run(glm, tmp_path / f"{tp}", Deployment(pp=pp, tp=tp, drafter=True, guard="helper"), closes=False)
    (alone,) = (torch.load(tmp_path / "1" / f"drafter-{pp - 1}-0-0.pt"),)
    shards = [torch.load(tmp_path / "2" / f"drafter-{pp - 1}-{shard}-0.pt") for shard in range(2)]
    unloaded = ("shared_head.head", "model.embed_tokens")  # the main model's, shared after loading
    names = [name for name in alone if not any(part in name for part in unloaded)]
    assert names and all(list(shard) == list(alone) for shard in shards)
    found = {name: joined([shard[name] for shard in shards], rule(GLM, name)) for name in names}
    assert_same(found, {name: alone[name] for name in names})


@pytest.mark.parametrize(("tp", "pp", "ep"), [(2, 1, False), (2, 2, False), (4, 1, True), (2, 3, True)])
def test_the_load_format_hands_a_rank_what_it_can_hold_and_the_same_is_loaded(glm, whole, tmp_path, tp, pp, ep):
    """Of another rank's experts only the scales, which vLLM's own filter lets pass, too."""
    deployment = Deployment(pp, tp, ep=ep, guard="loader")
    report = run(glm, tmp_path / "ranks", deployment)
    assert_same(assemble(tmp_path / "ranks", deployment, GLM), whole)
    for one in report.stages:
        mine = [name for name in glm if one.stage.owner(name) != OTHER_STAGE]
        weights = [name for name in mine if ".experts." in name and name.endswith(".weight")]
        if ep:
            assert len(one.experts) < EXPERTS
            # The MTP layer is handed over in case the model knows better.
            foreign = [name for name in weights if int(name.split(".")[5]) not in one.experts and ".layers.5." not in name]
            assert foreign
        else:
            foreign = []
        assert one.handed_over == len(mine) - len(foreign)


# --- other architectures: attention with fewer heads for keys than shards, tied, wrapped ---------------------------


OTHERS = {
    r"(embed_tokens|lm_head)\.weight$": (0, [1]),
    r"(o_proj|down_proj)\.weight": (1, [1]),
    r"gate_up_proj\.weight": (0, [1, 1]),
    r"experts\..*w13_weight": (1, [1, 1]),
    r"experts\..*w2_weight": (2, [1]),
    r"visual.*\.(qkv\.(weight|bias))$": (0, [1, 1, 1]),
    r"visual.*\.gate_up_proj\.bias": (0, [1, 1]),
    r"visual.*\.mlp\.0\.(weight|bias)$": (0, [1]),
    r"visual.*(\.attn\.proj|\.mlp\.2)\.weight$": (1, [1]),
}


def one_of_two(name: str, whole: torch.Tensor, shard: int) -> torch.Tensor:
    """What the first or the second of two shards holds of a parameter, by the rule."""
    if ".qkv_proj." in name:
        head = whole.shape[0] // 4  # two heads for queries, one for keys and one for values, which both shards have
        return torch.cat([whole[shard * head : (shard + 1) * head], whole[2 * head :]])
    cut = rule(OTHERS, name)
    if cut is None:
        return whole
    return torch.cat([part.chunk(2, cut[0])[shard] for part in whole.chunk(len(cut[1]), cut[0])], cut[0])


@pytest.mark.parametrize(
    ("kind", "pp", "ep"),
    [("llama_tied", 2, False), ("qwen3_moe", 2, False), ("qwen3_moe", 1, True), ("qwen2_5_vl", 2, False)],
)
def test_shards_of_other_architectures_are_those_of_the_rule(tmp_path, kind, pp, ep):
    checkpoint = Checkpoint.from_directory(write_model(kind, tmp_path / "model"))
    run(checkpoint, tmp_path / "whole", Deployment(), closes=False)
    whole = parameters(tmp_path / "whole", 0)
    for guard in ("installed", "loader"):
        report = run(checkpoint, tmp_path / guard, Deployment(pp=pp, tp=2, ep=ep, guard=guard), closes=False)
        for one in report.stages:
            held = parameters(tmp_path / guard, *one.rank)
            for name, value in held.items():
                whole_value = whole[name if name in whole else name.replace("lm_head", "model.embed_tokens")]
                if one.experts is not None and is_expert(name):
                    expected = whole_value[one.experts]
                else:
                    expected = one_of_two(name, whole_value, one.run.tp_rank)
                assert equal(value, expected), (guard, one.label, name)


# --- what vLLM refuses, what cannot be told, and what is said ------------------------------------------------------


@pytest.mark.parametrize("gpu", ["h200", CPU])
@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (3, "Total number of attention heads (4) must be divisible by tensor parallel size (3)."),
        (4, "divisible by weight quantization block"),  # a quarter of o_proj's input is 64, half a block
    ],
)
def test_a_layout_that_vllm_refuses_is_refused_in_its_words_before_anything_is_read(tiny, tp, words, gpu):
    report = dry_run(tiny, Deployment(pp=2, tp=tp, guard="helper", gpu=gpu), progress=False)
    assert {one.verdict for one in report.all} == {CANNOT_BUILD} and all(one.refused for one in report.all)
    assert {one.handed_over for one in report.all} == {0}
    assert words in report.stages[0].message
    assert report.overall() == DIES
    assert report.stand_ins.keys() <= {"platform", "driver", "class inspection", "process groups"}


@pytest.mark.parametrize("moment", ["building", "loading"])
def test_a_rank_that_waits_for_others_is_not_told_dead(tmp_path, moment):
    """They are not here. What it would do with them cannot be told."""
    checkpoint = Checkpoint.from_directory(faulty.write_faulty(f"waits for the other shards, {moment}", tmp_path))
    report = dry_run(checkpoint, Deployment(pp=2, tp=2), control=False, progress=False)
    assert [one.verdict for one in report.stages] == [CANNOT_TELL] * 4 and report.overall() == CANNOT_TELL
    words = {"building": "<2 ranks: no other process of this group is here>", "loading": "'vllm::all_gather'"}
    assert words[moment] in report.stages[0].message
    assert dry_run(checkpoint, Deployment(tp=1), progress=False).loads


def test_by_default_the_first_and_the_last_shard_of_each_stage_are_run_and_the_control_has_as_many(glm):
    report = dry_run(glm, Deployment(pp=2, tp=4, guard="loader"), progress=False)
    assert [one.rank for one in report.stages] == [(0, 0, 0), (0, 3, 0), (1, 0, 0), (1, 3, 0)]
    assert report.loads and (report.control.run.tp_rank, report.control.run.tp_size) == (0, 4)
    assert report.stages[3].label == "stage 1, rank 3 of 4" and report.stages[3].stage.layers == range(3, 5)
    quarter = report.stages[1].ledger.parameters["model.embed_tokens.weight"]
    assert quarter == (512 * 256 // 4, 512 * 256 // 4)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([1], [(1, 0, 0), (1, 3, 0)]), ([(0, 2, 0), (1, 1, 0)], [(0, 2, 0), (1, 1, 0)])],
)
def test_ranks_are_asked_for_by_stage_or_one_by_one(glm, ranks, expected):
    report = dry_run(glm, Deployment(pp=2, tp=4, guard="loader"), ranks=ranks, control=False, progress=False)
    assert [one.rank for one in report.stages] == expected and report.loads


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        ({"tp": 0}, None, "tp=0: expected a whole number from 1"),
        ({"dp": -1}, None, "dp=-1: expected a whole number from 1"),
        ({"tp": 2}, [(0, 2, 0)], r"no rank \(0, 2, 0\), \(stage, tensor rank, data rank\), of TP=2"),
        ({"tp": 2}, [1], "no stage 1 of 1"),
    ],
)
def test_what_is_no_layout_and_no_rank_of_it_is_an_error(glm, arguments, ranks, message):
    with pytest.raises(GlmppError, match=message):
        dry_run(glm, Deployment(**arguments), ranks=ranks)


@pytest.mark.usefixtures("no_partition_variable")
def test_the_command_names_the_ranks_and_its_line_to_paste_has_the_layout(tmp_path, capsys):
    model = faulty.write_faulty("attribute of a placeholder, loading", tmp_path)
    assert cli.main(["check", str(model), "--tp", "2", "--pp", "3", "--dp", "2"]) == 1
    out = capsys.readouterr().out
    assert "\nstage 0, ranks 0-1 of 2, replicas 0-1 of 2    layers 0-3      dies\n" in out
    assert "\nstages 1-2, ranks 0-1 of 2, replicas 0-1 of 2 layers 4-11     dies\n" in out
    assert "\nPP=1 control, rank 0 of 2, replica 0 of 2     layers 0-11     loads\n" in out
    assert "TP=2 PP=3 DP=2: does not load: 12 of 12 ranks that were run fail although PP=1 loads\n" in out
    sizes = "--tensor-parallel-size 2 --pipeline-parallel-size 3 --data-parallel-size 2"
    assert f"    vllm serve {model} {sizes} --load-format glmpp\n" in out
    line = "vllm serve model --tensor-parallel-size 8 --enable-expert-parallel --load-format glmpp"
    assert serve_line("model", Deployment(tp=8, ep=True, guard="loader")) == line


@pytest.mark.usefixtures("no_partition_variable")
def test_json_of_a_layout_follows_the_schema(glm, capsys):
    arguments = ["check", str(glm.directory), "--tp", "4", "--ep", "--ranks", "all", "--guard", "loader", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, json.loads((ROOT / "tests" / "check.schema.json").read_text()))
    assert {one["device"] for one in report["stages"]} == {"meta"}
    assert (report["tp_size"], report["pp_size"], report["dp_size"], report["ep"]) == (4, 1, 1, True)
    assert [(one["stage"], one["tp_rank"], one["experts"]) for one in report["stages"]] == [
        (0, 0, [0, 1]), (0, 1, [2, 3]), (0, 2, [4]), (0, 3, [5])
    ]  # fmt: skip


def test_a_report_of_a_layout_survives_saving(glm, tmp_path):
    live = dry_run(glm, Deployment(tp=2, ep=True, guard="loader"), progress=False)
    live.save(tmp_path / "report.json")
    again = DryRunReport.load(tmp_path / "report.json", glm)
    assert again.deployment == live.deployment and again.stages == live.stages
