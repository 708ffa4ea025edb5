"""Layers to stages, tensors to owners. Agreement with the installed vLLM is in test_vllm_partition.py."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.deployment import Deployment
from glmpp.errors import GlmppError
from glmpp.formats.index import natural_key
from glmpp.formats.tensor import TensorSpec
from glmpp.layouts.layer_list import layer_list
from glmpp.layouts.split import balance, balance_cache, best_split
from glmpp.partition import (
    OTHER_STAGE,
    OWN,
    SPECULATIVE,
    UNKNOWN,
    PrefixSet,
    Stage,
    make_stages,
    partition_layers,
    stage_bytes,
)


def counts(ranges: list[range]) -> list[int]:
    return [len(layers) for layers in ranges]


def test_78_layers_over_8_stages_put_the_remainder_in_the_middle():
    assert counts(partition_layers(78, 8)) == [9, 10, 10, 10, 10, 10, 10, 9]


@given(st.integers(1, 300), st.integers(1, 64))
def test_every_layer_is_held_once_and_in_order(num_layers, pp_size):
    ranges = partition_layers(num_layers, pp_size)
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))
    assert max(counts(ranges)) - min(counts(ranges)) <= 1


def test_layer_counts_as_list_and_string_agree():
    expected = partition_layers(12, 3, [2, 4, 6])
    assert counts(expected) == [2, 4, 6]
    assert partition_layers(12, 3, "2,4, 6") == expected
    assert counts(partition_layers(12, 3, [0, 12, 0])) == [0, 12, 0]  # vLLM allows it


@pytest.mark.parametrize("value", ["2,4,6", "1,2", "no numbers"])
def test_no_function_reads_the_variable(value, monkeypatch, tiny_config):
    """What a function says must not depend on where it is called; the command alone reads the variable."""
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", value)
    assert counts(partition_layers(12, 3)) == [4, 4, 4]
    assert [len(stage.layers) for stage in make_stages(tiny_config, 3)] == [4, 4, 4]
    assert Deployment(pp=3).layer_counts is None and Deployment(pp=3, layer_counts="2,4,6").partition == "2,4,6"
    assert [len(stage.layers) for stage in Deployment(pp=4).stages(tiny_config)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("6,6", "names 2 stages, there are 3"),
        ("4,4,5", "adds up to 13 layers, the model has 12"),
        ("4,four,4", "expected 3 numbers"),
        ("", "expected 3 numbers"),
        ("6,,6", "expected 3 numbers"),
        ([4, 4.5, 3.5], "expected 3 numbers"),
        ([4, None, 8], "expected 3 numbers"),
        ([True, 5, 6], "expected 3 numbers"),
        ([4, "4", 4], "expected 3 numbers"),
        (12, "expected 3 numbers"),
        ([], "names 0 stages, there are 3"),
        ("-2,7,7", "gives stage 0 -2 layers: a stage has 0 or more"),
        ([7, 7, -2], "gives stage 2 -2 layers"),
    ],
)
def test_bad_layer_counts_are_clear_errors(value, message):
    with pytest.raises(GlmppError, match=message):
        partition_layers(12, 3, value)
    with pytest.raises(GlmppError, match=message):
        Deployment(3, layer_counts=value).stages({"num_hidden_layers": 12})


@given(st.lists(st.integers(-3, 20), max_size=6), st.integers(1, 6), st.integers(1, 30))
def test_layer_counts_are_right_or_wrong_in_one_way_that_is_named(layer_counts, pp_size, num_layers):
    if len(layer_counts) != pp_size:
        words = f"names {len(layer_counts)} stages, there are {pp_size}"
    elif any(count < 0 for count in layer_counts):
        words = "a stage has 0 or more"
    elif sum(layer_counts) != num_layers:
        words = f"adds up to {sum(layer_counts)} layers, the model has {num_layers}"
    else:
        assert counts(partition_layers(num_layers, pp_size, layer_counts)) == layer_counts
        return
    with pytest.raises(GlmppError) as raised:
        partition_layers(num_layers, pp_size, layer_counts)
    assert words in str(raised.value)


@pytest.mark.parametrize(("num_layers", "pp_size"), [(0, 1), (1, 0), (4, -1)])
def test_nothing_to_split_is_an_error(num_layers, pp_size):
    with pytest.raises(GlmppError, match="expected a whole number from 1"):
        partition_layers(num_layers, pp_size)


def test_more_stages_than_layers_is_an_error_for_stages(tiny_config):
    with pytest.raises(GlmppError, match="13 stages for 12 layers"):
        make_stages(tiny_config, 13)


def test_stage_with_layer_1_does_not_own_layer_11():
    stage = Stage(rank=0, size=2, layers=range(0, 2), num_layers=12)
    assert stage.owns("model.layers.1.self_attn.indexer.wk.weight")
    assert not stage.owns("model.layers.11.self_attn.indexer.wk.weight")


def test_a_missing_layer_1_does_not_hide_layer_11():
    stage = Stage(rank=1, size=2, layers=range(2, 12), num_layers=12)
    missing = tuple(stage.missing_prefixes())
    assert "model.layers.1.mlp.gate.weight".startswith(missing)
    assert not "model.layers.11.mlp.gate.weight".startswith(missing)
    assert all(prefix.endswith(".") for prefix in missing)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 2))
def test_every_tensor_of_the_model_has_an_owner(num_layers, pp_size, tied, drafter, num_nextn):
    config = {"num_hidden_layers": num_layers, "num_nextn_predict_layers": num_nextn, "tie_word_embeddings": tied}
    if pp_size > num_layers:
        return
    stages = make_stages(config, pp_size, drafter=drafter)
    owners = lambda name: [stage.rank for stage in stages if stage.owns(name)]  # noqa: E731
    for layer in range(num_layers):
        assert len(owners(f"model.layers.{layer}.x.weight")) == 1
    for layer in range(num_layers, num_layers + num_nextn):
        assert owners(f"model.layers.{layer}.x.weight") == ([pp_size - 1] if drafter else [])
    assert owners("model.norm.weight") == owners("lm_head.weight") == [pp_size - 1]
    assert owners("model.embed_tokens.weight") == sorted({0, pp_size - 1} if tied else {0})


@given(st.integers(1, 30), st.data())
def test_missing_prefixes_and_ownership_say_the_same(num_layers, data):
    pp_size = data.draw(st.integers(1, num_layers))
    tied = data.draw(st.booleans())
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{layer}.x.weight" for layer in range(num_layers)]
    for stage in make_stages({"num_hidden_layers": num_layers, "tie_word_embeddings": tied}, pp_size):
        missing = tuple(stage.missing_prefixes())
        assert all(name.startswith(missing) == (not stage.owns(name)) for name in names)


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [
        ("transformer.h", ["transformer.wte"], ["transformer.ln_f", "lm_head"]),
        ("gpt_neox.layers", ["gpt_neox.embed_in"], ["gpt_neox.final_layer_norm", "embed_out"]),
        ("backbone.layers", ["backbone.embeddings"], ["backbone.norm_f", "lm_head"]),
        ("language_model.model.layers", ["language_model.model.embed_tokens"], ["language_model.lm_head"]),
        ("model.layers", ["model.embed_tokens"], ["model.norm", "lm_head"]),
    ],
)
def test_what_a_stage_misses_is_called_as_in_the_checkpoint(layers, first, last):
    names = [f"{part}.weight" for part in ["vision.patch", *last, *first]] + [f"{layers}.{n}.x.weight" for n in range(4)]
    for tied in (False, True):
        for stage in make_stages({"num_hidden_layers": 4, "tie_word_embeddings": tied}, 2, layer_list=layers):
            missing = stage.missing_prefixes(names)
            assert all(name.startswith(tuple(missing)) == (stage.owner(name) == OTHER_STAGE) for name in names)
            assert [name for name in names if stage.owner(name) == UNKNOWN] == ["vision.patch.weight"]
    assert missing == [f"{layers}.0.", f"{layers}.1."]  # of the last stage of a tied model
    untied = make_stages({"num_hidden_layers": 4}, 2, layer_list=layers)
    ours = [f"{layers}.2.", f"{layers}.3.", *(f"{part}." for part in last)]
    assert untied[0].missing_prefixes(names) == ours  # in module order
    known = ours if layers == "model.layers" else ours[:2]
    assert untied[0].missing_prefixes() == known  # nothing is called by a name that nobody has seen


PARTS = st.sampled_from(["model", "language", "language_model", "text", "transformer", "backbone", "decoder", "llm", "h"])
TOWER = st.sampled_from(["vision", "visual", "vision_tower", "vision_model", "audio", "audio_tower", "image_encoder"])


@given(st.data())
def test_the_list_of_layers_is_the_language_models_whatever_lies_beside_it(data):
    num_layers, mtp = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 2))
    path = ".".join([*data.draw(st.lists(PARTS, max_size=3)), data.draw(st.sampled_from(["layers", "blocks", "h"]))])
    held = num_layers + mtp * data.draw(st.booleans())
    lists = {path: held}
    for _ in range(data.draw(st.integers(0, 3))):
        tower = [*data.draw(st.lists(PARTS, max_size=1)), data.draw(TOWER), data.draw(st.sampled_from(["blocks", "layers"]))]
        lists[".".join(tower)] = data.draw(st.integers(1, 40) | st.just(num_layers))
    if data.draw(st.booleans()):  # something that holds more layers than the config says
        lists["q.b"] = num_layers + mtp + data.draw(st.integers(1, 9))
    config = {"num_hidden_layers": num_layers, "num_nextn_predict_layers": mtp}
    if data.draw(st.booleans()):  # a tower under a name that says nothing: the config tells it, or its number of layers
        depth = data.draw(st.integers(1, 40))
        if depth not in (num_layers, num_layers + mtp):
            lists["t.b"] = depth
        lists["sonar.b"] = data.draw(st.integers(1, 40))
        config = {"text_config": config, "vision_config": {"depth": depth}, "sonar_config": {"num_layers": 5}}
    names = [f"{name}.{n}.w" for name, count in lists.items() for n in range(count)]
    checkpoint = Checkpoint([TensorSpec(name, "U8", (1,)) for name in data.draw(st.permutations(names))], config)
    assert layer_list(checkpoint) == path


def test_a_config_may_say_more_layers_than_there_are():
    specs = [TensorSpec("model.layers.0.w", "U8", (1,)), TensorSpec("h.5.w", "U8", (1,))]
    assert layer_list(Checkpoint(specs, {"n_layer": 1, "num_nextn_predict_layers": 1000})) == "model.layers"
    with pytest.raises(GlmppError, match="no list of layers"):
        layer_list(Checkpoint(specs, {"n_layer": 1000}))


@pytest.mark.parametrize(
    ("language", "other"),
    [
        ("language_model.model.layers", "qformer.encoder.layer"),
        ("language_model.layers", "model.resampler.layers"),
        ("thinker.model.layers", "codec.layers"),
        ("transformer.text_model.layers", "clip.blocks"),
        ("model.decoder.layers", "model.encoder.layers"),
        ("model.layers", "text.b"),
        ("encoder.layer", None),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_of_lists_as_long_as_each_other_the_language_models_is_told_by_its_name(language, other, first):
    names = [name for name in (language, other) if name]
    specs = [TensorSpec(f"{name}.{n}.w", "U8", (1,)) for name in names[:: 1 - 2 * first] for n in range(6)]
    assert layer_list(Checkpoint(specs, {"n_layer": 6})) == language


def test_two_lists_that_nothing_tells_apart_are_an_error():
    specs = [TensorSpec(f"{name}.{n}.w", "U8", (1,)) for name in ("one.b", "two.b") for n in range(6)]
    with pytest.raises(GlmppError, match=r"'(one|two)\.b' and '(one|two)\.b' both hold 6 layers"):
        layer_list(Checkpoint(specs, {"n_layer": 6}))


def test_more_layers_than_the_config_says_are_taken_only_from_what_is_no_tower():
    def of(lists: dict[str, int], **config) -> str:
        names = [f"{name}.{n}.w" for name, count in lists.items() for n in range(count)]
        return layer_list(Checkpoint([TensorSpec(name, "U8", (1,)) for name in names], {"n_layer": 12, **config}))

    assert of({"language.model.layers": 13, "eyes.b": 27}, vision_config={"depth": 27}) == "language.model.layers"
    assert of({"model.layers": 13, "h": 14}) == "model.layers"
    with pytest.raises(GlmppError, match="no list of layers"):
        of({"vision.blocks": 27, "visual_encoder.layers": 12})


def test_columns_of_a_middle_stage():
    stage = Stage(rank=1, size=3, layers=range(4, 8), num_layers=12, num_nextn=1)
    assert stage.owner("model.layers.5.mlp.gate.weight") == OWN
    assert stage.owner("model.layers.3.mlp.gate.weight") == OTHER_STAGE
    assert stage.owner("lm_head.weight") == OTHER_STAGE
    assert stage.owner("model.layers.12.eh_proj.weight") == SPECULATIVE
    assert stage.owner("model.layers.13.eh_proj.weight") == UNKNOWN
    assert stage.owner("visual.patch_embed.weight") == UNKNOWN


@pytest.mark.parametrize("drafter", [False, True])
@pytest.mark.parametrize("pp_size", [1, 4, 8])
def test_stage_bytes_add_up_to_the_checkpoint(full, pp_size, drafter):
    stages = make_stages(full.config, pp_size, drafter=drafter)
    mtp = sum(spec.nbytes for name, spec in full.items() if name.startswith("model.layers.78."))
    assert sum(stage_bytes(full, stages)) == full.nbytes - (0 if drafter else mtp)
    assert stage_bytes(full, stages) == [
        sum(spec.nbytes for spec in full.values() if stage.owns(spec.name)) for stage in stages
    ]


@given(st.data())
def test_balance_equals_brute_force(data):
    num_layers = data.draw(st.integers(1, 9))
    pp_size = data.draw(st.integers(1, num_layers))
    size = st.integers(1, 50)
    specs = [TensorSpec(f"model.layers.{n}.w.weight", "U8", (data.draw(size),)) for n in range(num_layers)]
    specs.append(TensorSpec(f"model.layers.{num_layers}.w.weight", "U8", (data.draw(size),)))
    specs.append(TensorSpec("model.embed_tokens.weight", "U8", (data.draw(size),)))
    tied, drafter = data.draw(st.booleans()), data.draw(st.booleans())
    if not tied:
        specs.append(TensorSpec("lm_head.weight", "U8", (data.draw(size),)))
    config = {"num_hidden_layers": num_layers, "num_nextn_predict_layers": 1, "tie_word_embeddings": tied}
    checkpoint = Checkpoint(specs, config)

    def largest(split: list[int]) -> int:
        return max(stage_bytes(checkpoint, make_stages(config, pp_size, split, drafter)))

    cuts = combinations(range(1, num_layers), pp_size - 1)
    splits = [[b - a for a, b in zip((0, *cut), (*cut, num_layers))] for cut in cuts]
    found = balance(checkpoint, pp_size, drafter)
    assert sum(found) == num_layers and min(found) >= 1
    assert largest(found) == min(map(largest, splits))


def test_balance_of_glm_5_1_cuts_the_largest_stage_at_pp_4(full):
    default = max(stage_bytes(full, make_stages(full.config, 4)))
    balanced = max(stage_bytes(full, make_stages(full.config, 4, balance(full, 4))))
    assert balanced < 0.97 * default


@given(st.lists(st.integers(0, 9) | st.integers(0, 10**12), min_size=1, max_size=9), st.data())
def test_the_best_split_is_the_first_of_those_with_the_least_sum_of_squares(sizes, data):
    pp_size = data.draw(st.integers(1, len(sizes)))
    splits = []
    for cut in combinations(range(1, len(sizes)), pp_size - 1):
        ends = list(pairwise((0, *cut, len(sizes))))
        stages = [sum(sizes[start:stop]) for start, stop in ends]
        splits.append((max(stages), sum(size**2 for size in stages), [stop - start for start, stop in ends]))
    assert best_split(len(sizes), pp_size, lambda start, stop: sum(sizes[start:stop])) == min(splits)[2]


@pytest.mark.parametrize("pp_size", [8, 333, 1000])
@pytest.mark.parametrize("giant", [1, 10**6])
def test_a_thousand_layers_are_split_in_seconds(pp_size, giant):
    """Every stage and cut tried, as it once was, is half a billion steps for 1,000 stages."""
    sizes, asked = [100 + number % 7 for number in range(999)] + [giant], []
    below = [0, *accumulate(sizes)]

    def cost(start: int, stop: int) -> int:
        asked.append(None)
        return below[stop] - below[start]

    counts = best_split(1000, pp_size, cost)
    assert len(counts) == pp_size and sum(counts) == 1000 and min(counts) >= 1 and len(asked) < 5_000_000


def test_a_number_of_thousands_of_digits_in_a_name_is_no_layer():
    names = ["model.layers.0.w", f"model.layers.{'9' * 5000}.w", f"model.layers.0.mlp.experts.{'1' * 5000}.w"]
    checkpoint = Checkpoint([TensorSpec(name, "U8", (1,)) for name in names], {"n_layer": 1})
    (stage,) = make_stages(checkpoint.config, 1, layer_list=layer_list(checkpoint))
    assert [stage.owner(name) for name in names] == [OWN, UNKNOWN, OWN]
    assert natural_key(f"a-{'9' * 5000}") > natural_key("a-2")


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "ab", "b", "1", "11"]), min_size=1, max_size=4).map(lambda p: ".".join(p) + ".")
    ),
    st.lists(st.lists(st.sampled_from(["a", "ab", "b", "1", "11", "z"]), min_size=1, max_size=5).map(".".join)),
)
def test_prefixes_cover_what_startswith_says(prefixes, names):
    asked = PrefixSet(prefixes)
    covered = [name for name in names if name.startswith(tuple(prefixes))]
    assert [name for name in names if asked.cover(name)] == covered
    assert asked.split(names) == (sorted(name for name in names if name not in covered), sorted(covered))


@given(st.data())
def test_the_split_that_leaves_most_tokens_equals_brute_force(data):
    num_layers = data.draw(st.integers(1, 8))
    pp_size = data.draw(st.integers(1, num_layers))
    weights = data.draw(st.lists(st.integers(1, 30), min_size=num_layers, max_size=num_layers))
    caches = data.draw(st.lists(st.integers(1, 4), min_size=num_layers, max_size=num_layers))
    first, last, room = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)), data.draw(st.integers(1, 200))

    def tokens(split: list[int]) -> Fraction:
        """Of the stage with the least room; nothing if one has none."""
        layers = list(range(num_layers))
        least = None
        for rank, count in enumerate(split):
            stage, layers = layers[:count], layers[count:]
            held = sum(weights[n] for n in stage) + (first if rank == 0 else 0) + (last if rank == pp_size - 1 else 0)
            here = Fraction(max(0, room - held), sum(caches[n] for n in stage))
            least = here if least is None else min(least, here)
        return least

    cuts = combinations(range(1, num_layers), pp_size - 1)
    most = max(tokens([b - a for a, b in zip((0, *cut), (*cut, num_layers))]) for cut in cuts)
    found = balance_cache(weights, caches, pp_size, room, first, last)
    if most == 0:
        assert found is None
    else:
        assert sum(found) == num_layers and min(found) >= 1
        assert float(tokens(found)) == pytest.approx(float(most))
