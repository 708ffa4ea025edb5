"""A vLLM plugin with a small model that has one fault of the class, chosen by its config; see `write_faulty`.

It lies beside a `dist-info` with an entry point, as an installed package does, and conftest.py puts the folder on the path
of the child processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

FAULTS = (
    "none",
    "unguarded lookup",
    "attribute of a placeholder, loading",
    "attribute of a placeholder, building",
    "None for a placeholder",
    "guard too wide",
    "guard after buffering",
    "dies twice",
    "an operator of the GPU library on the first stage",
    "padded vocabulary",
    "padded vocabulary, a slice never written",
    "waits for the other shards, building",
    "waits for the other shards, loading",
    "breaks the kit",
    "needs a name that transformers lacks",
    "takes one address for one tensor",
)
# What a model may ask a tensor for that one without data has no answer to.
ASKS: dict[str, Callable[[torch.Tensor], object]] = {
    "asks whether two are equal": lambda tensor: torch.equal(tensor, tensor),
    "takes what a mask says": lambda tensor: tensor[tensor > 0],
    "looks for what is not zero": lambda tensor: tensor.nonzero(),
    "looks for different values": lambda tensor: torch.unique(tensor),
    "counts values": lambda tensor: torch.bincount(tensor.flatten().int()),
    "turns it into an array": lambda tensor: tensor.float().numpy(),
    "asks for a value": lambda tensor: 1 / tensor.flatten()[0].item(),
    "saves it": lambda tensor: tensor.view(torch.uint8).cpu().numpy().tobytes(),
    "takes ones for a fault": lambda tensor: {2.0: None}[tensor.flatten()[0].item()],
    "goes on without an answer": lambda tensor: _first(tensor) and {2.0: None}[_first(tensor)],
}
# What a model does with a GPU while it loads: a tensor is moved elsewhere, or it cannot be told.
MOVES: dict[str, Callable[[torch.Tensor], object]] = {
    "moves it to the GPU": lambda tensor: tensor.cuda() + torch.ones(1, device="cuda"),
    "moves it to the GPU by name": lambda tensor: tensor.to("cuda:0") + torch.empty_like(tensor, device="cuda"),
    "pins it": lambda tensor: tensor.pin_memory() + torch.zeros(1, device="cpu", pin_memory=True).to(tensor.device),
}
NEEDS_A_GPU: dict[str, Callable[[torch.Tensor], object]] = {
    "draws from a generator of the GPU": lambda tensor: torch.Generator("cuda"),
    "asks for what a pretended GPU does not say": lambda tensor: torch.cuda.get_device_properties(0).uuid,
    "asks for an event's time": lambda tensor: torch.cuda.Event().elapsed_time(torch.cuda.Event()),
}
# And what no tensor has an answer to, with data or without.
ASKS_TOO_MUCH: dict[str, Callable[[torch.Tensor], object]] = {
    "multiplies what does not fit": lambda tensor: tensor @ torch.ones(3, 3, dtype=tensor.dtype, device=tensor.device),
    "takes rows that are not there": lambda tensor: tensor.narrow(0, 1000, 1000),
}
LAYERS, HIDDEN, VALUE = 12, 16, 2.0


def _first(tensor: torch.Tensor) -> float:
    """The first value of a tensor, 1 if there is none."""
    try:
        return tensor.flatten()[0].item()
    except RuntimeError:
        return 1.0


FIX = "faulty_lookup"


def register() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for name in ("FaultyForCausalLM", "LackingForCausalLM"):
        ModelRegistry.register_model(name, f"faulty:{name}")
    if "glmpp.dryrun.child.handlers" in sys.modules:  # a process of the dry run
        add_fix()


def add_fix() -> None:
    """A fix for "unguarded lookup", as if it lay in `glmpp.serving.fixes`."""
    from glmpp.serving import contract, fixes

    fix = ModuleType(f"{fixes.__name__}.{FIX}", "The faulty model looks up what is another stage's.\n")
    fix.RELEASES, fix.ARCHITECTURES = (contract.vllm_version().partition("+")[0],), ("FaultyForCausalLM",)
    fix.CURES = (("KeyError", ""),)

    def apply() -> None:
        module = sys.modules[__name__]
        module.FaultyForCausalLM = model = module.__getattr__("FaultyForCausalLM")
        model.touch = lambda self, name: None

    fix.apply = apply
    sys.modules[fix.__name__] = fix
    fixes.NAMES = tuple(sorted({*fixes.NAMES, FIX}))


def write_faulty(fault: str, folder: Path) -> Path:
    """A checkpoint of the model; returns its folder."""
    import json

    from safetensors.torch import save_file

    model = folder / "model"
    model.mkdir()
    tensors = {"model.embed_tokens.weight": (64, HIDDEN), "lm_head.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for index in range(LAYERS):
        tensors[f"model.layers.{index}.a.weight"] = (HIDDEN, HIDDEN)
        tensors[f"model.layers.{index}.b.weight"] = (HIDDEN, HIDDEN)
    save_file(
        {name: torch.full(shape, VALUE, dtype=torch.bfloat16) for name, shape in tensors.items()},
        model / "model.safetensors",
    )
    architecture = "LackingForCausalLM" if "lacks" in fault else "FaultyForCausalLM"
    config = config_of(architecture, HIDDEN, LAYERS, 64, fault) | {"torch_dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    return model


def config_of(architecture: str, hidden: int, layers: int, vocabulary: int, fault: str) -> dict:
    """What the config of such a model says; silent.py's, too."""
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "fault": fault,
    }


