"""`glmpp check` of the checkpoints in public reports, asked as their reporters would: exit code, verdict, what matters."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import quantised
import reports
import torch
from conftest import ROOT
from safetensors.torch import load_file

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import CANNOT_BUILD, INCOMPLETE, LOADS
from glmpp.layouts.search import layouts
from glmpp.partition import SPECULATIVE

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_partition_variable")]
OLD = vllm_version() == "0.22.1"
GLM_5_1 = ROOT / "data" / "glm-5.1-fp8" / "config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def ask(folders, capsys):
    """Asks the command about a report's checkpoint on an H100, unless another GPU is named; returns exit code and text."""

    def run(report: str, *arguments: str, command: str = "check") -> tuple[int, str]:
        folder = written(folders, report)
        gpu = [] if "--gpu" in arguments else ["--gpu", "h100"]
        code = cli.main([command, str(folder), *arguments, *gpu])
        out, err = capsys.readouterr()
        return code, (out + err).replace(str(folder), "MODEL")

    return run


def written(folders: Path, report: str) -> Path:
    folder = folders / report.replace(" ", "-").replace(",", "")
    return folder if folder.exists() else reports.REPORTS[report](folder)


# --- experts that a layout cuts -----------------------------------------------------------------------------------


def test_fp8_blocks_that_tp_8_cuts_are_refused_in_vllms_words_and_spread_experts_are_the_way_out(ask):
    code, out = ask("fp8 experts of 640", "--tp", "8")
    assert code == 1 and "\nTP=8: does not load: 2 of 2 ranks that were run fail\n" in out
    said = "weight = 80 is not divisible by weight quantization block_n = 128. (while model.layers.0.mlp"
    assert said in out and out.count(said) == 1
    line = "vllm serve MODEL --tensor-parallel-size 8 --enable-expert-parallel"
    assert out.endswith(f"\n\non as many GPUs TP=8 EP loads (tried: TP=8 EP):\n    {line}\n")
    assert "the fix" not in out and "release" not in out


def test_heads_that_do_not_divide_are_refused_without_what_pydantic_says_and_nothing_is_said_of_releases(ask):
    code, out = ask("fp8 experts of 640", "--tp", "3")
    assert code == 1 and "\n    ValidationError: Total number of attention heads (16) must be divisible by tensor" in out
    assert "pydantic" not in out and "input_value" not in out and "known to load" not in out and "PP=2" not in out
    assert out.endswith("\nno other layout of these GPUs that was tried loads and fits: TP=3 EP\n")


@pytest.mark.parametrize("gpu", ["h100"])
def test_groups_that_tp_8_cuts_are_no_complete_load_and_what_loads_was_tried(ask, gpu):
    code, out = ask("nemotron-h", "--tp", "8", "--gpu", gpu)
    assert code == 1 and "\nTP=8: loads, and is not complete: 32 cut\n" in out
    assert out.count("    cut: ") == 2 and "\nstage 0, ranks 0-7 of 8 layers 0-3      loads, is not complete\n" in out
    assert "\n        112-115 of dimension 1: read by no rank\n" in out
    assert "\non as many GPUs TP=8 EP loads (tried: TP=8 EP):\n" in out


def test_layouts_calls_a_layout_that_cuts_not_complete_and_asks_spread_experts_by_themselves(ask):
    code, out = ask("nemotron-h", "--gpus", "8", "--context", "4096", command="layouts")
    found = verdicts(out)
    assert code == 0 and (found["TP=8 EP"], found["TP=8"]) == (LOADS, "not complete")
    assert "stage 0, rank 0 of 8: 32 tensors cut, backbone.layers." in out
    assert out.count("--tensor-parallel-size 8 ") == 1  # the one to paste spreads the experts
    code, out = ask("fp8 experts of 640", "--gpus", "8", "--context", "4096", command="layouts")
    found = verdicts(out)
    assert code == 0 and (found["TP=8 EP"], found["TP=8"]) == (LOADS, CANNOT_BUILD)


def verdicts(out: str) -> dict[str, str]:
    """Layout -> verdict, from the table of `glmpp layouts`."""
    return {line[:14].strip(): line[15:33].strip() for line in out.splitlines() if line.startswith(("TP=", "PP="))}


# --- experts that are not alike -----------------------------------------------------------------------------------


