"""LFM2 with experts cannot be built on a stage that holds dense layers alone: a RuntimeError.

The check comes last in `__init__`, before the counts of experts are written down; by then everything else of the stage is
built. The fix lets such a stage be, with no counts, as a model without experts.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("Lfm2MoeForCausalLM",)
# On a CPU without AMX the chooser of FP8 kernels refuses first, and the stand-in for it uncovers the other error.
CURES = (("RuntimeError", r"/lfm2_moe\.py"), ("ValueError", r"/kernels/linear/__init__\.py"))


def apply() -> None:
    from vllm.model_executor.models.lfm2_moe import Lfm2MoeForCausalLM

    init = Lfm2MoeForCausalLM.__init__

    def build(self, *, vllm_config, prefix=""):  # vLLM looks at the signature
        try:
            init(self, vllm_config=vllm_config, prefix=prefix)
        except RuntimeError as error:
            if "No Lfm2MoeSparseMoeBlock layer found" not in str(error):
                raise

    Lfm2MoeForCausalLM.__init__ = build
