"""The KeyError and its cure inside the installed vLLM's own classes."""

from __future__ import annotations

import re

import pytest

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment, Helper
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.errors import GlmppError
from glmpp.ledger import LOADED, NOT_REACHED, UNEXPECTED
from glmpp.loader import SPECULATIVE, load_stage, stage_parameters
from glmpp.partition import OTHER_STAGE, make_stages

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
affected = pytest.mark.skipif(vllm_version() != "0.22.1", reason="pins what the last affected release does")

KEY = "layers.{}.self_attn.indexer.wk_weights_proj.weight"
LATE = "glmpp.loader:load_fp8_indexer_wk_late_skip"
UNGUARDED = "glmpp.loader:load_fp8_indexer_wk_unguarded"


@pytest.fixture(scope="module")
def whole(tiny) -> DryRunReport:
    """Parameters of the PP=1 load by vLLM as it is: the reference for every stage's bytes."""
    return dry_run(tiny, 1, weights="real", progress=False)


@affected
def test_full_size_every_stage_of_pp_8_dies_at_the_reported_key_and_pp_1_loads(full, side_by_side):
    side_by_side(2)
    report = dry_run(full, 8, progress=False)
    assert [one.verdict for one in report.stages] == [DIES] * 8
    assert [one.key for one in report.stages] == [KEY.format(9)] + [KEY.format(0)] * 7
    assert {one.exception for one in report.stages} == {"KeyError"}
    assert {one.place for one in report.stages} == {"vllm/model_executor/models/deepseek_v2.py:774"}
    assert {one.function for one in report.stages} == {"_try_load_fp8_indexer_wk"}
    assert report.stages[3].tensor == "model.layers.0.self_attn.indexer.wk.weight_scale_inv"
    assert report.control.verdict == LOADS
    assert report.peak_rss_bytes < 1.5e9


@affected
def test_glm_5_2_dies_at_the_first_indexer_of_another_stage(config_52):
    """Not at layer 9, as GLM-5.1 does on stage 0: that layer has none. The next one with an indexer is 10."""
    report = dry_run(Checkpoint.from_config(config_52), 8, ranks=[0, 7], control=False, progress=False)
    assert [one.key for one in report.stages] == [KEY.format(10), KEY.format(0)]


def test_full_size_with_the_kits_helper_a_stage_loads_and_its_ledger_closes(full):
    report = dry_run(full, Deployment(pp=8, guard="helper"), ranks=[0, 7], control=False, progress=False)
    for one in report.stages:
        assert one.verdict == LOADS and one.held == {}
        one.ledger.check(full, one.stage)
        assert one.ledger.parameters.keys() == stage_parameters(full, one.stage).keys()


@pytest.mark.parametrize(("pp_size", "counts"), [(2, None), (3, None), (4, None), (8, None), (3, [1, 9, 2])])
def test_every_parameter_of_every_stage_is_bit_identical_to_pp_1(tiny, whole, pp_size, counts):
    report = dry_run(
        tiny, Deployment(pp=pp_size, layer_counts=counts, guard="helper"), weights="real", control=False, progress=False
    )
    found: dict[str, str] = {}
    for one in report.stages:
        assert one.verdict == LOADS, one.message
        one.ledger.check(tiny, one.stage)
        assert found.keys().isdisjoint(one.digests)
        found |= one.digests
    assert found == whole.stages[0].digests


def test_the_kits_own_loader_stores_the_same_bytes_as_vllm(tiny, whole):
    """Apart from the indexer's k_norm, which vLLM keeps in float32 where the checkpoint has BF16."""
    import hashlib

    import torch

    params, _ = load_stage(tiny, make_stages(tiny.config, 1)[0])
    assert params.keys() == whole.stages[0].digests.keys()
    for name, param in params.items():
        value = param.float() if ".k_norm." in name else param
        content = f"{value.dtype} {list(value.shape)} ".encode() + value.contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == whole.stages[0].digests[name], name


@affected
def test_taking_the_skip_out_flips_every_verdict(tiny):
    """The mutation check of the cure: same patch, same vLLM, only the skip is gone."""
    with_skip = dry_run(tiny, Deployment(pp=4, guard="helper"), control=False, progress=False)
    without = dry_run(tiny, Deployment(pp=4, guard=Helper(UNGUARDED)), control=False, progress=False)
    off = dry_run(tiny, Deployment(pp=4, guard="off"), control=False, progress=False)
    assert [one.verdict for one in with_skip.stages] == [LOADS] * 4
    for report in (without, off):
        assert [one.key for one in report.stages] == [KEY.format(3)] + [KEY.format(0)] * 3