def test_what_some_experts_lack_is_written_in_part_and_the_experts_are_named(ask):
    code, out = ask("nvfp4 experts without input_scale", "--gpu", "b200")
    assert code == 1 and out.endswith("\nPP=1: loads, and is not complete: 4 written in part\n")
    at = "model.layers.{}.mlp.experts" + ("" if OLD else ".routed_experts")
    stacks = {"w13_input_scale": "gate_proj.input_scale and up_proj.input_scale", "w2_input_scale": "down_proj.input_scale"}
    for layer, experts in ((0, "1 of 8 experts: 3"), (1, "2 of 8 experts: 5, 6")):
        for name, parts in stacks.items():
            why = f"absent: the checkpoint lacks {parts} of {experts}"
            assert f"    written in part: {at.format(layer)}.{name}\n        {why}\n" in out
    assert "left at init" not in out and "in the model" not in out


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("mlp.experts.3.up_proj.weight", "the checkpoint lacks up_proj.weight of 1 of 8 experts: 3"),
        ("mlp.experts.3.down_proj.weight", "the checkpoint lacks down_proj.weight of 1 of 8 experts: 3"),
        ("self_attn.k_proj.weight", "the checkpoint lacks k_proj.weight; "),
    ],
)
def test_what_lacks_is_named_and_not_what_it_would_be_a_part_of(tmp_path, capsys, lacks, said):
    into, config = reports.qwen3_moe(256, 8, reports.plain, reports.plain)
    del into[f"model.layers.1.{lacks}"]
    assert cli.main(["check", str(reports.write(tmp_path / "model", into, config)), "--gpu", "h100"]) == 1
    assert f"        absent: {said}" in capsys.readouterr().out


def test_a_rank_between_the_first_and_the_last_that_lacks_a_part_of_its_expert_is_found(folders, tmp_path):
    """Of spread experts every rank holds others."""
    source = written(folders, "fp8 experts of 640")
    tensors = load_file(source / "model.safetensors")
    lost = "model.layers.1.mlp.experts.5.down_proj.weight"
    del tensors[lost]
    config = json.loads((source / "config.json").read_text())
    checkpoint = Checkpoint.from_directory(reports.write(tmp_path / "lacks", tensors, config), judged=True)
    report = dry_run(checkpoint, Deployment(tp=8, ep=True, gpu="h100"), progress=False)
    assert [stage.run.tp_rank for stage in report.stages if stage.verdict == INCOMPLETE] == [5]
    found = layouts(checkpoint, 8, "h100", context=4096, progress=False).layouts
    assert {one.verdict for one in found if one.deployment.tp == 8 and one.deployment.ep} == {INCOMPLETE}


# --- MTP layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("report", "mtp"), [("qwen3.5", "mtp."), ("glm-4.7-flash", "model.layers.6.")])
def test_without_a_drafter_two_stages_load_and_the_mtp_tensors_are_in_their_column(ask, folders, report, mtp):
    code, out = ask(report, "--pp", "2")
    assert code == 0 and out.endswith("\nPP=2: loads, complete\n") and "dropped" not in out
    checkpoint = Checkpoint.from_directory(written(folders, report), judged=True)
    for stage in dry_run(checkpoint, Deployment(2, gpu="h100"), control=False, progress=False).stages:
        assert {name for name in checkpoint if name.startswith(mtp)} == set(stage.ledger.in_column(SPECULATIVE))


def test_a_drafter_alone_is_told_as_one_with_the_model_that_it_needs(ask):
    code, out = ask("eagle3")
    assert code == 2 and "is a drafter in the speculators format ('eagle3') and no model of its own" in out
    assert "'/nowhere/verifier'" in out and "dealt out" not in out


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["mistral3", "mistral3, says so", "qwen2.5-vl, two words on the head"])
def test_a_head_of_its_own_is_loaded_or_said_to_be_lost(ask, folders, tmp_path, report):
    """Where the parts of config.json differ vLLM 0.22.1 ties it to the embedding; later ones look into the checkpoint."""
    if "mistral3" in report and OLD and not has_pixtral():
        code, out = ask(report)
        assert code == 2 and "install an older transformers" in out
        return
    folder = written(folders, report)
    deployment = Deployment(gpu="h100")
    checkpoint = Checkpoint.from_directory(folder, judged=True)
    (stage,) = dry_run(checkpoint, deployment, weights="real", keep=tmp_path, progress=False).stages
    held = torch.load(tmp_path / "0-0-0.pt")
    (head,) = (tensor for name, tensor in checkpoint.read() if name.endswith("lm_head.weight"))
    is_loaded = any(len(one) >= len(head) and torch.equal(one[: len(head)], head) for one in held.values() if one.dim() == 2)
    assert is_loaded == (not OLD or report == "mistral3, says so")
    code, out = ask(report)
    assert (code, stage.verdict) == ((0, LOADS) if is_loaded else (1, INCOMPLETE))
    assert is_loaded or "lost: vLLM ties the head to language_model.model.embed_tokens, although" in out


