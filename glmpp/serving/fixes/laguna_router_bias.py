"""Laguna's router loses its correction bias and computes with zeros, without an error.

The checkpoint's `mlp.experts.e_score_correction_bias` is now the parameter
`mlp.experts.routed_experts.e_score_correction_bias`, and the loader of the experts, which is handed the tensor, passes over
whatever is no expert's weight without a word. The fix takes the tensor out of the stream and loads it itself. What is in the
layer of another stage passes as before.
"""

RELEASES = ("0.33.0",)
ARCHITECTURES = ("LagunaForCausalLM",)
CURES = (("lost", r"\.e_score_correction_bias$"),)
STORED, MOVED = ".experts.e_score_correction_bias", ".experts.routed_experts.e_score_correction_bias"


def apply() -> None:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.model_executor.models.laguna import LagunaModel

    load_weights = LagunaModel.load_weights

    def with_biases(self, weights):
        parameters, loaded = dict(self.named_parameters()), set()

        def others():
            for name, tensor in weights:
                place = name.replace(STORED, MOVED)
                if place != name and place in parameters:
                    default_weight_loader(parameters[place], tensor)
                    loaded.add(place)
                else:
                    yield name, tensor

        return load_weights(self, others()) | loaded

    LagunaModel.load_weights = with_biases
