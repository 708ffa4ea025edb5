"""Ernie 4.5 MoE and Falcon-H1 with tied embeddings cannot be built at PP >= 2: a stage ties to a placeholder.

The classes tie the head to the embedding of the same stage, and the last of several stages has none (Ernie's also tie on the
stages without a head). The fix builds the model untied, and then ties what the stage has: with one stage both; on the last
of several the head takes the embedding's place, so that the embedding's tensor is loaded into it.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("Ernie4_5_MoeForCausalLM", "FalconH1ForCausalLM")
CURES = (("AttributeError", r"/(ernie45_moe|vocab_parallel_embedding)\.py"),)


def apply() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in ARCHITECTURES:
        cls = ModelRegistry.models[architecture].load_model_cls()
        cls.__init__ = untied_and_then_tied(cls.__init__)


def untied_and_then_tied(init):
    from vllm.model_executor.models.utils import PPMissingLayer

    def build(self, *, vllm_config, prefix=""):  # vLLM looks at the signature
        config = vllm_config.model_config.hf_config
        tied, config.tie_word_embeddings = config.tie_word_embeddings, False
        try:
            init(self, vllm_config=vllm_config, prefix=prefix)
        finally:
            config.tie_word_embeddings = tied
        if not tied or isinstance(self.lm_head, PPMissingLayer):
            return
        if isinstance(self.model.embed_tokens, PPMissingLayer):
            self.model.embed_tokens = self.lm_head
        else:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)

    return build
