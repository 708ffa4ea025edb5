"""A load that ends well and is not complete: each kind found, named, and proven on the bytes, by dry run and load format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import silent
from sweep.same_bytes import EQUAL, compare_case

from glmpp.checkpoint import Checkpoint
from glmpp.cli.report_text import as_text, evidence_lines
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.stage_report import CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.ledger import ABSENT, EXPECTED, LOST, UNTIED, UnloadedParam
from glmpp.synthetic import checkpoint_without

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LAYER = "model.layers.1"
NO_FAULT = ("none", "none, by an index")
# Fault -> what is left, its kind, the tensor that it should have come from.
FOUND = {
    "a suffix that an ignore list swallows": (f"{LAYER}.gate.score_bias", LOST, f"{LAYER}.gate.score_bias"),
    "a renamed parameter": (f"{LAYER}.mix.weight", LOST, f"{LAYER}.mixer.weight"),
    "a tie that is not made": ("lm_head.weight", UNTIED, "model.embed_tokens.weight"),
    "a shard of a fused parameter never comes": (f"{LAYER}.qk.weight", ABSENT, None),
    "an expert's scale is absent": (f"{LAYER}.experts.scale", ABSENT, None),
    "a tensor is written to the wrong shard": (f"{LAYER}.qk.weight", LOST, None),
    "a buffer that nobody loads": (f"{LAYER}.gate.shift", LOST, f"{LAYER}.gate.shift"),
    "a scale is dropped and its weight is not": (f"{LAYER}.mix.weight_scale", LOST, f"{LAYER}.mix.weight_scale"),
    "a weight is dropped and its scale is not": (f"{LAYER}.mix.weight", LOST, f"{LAYER}.mix.weight"),
    "an index leaves out a row": (f"{LAYER}.qk.weight", ABSENT, None),
    "half of a pair never comes": (f"{LAYER}.lowered.weight", LOST, f"{LAYER}.low.weight"),
}


def run(fault: str, folder, pp: int, **options):
    guard = options.pop("guard", "installed")
    checkpoint = Checkpoint.from_directory(silent.write_silent(fault, folder / f"{pp}-{len(options)}-{guard}"))
    return checkpoint, dry_run(checkpoint, Deployment(pp, guard=guard, gpu="cpu"), progress=False, **options)


def test_every_fault_is_tried():
    assert FOUND.keys() == silent.FAULTS.keys() - {*NO_FAULT}


@pytest.mark.parametrize("guard", ["installed", "loader"])
@pytest.mark.parametrize("weights", ["meta", "real"])
@pytest.mark.parametrize("fault", NO_FAULT)
@pytest.mark.parametrize("pp", [1, 2])
def test_a_model_without_a_fault_loads_completely(tmp_path, pp, fault, weights, guard):
    checkpoint, report = run(fault, tmp_path, pp, weights=weights, guard=guard)
    assert report.loads and all(stage.left == {} and stage.dropped == [] for stage in report.stages)
    # Of an index without data nobody knows where it writes.
    again = [stage.device for stage in report.stages] if weights == "meta" else []
    assert again == (["cpu" if "index" in fault else "meta", "meta"][:pp] if again else [])
    assert as_text(checkpoint, report).endswith(f"PP={pp}: loads, complete")


@pytest.mark.parametrize("fault", FOUND)
def test_what_a_silent_load_leaves_is_named_with_its_kind_at_every_pipeline_size(tmp_path, fault):
    name, kind, tensor = FOUND[fault]
    for pp in (1, 2):
        checkpoint, report = run(fault, tmp_path, pp)
        (stage,) = (stage for stage in report.stages if not stage.loads)
        assert stage.verdict == INCOMPLETE and stage.stage.rank == (pp - 1 if kind == UNTIED else 0)
        assert {left: one.kind for left, one in stage.left.items()} == {name: kind}
        assert stage.left[name].tensor == tensor and stage.data == "the checkpoint's"  # it was tried again with its bytes
        assert stage.dropped == ([tensor] if kind == LOST and tensor else [])
        text = as_text(checkpoint, report)
        said = "written in part" if stage.is_partly_written(name) else "left at init"
        assert f"    {said}: {name}\n        {kind}: " in text and "loads, and is not complete" in text


@pytest.mark.parametrize("fault", FOUND)
def test_the_bytes_prove_it(tmp_path, fault):
    """Each tensor of the file is filled with a number of its own."""
    name, kind, tensor = FOUND[fault]
    _, report = run(fault, tmp_path, 1, weights="real")
    one = report.stages[0].left[name]
    assert one.kind == kind and one.tensor == tensor
    assert one.in_file == (None if tensor is None else f"{silent.tensors()[silent_name(fault, tensor)].view(-1)[0]:g}")
    assert one.in_model != one.in_file if tensor else one.in_model is None


def silent_name(fault: str, tensor: str) -> str:
    """What a tensor of the checkpoint is called where nothing is renamed."""
    return next((old for old, new in silent.FAULTS[fault].items() if new == tensor), tensor)


@pytest.mark.parametrize("fault", FOUND)
def test_the_load_format_ends_the_load_in_the_same_words(tmp_path, fault):
    name, kind, tensor = FOUND[fault]
    _, report = run(fault, tmp_path, 2, weights="real", guard="loader", control=False)
    (stage,) = (stage for stage in report.stages if not stage.loads)
    assert (stage.verdict, stage.exception) == (DIES, "GlmppError")
    assert f"1 parameters were left at init, or partly: {name} ({kind}: " in stage.message
    assert tensor is None or kind == UNTIED or repr(tensor) in stage.message


def test_where_data_cannot_be_made_up_an_index_leaves_the_verdict_open(tmp_path):
    checkpoint = Checkpoint.from_directory(silent.write_silent("none, by an index", tmp_path / "small"))
    specs = [checkpoint["lm_head.weight"]._replace(name=f"unused.{n}", shape=(2**28,)) for n in range(2)]
    large = Checkpoint([*checkpoint.values(), *specs], checkpoint.config)  # 2.1 GB
    (stage,) = dry_run(large, Deployment(1, gpu="cpu"), control=False, progress=False).stages
    assert (stage.verdict, stage.device, stage.left) == (CANNOT_TELL, "meta", {})
    assert evidence_lines(stage) == [f"    written at places that only data would tell: {LAYER}.qk.weight"]


PAIR = ("layers.0.mix.weight", "layers.0.mix.weight_scale")


@pytest.mark.parametrize("order", [PAIR, PAIR[::-1]], ids=["weight first", "scale first"])
@pytest.mark.parametrize(
    ("parameters", "into", "is_kept"),
    [
        # The pair is stored as one: under another name, or in the place of the weight.
        ({"fused.weight": (8, 4)}, "fused.weight", True),
        ({"mix.weight": (8, 4)}, "mix.weight", True),
        ({"fused.weight": (8, 4), "norm.scale": (2, 1)}, "fused.weight", True),
        # Each has a parameter of its own, and of the first half nothing is stored.
        ({"mix.weight": (8, 4), "mix.weight_scale": (2, 1)}, None, False),
        ({"fused.weight": (16, 4), "fused.weight_scale": (4, 1)}, None, False),
        ({"fused.weight": (16, 4), "fused.scale": (4, 1)}, None, False),
    ],
)
def test_what_the_second_half_of_a_pair_writes_is_the_firsts_only_if_the_pair_is_stored_as_one(
    order, parameters, into, is_kept
):
    torch = pytest.importorskip("torch")
    from glmpp.serving.dropped import dropped
    from glmpp.serving.write_tracking import WriteRecorder

    model, layer = torch.nn.Module(), torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    for name, shape in parameters.items():
        path, leaf = name.split(".")
        if not hasattr(layer, path):
            layer.add_module(path, torch.nn.Module())
        getattr(layer, path).register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    tensors = {PAIR[0]: torch.ones(8, 4), PAIR[1]: torch.ones(2, 1)}
    with WriteRecorder(model) as recorder:
        for name, tensor in recorder.hand_over((name, tensors[name]) for name in order):
            if name == order[1]:
                suffix = "scale" if name == PAIR[1] else "weight"
                place = into or next(one for one in parameters if one.endswith(suffix))
                model.get_parameter(f"layers.0.{place}").data[: len(tensor) if into is None else 8].fill_(1.0)
    lost = {} if is_kept else {order[0]: tensors[order[0]].shape}
    assert dropped(recorder, model) == lost


def test_a_half_that_comes_after_the_other_was_stored_was_not_waited_for(small):
    torch = pytest.importorskip("torch")
    from glmpp.serving.dropped import dropped
    from glmpp.serving.write_tracking import WriteRecorder

    small.layers[0]["fused"] = torch.nn.Linear(4, 8, bias=False)
    weights = [("layers.0.low.weight", torch.ones(8, 4)), ("layers.0.low.weight_scale", torch.ones(1))]
    with WriteRecorder(small) as recorder:
        for name, tensor in recorder.hand_over(weights):
            if name == "layers.0.low.weight":
                small.layers[0]["fused"].weight.data.copy_(tensor)
    assert dropped(recorder, small) == {"layers.0.low.weight_scale": (1,)}


@pytest.fixture
def small():
    """A model of two layers, each with a norm and a matrix."""
    torch = pytest.importorskip("torch")
    layers = [torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4, bias=False), "mix": torch.nn.Linear(4, 8, bias=False)})]
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    return model


CONFIG = SimpleNamespace(runner_type="generate", hf_text_config=SimpleNamespace(tie_word_embeddings=False))


def test_a_dropped_tensor_is_taken_for_a_parameter_of_its_layer_and_shape_only(small):
    from glmpp.serving.unloaded import losses

    def kind(dropped: dict[str, tuple[int, ...]]) -> tuple[str, str | None]:
        one = losses(["layers.0.mix.weight"], small, CONFIG, dropped, set())["layers.0.mix.weight"]
        return one.kind, one.tensor

    assert kind({"layers.0.mixer.weight": (8, 4)}) == (LOST, "layers.0.mixer.weight")
    assert kind({"layers.0.other.weight": (8, 4), "layers.0.mixer.weight": (8, 4)}) == (LOST, "layers.0.mixer.weight")
    assert kind({"layers.1.mix.weight": (8, 4)}) == kind({"mix.weight": (8, 4)}) == (ABSENT, None)
    assert kind({"visual.blocks.0.mix.weight": (8, 4)}) == (ABSENT, None)  # another list of layers
    assert kind({"layers.0.mixer.weight": (7, 4)}) == kind({"layers.0.mixer.weight": (8,)}) == (ABSENT, None)


def test_a_finding_that_the_bytes_do_not_confirm_is_none(small, tmp_path):
    """The model has the tensor's bytes, whichever way they came."""
    from safetensors.torch import save_file

    from glmpp.serving.unloaded import confirmed

    name, weight = "layers.0.mix.weight", small.layers[0]["mix"].weight.detach()
    (tmp_path / "config.json").write_text("{}")
    save_file({"same": weight.clone(), "part": weight[4:].clone(), "other": weight + 1}, tmp_path / "model.safetensors")
    kinds = {
        source: confirmed({name: UnloadedParam(LOST, "", source)}, small, str(tmp_path), {})[name].kind
        for source in ("same", "part", "other")
    }
    assert kinds == {"same": EXPECTED, "part": EXPECTED, "other": LOST}


