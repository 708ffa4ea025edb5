"""A stage's model, built as vLLM builds it: its own config checks, model class and placeholders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry, utils
from vllm.utils.torch_utils import set_default_torch_dtype

from glmpp.dryrun.messages import Run, StageRequest
from glmpp.dryrun.pretend.cpu_stand_ins import StandIns
from glmpp.dryrun.pretend.failures import frames
from glmpp.dryrun.pretend.ranks import set_layer_counts
from glmpp.dryrun.pretend.targets import tensors_on
from glmpp.errors import chain
from glmpp.serving import contract, fixes

NOMINAL = 512  # tokens of context: nothing is generated


@dataclass
class Built:
    """A model with the configs that it was built from. `model_config` is the drafter's own if it is one."""

    model: torch.nn.Module
    config: VllmConfig
    model_config: ModelConfig


class ModelBuilder:
    """Builds the models of a request's stages.

    Attributes:
        stand_ins: what stands in for parts that cannot be built here.
        num_layers: main layers, as vLLM counts them; None before the first config is made.
    """

    def __init__(self, request: StageRequest):
        self.request, self.stand_ins, self.num_layers = request, StandIns(request.gpu, request.strict), None

    def vllm_config(self, run: Run, max_model_len: int | None = NOMINAL, **options) -> VllmConfig:
        """The config that `vllm serve` would make, after all its checks. Raises whatever vLLM refuses it with.

        Args:
            max_model_len: the longest context; None: what vLLM takes for this model.
            options: of `create_engine_config`.
        """
        set_layer_counts(run.layer_counts)
        config = EngineArgs(
            model=self.request.model,
            skip_tokenizer_init=True,
            load_format="glmpp" if self.request.guard == "loader" else "auto",
            enforce_eager=True,
            enable_prefix_caching=False,  # the CPU platform turns it off halfway, and then other checks fail
            max_model_len=max_model_len,
            kv_cache_dtype=self.request.cache,
            pipeline_parallel_size=run.pp_size,
            tensor_parallel_size=run.tp_size,
            data_parallel_size=run.dp_size,
            enable_expert_parallel=run.ep,
            distributed_executor_backend="mp",
            speculative_config={"method": "mtp", "num_speculative_tokens": 1} if run.drafter else None,
        ).create_engine_config(**options)
        config.parallel_config.rank = run.stage * run.tp_size + run.tp_rank
        if run.dp_size > 1:
            become_replica(config, run.dp_rank)
        self.num_layers = config.model_config.get_total_num_hidden_layers()
        return config

    def build(self, run: Run, device: str) -> Built:
        """A stage's model with its parameters on a device.

        Raises:
            Exception: of whatever kind the config checks or the model's class end with.
        """
        utils._model_to_pp_missing_layer_names.clear()  # keyed by id(model), and ids are reused: see missing_prefixes
        try:
            config = self.vllm_config(run)  # what fails here no stand-in is for
        except Exception as error:
            name_cause(error, self.request.config.get("architectures") or [])
            raise
        # As the load format does it: plugins are loaded, no model is built. The fork ends, and with it the fixes.
        fixes.apply(self.request.fixes, contract.vllm_version(), config.model_config.architectures)

        def construct() -> Built:
            nonlocal config
            mine, config = config or self.vllm_config(run), None  # layers register in it: another attempt needs another
            model_config = mine.speculative_config.draft_model_config if run.drafter else mine.model_config
            dtype = set_default_torch_dtype(model_config.dtype)
            with set_current_vllm_config(mine), dtype, torch.device(device), tensors_on(device):
                return Built(initialize_model(vllm_config=mine, model_config=model_config), mine, model_config)

        return self.stand_ins.build(construct)


def name_cause(error: Exception, architectures: list[str]) -> None:
    """Give an error of vLLM's registry its cause: why a class cannot be imported, the registry says in its log alone."""
    if not any(frame.module == registry.__name__ for cause in chain(error) for frame in frames(cause)):
        return
    for architecture in architectures:
        if known := registry.ModelRegistry.models.get(architecture):
            try:
                known.load_model_cls()
            except Exception as cause:
                error.__cause__ = cause


def become_replica(config: VllmConfig, dp_rank: int) -> None:
    """What a replica's engine does with its config before it starts workers (`vllm/v1/engine/core.py:run_engine_core`)."""
    parallel = config.parallel_config
    parallel.data_parallel_index = dp_rank
    if config.model_config.is_moe:
        parallel.data_parallel_rank = dp_rank
    elif hasattr(parallel, "reconfigure_for_independent_dp_rank"):  # vLLM >= 0.32
        parallel.reconfigure_for_independent_dp_rank()
    else:
        parallel.data_parallel_size = parallel.data_parallel_size_local = 1
        parallel.data_parallel_rank = 0
