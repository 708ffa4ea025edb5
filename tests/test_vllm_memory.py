"""What a rank takes of its GPU, by the installed vLLM's own classes, beside known sizes and what others measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import pytest
from conftest import ROOT
from models import SIZES, write_model

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.cli.report_text import as_text
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import LOADS
from glmpp.errors import GlmppError
from glmpp.formats.config import load_config
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.tensor import TensorSpec
from glmpp.gpus import CPU, GPUS
from glmpp.layouts.search import layouts

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
LOGS = sorted((ROOT / "data" / "logs").glob("*.json"))


def run(checkpoint: Checkpoint, context: int | None = None, ranks=None, **layout) -> DryRunReport:
    deployment = Deployment(**{"gpu": "h200", "guard": "loader", **layout})
    return dry_run(checkpoint, deployment, control=False, progress=False, context=context, ranks=ranks)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Checkpoint:
    return Checkpoint.from_directory(write_model("llama", tmp_path_factory.mktemp("llama") / "model"))


def config_alone(config: dict) -> Checkpoint:
    """A model without its weights: it is built, and what is left at init takes as much memory as if it were not."""
    return Checkpoint([TensorSpec("model.norm.weight", "BF16", (config["hidden_size"],))], config)


# --- weights ------------------------------------------------------------------------------------------------------


def test_parameters_in_bf16_are_the_checkpoints_bytes_whatever_the_stages(llama):
    assert [sum(one.memory.parameters for one in run(llama, pp=pp).stages) for pp in (1, 2, 4)] == [llama.nbytes] * 3


def test_shards_share_a_stages_parameters_and_the_norms_are_on_each(llama):
    norms = sum(spec.nbytes for name, spec in llama.items() if "norm" in name)
    shards = run(llama, tp=2, ranks="all").stages
    head = SIZES["hidden_size"] // SIZES["num_attention_heads"]  # one head for keys and values: each shard has a copy
    doubled = 2 * SIZES["num_hidden_layers"] * head * SIZES["hidden_size"] * 2
    assert sum(one.memory.parameters for one in shards) == llama.nbytes + norms + doubled


def test_a_table_that_layers_share_counts_once(llama):
    """The rotary table: cosine and sine of half a head for each position."""
    head = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    (one,) = run(llama, pp=1).stages
    assert (
        SIZES["max_position_embeddings"] * head * 2 <= one.memory.others < 2.5 * SIZES["max_position_embeddings"] * head * 2
    )


def test_layers_and_the_rest_are_the_whole(tiny):
    for one in run(tiny, pp=3).stages:
        held = [at for at, nbytes in enumerate(one.memory.layers) if nbytes]
        assert held == list(one.stage.layers) and sum(one.memory.layers) <= one.memory.weights
        ends = {0: "model.embed_tokens.weight", 2: "lm_head.weight"}
        outside = tiny[ends[one.stage.rank]].nbytes if one.stage.rank in ends else 0
        assert one.memory.parameters - sum(one.memory.layers) <= outside + 1024  # the final norm


def test_mla_keeps_a_second_copy_of_kv_b_proj_in_bf16(tiny):
    """Made once the weights are loaded; it is nobody's parameter in the checkpoint."""
    (one,) = run(tiny, pp=1).stages
    kv_b = [spec for name, spec in tiny.items() if name.endswith("kv_b_proj.weight") and ".layers.12." not in name]
    weights = sum(one.memory.layers)
    stored = sum(spec.nbytes for name, spec in tiny.items() if ".layers." in name and ".layers.12." not in name)
    copies = sum(2 * spec.nbytes for spec in kv_b)  # stored in FP8
    wk = [spec for name, spec in tiny.items() if name.endswith("indexer.wk.weight") and ".layers.12." not in name]
    assert stored + copies <= weights <= stored + copies + sum(spec.nbytes for spec in wk) + 0.02 * stored


# --- KV cache -----------------------------------------------------------------------------------------------------


