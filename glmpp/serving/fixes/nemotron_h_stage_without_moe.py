"""Nemotron-H with experts cannot be built on a stage that holds no MoE layer: an assertion without words.

`has_moe` is read off the pattern of the whole model, and the stage then looks for an MoE layer among its own. The fix makes
it say what this stage has, so that such a stage is built like a model without experts.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("NemotronHForCausalLM",)
CURES = (("AssertionError", r"/nemotron_h\.py"),)


def apply() -> None:
    from vllm.model_executor.models.nemotron_h import NemotronHModel, NemotronHMoEDecoderLayer

    init = NemotronHModel.__init__

    def build(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.has_moe = any(isinstance(layer, NemotronHMoEDecoderLayer) for layer in self.layers)

    NemotronHModel.__init__ = build
