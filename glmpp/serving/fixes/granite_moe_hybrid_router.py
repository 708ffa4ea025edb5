"""GraniteMoeHybrid's stages look up every parameter that is stored as it is, of other stages' layers, too.

`GraniteMoeHybridModel.load_weights` asks `is_pp_missing_parameter` for fused and expert parameters; its `_load`, which the
router and everything that is stored as it is go through, does not: KeyError at PP >= 2. Drop what lies under a placeholder.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
CURES = (("KeyError", r"/granitemoehybrid\.py"),)


def apply() -> None:
    from vllm.model_executor.models import granitemoehybrid, utils

    model = granitemoehybrid.GraniteMoeHybridModel
    load_weights = model.load_weights

    def own(self, weights):
        here = (pair for pair in weights if not utils.is_pp_missing_parameter(pair[0], self))
        return load_weights(self, here)

    model.load_weights = own