def test_a_token_takes_what_its_attention_says(tiny_config, tiny):
    """Latent and rotary part in BF16, and the indexer's key in FP8 with a scale."""
    latent = 2 * (tiny_config["kv_lora_rank"] + tiny_config["qk_rope_head_dim"])
    indexer = tiny_config["index_head_dim"] + 4
    for pp in (1, 3):
        stages = run(tiny, context=512, pp=pp).stages
        assert [one.memory.kv_cache.bytes_per_token for one in stages] == [
            (latent + indexer) * len(one.stage.layers) for one in stages
        ]
        assert {one.memory.kv_cache.blocks_per_request for one in stages} == {512 // 64}  # FlashMLA's blocks
        assert all(sum(one.memory.kv_cache.pages) == one.memory.kv_cache.block_bytes for one in stages)


def test_heads_are_shared_among_shards_until_each_has_one():
    config = json.loads((ROOT / "data" / "logs" / "qwen3-14b.json").read_text())["config"] | {"num_hidden_layers": 4}
    for tp, heads in ((1, 8), (4, 2), (8, 1)):
        (one,) = run(config_alone(config), context=1024, tp=tp, ranks=[(0, 0, 0)]).stages
        assert one.memory.kv_cache.bytes_per_token == 4 * heads * 128 * 2 * 2


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 131_072,
    "sliding_window": 1024,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "dtype": "bfloat16",
}


def test_layers_with_a_window_take_less_for_a_token_the_longer_the_request():
    """Of six layers five keep 1,024 tokens, and what is computed at once."""
    at = {context: run(config_alone(GEMMA), context=context).stages[0].memory.kv_cache for context in (1024, 131_072)}
    layer = 2 * 2 * 64 * 2
    assert at[1024].bytes_per_token == pytest.approx(6 * layer, rel=0.05)
    assert layer < at[131_072].bytes_per_token < 2 * layer


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_what_servers_logged_on_real_gpus(path):
    log = json.loads(path.read_text())
    config = load_config(ROOT / log["config"]) if isinstance(log["config"], str) else log["config"]
    checkpoint = config_alone(config)
    (one,) = run(checkpoint, tp=log["tp"], gpu=log["gpu"], ranks=[(0, log["tp"] - 1, 0)]).stages
    cache = one.memory.kv_cache
    assert log["available_gib"] * 2**30 / cache.bytes_per_token == pytest.approx(log["tokens"], rel=0.02)


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_drafter_adds_its_layer_and_shares_embedding_and_lm_head(tiny):
    report = run(tiny, pp=1, drafter=True)
    (both,), main, drafter = report.fit().memories, report.stages[0].memory, report.drafter.memory
    assert both.weights == main.weights + drafter.weights
    assert both.kv_cache.caches == main.kv_cache.caches + drafter.kv_cache.caches == 2 * 13
    own = sum(spec.nbytes for name, spec in tiny.items() if name.startswith("model.layers.12."))
    assert own <= drafter.parameters < 2 * own
    larger = Checkpoint.from_config({**tiny.config, "vocab_size": 4 * tiny.config["vocab_size"]})
    assert run(larger, pp=1, drafter=True).drafter.memory.parameters == drafter.parameters


@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.usefixtures("no_partition_variable")
def test_check_prints_a_line_for_what_each_rank_takes(tiny, capsys):
    arguments = ["check", str(tiny.directory), "--pp", "3", "--guard", "loader", "--gpu", "h200"]
    assert cli.main([*arguments, "--gpu-memory-utilization", "0.5", "--context", "4096"]) == 0
    out = capsys.readouterr().out
    (head,) = [line for line in out.splitlines() if line.startswith("memory, 50% of the 150.8 GB of h200")]
    assert "activations, CUDA graphs" in head
    assert out.count("bytes of KV cache per token") in (2, 3) and "requests of 4,096 tokens at a time" in out
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fit"]["tokens"] == min(stage["memory"]["tokens"] for stage in told["stages"])
    assert told["fit"]["gpu_memory_bytes"] == GPUS["h200"].memory and told["fit"]["gpu_memory_utilization"] == 0.92
    assert cli.main([*arguments, "--gpu-memory-utilization", "1.5"]) == 2