def test_what_is_shown_is_where_they_differ_first(small, tmp_path):
    """A row that pads a vocabulary is zero in both."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from glmpp.serving.unloaded import confirmed

    name, weight = "layers.0.mix.weight", small.layers[0]["mix"].weight
    weight.data = torch.zeros(8, 4)
    stored = torch.zeros(8, 4)
    stored[1, 2] = 7.0
    (tmp_path / "config.json").write_text("{}")
    save_file({"mixer": stored}, tmp_path / "model.safetensors")
    one = confirmed({name: UnloadedParam(LOST, "", "mixer")}, small, str(tmp_path), {})[name]
    assert (one.in_file, one.in_model) == ("7", "0")


def test_forty_three_scales_that_a_repack_lost_do_not_come_up_green(tiny):
    """vLLM says nothing: by default it checks no quantised model after loading."""
    scales = [
        name
        for name in tiny
        if name.endswith("_scale_inv") and ".indexer." not in name and not name.startswith("model.layers.12.")
    ]
    with checkpoint_without(tiny, *scales[:: len(scales) // 43][:43]) as checkpoint:
        assert len(tiny) - len(checkpoint) == 43
        stock = dry_run(checkpoint, 1, weights="real", progress=False).stages[0]
        ours = dry_run(checkpoint, Deployment(1, guard="loader"), weights="real", progress=False).stages[0]
    assert stock.verdict == INCOMPLETE and stock.failures == []
    assert {one.kind for one in stock.left.values() if one.kind != EXPECTED} == {ABSENT}
    assert ours.verdict == DIES and ours.unaccounted == stock.unaccounted
    assert f"{len(stock.unaccounted)} parameters were left at init" in ours.message  # a report keeps its beginning
    assert dry_run(tiny, 1, weights="real", progress=False).stages[0].verdict == LOADS


def test_a_tower_that_a_stage_has_no_use_for_is_not_asked_for_bytes():
    """Its bare parameters vLLM (not yet 0.22.1) leaves without data: BLIP-2's query tokens, on the second of two stages."""
    assert compare_case("Blip2ForConditionalGeneration", "plain", "h100").outcome == EQUAL


def test_a_model_that_comes_without_a_config_is_loaded_all_the_same(monkeypatch, tmp_path):
    """Mistral's own format has params.json; whether the head should be tied is then not known here."""
    import torch

    from glmpp.serving import dropped

    weight = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(dropped, "vocabularies", lambda model: {"model.embed_tokens": weight, "lm_head": weight})
    config = SimpleNamespace(model=str(tmp_path), revision=None)
    assert dropped.dropped_heads((), None, torch.nn.Module(), config) == {}
