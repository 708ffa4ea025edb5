"""The load format "glmpp": what a stage is handed, what it is not, and what is said when something stays at init.

The first part asks the filter and the readers in this process, with small modules in the place of models; the second runs
the installed vLLM's own classes, every stage, in the dry run's child.
"""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import CANNOT_BUILD, DIES, INCOMPLETE, LOADS
from glmpp.errors import GlmppError
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.shard import read_shard
from glmpp.ledger import ABSENT, EXPECTED, LOADED, UNEXPECTED, UnloadedParam
from glmpp.loader import SPECULATIVE
from glmpp.partition import OTHER_STAGE, make_stages
from glmpp.synthetic import checkpoint_without

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
affected = pytest.mark.skipif(vllm_version() != "0.22.1", reason="pins what the last affected release does")


@pytest.fixture(scope="module")
def plugin():
    from glmpp.serving import load_format

    return load_format


def selecting():
    """Imported late: this file is collected where there is no vLLM, too."""

    from glmpp.serving import stage_filter

    return stage_filter


@pytest.fixture
def stage_of(plugin, monkeypatch):
    """Pretend a position in the pipeline."""

    def pretend(rank: int, size: int) -> None:
        group = SimpleNamespace(rank_in_group=rank, world_size=size, is_first_rank=rank == 0, is_last_rank=rank == size - 1)
        for module in (plugin, selecting()):
            monkeypatch.setattr(module, "get_pp_group", lambda: group)
        monkeypatch.setattr(plugin, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1))

    pretend(1, 4)
    return pretend


def model_with(missing: list[str], held: list[str] = (), mapper=None) -> torch.nn.Module:
    """A module tree with vLLM's placeholders at the missing paths and a parameter at the held ones."""
    from vllm.model_executor.models.utils import PPMissingLayer

    root = torch.nn.Module()
    for path, placeholder in [*((p, True) for p in missing), *((p, False) for p in held)]:
        *parents, last = path.split(".")
        at = root
        for name in parents:
            if not hasattr(at, name):
                at.add_module(name, torch.nn.Module())
            at = getattr(at, name)
        at.add_module(last, PPMissingLayer() if placeholder else torch.nn.Linear(2, 2))
    if mapper is not None:
        root.hf_to_vllm_mapper = mapper
        root.load_weights = lambda weights: None
    return root


def config_of(directory="", runner="generate", **text) -> SimpleNamespace:
    said = {"model": str(directory), "revision": None, "runner_type": runner, "hf_text_config": SimpleNamespace(**text)}
    return SimpleNamespace(**said, get_total_num_hidden_layers=lambda: text.get("num_hidden_layers", 0))


def loader_of(plugin, **options):
    from vllm.config.load import LoadConfig

    return plugin.StageModelLoader(LoadConfig(load_format="glmpp", use_tqdm_on_load=False, **options))


# --- the filter ---------------------------------------------------------------------------------------------------

PATHS = st.lists(
    st.lists(st.sampled_from(["model", "layers", "vision", "1", "11", "2", "norm"]), min_size=1, max_size=3).map(".".join),
    max_size=5,
    unique=True,
)
NAMES = st.lists(
    st.lists(st.sampled_from(["model", "hf", "layers", "vision", "1", "11", "2", "norm", "weight"]), min_size=1, max_size=5),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    PATHS, NAMES, st.dictionaries(st.sampled_from(["hf.", "model.", "vision."]), st.sampled_from(["model.", "vision.", ""]))
)
def test_a_tensor_is_dropped_exactly_if_its_mapped_name_lies_under_a_missing_prefix(plugin, missing, names, prefixes):
    from vllm.model_executor.models.utils import WeightsMapper

    plain = [path for path in missing if not any(other != path and path.startswith(f"{other}.") for other in missing)]
    group = SimpleNamespace(is_first_rank=False, is_last_rank=False)
    original, selecting().get_pp_group = selecting().get_pp_group, lambda: group
    try:
        chosen = plugin.Selection(model_with(plain, mapper=WeightsMapper(orig_to_new_prefix=prefixes)), config_of())
    finally:
        selecting().get_pp_group = original

    def place(name: str) -> str:  # each prefix in turn, as vLLM documents
        for old, new in prefixes.items():
            name = new + name[len(old) :] if name.startswith(old) else name
        return name

    names = list(map(".".join, names))
    expected = [name for name in names if not any(place(name).startswith(f"{path}.") for path in plain)]
    assert [name for name in names if chosen.wants(name)] == expected
    assert chosen.filter_names(names) == expected


def test_layer_11_is_not_dropped_for_layer_1(plugin, stage_of):
    selection = plugin.Selection(model_with(["model.layers.1"], ["model.layers.11"]), config_of())
    assert not selection.wants("model.layers.1.mlp.weight") and selection.wants("model.layers.11.mlp.weight")