def has_pixtral() -> bool:
    """Whether transformers has what vLLM 0.22.1 takes from it."""
    return (
        "class PixtralRotaryEmbedding" in Path(find_spec("transformers.models.pixtral.modeling_pixtral").origin).read_text()
    )


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["leftovers", "leftovers, indexed"])
def test_what_trainers_leave_beside_a_model_is_taken_in_and_is_a_death_that_names_its_file(ask, report):
    code, out = ask(report, "--pp", "2")
    assert code == 1 and "\nPP=2: does not load, nor does PP=1: 2 of 2 stages fail\n" in out
    listed = "adapter_model.safetensors, model.safetensors, optimizer.safetensors"
    assert (f"vLLM opens every *.safetensors of the folder: {listed}\n" in out) == (report == "leftovers")
    assert "\nstages 0-1    layers 0-3      dies\n" in out  # of the same, although each lists other parameters
    assert "no module or parameter named 'base_model' in LlamaForCausalLM" in out and "model.norm.weight" not in out
    assert "lora_A.weight of adapter_model.safetensors\n" in out and "memory" not in out


def test_shards_load_without_an_index_and_with_a_sound_one_beside_older_ones(ask):
    code, out = ask("shards without an index")
    assert code == 0 and out.endswith("\nPP=1: loads, complete\n")
    assert "opens every *.safetensors of the folder: model-00001-of-00002.safetensors, model-00002-of-00002" in out
    code, out = ask("older shards beside an index", "--pp", "2")
    assert code == 0 and out.endswith("\nPP=2: loads, complete\n")
    older = ", ".join(f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3))
    assert f"not opened by vLLM, as model.safetensors.index.json does not name them: {older}\n" in out


def test_a_missing_shard_is_a_death_and_a_folder_with_an_adapter_alone_is_told_as_one(folders, tmp_path, capsys):
    folder = reports.shards(tmp_path / "shards", indexed=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert cli.main(["check", str(folder), "--gpu", "h100"]) == 1
    assert "the shard is missing" in capsys.readouterr().out
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = written(folders, "leftovers")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).symlink_to(source / name)
    assert cli.main(["check", str(adapter), "--gpu", "h100"]) == 2
    err = capsys.readouterr().err
    assert "is an adapter" in err and "--lora-modules" in err


# --- GLM-5.2 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glm_5_2(folders) -> Path:
    return reports.glm_5_2(folders / "glm-5.2", GLM_5_1)


def test_glm_5_2_dies_of_the_key_error_on_0_22_1_and_loads_later(glm_5_2, capsys):
    code = cli.main(["check", str(glm_5_2), "--pp", "8", "--gpu", "h100"])
    out = capsys.readouterr().out
    if OLD:
        assert code == 1 and "    KeyError: 'layers.0.self_attn.indexer.wk_weights_proj.weight'\n" in out
        assert "\nPP=8: does not load, nor does PP=1: 8 of 8 stages fail\n" in out  # which lacks the shared indexers
        assert "\nthis KeyError is mended from vLLM 0.23.0 on (" in out and "nearest release" not in out
        return
    assert code == 1 and "\nPP=8: loads, and stage 3 reads topk_indices_buffer that stage 2 computes" in out
    assert out.endswith("\nno split into 8 stages cuts nothing; into 5 there is one\n")
    assert cli.main(["check", str(glm_5_2), "--tp", "8", "--gpu", "h100"]) == 0
    assert cli.main(["layouts", str(glm_5_2), "--gpus", "8", "--gpu", "h100", "--context", "4096"]) == 0


# --- what does not fit --------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_a_verdict_and_an_fp8_cache_is_advised_where_it_was_tried_and_fits(tmp_path, capsys):
    config = reports.LLAMA | {"max_position_embeddings": 40_000_000}
    folder = reports.write(tmp_path / "long", reports.llama(config), config)
    code = cli.main(["check", str(folder), "--gpu", "h100", "--context", "25000000"])
    out = capsys.readouterr().out
    assert code == 1 and "\nPP=1: loads, and does not fit: a request of 25,000,000 tokens needs 95.37 GiB of KV cache" in out
    assert "\nwith --kv-cache-dtype fp8 it fits\n" in out and "\n2 x h100 hold it: " in out


def test_a_layout_that_vllm_divides_by_zero_for_does_not_load():
    """gpt-oss has two KV heads here; vLLM 0.22.1 asks for a remainder of none."""
    report = dry_run(quantised.gpt_oss(), Deployment(tp=4, gpu="h100"), progress=False)
    assert {stage.verdict for stage in report.stages} <= {CANNOT_BUILD, LOADS}
    assert not OLD or {stage.exception for stage in report.stages} == {"ZeroDivisionError"}