def test_a_cpu_has_no_memory_to_fit_into(tiny):
    report = run(tiny, gpu=CPU)
    assert report.fit() is None and report.stages[0].memory.parameters > 0
    assert "memory, " not in as_text(tiny, report)


@pytest.mark.usefixtures("no_partition_variable")
def test_what_does_not_fit_ends_with_1_and_says_what_would(tiny, capsys):
    """Half of the room that a request of this length needs."""
    (one,) = run(tiny, pp=1, context=4096).fit().memories
    need = one.kv_cache.block_bytes * one.kv_cache.blocks_per_request
    share = (one.weights + need / 2) / GPUS["h200"].memory
    arguments = ["check", str(tiny.directory), "--gpu", "h200", "--context", "4096", "--guard", "loader", "--json"]
    assert cli.main([*arguments, "--gpu-memory-utilization", f"{share:.7f}"]) == 1
    told = json.loads(capsys.readouterr().out)
    jsonschema.validate(told, json.loads((ROOT / "tests" / "check.schema.json").read_text()))
    assert told["verdict"] == "does not fit" and told["fit"]["fits"] is False and "4,096 tokens" in told["fit"]["lack"]
    (length,) = [int(line.split()[2]) for line in told["would_fit"] if "--max-model-len" in line]
    assert 1700 < length <= 2048
    assert any(line.startswith("2 x h200 hold it: ") for line in told["would_fit"]), told["would_fit"]