def test_a_skip_after_the_buffering_loads_but_keeps_foreign_tensors(tiny):
    report = dry_run(tiny, Deployment(pp=4, guard=Helper(LATE)), ranks=[1], control=False, progress=False)
    (one,) = report.stages
    foreign = [layer for layer in range(12) if layer not in one.stage.layers]
    assert one.verdict == LOADS
    expected = {}
    for layer in foreign:
        wk = f"model.layers.{layer}.self_attn.indexer.wk.weight"
        expected |= {wk: 128 * 256, f"{wk}_scale_inv": 4 * 2}
    # Of a run of names the last tensor may live on in a variable of vLLM's loop; alone it would not be counted.
    assert expected.items() <= one.held.items() and len(one.held) - len(expected) <= 1


@affected
def test_mtp_must_follow_the_new_signature(tiny):
    half = dry_run(tiny, Deployment(pp=1, drafter=True, guard=Helper(callers=("deepseek_v2",))), progress=False)
    assert half.stages[0].verdict == LOADS
    assert (half.drafter.verdict, half.drafter.exception) == (DIES, "TypeError")
    assert "missing 1 required positional argument: 'pp_missing_layer_names'" in half.drafter.message
    assert half.drafter.place.startswith("vllm/model_executor/models/deepseek_mtp.py:")
    both = dry_run(tiny, Deployment(pp=1, drafter=True, guard="helper"), progress=False)
    assert both.drafter.verdict == LOADS
    assert sorted(both.drafter.accounted) == ["model.embed_tokens.weight", "model.layers.12.shared_head.head.weight"]
    mtp = {name for name in tiny if name.startswith("model.layers.12.")}
    assert set(both.drafter.ledger.in_column(LOADED)) == mtp
    assert set(both.stages[0].ledger.in_column(SPECULATIVE)) == mtp
    assert both.drafter.ledger.in_column(UNEXPECTED) == []


@affected
def test_this_release_refuses_mtp_under_pipeline_parallelism(tiny):
    report = dry_run(tiny, Deployment(pp=2, drafter=True, guard="helper"), control=False, progress=False)
    assert report.drafter.verdict == CANNOT_BUILD and "Pipeline parallelism is not supported" in report.drafter.message
    assert [one.verdict for one in report.stages] == [LOADS, LOADS]


def test_pp_1_is_untouched_by_the_helper(tiny, whole):
    patched = dry_run(tiny, Deployment(pp=1, guard="helper"), weights="real", progress=False)
    assert patched.stages[0].verdict == LOADS
    assert patched.stages[0].digests == whole.stages[0].digests


def without_indexer(tiny: Checkpoint) -> Checkpoint:
    """The same tensors and sizes as DeepSeek-V3, which has no indexer."""
    dropped = ("index_head_dim", "index_n_heads", "index_topk", "indexer_rope_interleave")
    config = {key: value for key, value in tiny.config.items() if key not in dropped}
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    return Checkpoint([spec for spec in tiny.values() if ".indexer." not in spec.name], config)


def test_a_model_without_an_indexer_is_untouched(tiny):
    checkpoint = without_indexer(tiny)
    for guard in ("installed", "helper"):
        report = dry_run(checkpoint, Deployment(pp=3, guard=guard), progress=False)
        assert report.loads, [one.message for one in report.stages]
        for one in report.stages:
            one.ledger.check(checkpoint, one.stage)


@affected
def test_four_real_processes_in_a_gloo_pipeline_group_give_the_same_verdicts(tiny):
    """The stand-in for the pipeline group is honest."""
    stand_in = dry_run(tiny, 4, control=False, progress=False)
    real = dry_run(tiny, 4, real_group=True, control=False, progress=False)
    assert "pipeline group" in stand_in.stand_ins and "pipeline group" not in real.stand_ins
    for one, other in zip(stand_in.stages, real.stages, strict=True):
        assert one.missing_prefixes == other.missing_prefixes
        assert (one.verdict, one.key, one.place, one.tensor) == (other.verdict, other.key, other.place, other.tensor)
    assert [one.key for one in real.stages] == [KEY.format(3)] + [KEY.format(0)] * 3


def test_several_models_in_one_process_do_not_share_missing_layers(tiny):
    """Eight stages one after another in one child, ids of dead models reused: vLLM's cache must not leak."""
    report = dry_run(tiny, Deployment(pp=8, guard="helper"), ranks=[5, 2, 7, 0, 2, 5], progress=False)
    for one in report.stages:
        assert one.verdict == LOADS and one.missing_prefixes == one.stage.missing_prefixes()
        one.ledger.check(tiny, one.stage)


