"""A tied head is left at init: nobody makes `lm_head` the embedding where config.json says `tie_word_embeddings`.

The classes below build a head of their own, which no tensor of a tied checkpoint is for: random logits, and no error. The
fix ties it when the model is built, as vLLM's own tied models do. On the last of several stages, where the embedding is a
placeholder, the head takes its place, so that the embedding's tensor is loaded into it. An `lm_head.weight` in the file is
then not read, as with vLLM's own.
"""

from __future__ import annotations

import functools

RELEASES = ("0.33.0",)
CAUSAL = (
    "AfmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "Glm5NextForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "MiniMaxM2ForCausalLM",
    "OlmoeForCausalLM",
    "Qwen3NextForCausalLM",
)
AROUND = ("Glm4vMoeForConditionalGeneration", "Glm5NextForConditionalGeneration")  # they build one of those
ARCHITECTURES = (*CAUSAL, *AROUND)


def apply() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in CAUSAL:  # by the registry, for some have another class on a GPU
        cls = ModelRegistry.models[architecture].load_model_cls()
        cls.__init__ = and_tied(cls.__init__)


def and_tied(init):
    @functools.wraps(init)  # vLLM looks at the signature
    def build(self, **arguments):
        init(self, **arguments)
        tie(self)

    return build


def tie(causal) -> None:
    """Make a causal model's head and embedding one, where this rank has a head."""
    from vllm.model_executor.models.utils import PPMissingLayer

    head, name = causal.lm_head, "embedding" if hasattr(causal.model, "embedding") else "embed_tokens"  # GPT-OSS
    if not getattr(causal.config, "tie_word_embeddings", False) or isinstance(head, PPMissingLayer):
        return
    embedding = getattr(causal.model, name)
    if isinstance(embedding, PPMissingLayer):
        setattr(causal.model, name, head)
    else:
        causal.lm_head = head.tie_weights(embedding)
