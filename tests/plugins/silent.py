"""A vLLM plugin with a small model that loads, says nothing, and has one parameter that nobody wrote; see `write_silent`.

It is found as faulty.py is.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from faulty import config_of

# Fault -> tensors of layer 1 that the checkpoint does not have as the model would like them: old name -> new name, or None.
FAULTS: dict[str, dict[str, str | None]] = {
    "none": {},
    "none, by an index": {},
    "a suffix that an ignore list swallows": {},
    "a renamed parameter": {"model.layers.1.mix.weight": "model.layers.1.mixer.weight"},
    "a tie that is not made": {"lm_head.weight": None},
    "a shard of a fused parameter never comes": {"model.layers.1.k.weight": None},
    "an expert's scale is absent": {"model.layers.1.experts.2.scale": None},
    "a tensor is written to the wrong shard": {},
    "a buffer that nobody loads": {},
    "a scale is dropped and its weight is not": {},
    "a weight is dropped and its scale is not": {},
    "an index leaves out a row": {},
    "half of a pair never comes": {"model.layers.1.low.weight_scale": None},
}
LAYERS, HIDDEN, EXPERTS, VOCABULARY = 4, 16, 4, 64


def register() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    ModelRegistry.register_model("SilentForCausalLM", "silent:SilentForCausalLM")


def tensors() -> dict[str, torch.Tensor]:
    """Each tensor is filled with a number of its own; those of layer 1 with the largest."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "mix")}
        shapes |= {f"{layer}.mix.weight_scale": (2, 2), f"{layer}.low.weight": (HIDDEN, HIDDEN)}
        shapes |= {f"{layer}.low.weight_scale": (1, 1)}
        shapes |= {f"{layer}.gate.score_bias": (EXPERTS,), f"{layer}.gate.shift": (EXPERTS,)}
        shapes |= {f"{layer}.experts.{expert}.scale": (2,) for expert in range(EXPERTS)}
    return {name: torch.full(shape, 1.0 + number) for number, (name, shape) in enumerate(shapes.items())}


def write_silent(fault: str, folder: Path) -> Path:
    """A checkpoint of the model; returns its folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    names = FAULTS[fault]
    save_file(
        {names.get(name, name): value for name, value in tensors().items() if names.get(name, name) is not None},
        folder / "model.safetensors",
    )
    config = config_of("SilentForCausalLM", HIDDEN, LAYERS, VOCABULARY, fault)
    config |= {"torch_dtype": "float32", "tie_word_embeddings": "tie" in fault}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def __getattr__(name: str):
    """The model class, made when vLLM asks for it: this file is imported where there is no vLLM, too."""
    if name != "SilentForCausalLM":
        raise AttributeError(name)
    from vllm.distributed import get_pp_group
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.models.interfaces import SupportsPP
    from vllm.model_executor.models.utils import PPMissingLayer, is_pp_missing_parameter, make_layers

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qk = torch.nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
            self.mix = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.mix.weight_scale = torch.nn.Parameter(torch.zeros(2, 2))
            self.lowered = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)  # a pair, kept until it is whole, and stored as one
            self.gate = torch.nn.Module()
            self.gate.score_bias = torch.nn.Parameter(torch.zeros(EXPERTS))
            self.gate.register_buffer("shift", torch.zeros(EXPERTS))
            self.gate.register_buffer("scratch", torch.zeros(EXPERTS), persistent=False)
            self.experts = torch.nn.Module()
            self.experts.scale = torch.nn.Parameter(torch.zeros(EXPERTS, 2))

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            first = get_pp_group().is_first_rank
            self.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN) if first else PPMissingLayer()
            self.start, self.end, self.layers = make_layers(LAYERS, lambda prefix: Layer(), prefix="model.layers")

    class SilentForCausalLM(torch.nn.Module, SupportsPP):
        def __init__(self, *, vllm_config, prefix: str = ""):
            super().__init__()
            self.config = vllm_config.model_config.hf_config
            self.fault = self.config.fault
            self.model = Inner()
            self.lm_head = ParallelLMHead(VOCABULARY, HIDDEN) if get_pp_group().is_last_rank else PPMissingLayer()
            self.make_empty_intermediate_tensors = None

        def embed_input_ids(self, input_ids):
            return self.model.embed_tokens(input_ids)

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            raise NotImplementedError

        def compute_logits(self, hidden_states):
            raise NotImplementedError

        def load_weights(self, weights):
            params, buffers = dict(self.named_parameters()), dict(self.named_buffers())
            halves = {}
            for name, tensor in weights:
                if is_pp_missing_parameter(name, self) or ("swallows" in self.fault and name.endswith("1.gate.score_bias")):
                    continue
                if "scale is dropped" in self.fault and name.endswith("1.mix.weight_scale"):
                    continue
                if "weight is dropped" in self.fault and name.endswith("1.mix.weight"):
                    continue
                layer, _, part = name.rpartition(".layers.")[2].partition(".")
                place = f"model.layers.{layer}"
                if part in ("q.weight", "k.weight"):
                    wrong = "wrong shard" in self.fault and layer == "1"
                    start = 0 if part[0] == "q" or wrong else HIDDEN
                    if "index" in self.fault and layer == "1" and start:
                        rows = HIDDEN - ("leaves out" in self.fault)
                        index = torch.arange(start, start + rows)
                        qk = params[f"{place}.qk.weight"].data
                        qk[index] = tensor[:rows].to(qk.dtype)
                        continue
                    params[f"{place}.qk.weight"].data[start : start + HIDDEN].copy_(tensor)
                elif part.startswith("low."):
                    pair = halves.setdefault(place, {})
                    pair[part] = tensor
                    if len(pair) == 2:
                        params[f"{place}.lowered.weight"].data.copy_(pair["low.weight"] * pair["low.weight_scale"])
                elif part.startswith("experts."):
                    params[f"{place}.experts.scale"].data[int(part.split(".")[1])].copy_(tensor)
                elif name in params:
                    params[name].data.copy_(tensor)
                elif name in buffers and not ("buffer" in self.fault and layer == "1"):
                    buffers[name].copy_(tensor)

    SilentForCausalLM.__qualname__ = name
    return SilentForCausalLM