@pytest.mark.usefixtures("no_partition_variable")
def test_experts_that_tp_cuts_are_told_of_the_layout_that_loads_and_of_no_fix_or_release(config, tmp_path, capsys):
    """A quarter of an expert is half a block of 128; everything else can be cut in four."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 512}
    experts = {"moe_intermediate_size": 256, "n_shared_experts": 2, "num_hidden_layers": 4, "first_k_dense_replace": 1}
    (tmp_path / "config.json").write_text(json.dumps(reduced_config(config, **heads, **experts)))
    code, out = cli.main(["check", str(tmp_path), "--tp", "4", "--gpu", "h200"]), capsys.readouterr().out
    if code == 0:  # newer releases give each rank's part blocks of its own
        assert tuple(map(int, vllm_version().split(".")[:2])) >= (0, 32) and "\nTP=4: loads, complete" in out
        return
    assert code == 1 and "on as many GPUs TP=4 EP loads (tried: TP=4 EP):\n    vllm serve MODEL " in out, out
    assert out.endswith("--enable-expert-parallel\n")
    assert "does not cure" not in out and "release" not in out and "memory, " not in out


@pytest.mark.usefixtures("no_partition_variable")
def test_heads_that_no_layout_of_these_gpus_can_share_are_told_with_what_was_tried(tiny, capsys):
    assert cli.main(["check", str(tiny.directory), "--tp", "3", "--gpu", "h200", "--guard", "installed"]) == 1
    out = capsys.readouterr().out
    assert (
        "must be divisible" in out
        and re.search(r"(tried loads and fits: |\(tried: )TP=3 EP, PP=3", out)
        and "release" not in out
        and "fix" not in out
    )


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tiny):
    return layouts(tiny, 4, "h200", context=4096, progress=False)


def test_every_way_to_use_the_gpus_is_tried_and_the_best_comes_first(found):
    tried = {(one.deployment.tp, one.deployment.pp, one.deployment.ep) for one in found.layouts}
    assert tried == {(1, 4, False), (2, 2, False), (2, 2, True), (4, 1, False), (4, 1, True)}
    serving = [one.requests for one in found.layouts if one.serves]
    assert serving and serving == sorted(serving, reverse=True)
    assert [one.serves for one in found.layouts] == sorted((one.serves for one in found.layouts), reverse=True)


def test_vllms_own_load_was_asked_for_each_layout_as_it_is_told(found, tiny):
    """With EP, too: what is said of it without EP is said of another layout."""
    for one in (one for one in found.layouts if one.serves):
        stock = dry_run(tiny, replace(one.deployment, guard="installed"), control=False, progress=False)
        assert (one.deployment.guard == "installed") == stock.loads, one.deployment.layout


def test_a_shard_that_cuts_a_block_is_refused_in_vllms_words(found):
    """Experts of 128 columns in blocks of 128, cut in four."""
    refused = [one for one in found.layouts if one.verdict != LOADS]
    assert refused and all(one.deployment.tp > 1 and "block" in one.why for one in refused), [one.why for one in refused]
    assert not any(one.serves for one in refused)


def test_stages_that_were_not_run_take_what_those_take_that_were_run_for_them(found, tiny):
    (one,) = [one for one in found.layouts if one.deployment.pp == 4]
    report = run(tiny, context=4096, pp=4, layer_counts=one.deployment.layer_counts)
    assert [stage.memory.weights for stage in report.stages] == [memory.weights for memory in one.fit.memories]
    assert report.fit().tokens == one.tokens


def test_more_stages_than_layers_are_left_out_and_a_cpu_is_refused(llama):
    few = layouts(llama, 5, "h200", context=256, progress=False)
    assert few.left == {"PP=5": "the model has 4 layers"} and all(one.deployment.pp == 1 for one in few.layouts)
    with pytest.raises(GlmppError, match="whether a model fits is asked of a GPU"):
        layouts(llama, 2, CPU)
    with pytest.raises(GlmppError, match="gpus=0: expected a whole number from 1"):
        layouts(llama, 0, "h200")


def test_a_context_that_is_longer_than_the_models_is_refused_in_vllms_words(llama):
    for one in layouts(llama, 1, "h200", context=100_000, progress=False).layouts:
        assert one.verdict == LOADS and not one.serves and "100000" in one.why, one.why


def test_a_split_of_its_own_is_taken_where_it_leaves_more_tokens():
    """Embedding and lm_head weigh more than all layers together, and vLLM's split does not ask."""
    config = GEMMA | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": None}
    config = {key: value for key, value in config.items() if key not in ("layer_types", "sliding_window")}
    config |= {"vocab_size": 8_000_000, "num_hidden_layers": 6, "tie_word_embeddings": False}
    hidden, names = config["hidden_size"], {"model.norm.weight": (256,), "lm_head.weight": (8_000_000, 256)}
    names |= {"model.embed_tokens.weight": (8_000_000, 256)}
    for n in range(6):
        layer = f"model.layers.{n}."
        names |= {
            f"{layer}self_attn.{part}_proj.weight": (rows, hidden) for part, rows in (("q", 256), ("k", 128), ("v", 128))
        }
        names |= {f"{layer}self_attn.o_proj.weight": (hidden, 256), f"{layer}mlp.down_proj.weight": (hidden, 256)}
        names |= {f"{layer}mlp.{part}_proj.weight": (256, hidden) for part in ("gate", "up")}
        names |= {f"{layer}{part}_layernorm.weight": (256,) for part in ("input", "post_attention")}
    checkpoint = Checkpoint([TensorSpec(name, "BF16", shape) for name, shape in names.items()], config, source="made up")
    found = layouts(checkpoint, 3, "h200", context=1024, utilization=0.03, progress=False)
    (deep,) = [one for one in found.layouts if one.deployment.pp == 3]
    assert deep.even is not None and deep.tokens > deep.even
    counts = deep.deployment.layer_counts
    assert counts[0] < 2 and counts[2] < 2 and sum(counts) == 6  # the ends hold four gigabytes of embedding each


@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.usefixtures("no_partition_variable")
def test_layouts_are_told_as_json_and_as_a_line_to_paste(tiny, capsys):
    arguments = ["layouts", str(tiny.directory), "--gpus", "2", "--gpu", "h200", "--context", "4096"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "best first: " in out and "left out of the memory: activations" in out
    assert f"vllm serve {tiny.directory} --pipeline-parallel-size 2 --max-model-len 4096" in out
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["requests"] for one in told["layouts"] if one["command"]] != [] and told["context"] == 4096
    assert all(one["command"] in out for one in told["layouts"] if one["command"])
