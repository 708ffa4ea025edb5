# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The default loader hands a pipeline stage only what the stage can hold.

Every stage has a placeholder (``PPMissingLayer``) for what lives elsewhere. A tensor
whose name, after the model's own renaming, lies under one is not handed over;
everything else is, whatever it is called: a filter that is too wide loses weights.

Real: the loader, shards on disk, the layer split, the placeholders, the mapper.
Stubs, on the CPU: the model and the pipeline group.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm.config.load import LoadConfig
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import utils

NUM_LAYERS = 12  # so that there is a layer 11 beside layer 1
SPLITS = [(12,), (6, 6), (4, 4, 4), (2, 10)]
STAGES = [(split, rank) for split in SPLITS for rank in range(len(split))]
LAYERS = {layer: f"hf.layers.{layer}.weight" for layer in range(NUM_LAYERS)}
# The layer of an MTP drafter, a vision tower with layers of its own, a misspelling.
FOR_ALL = ["hf.layers.12.weight", "vision.layers.3.weight", "hf.layer.3.weight"]


class Model(nn.Module):
    hf_to_vllm_mapper = utils.WeightsMapper(orig_to_new_prefix={"hf.": "model."})

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.model = nn.Module()
        _, _, self.model.layers = utils.make_layers(NUM_LAYERS, lambda prefix: nn.Linear(2, 2), "model.layers")
        embedding = nn.Embedding(2, 2) if first else utils.PPMissingLayer()
        self.model.embed_tokens = embedding
        self.lm_head = nn.Linear(2, 2) if last else utils.PPMissingLayer()

    def load_weights(self, weights):
        raise NotImplementedError


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("split", "rank"), STAGES)
def test_stage_is_handed_what_it_can_hold(split, rank, tied, tmp_path, monkeypatch):
    first, last = rank == 0, rank == len(split) - 1
    group = SimpleNamespace(
        rank_in_group=rank,
        world_size=len(split),
        is_first_rank=first,
        is_last_rank=last,
    )
    monkeypatch.setattr(parallel_state, "_PP", group)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, split)))
    names = [*LAYERS.values(), *FOR_ALL, "hf.embed_tokens.weight"]
    names += [] if tied else ["lm_head.weight"]
    for shard in range(3):
        part = {name: torch.zeros(2, 2) for name in names[shard::3]}
        save_file(part, tmp_path / f"model-{shard}.safetensors")
    text = SimpleNamespace(num_hidden_layers=NUM_LAYERS, tie_word_embeddings=tied)
    config = SimpleNamespace(model=str(tmp_path), revision=None, runner_type="generate", hf_text_config=text)
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))

    handed = [name for name, _ in loader.get_all_weights(config, Model(first, last))]

    own = range(sum(split[:rank]), sum(split[: rank + 1]))
    expected = {LAYERS[layer] for layer in own} | set(FOR_ALL)
    if first or (last and tied):  # a head may be loaded from the embedding
        expected.add("hf.embed_tokens.weight")
    if last and not tied:
        expected.add("lm_head.weight")
    assert sorted(handed) == sorted(expected)