def with_experts(model: torch.nn.Module, path: str, held: list[int], number: int = 8) -> torch.nn.Module:
    """A module tree with a layer of experts like vLLM's under expert parallelism."""
    local = torch.full((number,), -1)
    local[held] = torch.arange(len(held))
    model.get_submodule(path).expert_map_manager = SimpleNamespace(expert_map=local)
    return model


def test_of_another_ranks_experts_the_weights_are_dropped_and_nothing_else(plugin, stage_of):
    """Layer 1 holds experts 2 and 3, layer 11 has all of its experts, layer 2 calls them otherwise."""
    held = ["model.layers.1.mlp.experts.routed", "model.layers.11.mlp.experts", "model.layers.2.mlp.ffn"]
    model = with_experts(with_experts(model_with([], held), held[0], [2, 3]), held[2], [2, 3])
    selection = plugin.Selection(model, config_of())
    names = [
        f"model.layers.{layer}.mlp.{part}"
        for layer in (1, 11, 2)
        for part in (
            *(f"experts.{number}.up_proj.{leaf}" for number in range(8) for leaf in ("weight", "weight_scale_inv")),
            "shared_experts.up_proj.weight",
            "gate.weight",
            "experts.up_proj.weight",
            "ffn.7.weight",
        )
    ]
    dropped = {f"model.layers.1.mlp.experts.{number}.up_proj.weight" for number in range(8) if number not in (2, 3)}
    assert not selection.is_whole
    assert {name for name in names if not selection.wants(name)} == dropped
    assert set(selection.filter_names(names)) == {*names} - dropped


def test_experts_are_looked_up_under_the_names_of_the_model(plugin, stage_of):
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(orig_to_new_prefix={"text.": "model."})
    model = with_experts(model_with([], ["model.1.experts"], mapper=mapper), "model.1.experts", [0])
    selection = plugin.Selection(model, config_of())
    assert selection.wants("text.1.experts.0.up.weight") and not selection.wants("text.1.experts.1.up.weight")
    assert selection.filter_names(["text.1.experts.1.up.weight", "text.2.experts.1.up.weight"]) == [
        "text.2.experts.1.up.weight"
    ]


def test_where_vllm_balances_experts_a_rank_may_need_any(plugin, stage_of, monkeypatch):
    model = with_experts(model_with([], ["model.1.experts"]), "model.1.experts", [0])
    balanced = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=True))
    monkeypatch.setattr(selecting(), "get_current_vllm_config_or_none", lambda: balanced)
    assert plugin.Selection(model, config_of()).wants("model.1.experts.1.up.weight")


def test_the_mappers_of_parts_that_load_themselves_are_applied_after_the_outer_one(plugin, stage_of):
    from vllm.model_executor.models.utils import WeightsMapper

    model = model_with(["text.model.layers.0"], mapper=WeightsMapper(orig_to_new_prefix={"language.": "text."}))
    model.text.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"blocks.": "model.layers."})
    model.text.load_weights = lambda weights: None
    selection = plugin.Selection(model, config_of())
    assert not selection.wants("language.blocks.0.weight") and selection.wants("language.blocks.1.weight")
    model.text.hf_to_vllm_mapper = None  # as many classes have it
    assert plugin.Selection(model, config_of()).wants("language.blocks.0.weight")


def test_a_name_that_the_mapper_tells_to_ignore_passes(plugin, stage_of):
    from vllm.model_executor.models.utils import WeightsMapper

    model = model_with(["model.layers.0"], mapper=WeightsMapper(orig_to_new_substr={"rotary": None}))
    assert plugin.Selection(model, config_of()).wants("model.layers.0.rotary.weight")


@pytest.mark.parametrize(("rank", "passes"), [(0, True), (1, False), (3, True)])
def test_tied_embedding_and_head_pass_where_the_stage_has_one_of_them(plugin, stage_of, rank, passes):
    stage_of(rank, 4)
    missing = [path for path, at in (("model.embed_tokens", 0), ("model.norm", 3), ("lm_head", 3)) if rank != at]
    tied = plugin.Selection(model_with([*missing, "model.layers.9"]), config_of(tie_word_embeddings=True))
    assert tied.wants("model.embed_tokens.weight") == passes and tied.wants("lm_head.weight") == passes
    assert not tied.wants("model.layers.9.mlp.weight")
    untied = plugin.Selection(model_with(missing), config_of(tie_word_embeddings=False))
    assert [untied.wants(f"{path}.weight") for path in ("model.embed_tokens", "lm_head")] == [rank == 0, rank == 3]


def test_without_placeholders_nothing_is_dropped(plugin, stage_of):
    assert plugin.Selection(model_with([], ["model.layers.0"]), config_of()).is_whole


def test_missing_prefixes_do_not_come_from_vllms_cache_by_id(plugin, stage_of):
    from vllm.model_executor.models import utils

    model = model_with(["model.layers.1"], ["model.layers.0"])
    utils._model_to_pp_missing_layer_names[id(model)] = ["model.layers.0."]
    try:
        assert selecting().missing_prefixes(model) == ["model.layers.1."]
    finally:
        del utils._model_to_pp_missing_layer_names[id(model)]