def __getattr__(name: str):
    """The model class, made when vLLM asks for it: this file is imported where there is no vLLM, too."""
    if name == "LackingForCausalLM":
        from transformers import NoSuchConfig  # noqa: F401
    if name != "FaultyForCausalLM":
        raise AttributeError(name)
    from vllm.distributed import get_pp_group, get_tp_group
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.models.interfaces import SupportsPP
    from vllm.model_executor.models.utils import PPMissingLayer, is_pp_missing_parameter, make_layers

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ab = torch.nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
            self.scale = 1.0

    class Inner(torch.nn.Module):
        def __init__(self, fault: str):
            super().__init__()
            group = get_pp_group()
            nothing = (lambda: None) if fault == "None for a placeholder" else PPMissingLayer
            embedding = partial(VocabParallelEmbedding, padding_size=48) if "padded" in fault else torch.nn.Embedding
            self.embed_tokens = embedding(64, HIDDEN) if group.is_first_rank else nothing()
            self.start, self.end, self.layers = make_layers(LAYERS, lambda prefix: Layer(), prefix="model.layers")
            self.norm = torch.nn.LayerNorm(HIDDEN, bias=False) if group.is_last_rank else PPMissingLayer()
            if fault == "an operator of the GPU library on the first stage" and group.is_first_rank:
                self.operator = torch.ops._C.an_operator
            if fault == "waits for the other shards, building":
                get_tp_group().barrier()
            if fault == "attribute of a placeholder, building":
                self.total = sum(layer.scale for layer in self.layers)

    class FaultyForCausalLM(torch.nn.Module, SupportsPP):
        def __init__(self, *, vllm_config, prefix: str = ""):
            super().__init__()
            self.config = vllm_config.model_config.hf_config
            self.fault = self.config.fault
            self.model = Inner(self.fault)
            last = get_pp_group().is_last_rank
            self.lm_head = torch.nn.Linear(HIDDEN, 64, bias=False) if last else PPMissingLayer()
            self.make_empty_intermediate_tensors = None

        def embed_input_ids(self, input_ids):
            return self.model.embed_tokens(input_ids)

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            raise NotImplementedError

        def compute_logits(self, hidden_states):
            raise NotImplementedError

        def load_weights(self, weights):
            if self.fault == "waits for the other shards, loading":
                get_tp_group().all_gather(torch.ones(2, device="cpu"), dim=0)
            params, loaded, seen = dict(self.named_parameters()), set(), set()
            self.held = {}
            if self.fault == "breaks the kit":
                import glmpp.dryrun.child.tensor_outcomes

                glmpp.dryrun.child.tensor_outcomes.padding = None
            for name, tensor in weights:
                if name.startswith("unused."):
                    continue
                (ASKS | ASKS_TOO_MUCH | MOVES | NEEDS_A_GPU).get(self.fault, id)(tensor)
                if self.fault == "takes one address for one tensor":
                    if tensor.data_ptr() in seen:
                        continue
                    seen.add(tensor.data_ptr())
                    self.held[name] = [tensor]  # or the next one would get its address
                self.touch(name)
                if self.skips(name):
                    continue
                stem, _, part = name.partition(".b." if ".b." in name else ".a.")
                if not part and "padded" in self.fault and "embed" in name:  # 96 rows for 64, and no loader that fills them
                    for start in (0,) if "never" in self.fault else (0, 32):
                        params[name].data[start : start + 32] = tensor[start : start + 32]
                    loaded.add(name)
                    continue
                if not part:
                    params[name].data.copy_(tensor)
                    loaded.add(name)
                    continue
                half = self.held.setdefault(stem, {})
                half["b" if ".b." in name else "a"] = tensor
                if is_pp_missing_parameter(name, self):  # only reached by "guard after buffering"
                    continue
                if len(half) == 2:
                    params[f"{stem}.ab.weight"].data.copy_(torch.cat([half["a"], half["b"]]))
                    loaded.add(f"{stem}.ab.weight")
                    del self.held[stem]
            return None if self.fault == "guard too wide" else loaded  # vLLM checks only what a model returns

        def touch(self, name: str) -> None:
            if self.fault == "attribute of a placeholder, loading" and ".layers." in name:
                _ = self.model.layers[int(name.split(".")[2])].scale
            if self.fault == "None for a placeholder" and "embed_tokens" in name:
                _ = self.model.embed_tokens.weight
            if self.fault == "unguarded lookup" and name.endswith(".b.weight"):
                _ = dict(self.named_parameters())[name.replace(".b.", ".ab.")]
            if self.fault == "dies twice" and ".layers." in name and int(name.split(".")[2]) in (1, 11):
                _ = dict(self.named_parameters())[name.replace(".a.", ".ab.").replace(".b.", ".ab.")]

        def skips(self, name: str) -> bool:
            if self.fault == "guard too wide" and get_pp_group().world_size > 1:
                first = next(i for i, layer in enumerate(self.model.layers) if not isinstance(layer, PPMissingLayer))
                return is_pp_missing_parameter(name, self) or name.startswith(f"model.layers.{first}")  # no dot
            if self.fault == "guard after buffering" and ".layers." in name:
                return False
            return is_pp_missing_parameter(name, self)

    FaultyForCausalLM.__qualname__ = name
    return FaultyForCausalLM
