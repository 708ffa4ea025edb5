"""A head that is tied to the embedding is left at init: random logits, and no error.

The classes below do not look at `tie_word_embeddings`: their head is for a tensor that the checkpoint does not have. The fix
ties it when the model is built, as vLLM's own tied models do. On the last of several stages, where the embedding is a
placeholder, the head takes its place, so that the embedding's tensor is loaded into it. An `lm_head.weight` in the file is
then not read, as with vLLM's own.
"""

RELEASES = ("0.33.0",)
NAMES = (
    "Afmoe DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 Glm4Moe Glm4MoeLite Glm5Next GlmMoeDsa GptOss Jamba LongcatFlash"
    " MiMoV2Flash MiniMaxM2 MiniMaxM3Sparse MuseGlimmer Olmoe Qwen3Next Qwen4Exp"
)
CAUSAL = tuple(f"{name}ForCausalLM" for name in NAMES.split())
# These build one of those, or are one.
AROUND = (
    *(f"{name}ForConditionalGeneration" for name in ("Glm4vMoe", "Glm5Next", "MiniMaxM3Sparse", "MuseGlimmer", "Qwen4Exp")),
    "JambaForSequenceClassification",
)
ARCHITECTURES = (*CAUSAL, *AROUND)
CURES = (("untied", r"lm_head\.weight$"),)


def apply() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in CAUSAL:  # by the registry, for some have another class on a GPU
        cls = ModelRegistry.models[architecture].load_model_cls()
        cls.__init__ = and_tied(cls.__init__)


def and_tied(init):
    from vllm.model_executor.models.utils import PPMissingLayer

    def build(self, *, vllm_config, prefix=""):  # vLLM looks at the signature
        init(self, vllm_config=vllm_config, prefix=prefix)
        if not getattr(self.config, "tie_word_embeddings", False) or isinstance(self.lm_head, PPMissingLayer):
            return
        name = "embedding" if hasattr(self.model, "embedding") else "embed_tokens"  # GPT-OSS
        if isinstance(getattr(self.model, name), PPMissingLayer):
            setattr(self.model, name, self.lm_head)
        else:
            self.lm_head = self.lm_head.tie_weights(getattr(self.model, name))

    return build