@pytest.mark.parametrize(("layers", "dropped"), [(6, True), (7, False), (0, False)])
def test_a_drafter_numbered_after_the_main_model_is_not_handed_the_main_layers(plugin, stage_of, layers, dropped):
    drafter = torch.nn.Module()
    drafter.model = torch.nn.Module()
    drafter.model.layers = torch.nn.ModuleDict({"6": torch.nn.Linear(2, 2)})
    selection = plugin.Selection(drafter, config_of(runner="draft", num_hidden_layers=layers))
    assert selection.wants("model.layers.5.mlp.weight") is not dropped
    shared = ("model.layers.6.eh_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert all(map(selection.wants, shared))
    main = plugin.Selection(drafter, config_of(num_hidden_layers=layers))
    assert main.is_whole  # the rule is for drafters only


def test_what_a_drafter_says_it_does_not_use_is_dropped(plugin, stage_of):
    drafter = model_with([], ["mtp"])
    drafter.is_unused_checkpoint_weight = lambda name: not name.startswith("mtp.")
    selection = plugin.Selection(drafter, config_of(runner="draft"))
    assert selection.filter_names(["mtp.weight", "model.layers.0.weight"]) == ["mtp.weight"] and not selection.is_whole


# --- files and readers --------------------------------------------------------------------------------------------


@pytest.fixture
def stage_1(tiny):
    stage = make_stages(tiny.config, 4)[1]
    paths = [prefix.rstrip(".") for prefix in stage.missing_prefixes()]
    model = model_with(paths, [f"model.layers.{index}" for index in stage.layers])
    wanted = [name for name in tiny if stage.owner(name) != OTHER_STAGE]  # the MTP layer passes: nobody missed it
    return model, config_of(tiny.directory), wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"safetensors_load_strategy": "eager"},
        {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
        {"model_loader_extra_config": {"reader": "runai_streamer"}},
        {"model_loader_extra_config": {"reader": "fastsafetensors"}},
    ],
    ids=lambda options: json.dumps(options),
)
def test_every_reader_hands_over_the_same_tensors_from_the_same_files(plugin, stage_of, stage_1, tiny, options):
    model, config, wanted = stage_1
    loader = loader_of(plugin, **options)
    found = {name: tensor.clone() for name, tensor in loader.get_all_weights(config, model)}
    assert found.keys() == set(wanted)
    for name, tensor in tiny.read(wanted):
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert loader.selection.handed == len(wanted) and loader.selection.offered == len(tiny)
    assert loader.selection.files == len({tiny[name].file for name in wanted})


def test_no_file_is_opened_that_holds_nothing_for_the_stage(plugin, stage_of, stage_1, tiny, monkeypatch, tmp_path):
    """One file for each layer. The MTP layer's file is opened: no placeholder says that it is missed."""
    import shutil

    folder = shutil.copytree(tiny.directory, tmp_path / "tiny")
    model, *_ = stage_1
    one_layer_each(folder, tiny)
    opened = []
    monkeypatch.setattr(plugin, "read_shard", lambda file, *rest: opened.append(file) or iter(()))
    list(loader_of(plugin).get_all_weights(config_of(folder), model))
    layers = {file.rsplit("/", 1)[1].split(".")[0] for file in opened}
    assert layers == {"layer-3", "layer-4", "layer-5", "layer-12"}


