"""The filter of the load format "glmpp" in front of vLLM's default loader, to show what its test asks for."""


def apply() -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from glmpp.serving.stage_filter import Selection

    all_weights = DefaultModelLoader.get_all_weights

    def wanted(self, model_config, model):
        wants = Selection(model, model_config).wants
        return (pair for pair in all_weights(self, model_config, model) if wants(pair[0]))

    DefaultModelLoader.get_all_weights = wanted
