"""Glm5Next's stages look up FP8 projections of others' layers (this loads; to answer at PP >= 2 takes vLLM PR 57171, too).

`_try_load_fp8_indexer_wk` and `_try_load_fp8_attn_proj` run before the branches of `Glm5NextModel.load_weights` that ask
`is_pp_missing_parameter`, and do not ask: KeyError at PP >= 2, as in vLLM PR 42944. Drop what lies under a placeholder
before either of them buffers it.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("Glm5NextForConditionalGeneration", "Glm5NextForCausalLM")
CURES = (("KeyError", r"/glm5next/"),)


def apply() -> None:
    from vllm.model_executor.models import utils
    from vllm.models.glm5next.common import model as glm5next

    model = glm5next.Glm5NextModel
    load_weights = model.load_weights

    def own(self, weights):
        here = (given for given in weights if not utils.is_pp_missing_parameter(given[0], self))
        return load_weights(self, here)

    model.load_weights = own
