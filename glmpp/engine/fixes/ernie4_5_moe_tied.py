"""Ernie 4.5 MoE with tied embeddings cannot be built at PP >= 2: a stage ties to a placeholder.

`Ernie4_5_MoeForCausalLM.__init__` ties head and embedding on every stage, of which most have at most one of the two. The fix
builds the model untied, and then ties what the stage has: with one stage both; on the last of several the head takes the
embedding's place, so that the embedding's tensor is loaded into it.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)


def apply() -> None:
    from vllm.model_executor.models import ernie45_moe
    from vllm.model_executor.models.utils import PPMissingLayer

    init = ernie45_moe.Ernie4_5_MoeForCausalLM.__init__

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

    ernie45_moe.Ernie4_5_MoeForCausalLM.__init__ = build