def one_layer_each(folder, checkpoint: Checkpoint) -> None:
    """Write the shards of a checkpoint folder anew: one file for each layer, one for the rest."""
    files: dict[str, dict] = {}
    for name, tensor in checkpoint.read():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "none"
        files.setdefault(f"layer-{layer}.safetensors", {})[name] = tensor.clone()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_within_a_shard_only_wanted_tensors_are_made(plugin, stage_of, stage_1, tiny, tmp_path):
    """Everything in one file and no index: the names decide."""
    tensors = {name: tensor.clone() for name, tensor in tiny.read()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, _, wanted = stage_1
    loader = loader_of(plugin)
    assert [name for name, _ in loader.get_all_weights(config_of(tmp_path), model)] == sorted(wanted)
    assert (loader.selection.offered, loader.selection.files) == (None, 1)


def test_a_name_that_the_index_does_not_list_is_still_handed_over(plugin, stage_of, stage_1, tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny.directory, tmp_path / "tiny")
    model, _, wanted = stage_1
    index = json.loads((folder / INDEX_FILE).read_text())
    lost = next(name for name in wanted if name.startswith("model.layers.4."))
    del index["weight_map"][lost]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert lost in dict(loader_of(plugin).get_all_weights(config_of(folder), model))


@pytest.mark.parametrize("change", ["none", "no index", "consolidated too", "an extra file"])
def test_files_are_located_as_the_default_loader_does(plugin, stage_of, tiny, tmp_path, change):
    import shutil

    folder = shutil.copytree(tiny.directory, tmp_path / "tiny")
    shard = sorted(folder.glob("*.safetensors"))[0]
    if change == "no index":
        (folder / INDEX_FILE).unlink()
    elif change == "consolidated too":
        shutil.copy(shard, folder / "consolidated.safetensors")
    elif change == "an extra file":
        shutil.copy(shard, folder / "training_state.safetensors")
    loader = loader_of(plugin)
    files, is_safetensors, weight_map = loader.locate(loader.Source(str(folder), None))
    _, expected, expected_safetensors, *_ = loader._prepare_weights(str(folder), None, None, True, None)
    assert (sorted(files), is_safetensors) == (sorted(expected), expected_safetensors)
    assert bool(weight_map) == (change in ("none", "an extra file"))


def test_pt_files_pass_the_filter_too(plugin, stage_of, tmp_path):
    torch.save({"model.layers.0.weight": torch.ones(2), "model.layers.1.weight": torch.ones(2)}, tmp_path / "a.bin")
    found = loader_of(plugin).get_all_weights(config_of(tmp_path), model_with(["model.layers.0"]))
    assert [name for name, _ in found] == ["model.layers.1.weight"]


def test_secondary_weights_are_asked_about_under_their_prefix(plugin, stage_of, tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        save_file(
            {"layers.0.weight": torch.ones(1), "layers.1.weight": torch.ones(1)}, tmp_path / part / "model.safetensors"
        )
    model = model_with(["audio.layers.0", "layers.1"])
    loader = loader_of(plugin)
    model.secondary_weights = [loader.Source(str(tmp_path / "b"), None, prefix="audio.")]
    found = [name for name, _ in loader.get_all_weights(config_of(tmp_path / "a"), model)]
    assert found == ["layers.0.weight", "audio.layers.1.weight"]


def test_without_pipeline_parallelism_the_default_loader_reads(plugin, stage_of, tiny, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stage_of(0, 1)
    called = []
    stock = DefaultModelLoader._get_weights_iterator
    monkeypatch.setattr(DefaultModelLoader, "_get_weights_iterator", lambda *a: called.append(1) or stock(*a))
    found = [name for name, _ in loader_of(plugin).get_all_weights(config_of(tiny.directory), model_with([], ["model"]))]
    assert called == [1]
    assert found == [
        name for file in sorted({s.file for s in tiny.values()}) for name in sorted(load_file(tiny.directory / file))
    ]


def test_an_unknown_reader_and_an_unknown_option_are_refused(plugin):
    with pytest.raises(GlmppError, match="reader 'tape' is unknown; choose one of safetensors"):
        loader_of(plugin, model_loader_extra_config={"reader": "tape"})
    with pytest.raises(ValueError, match="Unexpected extra config keys"):
        loader_of(plugin, model_loader_extra_config={"readers": "safetensors"})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([["incomplete", "warn"]], "--model-loader-extra-config is .*, expected a JSON object"),
        ("x", "expected a JSON object"),
        *(
            ({"may_stay_at_init": wrong}, r"may_stay_at_init is .*, expected a list of patterns, e\.g\. \['\*\.bias'\]")
            for wrong in ("*.bias", "*", None, 5, {"*": 1}, True, [1], ["*.bias", ""], [["*"]], [None])
        ),
        *(({"fixes": wrong}, "fix .* is unknown; there are") for wrong in (None, 5, [1], "", ["known", None], [["known"]])),
        *(({"reader": wrong}, "reader .* is unknown") for wrong in (3, None, ["safetensors"], "")),
        *(({"incomplete": wrong}, "incomplete: .* is unknown") for wrong in (None, False, ["warn"], "")),
        *(({"enable_multithread_load": wrong}, "_load is .*, expected true or false") for wrong in ("false", 0, None, [])),
        *(({"num_threads": wrong}, "num_threads=.*: expected a whole number from 1") for wrong in ("8", 0, -3, True, 1e3)),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_refused_before_anything_is_loaded(plugin, extra, said):
    with pytest.raises(GlmppError, match=said):
        loader_of(plugin, model_loader_extra_config=extra)


def test_registering_again_changes_nothing(plugin):
    from importlib.metadata import entry_points

    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "glmpp")
    register = entry.load()
    register()
    first = type(get_model_loader(LoadConfig(load_format="glmpp")))
    register()
    assert type(get_model_loader(LoadConfig(load_format="glmpp"))) is first is plugin.StageModelLoader


# --- what may stay at init ----------------------------------------------------------------------------------------


def test_a_parameter_left_at_init_is_an_error_unless_somebody_accounts_for_it(plugin, stage_of, monkeypatch):
    names = ["model.layers.4.weight", "model.layers.4.bias"]
    left, config = {name: UnloadedParam(ABSENT, "nothing") for name in names}, config_of()
    said = r"stage 1 of 4: 2 parameters .*model\.layers\.4\.bias, model\.layers\.4\.weight \(absent: nothing\)"
    with pytest.raises(GlmppError, match=said):
        loader_of(plugin).check(left, config)
    allowed = {"may_stay_at_init": ["*.bias"]}
    with pytest.raises(GlmppError, match=r"1 parameters .*: model\.layers\.4\.weight \("):
        loader_of(plugin, model_loader_extra_config=allowed).check(left, config)
    loader_of(plugin, model_loader_extra_config=allowed).check({names[1]: left[names[1]]}, config)
    loader_of(plugin).check({names[0]: UnloadedParam(EXPECTED, "made later")}, config)
    warned = []
    monkeypatch.setattr(plugin.logger, "warning", lambda form, *values: warned.append(form % values))
    loader_of(plugin, model_loader_extra_config={"incomplete": "warn"}).check(left, config)
    assert len(warned) == 1 and re.search(said, warned[0])
    with pytest.raises(GlmppError, match="incomplete: 'perhaps' is unknown; choose one of refuse, warn"):
        loader_of(plugin, model_loader_extra_config={"incomplete": "perhaps"})


class FourLayers(torch.nn.Module):
    """Stage 1 of 4, as small as it can be: layers 1 and 2 of 4, and a `load_weights` that skips what it has not."""

    def __init__(self):
        from vllm.model_executor.models.utils import PPMissingLayer

        super().__init__()
        self.layers = torch.nn.ModuleList([PPMissingLayer() if i in (0, 3) else torch.nn.Linear(2, 2) for i in range(4)])

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            if name in params:
                params[name].data.copy_(tensor)


@pytest.fixture
def four_layers(tmp_path):
    weights = {f"layers.{index}.weight": torch.ones(2, 2) for index in range(4)}
    save_file(weights | {f"layers.{index}.bias": torch.ones(2) for index in range(4)}, tmp_path / "model.safetensors")
    return config_of(tmp_path)


def load(plugin, monkeypatch, config) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    monkeypatch.setattr(DefaultModelLoader, "_init_ep_weight_filter", lambda *_: None)  # asks for a whole VllmConfig
    config.quantization, config.multimodal_config = "fp8", None
    loader_of(plugin).load_weights(FourLayers(), config)


def test_a_filter_one_layer_too_wide_is_caught_by_the_books(plugin, stage_of, monkeypatch, four_layers):
    load(plugin, monkeypatch, four_layers)
    right = selecting().missing_prefixes
    monkeypatch.setattr(selecting(), "missing_prefixes", lambda model: [*right(model), "layers.2."])
    with pytest.raises(
        GlmppError, match=r"2 parameters were left at init, or partly: layers\.2\.bias, layers\.2\.weight \(absent: "
    ):
        load(plugin, monkeypatch, four_layers)


@pytest.mark.parametrize("prefix", ["", "draft."])
def test_a_shard_counted_at_once_is_counted_like_its_tensors(plugin, stage_of, tiny, prefix):
    """The second shard comes twice, as a tensor that two shards hold does."""
    from functools import partial

    model, shards = model_with([]), [tiny.directory / file for file in sorted({spec.file for spec in tiny.values()})][:3]
    at_once, one_by_one = plugin.Selection(model, config_of()), plugin.Selection(model, config_of())
    for shard in [*shards, shards[1]]:
        pairs = list(read_shard(shard, lambda name: "layernorm" not in name, announce=partial(at_once.count, prefix=prefix)))
        assert list(one_by_one.counted((prefix + name, tensor) for name, tensor in pairs))
    assert one_by_one.twice and one_by_one.quantised
    for what in ("handed", "names", "twice", "quantised", "nbytes"):
        assert getattr(at_once, what) == getattr(one_by_one, what), what


def test_one_line_says_what_a_stage_was_handed(plugin, stage_of, monkeypatch, four_layers):
    lines = []
    monkeypatch.setattr(plugin.logger, "info", lambda form, *values: lines.append(form % values))
    load(plugin, monkeypatch, four_layers)
    (line,) = lines
    assert re.fullmatch(r"glmpp: stage 1 of 4: 4 tensors, 0\.000 GB from 1 of 1 files, \d\.\d\d s", line)


def test_padding_is_what_vllms_own_attributes_say():
    from glmpp.serving.padding import padding

    model, moe = torch.nn.Module(), torch.nn.Module()
    model.experts = moe
    moe.moe_config = SimpleNamespace(
        hidden_dim=256,
        hidden_dim_unpadded=192,
        intermediate_size_per_partition=128,
        intermediate_size_per_partition_unpadded=96,
    )
    for name, shape in {"w13_weight": (4, 256, 256), "w13_bias": (4, 256), "a_scale": (4,)}.items():
        moe.register_parameter(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    model.plain = torch.nn.Linear(4, 4, bias=False)
    model.said = torch.nn.Linear(4, 4, bias=False)
    model.said.weight.weight_loader_numel = 12
    model.mixer = torch.nn.Module()
    model.mixer.pad_size = 3
    for name, outputs in {"padded": [4, 1, 3], "whole": [4, 4]}.items():
        linear = torch.nn.Linear(2, 8, bias=False)
        linear.output_sizes = outputs
        setattr(model.mixer, name, linear)
    # Nine sixteenths of each expert's weight are filled; a scale for each expert is never padding.
    assert padding(model) == {
        "experts.w13_weight": 4 * 28672,
        "experts.w13_bias": 4 * 112,
        "said.weight": 4,
        "mixer.padded.weight": 3 * 2,
    }


def test_kv_cache_scales_and_what_a_drafter_shares_are_accounted_for(plugin, stage_of):
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    from glmpp.serving.left_at_init import accounted

    drafted = ["model.embed_tokens", "model.layers.6.shared_head.head", "model.layers.6.eh_proj"]
    model = model_with([], ["attn", "mlp", *drafted])
    model.attn.quant_method = object.__new__(BaseKVCacheMethod)
    assert list(accounted(["attn.weight", "mlp.weight"], model, config_of())) == ["attn.weight"]
    shared = [f"{path}.weight" for path in drafted]
    assert list(accounted(shared, model, config_of(runner="draft"))) == shared[:2]
    assert accounted(shared, model, config_of()) == {}


# --- the installed vLLM's own classes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny):
    return dry_run(tiny, 1, weights="real", progress=False).stages[0]


@pytest.mark.parametrize("pp_size", [2, 4, 8])
def test_every_stage_of_glm_is_bit_identical_to_pp_1(tiny, whole, pp_size):
    report = dry_run(tiny, Deployment(pp=pp_size, guard="loader"), weights="real", control=False, progress=False)
    found: dict[str, str] = {}
    for one in report.stages:
        assert one.verdict == LOADS, one.message
        assert one.patched == []
        one.ledger.check(tiny, one.stage)
        assert one.handed_over == sum(one.stage.owner(name) != OTHER_STAGE for name in tiny)
        found |= one.digests
    assert found == whole.digests


@affected
@pytest.mark.parametrize("pp_size", [2, 4, 8])
def test_the_stock_format_dies_where_this_one_loads(tiny, pp_size):
    report = dry_run(tiny, pp_size, control=False, progress=False)
    assert {one.verdict for one in report.stages} == {DIES} and {one.exception for one in report.stages} == {"KeyError"}


def test_at_full_size_every_stage_loads_and_its_ledger_closes(full):
    report = dry_run(full, Deployment(pp=8, guard="loader"), ranks=[0, 3, 7], control=False, progress=False)
    for one in report.stages:
        assert one.verdict == LOADS, one.message
        one.ledger.check(full, one.stage)


def test_without_pipeline_parallelism_it_hands_over_exactly_what_stock_does(tiny, whole):
    (one,) = dry_run(tiny, Deployment(pp=1, guard="loader"), weights="real", progress=False).stages
    assert (one.handed_over, one.order) == (whole.handed_over, whole.order)
    assert one.ledger == whole.ledger and one.digests == whole.digests


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    from models import write_model

    def checkpoint(kind: str) -> Checkpoint:
        return Checkpoint.from_directory(write_model(kind, tmp_path_factory.getbasetemp() / kind))

    return checkpoint


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3_moe", "qwen2_5_vl"])
def test_other_architectures_load_the_same_bytes_as_at_pp_1(others, kind):
    """Unquantised; with tied embeddings; experts; a multimodal wrapper whose names are mapped."""
    checkpoint = others(kind)
    (stock,) = dry_run(checkpoint, 1, weights="real", progress=False).stages
    assert stock.verdict == LOADS, stock.message
    (alone,) = dry_run(checkpoint, Deployment(pp=1, guard="loader"), weights="real", progress=False).stages
    assert (alone.order, alone.digests) == (stock.order, stock.digests)
    for pp_size in (2, 4):
        report = dry_run(checkpoint, Deployment(pp=pp_size, guard="loader"), weights="real", control=False, progress=False)
        installed = dry_run(checkpoint, pp_size, weights="real", control=False, progress=False)
        for one, other in zip(report.stages, installed.stages):
            assert one.verdict == other.verdict == LOADS, one.message
            assert one.digests == other.digests
            assert one.handed_over < other.handed_over == len(checkpoint)
        merged = {name: digest for one in report.stages for name, digest in one.digests.items()}
        assert merged == stock.digests


@pytest.fixture
def scaled(others, tmp_path):
    """A Llama in FP8 with a scale for each tensor, and scales of the KV cache: all of them without a dimension."""
    tensors = {name: tensor.clone() for name, tensor in others("llama").read()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stem = name.removesuffix(".weight")
        scale = tensors[name].abs().max().float() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{stem}.weight_scale": scale, f"{stem}.input_scale": torch.tensor(0.5)}
        if stem.endswith(("k_proj", "v_proj")):
            tensors[f"{stem}.{stem[-6]}_scale"] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    (tmp_path / "config.json").write_text(json.dumps({**others("llama").config, "quantization_config": quantization}))
    return Checkpoint.from_directory(tmp_path)


def test_scales_without_a_dimension_are_compared_like_any_other_parameter(scaled):
    (alone,) = dry_run(scaled, 1, weights="real", progress=False).stages
    assert alone.verdict == LOADS, alone.message
    scales = {f"model.layers.{layer}.self_attn.attn.{kind}_scale" for layer in range(4) for kind in "kv"}
    assert scales <= alone.digests.keys() and not scales & {*alone.ledger.left_at_init}
    report = dry_run(scaled, Deployment(pp=2, guard="loader"), weights="real", control=False, progress=False)
    assert [one.verdict for one in report.stages] == [LOADS] * 2, [one.message for one in report.stages]
    assert {name: digest for one in report.stages for name, digest in one.digests.items()} == alone.digests


def test_a_model_without_pipeline_support_is_refused_by_vllm_and_loads_alone(others):
    checkpoint = others("bert")
    report = dry_run(checkpoint, Deployment(pp=2, guard="loader"), weights="real", progress=False)
    assert {one.verdict for one in report.stages} == {CANNOT_BUILD}
    assert "Pipeline parallelism is not supported" in report.stages[0].message
    assert report.control.verdict == LOADS and report.control.handed_over == len(checkpoint)


def test_under_pp_the_drafter_on_the_last_stage_is_handed_its_own_layer_where_the_release_runs_one(tiny):
    report = dry_run(tiny, Deployment(pp=2, drafter=True, guard="loader"), control=False, progress=False)
    assert [stage.verdict for stage in report.stages] == [LOADS, LOADS]
    if tuple(map(int, vllm_version().split(".")[:2])) < (0, 32):
        assert report.drafter.verdict == CANNOT_BUILD and "Pipeline parallelism is not supported" in report.drafter.message
        return
    mtp = {name for name in tiny if name.startswith("model.layers.12.")}
    assert report.drafter.verdict == LOADS, report.drafter.unaccounted
    assert set(report.drafter.ledger.in_column(LOADED)) >= mtp
    assert report.drafter.handed_over <= len(mtp) + 3  # embedding, norm and head at most


@affected
def test_the_mtp_drafter_is_handed_its_own_layer_and_loads_the_same_as_stock(tiny):
    """At PP=1, the only size at which this release runs a drafter."""
    stock = dry_run(tiny, Deployment(pp=1, drafter=True, guard="installed"), weights="real", progress=False).drafter
    ours = dry_run(tiny, Deployment(pp=1, drafter=True, guard="loader"), weights="real", progress=False).drafter
    assert (stock.verdict, ours.verdict) == (LOADS, LOADS), ours.message
    own = [name for name in tiny if name.startswith("model.layers.12.")]
    assert (stock.handed_over, ours.handed_over) == (len(tiny), len(own) + 3)  # embedding, norm and lm_head
    assert set(ours.ledger.in_column(LOADED)) == set(stock.ledger.in_column(LOADED)) == set(own)
    assert ours.accounted == stock.accounted and len(ours.accounted) == 2
    loaded = [name for name in stock.digests if name not in stock.accounted]
    assert {name: ours.digests[name] for name in loaded} == {name: stock.digests[name] for name in loaded}


@pytest.mark.parametrize(
    ("lost", "parameter"),
    [
        ("model.layers.4.input_layernorm.weight", "model.layers.4.input_layernorm.weight"),
        ("model.layers.4.self_attn.q_a_proj.weight", "model.layers.4.self_attn.fused_qkv_a_proj.weight"),  # one half of two
        ("model.layers.4.mlp.experts.2.up_proj.weight", "model.layers.4.mlp.experts."),  # one of 12 parts
        ("model.layers.4.self_attn.indexer.wk.weight_scale_inv", "model.layers.4.self_attn.indexer.wk_weights_proj.weight"),
    ],
)
def test_a_tensor_that_is_missing_ends_the_load_with_its_parameters_name(tiny, lost, parameter):
    """vLLM's stock load says nothing: on a quantised model it does not check, and it counts half a parameter as loaded."""
    with checkpoint_without(tiny, lost) as checkpoint:
        report = dry_run(
            checkpoint, Deployment(pp=4, guard="loader"), weights="real", ranks=[0, 1], control=False, progress=False
        )
    assert report.stages[0].verdict == LOADS
    (_, one) = report.stages
    assert (one.verdict, one.exception) == (DIES, "GlmppError")
    assert "stage 1 of 4: 1 parameters were left at init, or partly" in one.message and parameter in one.message
    assert one.place.startswith("glmpp/serving/load_format.py:")
    assert one.unaccounted == [n for n in one.ledger.parameters if n in one.message]


def test_the_books_name_the_mtp_layer_and_nothing_unexpected(tiny):
    (one,) = dry_run(tiny, Deployment(pp=4, guard="loader"), ranks=[2], control=False, progress=False).stages
    assert one.ledger.counts()[UNEXPECTED] == 0
    assert set(one.ledger.in_column(SPECULATIVE)) == {name for name in tiny if name.startswith("model.layers.12.")}


# --- nothing is lost silently -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_tensor_that_is_lost_is_reported_on_its_stage_with_its_parameter(tiny, seed):
    lost = random.Random(seed).choice([name for name in tiny if not name.startswith("model.layers.12.")])
    checkpoint = Checkpoint([spec for spec in tiny.values() if spec.name != lost], tiny.config)
    report = dry_run(checkpoint, Deployment(pp=3, guard="loader"), control=False, progress=False)
    (stage,) = (stage for stage in report.stages if not stage.loads)
    assert stage.verdict == INCOMPLETE and stage.stage.owns(lost)
    (parameter,) = stage.unaccounted
    layer = re.match(r"model\.layers\.\d+\.", lost)
    assert parameter.startswith(layer[0]) if layer else parameter == lost


@pytest.mark.parametrize("seed", range(4))
def test_two_tensors_of_different_shape_that_are_swapped_are_reported_by_name(tiny, seed):
    rng = random.Random(seed)
    layer = rng.randrange(12)
    names = [name for name in tiny if name.startswith(f"model.layers.{layer}.") and tiny[name].dtype == "F8_E4M3"]
    one, other = next(pair for _ in names for pair in [rng.sample(names, 2)] if tiny[pair[0]].shape != tiny[pair[1]].shape)
    swapped = {one: tiny[other].shape, other: tiny[one].shape}
    specs = [spec._replace(shape=swapped.get(spec.name, spec.shape)) for spec in tiny.values()]
    report = dry_run(Checkpoint(specs, tiny.config), Deployment(pp=3, guard="loader"), control=False, progress=False)
    (stage,) = (stage for stage in report.stages if not stage.loads)
    assert stage.verdict == DIES and stage.tensor in swapped and stage.stage.owns(one)


def test_a_tensor_that_comes_twice_is_in_the_log_line(plugin, stage_of):
    selection = plugin.Selection(model_with([], ["a"]), config_of())
    list(selection.counted([("a.weight", torch.zeros(2)), ("b.weight", torch.zeros(2)), ("a.weight", torch.zeros(2))]))
    assert selection.twice == ["a.weight"] and "3 tensors, 1 of them twice, e.g. 'a.weight', " in f"{selection}"


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_halves_of_a_pair_that_came_alone_are_named_with_what_is_missing(plugin, stage_of, suffix):
    selection = plugin.Selection(model_with([], ["a"]), config_of())
    codes, scale = torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(1)
    whole = [("a.weight", codes), (f"a.weight{suffix}", scale), ("n.weight", torch.zeros(2))]
    list(selection.counted([*whole, ("b.weight", codes), (f"c.weight{suffix}", scale)]))
    assert selection.unpaired() == [
        "'b.weight' came, b.weight_scale_inv did not",
        f"'c.weight{suffix}' came, c.weight did not",
    ]


def test_words_of_a_checkpoint_forge_no_line_of_a_servers_log(plugin, stage_of, monkeypatch):
    name, said = "a\nINFO all is well" + "\x1b[2J" * 1000, []
    for level in ("info", "warning"):
        monkeypatch.setattr(plugin.logger, level, lambda form, *values: said.append(form % values))
    loader = loader_of(plugin, model_loader_extra_config={"fixes": "known"})
    loader.selection = selection = plugin.Selection(model_with([], ["a"]), config_of())
    codes, scale = torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(1)
    list(selection.counted([*[(f"{name}.weight", codes)] * 2, (f"{name}2.weight_scale", scale)]))
    config = config_of()
    config.architectures = [name]
    loader.fix(config)
    with pytest.raises(GlmppError) as error:
        loader.check({f"{name}.weight": UnloadedParam(ABSENT, name), f"{name}.bias": UnloadedParam(EXPECTED, name)}, config)
    said += [str(selection), *selection.unpaired(), str(error.value)]
    assert len(said) == 8 and all(line.isprintable() for line in said)
    assert max(len(line) for line in said if "as expected" not in line) < 3000


@pytest.mark.parametrize("lost", ["weight", "weight_scale_inv"])
def test_the_error_at_the_end_names_both_halves(tiny, lost):
    stem = "model.layers.4.self_attn.indexer.wk"
    with checkpoint_without(tiny, f"{stem}.{lost}") as checkpoint:
        report = dry_run(
            checkpoint, Deployment(pp=4, guard="loader"), weights="real", ranks=[1], control=False, progress=False
        )
    message = report.stages[0].message
    assert report.stages[0].exception == "GlmppError"
    assert f"{stem}.weight" in message and f"{stem}.weight_scale_inv" in message and f"{stem}.{lost} did not" in message