def test_a_list_that_vllm_cached_under_a_reused_id_is_not_read(tiny, tmp_path, side_by_side):
    """`get_pp_missing_layer_names` caches by id(model). Here every model has the id of the first one."""
    side_by_side(1)
    (tmp_path / "every_id_is_reused.py").write_text(
        "from vllm.model_executor.models import utils\n"
        "from glmpp.loader import load_fp8_indexer_wk as helper\n"
        "class OneId(dict):\n"
        "    def __contains__(self, key): return len(self) > 0\n"
        "    def __getitem__(self, key): return next(iter(self.values()))\n"
        "utils._model_to_pp_missing_layer_names = OneId()\n"
    )
    helper = f"{tmp_path / 'every_id_is_reused.py'}:helper"
    report = dry_run(tiny, Deployment(pp=4, guard=Helper(helper)), progress=False)
    for one in report.stages:
        assert one.verdict == LOADS, one.message
        one.ledger.check(tiny, one.stage)


def test_a_tensor_missing_from_the_checkpoint_is_found_although_vllm_says_nothing(tiny):
    """Quantised models skip vLLM's own check for parameters that were never loaded."""
    lost = "model.layers.2.mlp.down_proj.weight"
    checkpoint = Checkpoint([spec for spec in tiny.values() if spec.name != lost], tiny.config)
    report = dry_run(checkpoint, Deployment(pp=2, guard="helper"), progress=False)
    assert report.stages[0].verdict == report.control.verdict == INCOMPLETE
    assert report.stages[0].ledger.left_at_init == [lost] and report.stages[1].verdict == LOADS
    assert not report.loads


def test_half_of_a_fused_parameter_counts_as_left_at_init(tiny):
    lost = "model.layers.5.mlp.experts.2.up_proj.weight"
    checkpoint = Checkpoint([spec for spec in tiny.values() if spec.name != lost], tiny.config)
    report = dry_run(checkpoint, Deployment(pp=1, guard="helper"), progress=False)
    assert report.stages[0].ledger.left_at_init == ["model.layers.5.mlp.experts.w13_weight"]


def test_a_report_survives_saving_and_is_labelled_as_recorded(tiny, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    monkeypatch.setenv("GLMPP_RECORD", "1")
    live = dry_run(tiny, 2, ranks=[1], recorded=path, progress=False)
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    shown = dry_run(tiny, 2, ranks=[1], recorded=path, progress=False)
    assert live.recorded is None and live.source.startswith("live")
    assert shown.recorded and "recorded on" in shown.source and live.versions["vllm"] in shown.source
    assert shown.table().equals(live.table())
    assert shown.stages[0].ledger == live.stages[0].ledger
    if live.stages[0].verdict == DIES:
        assert shown.stages[0].ledger.counts()[NOT_REACHED] > 0
        assert shown.stages[0].ledger.counts()[OTHER_STAGE] > 0
    assert str(tmp_path) not in path.read_text()


def test_without_vllm_and_without_a_record_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    with pytest.raises(GlmppError, match=r"pip install '\.\[vllm\]'"):
        dry_run(tiny, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp": 13}, "13 stages for 12 layers"),
        ({"pp": 2, "guard": "on"}, "guard 'on' is unknown"),
        ({"pp": 2, "layer_counts": [1, 2]}, "adds up to 3 layers"),
        ({"pp": 2, "layer_counts": "1,2,9"}, "names 3 stages, there are 2"),
    ],
)
def test_bad_arguments_are_refused_before_a_process_is_started(tiny, arguments, message):
    with pytest.raises(GlmppError, match=message):
        dry_run(tiny, Deployment(**arguments))


def test_a_stage_that_does_not_exist_is_refused(tiny):
    with pytest.raises(GlmppError, match="no stage 2 of 2"):
        dry_run(tiny, 2, ranks=[2])


def test_real_weights_need_files(full):
    with pytest.raises(GlmppError, match="checkpoint with files"):
        dry_run(full, 2, weights="real")


@pytest.mark.parametrize("place", ["no_such_module:helper", "json:no_such_function", "{}/not_there.py:helper"])
def test_a_helper_that_cannot_be_imported_is_named(tiny, tmp_path, place):
    place = place.format(tmp_path)
    with pytest.raises(GlmppError, match=f"^the helper '{re.escape(place)}' cannot be imported: ") as found:
        dry_run(tiny, Deployment(pp=2, guard=Helper(place)), progress=False)
    assert type(found.value) is GlmppError
