"""Take a guard away and the test that claims to watch it must fail.

Each case changes one piece of source in a copy of the package and runs one test against the copy, in a fork of a process
that has imported the rest (`template.py`).
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from glmpp.verdict.deployment import Deployment, Helper
from glmpp.verdict.dry_run import dry_run

SKIP = """    if name.startswith(tuple(pp_missing_layer_names)):
        return True
    layer ="""

# file, source to replace, replacement, test that must fail
MUTATIONS = {
    "the skip": (
        "loader.py::load_fp8_indexer_wk",
        SKIP,
        "    layer =",
        "test_loader.py::test_a_foreign_layer_leaves_buffer_parameters_and_loaded_untouched",
    ),
    "the skip moved behind the buffering": (
        "loader.py::load_fp8_indexer_wk",
        SKIP + ' name.rsplit(".wk.", 1)[0]\n    pending.setdefault(layer, {})[part] = tensor\n',
        '    layer = name.rsplit(".wk.", 1)[0]\n    pending.setdefault(layer, {})[part] = tensor\n'
        "    if name.startswith(tuple(pp_missing_layer_names)):\n        return True\n",
        "test_loader.py::test_a_foreign_layer_leaves_buffer_parameters_and_loaded_untouched",
    ),
    "the pair is forgotten once stored": (
        "loader.py::store_wk",
        "pending.pop(layer)",
        "pending[layer]",
        "test_loader.py::test_every_arrival_order_of_two_layers_gives_the_same_parameters",
    ),
    "the dot at the end of a layer prefix": (
        "partition.py::Stage.missing_prefixes",
        'f"{self.layer_list}.{index}."',
        'f"{self.layer_list}.{index}"',
        "test_partition.py::test_a_missing_layer_1_does_not_hide_layer_11",
    ),
    "all digits of a layer number": (
        "partition.py::Stage.layer_of",
        "return int(number)",
        "return int(number[:1] or 0)",
        "test_partition.py::test_stage_with_layer_1_does_not_own_layer_11",
    ),
    "the tied embedding on the last stage": (
        "partition.py::Stage._column",
        "self.is_first or (self.tied and self.is_last)",
        "self.is_first",
        "test_partition.py::test_every_tensor_of_the_model_has_an_owner",
    ),
    "a stage that does not fit": (
        "partition.py::cache_cost",
        "if left > 0 else math.inf",
        "if left else math.inf",
        "test_partition.py::test_the_split_that_leaves_most_tokens_equals_brute_force",
    ),
    "what the first and the last stage hold beside layers": (
        "partition.py::cache_cost",
        "first * (start == 0) + last * (stop == len(weights))",
        "0",
        "test_partition.py::test_the_split_that_leaves_most_tokens_equals_brute_force",
    ),
    "weights that do not fit leave no blocks": (
        "verdict/fit.py::Memory.blocks",
        "max(0, self.room(gpu, utilization))",
        "self.room(gpu, utilization)",
        "test_fit.py::test_weights_that_do_not_fit_leave_no_tokens",
    ),
    "the rank with the least room decides": (
        "verdict/fit.py::Fit.requests",
        "blocks = min(",
        "blocks = max(",
        "test_fit.py::test_a_deployment_has_the_room_of_the_rank_that_has_the_least",
    ),
    "nobody knows the room if one block is unknown": (
        "verdict/fit.py::Fit.known",
        "all(memory.kv_cache for memory in self.memories)",
        "True",
        "test_fit.py::test_nobody_knows_the_room_if_vllm_did_not_say_what_a_block_is",
    ),
    "the ends of a pipeline have runs of their own": (
        "verdict/layouts.py::distinct",
        "same = (rank == 0, rank == len(stages) - 1, ",
        "same = (False, False, ",
        "test_fit.py::test_stages_that_share_a_run_hold_the_same_kinds_of_layers_and_the_ends_have_their_own",
    ),
    "the type of a layer tells it from others": (
        "verdict/layouts.py::layer_kinds",
        "*map(str, types[at : at + 1])",
        "",
        "test_fit.py::test_layers_with_the_same_tensors_and_another_type_are_another_kind",
    ),
    "a layout without room is no answer": (
        "verdict/layout.py::Layout.serves",
        "self.verdict == LOADS and self.requests >= 1",
        "self.verdict == LOADS",
        "test_fit.py::test_the_best_layout_loads_has_room_then_holds_most_requests_then_has_the_fewest_stages",
    ),
    "a block is as large as the backend asks": (
        "engine/kv_cache.py::kv_cache",
        "current_platform.update_block_size_for_backend(config)",
        "pass",
        "test_vllm_memory.py::test_a_token_takes_what_its_attention_says",
    ),
    "tables that layers share belong to none of them": (
        "engine/memory.py::memory",
        "if times > 1}",
        "if times > 99}",
        "test_vllm_memory.py::test_layers_and_the_rest_are_the_whole",
    ),
    "attention prepares its weights": (
        "engine/memory.py::memory",
        "prepare_attention(built, device)",
        "pass",
        "test_vllm_memory.py::test_mla_keeps_a_second_copy_of_kv_b_proj_in_bf16",
    ),
    "what a drafter shares counts once": (
        "engine/memory.py::_shared",
        "SHARED_BY_DRAFTER if place.drafter else ()",
        "()",
        "test_vllm_memory.py::test_the_drafter_adds_its_layer_and_shares_embedding_and_lm_head",
    ),
    "more stages than layers": (
        "partition.py::make_stages",
        "if pp_size > num_layers:",
        "if False:",
        "test_partition.py::test_more_stages_than_layers_is_an_error_for_stages",
    ),
    "wrong number of layer counts": (
        "partition.py::parse_counts",
        "if len(counts) != pp_size:",
        "if False:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "wrong sum of layer counts": (
        "partition.py::partition_layers",
        "if sum(counts) != num_layers:",
        "if False:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "negative layer counts": (
        "partition.py::parse_counts",
        "if (least := min(counts, default=0)) < 0:",
        "if False:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "a truth value is no number of layers": (
        "partition.py::parse_counts",
        "any(isinstance(entry, bool) for entry in layer_counts)",
        "False",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "a tower is not the language model": (
        "partition.py::layer_list",
        'if words.isdisjoint(re.split(r"[._]", path))',
        "",
        "test_partition.py::test_the_list_of_layers_is_the_language_models_whatever_lies_beside_it",
    ),
    "the list with exactly the config's layers": (
        "partition.py::layer_list",
        "whole := exact or more",
        "whole := exact + more",
        "test_partition.py::test_the_list_of_layers_is_the_language_models_whatever_lies_beside_it",
    ),
    "the variable is the command's to read": (
        "cli.py::_partition",
        "options.layer_partition is not None or found is None",
        "True",
        "test_cli.py::test_the_variable_is_vllms_split_where_it_fits_and_an_error_where_vllm_would_fail",
    ),
    "a layout of which nobody can tell": (
        "verdict/layout.py::Layouts.verdict",
        "CANNOT_TELL if any(one.untold for one in self.layouts) else DIES",
        "DIES",
        "test_cli.py::test_layouts_ends_with_2_only_where_a_layout_might_serve_and_nobody_can_tell",
    ),
    "a record of another question": (
        "verdict/record.py::check_record",
        "if differ:",
        "if False:",
        "test_records.py::test_another_question_is_an_error_that_says_in_what",
    ),
    "a record of another checkpoint": (
        "verdict/record.py::digest",
        "[(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()]",
        "sorted(checkpoint)",
        "test_records.py::test_each_change_of_a_checkpoint_changes_its_digest",
    ),
    "a record that lacks a run": (
        "verdict/report.py::DryRunReport.load",
        "if _run(run) not in found",
        "if False",
        "test_records.py::test_runs_that_are_not_recorded_are_missed",
    ),
    "what is no checkpoint is not overwritten": (
        "synthetic.py::_check_replaceable",
        "directory.iterdir() if directory.exists() else ()",
        "()",
        "test_cli.py::test_make_checkpoint_replaces_a_checkpoint_and_nothing_else",
    ),
    "zero layers or stages": (
        "partition.py::partition_layers",
        'whole("num_layers", num_layers, 1, 2**31), whole("pp_size", pp_size, 1, MAX_GPUS)',
        "num_layers, pp_size",
        "test_partition.py::test_nothing_to_split_is_an_error",
    ),
    "a scale grid that does not fit": (
        "dequant.py::_as_grid",
        "if shape == blocks:",
        "if len(shape) == 2:",
        "test_dequant.py::test_a_grid_that_does_not_fit_names_both_shapes",
    ),
    "bad scales": (
        "dequant.py::dequantize",
        "if check and not",
        "if False and not",
        "test_dequant.py::test_a_bad_scale_is_an_error_unless_asked_for",
    ),
    "E8M0 code 255": (
        "dequant.py::_as_grid",
        "codes == 255, math.nan",
        "codes == 256, math.nan",
        "test_dequant.py::test_e8m0_code_255_is_nan_and_refused",
    ),
    "dtype and rank of the weight": (
        "dequant.py::dequantize",
        "if weight.dtype != FP8 or weight.ndim != 2:",
        "if False:",
        "test_dequant.py::test_a_weight_that_is_not_an_fp8_matrix_is_an_error",
    ),
    "the shape of out": (
        "dequant.py::dequantize",
        "elif out.shape != weight.shape:",
        "elif False:",
        "test_dequant.py::test_out_is_written_in_place_and_nothing_else_is",
    ),
    "the scale of a block of zeros": (
        "dequant.py::quantize",
        "torch.where(absmax == 0, 1.0, (absmax / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny))",
        "absmax / FP8_MAX",
        "test_dequant.py::test_a_block_of_zeros_survives",
    ),
    "a power of two is rounded up by no rounded logarithm": (
        "dequant.py::quantize",
        "torch.exp2(exponent.double()).float()",
        "torch.exp2(torch.ceil(torch.log2(absmax / FP8_MAX)))",
        "test_dequant.py::test_a_scale_is_the_smallest_power_of_two_that_reaches",
    ),
    "a scale that float32 rounds down to its last digits": (
        "dequant.py::quantize",
        ".clamp(min=torch.finfo(torch.float32).tiny)",
        ".clamp(min=2**-149)",
        "test_dequant.py::test_quantize_stays_within_half_an_fp8_step_whatever_the_size_of_the_values",
    ),
    "columns that lie far apart": (
        "triton_dequant.py::_dequantize_kernel",
        "col.to(tl.int64) * out_col_stride",
        "col * out_col_stride",
        "test_dequant.py::test_a_transposed_out_of_over_2_31_elements_is_written_where_it_lies",
    ),
    "the weight's device": (
        "triton_dequant.py::launch",
        "with torch.cuda.device_of(weight):",
        "if True:",
        "test_dequant.py::test_triton_launches_on_the_weights_device_not_the_current_one",
    ),
    "the ledger against ownership": (
        "ledger.py::Ledger.check",
        "if column != expected:",
        "if False:",
        "test_loader.py::test_a_guard_that_is_one_layer_too_wide_is_caught",
    ),
    "the ledger against the checkpoint": (
        "ledger.py::Ledger.check",
        "if self.tensors.keys() != checkpoint.keys():",
        "if False:",
        "test_loader.py::test_a_tensor_nobody_owns_is_unexpected_and_the_books_do_not_close",
    ),
    "parameters left at init": (
        "ledger.py::Ledger.check",
        "if left := sorted(set(self.left_at_init) - set(may_stay_at_init)):",
        "if left := []:",
        "test_loader.py::test_a_parameter_left_at_init_is_caught_unless_accounted_for",
    ),
    "parameters written twice": (
        "ledger.py::Ledger.check",
        "if self.written_twice:",
        "if False:",
        "test_loader.py::test_a_parameter_written_twice_is_caught",
    ),
    "pairs held back are not loaded": (
        "loader.py::load_stage",
        "for part in parts:",
        "for part in ():",
        "test_loader.py::test_the_books_do_not_close_when_half_of_a_pair_is_held_back",
    ),
    "the write under another name": (
        "synthetic.py::write_checkpoint",
        'partial = Path(tempfile.mkdtemp(prefix=f".{directory.name[:50]}.partial-", dir=directory.parent))',
        "directory.mkdir(); partial = directory",
        "test_checkpoint.py::test_the_folder_appears_only_when_it_is_complete",
    ),
    "cleaning up after a failed write": (
        "synthetic.py::write_checkpoint",
        "shutil.rmtree(partial, ignore_errors=True)",
        "pass",
        "test_checkpoint.py::test_a_failed_write_leaves_nothing",
    ),
    "an existing folder": (
        "synthetic.py::write_checkpoint",
        "if exists(directory) and not overwrite:",
        "if False:",
        "test_checkpoint.py::test_an_existing_folder_is_not_overwritten_unasked",
    ),
    "a missing shard": (
        "checkpoint.py::Checkpoint.from_directory",
        "            if not exists(path):",
        "            if False:",
        "test_checkpoint.py::test_a_missing_shard_is_named_with_a_tensor_it_should_hold",
    ),
    "index entries the shard lacks": (
        "formats/index.py::check_index",
        "if missing := sorted(listed - held):",
        "if missing := []:",
        "test_checkpoint.py::test_an_index_that_names_a_tensor_its_shard_does_not_hold",
    ),
    "tensors the index lacks": (
        "formats/index.py::check_index",
        "if extra := sorted(held - listed):",
        "if extra := []:",
        "test_checkpoint.py::test_a_tensor_that_the_index_does_not_name",
    ),
    "another model type": (
        "formats/glm5.py::glm_config",
        'if config.get("model_type") != "glm_moe_dsa":',
        "if False:",
        "test_checkpoint.py::test_from_config_of_another_model_is_an_error",
    ),
    "NaN codes take the slow path": (
        "dequant.py::dequantize",
        "elif on_cpu and not nan_codes and",
        "elif on_cpu and",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "NaN codes are reported": (
        "dequant.py::dequantize",
        "    if nan_codes:",
        "    if False:",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "negative NaN codes are counted": (
        "dequant.py::_count_nan_codes",
        "codes.max() < 0xFF and",
        "",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "large scales take the slow path": (
        "dequant.py::_fits_shift",
        "and largest < 2.0**8",
        "",
        "test_dequant.py::test_scales_outside_the_fast_path_take_the_slow_one",
    ),
    "a scale of -0.0 takes the slow path": (
        "dequant.py::_fits_shift",
        "or torch.signbit(grid).any()",
        "",
        "test_dequant.py::test_scales_outside_the_fast_path_take_the_slow_one",
    ),
    "flushed subnormals take the slow path": (
        "dequant.py::_fits_shift",
        "bool(subnormal * _BIAS_GAP > 0)",
        "True",
        "test_dequant.py::test_flushed_subnormals_take_the_slow_path",
    ),
    "the sign of zeros": (
        "dequant.py::_shift_and_scale",
        "torch.full((channels,), -0.0,",
        "torch.full((channels,), 0.0,",
        "test_dequant.py::test_fast_and_slow_path_agree_on_the_real_shapes_and_any_strides",
    ),
    "types and devices spelt out": (
        "dequant.py::_shift_and_scale",
        'float32 = {"dtype": torch.float32, "device": "cpu"}',
        "float32 = {}",
        "test_dequant.py::test_the_default_dtype_and_device_of_the_caller_do_not_matter",
    ),
    "the band that bounds the memory": (
        "dequant.py::_shift_and_scale",
        "min(_BAND_ELEMENTS, weight.numel() // 16)",
        "weight.numel()",
        "test_dequant.py::test_extra_memory_is_under_a_tenth_of_the_output",
    ),
    "CUDA tensors only for triton": (
        "triton_dequant.py::launch",
        "if not weight.is_cuda and",
        "if False and",
        "test_dequant.py::test_triton_refuses_a_cpu_tensor",
    ),
    "the mask of the kernel": (
        "triton_dequant.py::_dequantize_kernel",
        "inside = (row < rows) & (col < cols)",
        "inside = (row < rows) & (col < cols + 1)",
        "test_dequant.py::test_triton_kernel_in_the_cpu_interpreter_gives_the_same_float32_bits",
    ),
    "an unknown backend": (
        "dequant.py::dequantize",
        'if backend not in ("auto", "torch", "triton"):',
        "if False:",
        "test_dequant.py::test_an_unknown_backend_is_an_error",
    ),
    "NaN in an error measure": (
        "lab/error.py::error_stats",
        "if math.isnan(norm) or math.isnan(size):",
        "if False:",
        "test_error.py::test_a_nan_is_an_error_not_an_error_measure",
    ),
    "more tokens picked than there are": (
        "lab/error.py::topk_overlap",
        "if not 0 < k <= scores.shape[-1]:",
        "if False:",
        "test_error.py::test_topk_overlap_counts_common_tokens",
    ),
    "an FP8 weight without a scale": (
        "lab/error.py::tensor_errors",
        "if scale is None:",
        "if False:",
        "test_error.py::test_an_fp8_weight_without_its_scale_is_named",
    ),
    "clearing vLLM's cache of missing layers between models": (
        "engine/build.py::ModelBuilder.build",
        "utils._model_to_pp_missing_layer_names.clear()",
        "pass",
        "test_vllm_dry_run.py::test_a_list_that_vllm_cached_under_a_reused_id_is_not_read",
    ),
    "crediting both halves of a buffered pair": (
        "engine/losses.py::dropped",
        "if last is None or turns[name] > turns[last] or not is_in(name, last):",
        "if True:",
        "test_vllm_dry_run.py::test_several_models_in_one_process_do_not_share_missing_layers",
    ),
    "counting parameters that were left at init": (
        "verdict/stage_report.py::stage_report",
        "if report.verdict == LOADS and report.unaccounted:",
        "if False:",
        "test_vllm_dry_run.py::test_a_tensor_missing_from_the_checkpoint_is_found_although_vllm_says_nothing",
    ),
    "every caller follows the helper's signature": (
        "engine/guards.py::Guard.install",
        "self.callers is None or name",
        "name",
        "test_vllm_dry_run.py::test_mtp_must_follow_the_new_signature",
    ),
    "the dot at the end of a missing prefix": (
        "engine/selection.py::missing_prefixes",
        'return [f"{path}." for path',
        'return [f"{path}" for path',
        "test_vllm_plugin.py::test_layer_11_is_not_dropped_for_layer_1",
    ),
    "the check after loading": (
        "engine/load_format.py::StageModelLoader.check",
        "if not unknown:",
        "if True:",
        "test_vllm_plugin.py::test_a_filter_one_layer_too_wide_is_caught_by_the_books",
    ),
    "the check is made": (
        "engine/load_format.py::StageModelLoader.load_weights",
        "self.check(left(self.written, model, model_config), model_config)",
        "left(self.written, model, model_config)",
        "test_vllm_plugin.py::test_a_filter_one_layer_too_wide_is_caught_by_the_books",
    ),
    "missing prefixes afresh": (
        "engine/selection.py::missing_prefixes",
        'return [f"{path}." for path, module in model.named_modules() if isinstance(module, kinds)]',
        "return model_utils.get_pp_missing_layer_names(model)",
        "test_vllm_plugin.py::test_missing_prefixes_do_not_come_from_vllms_cache_by_id",
    ),
    "names are mapped before they are asked about": (
        "engine/selection.py::mapped",
        "return rename if mappers else None",
        "return None",
        "test_vllm_plugin.py::test_the_mappers_of_parts_that_load_themselves_are_applied_after_the_outer_one",
    ),
    "tied embeddings pass": (
        "engine/selection.py::Selection.__init__",
        'if getattr(text, "tie_word_embeddings", False) and',
        "if False and",
        "test_vllm_plugin.py::test_tied_embedding_and_head_pass_where_the_stage_has_one_of_them",
    ),
    "the drafter's rule is for its own numbering": (
        "engine/selection.py::prefixes_before_drafter",
        "and min(map(int, keys)) == num_hidden_layers",
        "",
        "test_vllm_plugin.py::test_a_drafter_numbered_after_the_main_model_is_not_handed_the_main_layers",
    ),
    "files with nothing for the stage stay closed": (
        "engine/load_format.py::StageModelLoader.choose",
        "if os.path.basename(file) not in unneeded",
        "",
        "test_vllm_plugin.py::test_no_file_is_opened_that_holds_nothing_for_the_stage",
    ),
    "a name that no index lists is asked about": (
        "engine/load_format.py::StageModelLoader.choose.wants",
        "return name in known or (name not in weight_map and selection.wants(prefix + name))",
        "return name in known",
        "test_vllm_plugin.py::test_a_name_that_the_index_does_not_list_is_still_handed_over",
    ),
    "a folder of consolidated files is left to vLLM": (
        "engine/load_format.py::StageModelLoader.locate",
        " and not consolidated",
        "",
        "test_vllm_plugin.py::test_files_are_located_as_the_default_loader_does",
    ),
    "of nested prefixes the outer one is kept": (
        "partition.py::Prefixes.__init__",
        "if not (self._sorted and prefix.startswith(self._sorted[-1])):",
        "if True:",
        "test_partition.py::test_prefixes_cover_what_startswith_says",
    ),
    "the same region written twice is one": (
        "engine/writes.py::_tally",
        "((times > 0) * area)",
        "(times * area)",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes[one shard twice]",
    ),
    "an expert that lacks a part": (
        "engine/writes.py::_Tally.is_whole",
        "return total + more >= self.size - padding",
        "return True",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes",
    ),
    "a header that lists a name twice": (
        "formats/header.py::read_header",
        "if twin is not None:",
        "if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "a header longer than the file": (
        "formats/header.py::read_header",
        "if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):",
        "if False:",
        "test_shards.py::test_a_cut_header_is_refused_before_it_is_read",
    ),
    "tensors without holes": (
        "formats/header.py::read_header",
        "        if start != at:",
        "        if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "tensors to the end of the file": (
        "formats/header.py::read_header",
        "    if at != size:",
        "    if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "bytes that fit the shape": (
        "formats/header.py::read_header",
        "if (end - start) * 8 != nbits[kind]",
        "if False and nbits[kind]",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "alignment of a tensor in its file": (
        "formats/shard.py::read_shard",
        "            if start % itemsize == 0:",
        "            if True:",
        "test_shards.py::test_any_tensors_at_any_alignment_come_back",
    ),
    "no reading ahead in a shard that is wanted in part": (
        "formats/shard.py::read_shard",
        "sparse = (len(names) < len(specs) or",
        "sparse = False and (len(names) < len(specs) or",
        "test_shards.py::test_of_a_shard_that_is_wanted_in_part_only_that_part_is_read",
    ),
    "the exercise looks at what is left behind": (
        "lab/exercise.py::ToyStage.hand_over",
        "if (self.loaded, self.pending) != before:",
        "if False:",
        "test_exercise.py::test_wrong_answers_differ_where_they_are_wrong",
    ),
    "the exercise asks for `loaded`": (
        "lab/exercise.py::ToyStage.hand_over",
        "return STORED if _fused(layer) in self.loaded else",
        "return STORED if True else",
        "test_exercise.py::test_wrong_answers_differ_where_they_are_wrong",
    ),
    "a parameter that a stage's forward pass lacks": (
        "lab/forward.py::_restored",
        "if parameter not in params:",
        "if False:",
        "test_forward.py::test_a_parameter_that_was_not_loaded_is_named",
    ),
    "the second shard of a fused parameter": (
        "lab/forward.py::_restored",
        "return weight[-rows:] if where.shard else weight[:rows]",
        "return weight[:rows]",
        "test_forward.py::test_logits_of_the_stages_are_those_of_the_unsplit_model_bit_for_bit",
    ),
    "a tensor that comes in two shards": (
        "engine/selection.py::Selection.count",
        "self.twice += sorted(self.names.intersection(handed))",
        "pass",
        "test_vllm_plugin.py::test_a_shard_counted_at_once_is_counted_like_its_tensors",
    ),
    "a rank that does not exist": (
        "verdict/dry_run.py::chosen_ranks",
        "if not 0 <= asked < deployment.pp:",
        "if False:",
        "test_vllm_dry_run.py::test_a_stage_that_does_not_exist_is_refused",
    ),
    "an unknown guard": (
        "verdict/deployment.py::Deployment.__post_init__",
        "if str(self.guard) not in GUARDS:",
        "if False:",
        "test_vllm_dry_run.py::test_bad_arguments_are_refused_before_a_process_is_started",
    ),
    "every request names the commit": (
        "formats/hub.py::_Repository._beginning.get",
        "revision=self.sha, endpoint",
        "revision=None, endpoint",
        "test_hub.py::test_one_commit_is_read_although_its_branch_moves",
    ),
    "the range of a request": (
        "formats/hub.py::_Repository._beginning.get",
        'f"bytes=0-{end - 1}"',
        '"bytes=0-"',
        "test_hub.py::test_no_weight_is_downloaded",
    ),
    "hanging up on a server without ranges": (
        "formats/hub_requests.py::Requests.body",
        "while len(data) < enough and",
        "while",
        "test_hub.py::test_a_server_that_ignores_the_range_is_hung_up_on",
    ),
    "a header longer than the first request": (
        "formats/hub.py::_Repository.read_tensors",
        "if len(head) < end <= min(size, MAX_HEADER_BYTES):",
        "if False:",
        "test_hub.py::test_a_header_longer_than_the_first_request_takes_a_second_one",
    ),
    "an answer that is compressed": (
        "formats/hub_requests.py::Requests._check",
        "if encoded:",
        "if False:",
        "test_hub.py::test_an_answer_that_is_compressed_all_the_same_is_not_unpacked",
    ),
    "a connection that is used again": (
        "formats/hub_requests.py::Requests.body",
        'end + ("Content-Length" in answer.headers)',
        "end",
        "test_hub.py::test_a_connection_serves_one_request_after_another",
    ),
    "the time for a repository": (
        "formats/hub_requests.py::Requests.run",
        "self.until - time.monotonic()",
        "20",
        "test_hub.py::test_a_server_that_drips_is_left_when_the_time_is_over[tiny-header]",
    ),
    "a server that asks to wait": (
        "formats/hub_requests.py::Requests.ask",
        "max(pause, asked)",
        "pause",
        "test_hub.py::test_a_server_that_asks_to_wait_is_heard[s]",
    ),
    "a secret that the server says": (
        "formats/hub_requests.py::Requests.without_secrets",
        'text = text.replace(secret, "***")',
        "pass",
        "test_hub.py::test_what_the_server_says_of_credentials_is_not_printed[token-403]",
    ),
    "user and password of an address": (
        "formats/hub_requests.py::Requests.without_secrets",
        're.sub(r"://[^/?#\\s]*@", "://***@", text)',
        "text",
        "test_hub.py::test_an_address_is_told_without_user_and_password[token]",
    ),
    "a secret in a warning that the library logs": (
        "formats/hub_requests.py::Requests._check",
        "printable(self.without_secrets(text))",
        "printable(text)",
        "test_hub.py::test_what_the_server_says_of_credentials_is_not_printed[token-403]",
    ),
    "the proxy on the way": (
        "formats/hub_requests.py::_proxy",
        "if kind is None or proxy_bypass(host):",
        "if True:",
        "test_hub.py::test_a_dead_proxy_is_named",
    ),
    "a commit is hex digits": (
        "formats/hub.py::_Repository.resolve.get",
        "or not COMMIT.fullmatch(said.sha)",
        "",
        "test_hub.py::test_an_answer_with_other_kinds_of_values",
    ),
    "a revision is one part of the address": (
        "formats/hub.py::_Repository.resolve.get",
        "safe=''",
        "safe='/'",
        "test_hub.py::test_a_revision_is_one_part_of_the_address",
    ),
    "a silent cut": (
        "formats/hub.py::_Repository._beginning.get",
        "if len(data) < min(end, size):",
        "if False:",
        "test_hub.py::test_two_faults_of_the_connection_are_survived_and_three_are_not",
    ),
    "a folder without shards": (
        "cli.py::open_checkpoint",
        ' or name.endswith(".safetensors")',
        "",
        "test_cli.py::test_a_folder_without_shards_is_read_as_a_config_and_says_so",
    ),
    "control characters in the output": (
        "words.py::printable",
        "if not char.isprintable() or",
        "if",
        "test_words.py::test_control_characters_are_escaped_and_nothing_else",
    ),
    "a row of spaces in a name": (
        "words.py::shown.line",
        're.sub(" (?= )", r"\\\\x20", printable(part))',
        "printable(part)",
        "test_words.py::test_spaces_cannot_push_words_to_where_a_terminal_begins_its_next_line",
    ),
    "a line of a report that holds a name as it was": (
        "words.py::joined",
        "map(printable, lines)",
        "lines",
        "test_words.py::test_a_name_that_came_into_a_line_as_it_was_ends_no_line",
    ),
    "an error in one line": (
        "errors.py::GlmppError.__init__",
        "shown(str(said), LONGEST)",
        "str(said)",
        "test_words.py::test_an_error_is_one_line_and_one_for_each_detail",
    ),
    "a name that no shell can be given": (
        "cli.py::pasted",
        "or printable(model) != model",
        "",
        "test_words.py::test_layouts_have_as_many_lines_with_any_words_as_with_plain_ones",
    ),
    "the kit's plugin in the line to paste": (
        "verdict/advice.py::command",
        "if plugins is not None and",
        "if False and",
        "test_words.py::test_the_line_to_paste_lets_vllm_load_the_kits_plugin[lora,mine-VLLM_PLUGINS=lora,mine,glmpp ]",
    ),
    "names in a server's log": (
        "engine/selection.py::Selection.unpaired",
        "{shown(name)}_scale_inv did not",
        "{name}_scale_inv did not",
        "test_vllm_plugin.py::test_words_of_a_checkpoint_forge_no_line_of_a_servers_log",
    ),
    "a stage that cannot be built when PP=1 cannot either": (
        "verdict/report.py::assemble",
        "report.verdict = CANNOT_TELL\n",
        "pass\n",
        "test_vllm_check.py::test_strict_refuses_stand_ins_and_cannot_tell",
    ),
    "strict": (
        "engine/stand_ins.py::StandIns.__init__",
        "[] if strict else CANDIDATES",
        "CANDIDATES",
        "test_vllm_check.py::test_strict_refuses_stand_ins_and_cannot_tell",
    ),
    "tensors held to the end": (
        "engine/stage_load.py::StageLoad.until_exhausted",
        "self.held = {} if lists_all or",
        "self.held = {} if True or",
        "test_vllm_check.py::test_a_guard_after_buffering_loads_and_what_it_holds_is_named",
    ),
    "going on after a death": (
        "engine/stage_load.py::StageLoad.run",
        "if self.survives(self.load_all) or not all_deaths:",
        "if self.survives(self.load_all) or True:",
        "test_vllm_check.py::test_all_goes_on_after_a_death_and_finds_every_one",
    ),
    "regions lie end to end, and not upon each other": (
        "engine/writes.py::_follow",
        "(starts[order[1:]] == ends[:-1]).all()",
        "True",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes[one shard twice]",
    ),
    "a dropped tensor is of the same layer": (
        "engine/losses.py::_layer",
        "return found and found[0]",
        "return None",
        "test_vllm_losses.py::test_a_dropped_tensor_is_taken_for_a_parameter_of_its_layer_and_shape_only",
    ),
    "a dropped tensor is of the same shape": (
        "engine/losses.py::losses",
        "if any(_fits(dropped[t], one) for one in shapes)",
        "",
        "test_vllm_losses.py::test_a_dropped_tensor_is_taken_for_a_parameter_of_its_layer_and_shape_only",
    ),
    "the bytes have the last word": (
        "engine/losses.py::confirmed",
        "and _holds(tensors[name], stored):",
        "and False:",
        "test_vllm_losses.py::test_a_finding_that_the_bytes_do_not_confirm_is_none",
    ),
    "tensors of other stages are no losses": (
        "engine/losses.py::losses",
        "if not elsewhere.cover(place) and not is_elsewhere(name, experts):",
        "if True:",
        "test_vllm_losses.py::test_the_load_format_ends_the_load_in_the_same_words[a tie that is not made]",
    ),
    "what PP=1 leaves at init is no fault of the pipeline": (
        "verdict/sweep.py::fails",
        "return not set(stage.unaccounted) <= set(left)",
        "return True",
        "test_vllm_sweep.py::test_a_head_that_is_not_tied_counts_and_its_bytes_are_shown_at_every_size",
    ),
    "an exit code for what leaves parameters at init": (
        "verdict/text.py::overall",
        "(INCOMPLETE, NO_FIT, CANNOT_TELL)",
        "(NO_FIT, CANNOT_TELL)",
        "test_vllm_check.py::test_a_tensor_that_the_checkpoint_lacks_is_not_called_a_pipeline_fault",
    ),
    "a field of its type and in its range": (
        "formats/glm5.py::glm_config",
        "    check_fields(config, FIELDS, label)",
        "    pass",
        "test_ways_in.py::test_a_field_of_a_bare_config_has_a_type_and_a_range",
    ),
    "a number that is none": (
        "formats/glm5.py::glm_config",
        "if isinstance(part, float) and not math.isfinite(part):",
        "if False:",
        "test_ways_in.py::test_nothing_in_a_bare_config_is_nan_or_infinite",
    ),
    "a name with two values": (
        "formats/files.py::parse_json",
        "if first.setdefault(name, value) != value and (once is None or name in once):",
        "if False:",
        "test_ways_in.py::test_a_name_that_is_read_has_one_value",
    ),
    "layers and experts that no name speaks of": (
        "checkpoint.py::Checkpoint._check_counts",
        "if number > most:",
        "if False:",
        "test_ways_in.py::test_far_more_layers_or_experts_than_names_are_refused_before_anything_is_built",
    ),
    "a file that is none": (
        "formats/files.py::opened",
        "if kind != stat.S_IFREG:",
        "if False:",
        "test_ways_in.py::test_what_an_index_names_is_a_file",
    ),
    "an entry that would keep vLLM waiting": (
        "formats/files.py::_check_entry",
        "in _WAITS:",
        "in ():",
        "test_ways_in.py::test_a_folder_with_a_fifo_or_a_device_is_refused_whatever_it_is_called",
    ),
    "a config of any size": (
        "formats/files.py::_check_size",
        "if size > most:",
        "if False:",
        "test_ways_in.py::test_a_json_file_has_a_limit_before_it_is_read",
    ),
    "a product of sizes": (
        "verdict/deployment.py::Deployment.__post_init__",
        "if self.gpus > MAX_GPUS:",
        "if False:",
        "test_ways_in.py::test_what_is_no_number_of_gpus_is_refused_by_name",
    ),
    "a pattern that is no list": (
        "engine/load_format.py::StageModelLoader.__init__",
        "not isinstance(patterns, list | tuple) or",
        "",
        "test_vllm_plugin.py::test_an_option_of_another_type_is_refused_before_anything_is_loaded",
    ),
    "the bound of a best cut": (
        "partition.py::best_split",
        "if (here := cost(start, stop)) > bound:",
        "if (here := cost(start, stop)) > bound * 2:",
        "test_partition.py::test_the_best_split_is_the_first_of_those_with_the_least_sum_of_squares",
    ),
    "paths out of the folder": (
        "formats/index.py::shard_path",
        "    if leads_out:",
        "    if False:",
        "test_untrusted.py::test_an_index_cannot_lead_out_of_the_folder",
    ),
    "links out of the folder": (
        "formats/index.py::shard_path",
        "if not leads_out and (os.path.islink(path)",
        "if False and (os.path.islink(path)",
        "test_untrusted.py::test_an_index_cannot_lead_out_of_the_folder",
    ),
    "shards that the index does not name": (
        "checkpoint.py::Checkpoint.from_directory",
        "if stray := unlisted(files, listed):",
        "if False:",
        "test_untrusted.py::test_a_shard_that_the_index_does_not_name_is_an_error_and_another_file_is_not",
    ),
    "shapes that overflow": (
        "formats/header.py::read_header",
        "if math.prod(filter(None, info.shape)) >= 2**63:",
        "if False:",
        "test_untrusted.py::test_a_shape_whose_product_overflows_is_an_error",
    ),
    "bytes of a tensor without a dimension": (
        "ledger.py::digest",
        ".contiguous().view(-1)  # a scalar",
        ".contiguous()  # a scalar",
        "test_loader.py::test_two_digests_agree_exactly_if_dtype_shape_and_bytes_do",
    ),
    "layers given as a list": (
        "formats/config.py::_layers",
        "if key in LAYER_LISTS and",
        "if False and",
        "test_checkpoint.py::test_layers_are_counted_by_number_or_by_list",
    ),
    "the field that decides how many layers": (
        "formats/config.py::_layers",
        "DECISIVE.get(kind, ()) if",
        "() if",
        "test_checkpoint.py::test_layers_are_counted_by_number_or_by_list",
    ),
    "bits that fill no byte": (
        "formats/header.py::read_header",
        "if (end - start) * 8 != nbits[kind]:",
        "if end - start != nbits[kind] // 8:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "two elements of F4 in one of torch's": (
        "formats/tensor.py::in_torch",
        'if dtype != "F4":',
        "if True:",
        "test_shards.py::test_every_type_that_can_be_saved_comes_back_as_the_library_reads_it",
    ),
    "a dtype that only the library knows": (
        "formats/tensor.py::bits",
        "for size in range(1, 129) if",
        "for size in () if",
        "test_shards.py::test_a_dtype_that_only_the_library_knows_goes_through_the_library",
    ),
    "a dtype that torch has no type for": (
        "formats/shard.py::_by_library",
        "    except Exception as error:  # any: of a type",
        "    except ImportError as error:  # any: of a type",
        "test_shards.py::test_a_header_of_any_dtype_is_read_or_refused_as_the_library_does",
    ),
    "the child works elsewhere": (
        "verdict/server.py::Server._start",
        "cwd=ELSEWHERE,",
        "",
        "test_vllm_child.py::test_the_child_imports_nothing_from_where_the_kernel_works",
    ),
    "another user is not asked": (
        "verdict/server.py::Server.connect",
        "if not peer_is_this_user(connection):",
        "if False:",
        "test_vllm_child.py::test_another_users_process_is_not_asked",
    ),
    "another user is not served": (
        "engine/clients.py::Clients.accept",
        "if not peer_is_this_user(client):",
        "if False:",
        "test_faults.py::test_another_user_is_not_served",
    ),
    "a fork ends with who asked for it": (
        "engine/clients.py::Clients.received",
        "os.kill(pid, signal.SIGKILL)",
        "return None",
        "test_faults.py::test_a_fork_ends_when_the_connection_of_its_own_is_closed_and_no_other_does",
    ),
    "a fork that has ended is not killed": (
        "engine/clients.py::Clients.reap",
        "del self.forks[client]",
        "pass",
        "test_faults.py::test_a_fork_that_has_ended_by_itself_is_let_go_of_and_its_number_is_not_killed",
    ),
    "an import that nobody waits for": (
        "engine/clients.py::Clients.watched",
        "            alone()\n",
        "",
        "test_faults.py::test_a_process_that_imports_ends_with_the_last_of_its_clients",
    ),
    "a server that went before its fork was tied to it": (
        "engine/clients.py::end_with_parent",
        "if os.getppid() != parent:",
        "if False:",
        "test_faults.py::test_a_fork_whose_server_went_before_it_was_tied_to_it_ends",
    ),
    "a fault of the kit is not the connection's": (
        "formats/hub_requests.py::Requests.ask",
        "except NoAnswer as none:",
        "except Exception as none:",
        "test_hub.py::test_a_fault_of_the_kit_is_not_told_as_one_of_the_connection",
    ),
    "a server that has ended is asked for its last words": (
        "verdict/forks.py::Fork.last_words",
        "if self.server.ended() else",
        "if False else",
        "test_vllm_child.py::test_a_process_that_breaks_off_while_it_imports_is_asked_for_its_last_words",
    ),
    "a process that runs other code is not asked": (
        "verdict/server.py::Server._shared",
        "if (unquote(name), package) == (target, str(PACKAGE)):",
        "if package:",
        "test_vllm_child.py::test_nobody_is_served_by_a_process_that_has_ended_or_runs_other_code",
    ),
    "a GPU of another memory is another": (
        "gpus.py::default_target",
        "and memory in (gpu.memory, *[None] * gpu.limits.integrated):",
        "or memory is None:",
        "test_gpus.py::test_the_gpu_that_is_here_is_the_default_with_its_own_title_architecture_and_memory",
    ),
    "GPUs that differ": (
        "gpus.py::default_target",
        "if len(found) > 1:",
        "if not found:",
        "test_gpus.py::test_what_the_user_hides_is_here_all_the_same",
    ),
    "an nvidia-smi that fails": (
        "gpus.py::_nvidia_smi",
        'if code and "no devices were found" not in said.lower():',
        "if False:",
        "test_gpus.py::test_a_driver_that_does_not_say_which_gpu_is_here_is_an_error_that_asks_for_it",
    ),
    "the memory of a card as it is sold": (
        "gpus.py::gpu_of",
        "if memory == gpu.memory if mib else number == gpu.sold_as:",
        "if memory == gpu.memory:",
        "test_gpus.py::test_a_memory_in_gb_is_the_cards_and_in_mib_it_is_itself",
    ),
    "a target in an address": (
        "verdict/server.py::Server.share",
        'quote(each.target, safe="")',
        "each.target",
        "test_gpus.py::test_a_server_is_found_by_its_targets_name_whatever_is_in_it",
    ),
    "shared memory of an old GPU": (
        "gpus.py",
        '"sm75": Architecture(64, 64, 1024',
        '"sm75": Architecture(64, 65, 2048',
        "test_gpus.py::test_every_gpu_of_the_table_has_its_architectures_limits",
    ),
    "servers that are started together wait for each other": (
        "engine/child.py::main",
        "fcntl.lockf(turn, fcntl.LOCK_EX)",
        "pass",
        "test_vllm_child.py::test_those_that_are_started_together_import_one_after_another",
    ),
    "a distribution of another name": (
        "engine/contract.py::_installed",
        'packages_distributions().get("vllm", ())',
        "()",
        "test_vllm_child.py::test_a_distribution_of_another_name_that_provides_the_module_counts",
    ),
    "padding is not all that may stay": (
        "engine/writes.py::_Tally.is_whole",
        "return bool(lacking.sum() <= more)",
        "return True",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes[an expert missing, the padding of others filled]",
    ),
    "rows of a vocabulary": (
        "engine/padding.py::_filled",
        "rows = held.num_org_elements + held.num_added_elements",
        "rows = held.num_org_elements // 2",
        "test_vllm_check.py::test_rows_that_vllm_adds_to_a_vocabulary_may_stay_at_init_and_others_may_not",
    ),
    "a scale that comes after its weight was not waited for": (
        "engine/losses.py::dropped",
        "turns[name] > turns[last] or ",
        "",
        "test_vllm_losses.py::test_a_half_that_comes_after_the_other_was_stored_was_not_waited_for",
    ),
    "a weight is not stored by a scale that has a place of its own": (
        "engine/losses.py::dropped.is_in",
        'count > more and "scale" not in leaf and path not in scaled',
        "True",
        "test_vllm_losses.py::test_what_the_second_half_of_a_pair_writes_is_the_firsts_only_if_the_pair_is_stored_as_one",
    ),
    "where an index writes": (
        "engine/writes.py::_kernel",
        "places = _PLACES.get(name)",
        "places = None",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes[one row by its index]",
    ),
    "an index without data": (
        "engine/writes.py::_place",
        "(IndexError, RuntimeError)",
        "ZeroDivisionError",
        "test_loader.py::test_an_index_without_data_is_no_verdict[0]",
    ),
    "a number of a storage that another tensor has now": (
        "engine/writes.py::WriteRecorder.__init__",
        "self._alive.append(StorageWeakRef(tensor.untyped_storage()))",
        "pass",
        "test_loader.py::test_a_storage_that_is_given_back_is_no_longer_the_parameters",
    ),
    "a stage that wrote at an index is tried again with data": (
        "engine/stage.py::Stages.load",
        'if not load.deaths and result["unplaced"]:',
        "if False:",
        "test_vllm_losses.py::test_where_data_cannot_be_made_up_an_index_leaves_the_verdict_open",
    ),
    "padding is not compared": (
        "verdict/no_false_alarm.py::_by_digest",
        "name not in padded and ",
        "",
        "test_no_false_alarm.py::test_a_stage_loaded_by_both[other bytes where vLLM pads]",
    ),
    "only the last output is padding": (
        "engine/padding.py::_filled",
        "and outputs[-1] == pad_size",
        "",
        "test_vllm_plugin.py::test_padding_is_what_vllms_own_attributes_say",
    ),
    "stand-ins are taken away between runs": (
        "engine/stage.py::Stages.attempt",
        "self.builder.stand_ins.reset()",
        "pass",
        "test_vllm_check.py::test_what_stood_in_for_a_part_of_one_stage_is_gone_when_the_next_is_built",
    ),
    "the backend that vLLM remembers is forgotten": (
        "engine/stand_ins.py::_sparse_mla_backend.remove",
        "selector._cached_get_attn_backend.cache_clear()",
        "pass",
        "test_vllm_child.py::test_stages_side_by_side_are_told_the_same_as_one_after_another",
    ),
    "forks end with the server": (
        "engine/clients.py::end_with_parent",
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL)",
        "pass",
        "test_faults.py::test_a_fork_ends_with_the_process_that_it_came_from",
    ),
    "stages that end alike": (
        "verdict/text.py::as_text",
        "id(stage) if alone else",
        "id(stage) if True else",
        "test_vllm_check.py::test_what_the_load_format_cures_is_said_where_no_release_is_known_to",
    ),
    "a fault that is known": (
        "verdict/advice.py::known_fault",
        "== found), None)",
        "!= found), None)",
        "test_vllm_check.py::test_what_the_load_format_does_not_cure_is_said_with_where_it_still_dies",
    ),
    "bars are for those who watch": (
        "progress.py::progress_bar",
        "is_watched() if show is None else show",
        "show is not False",
        "test_cli.py::test_bars_are_for_a_terminal_and_a_notebook_and_not_for_a_log",
    ),
    "a shard that changes while it is read": (
        "formats/shard.py::read_shard",
        "if after is None or any(",
        "if False and any(",
        "test_faults.py::test_a_shard_that_changes_while_it_is_read_is_an_error",
    ),
    "somebody else's checkpoint": (
        "synthetic.py::write_checkpoint",
        "        if overwrite:\n            _check_replaceable(directory)  # still",
        "        if True:\n            pass",
        "test_faults.py::test_of_two_runs_that_write_the_same_folder_one_wins_and_the_other_is_told",
    ),
    "halves that came alone, in the ledger": (
        "ledger.py::Ledger.check",
        "for came, missing in self.unpaired.items():",
        "for came, missing in ():",
        "test_loader.py::test_the_books_do_not_close_when_half_of_a_pair_is_held_back",
    ),
    "a tensor that would be spread over its rows": (
        "loader.py::_row_writer.write",
        "if rows.shape != tensor.shape:",
        "if False:",
        "test_loader.py::test_a_tensor_of_another_shape_is_an_error_with_its_name",
    ),
    "the shard of a rank": (
        "engine/groups.py::pretend",
        '"_TP": ranks[place.replica, place.rank],',
        '"_TP": mine,',
        "test_vllm_layouts.py::test_the_ranks_of_a_layout_put_together_are_the_single_rank_bit_for_bit[2-1-False]",
    ),
    "the replica of a rank": (
        "engine/groups.py::pretend",
        '"_DP": ranks[:, place.rank, place.shard],',
        '"_DP": mine,',
        "test_vllm_layouts.py::test_replicas_hold_the_same_but_for_the_experts_that_they_share[True]",
    ),
    "ranks are numbered as vLLM does it": (
        "engine/answers.py::serve",
        "pretend(place)",
        'pretend(Place.of({**run, "shard": 0}))',
        "test_vllm_layouts.py::test_four_real_processes_in_gloo_groups_say_and_hold_the_same[False]",
    ),
    "a rank that waits is not dead": (
        "engine/failures.py::kind_of",
        "or RANKS_AWAY in str(error)",
        "or False",
        "test_vllm_layouts.py::test_a_rank_that_waits_for_others_is_not_told_dead[building]",
    ),
    "a rank that waits while it loads is not dead": (
        "engine/failures.py::kind_of",
        "if any(map(_is_of_the_pretence, causes)):",
        "if False:",
        "test_vllm_layouts.py::test_a_rank_that_waits_for_others_is_not_told_dead[loading]",
    ),
    "a layout refused on the CPU": (
        "engine/stage.py::Stages.attempt",
        "or self.is_layout_refused(place, device)",
        "or False",
        "test_vllm_layouts.py::test_a_layout_that_vllm_refuses_is_refused_in_its_words_before_anything_is_read",
    ),
    "another rank's expert in the ledger": (
        "engine/account.py::Account.column",
        "OTHER_RANK if is_elsewhere(name, self.experts) else UNEXPECTED",
        "UNEXPECTED",
        "test_vllm_layouts.py::test_the_ranks_of_a_layout_put_together_are_the_single_rank_bit_for_bit[2-1-True]",
    ),
    "the map of experts has its numbers": (
        "engine/stand_ins.py::expert_map_on_cpu",
        'with torch.device("cpu"):',
        'with torch.device("meta"):',
        "test_vllm_layouts.py::test_json_of_a_layout_follows_the_schema",
    ),
    "experts of other ranks are not handed over": (
        "engine/selection.py::Selection.among",
        "if self.experts else here",
        "if False else here",
        "test_vllm_layouts.py::test_the_load_format_hands_a_rank_what_it_can_hold_and_the_same_is_loaded[4-1-True]",
    ),
    "experts are another rank's in their own layer only": (
        "engine/experts.py::is_not_needed",
        "maps.get(stem + EXPERTS[:-1])",
        "held_experts(maps)",
        "test_vllm_plugin.py::test_of_another_ranks_experts_the_weights_are_dropped_and_nothing_else",
    ),
    "copies of experts": (
        "engine/selection.py::Selection.__init__",
        "{} if balanced else",
        "{} if False else",
        "test_vllm_plugin.py::test_where_vllm_balances_experts_a_rank_may_need_any",
    ),
    "the control has as many shards": (
        "verdict/dry_run.py::dry_run",
        '"size": 1}',
        '"size": 1, "shards": 1}',
        "test_vllm_layouts.py::test_by_default_the_first_and_the_last_shard_of_each_stage_are_run_and_the_control_has_as_many",
    ),
    "no shards at all": (
        "verdict/deployment.py::Deployment.__post_init__",
        "whole(name, getattr(self, name), 1, MAX_GPUS)",
        "getattr(self, name)",
        "test_ways_in.py::test_what_is_no_number_of_gpus_is_refused_by_name",
    ),
    "ranks that are not there": (
        "verdict/dry_run.py::is_rank",
        "type(at) is int and 0 <= at < size",
        "True",
        "test_ways_in.py::test_ranks_are_looked_up_at_once_and_what_is_none_is_an_error",
    ),
    "experts in the line to paste": (
        "verdict/advice.py::layout_words",
        '["--enable-expert-parallel"] if deployment.ep else []',
        "[]",
        "test_vllm_layouts.py::test_the_command_names_the_ranks_and_its_line_to_paste_has_the_layout",
    ),
    "of an architecture's variants the worst": (
        "verdict/release_sweep.py::known_of",
        "told[0] if told",
        "told[-1] if told",
        "test_releases.py::test_of_the_variants_the_worst_is_kept_with_where_it_dies",
    ),
    "no release for what the checkpoint lacks": (
        "verdict/advice.py::nearest_in_record",
        'if report.guard != "installed" or lacks:',
        "if False:",
        "test_vllm_check.py::test_a_tensor_that_the_checkpoint_lacks_is_not_called_a_pipeline_fault",
    ),
    "a release that loads it has no nearest": (
        "verdict/releases.py::Record.nearest",
        "or at in loading",
        "or False",
        "test_releases.py::test_the_nearest_release_that_loads[0.28.1]",
    ),
    "nothing is made of what is no list of names": (
        "verdict/releases.py::architectures",
        "names if isinstance(names, list) else ()",
        "names",
        "test_releases.py::test_what_a_config_names_decides_whatever_stands_there",
    ),
    "a refusal of what stock loads": (
        "verdict/no_false_alarm.py::compare_stage",
        "if stock.verdict == LOADS:",
        "if False:",
        "test_no_false_alarm.py::test_a_stage_loaded_by_both[refused for nothing]",
    ),
    "a refusal that the bytes do not confirm": (
        "verdict/no_false_alarm.py::compare_stage",
        "if int(refusal[1]) != len(ours.unaccounted):",
        "if False:",
        "test_no_false_alarm.py::test_a_stage_loaded_by_both[more named than the bytes confirm]",
    ),
    "a name that was elsewhere before": (
        "engine/contract.py::_failures",
        "BEFORE.get(name)",
        "None",
        "test_vllm_contract.py::test_a_name_that_was_elsewhere_before_is_found_there",
    ),
    "a fix on a release that it was not tried on": (
        "engine/fixes/__init__.py::chosen",
        "if not tried_on(name, release):",
        "if False:",
        "test_fixes.py::test_a_release_that_a_fix_was_not_tried_on_is_refused_and_nothing_is_applied[0.34.0]",
    ),
    "a release is all of its digits": (
        "engine/fixes/__init__.py::tried_on",
        "in fix(name).RELEASES",
        'in "".join(fix(name).RELEASES)',
        "test_fixes.py::test_a_release_that_a_fix_was_not_tried_on_is_refused_and_nothing_is_applied[0.33]",
    ),
    "a fix for another model": (
        "engine/fixes/__init__.py::chosen",
        "if not set(fix(name).ARCHITECTURES) & set(architectures):",
        "if False:",
        "test_fixes.py::test_a_fix_for_another_model_is_refused_by_name_and_left_out_of_known",
    ),
    "a fix that is unknown": (
        "engine/fixes/__init__.py::named",
        "if unknown :=",
        "if [] and",
        "test_fixes.py::test_an_unknown_name_is_refused_wherever_it_is_given",
    ),
    "no fix by itself": (
        "verdict/deployment.py::Deployment",
        "fixes: tuple[str, ...] | list[str] | str = ()",
        'fixes: tuple[str, ...] | list[str] | str = ("known",)',
        "test_fixes.py::test_none_is_active_by_itself",
    ),
    "a fix once in a process": (
        "engine/fixes/__init__.py::apply",
        "if name not in _applied:",
        "if True:",
        "test_fixes.py::test_a_fix_is_applied_once_in_a_process_and_said_to_be_active_each_time",
    ),
    "fixes in the line to paste": (
        "verdict/advice.py::serve_line",
        "if deployment.fixes:",
        "if False:",
        "test_fixes.py::test_the_line_to_paste_has_the_fixes",
    ),
    "no fix by itself in the load format": (
        "engine/load_format.py::StageModelLoader.__init__",
        'extra.pop("fixes", [])',
        'extra.pop("fixes", "known")',
        "test_vllm_fixes.py::test_the_load_format_applies_what_is_asked_for_before_the_model_is_built[None-active0]",
    ),
    "fixes before the model is built": (
        "engine/load_format.py::StageModelLoader.load_model",
        "        self.fix(model_config)\n        return super().load_model("
        "vllm_config=vllm_config, model_config=model_config, prefix=prefix)",
        "        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)\n"
        "        self.fix(model_config)\n        return model",
        "test_vllm_fixes.py::test_the_load_format_applies_what_is_asked_for_before_the_model_is_built[known-active2]",
    ),
    "a drafter has fixes of its own": (
        "engine/load_format.py::StageModelLoader.fix",
        "if is_drafter(model_config) and fixes.KNOWN not in wanted:",
        "if False:",
        "test_vllm_fixes.py::test_a_drafter_is_a_model_of_its_own_and_a_fix_for_the_main_model_is_no_error",
    ),
    "names that vLLM has moved": (
        "engine/contract.py::require",
        "    if gone:\n",
        "    if False:\n",
        "test_vllm_contract.py::test_a_name_that_has_moved_is_named_with_the_release_it_was_last_seen_in_and_what_still_works",
    ),
}


# What the tests and the package import, other than the package itself.
PLAIN = ["torch", "numpy", "pandas", "matplotlib.pyplot", "msgspec", "safetensors.torch", "huggingface_hub.hf_api"]
PLAIN += ["transformers.models.glm_moe_dsa.modeling_glm_moe_dsa", "hypothesis.strategies"]
PLAIN += ["pytest", "xdist.plugin", "anyio.pytest_plugin"]
# Asked for as a helper of the dry run, so that it is imported in a fork of the server: tells what vLLM's import pulled in.
IMPORTED = """import json, pathlib, sys
from glmpp.loader import load_fp8_indexer_wk as helper
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps([name for name in sys.modules if sys.modules[name]]))"""


class Template:
    """Where mutants are forked from."""

    def __init__(self, modules: list[str]):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        # As in the dry run's server: some of it is read by what is imported here.
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment |= {"VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        environment |= {"HUMMING_DISABLE_PARALLEL_BUILD": "1"}
        command = [sys.executable, ROOT / "tests" / "template.py"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.send(modules)

    def send(self, content: list) -> None:
        self.process.stdin.write(json.dumps(content) + "\n")
        self.process.stdin.flush()

    def run(self, folder: Path, node: str) -> tuple[int, str]:
        """Exit code and output of a test, run with the package that lies in the folder."""
        self.send([str(folder), str(ROOT / "tests" / node)])
        return int(self.process.stdout.readline()), (folder / "said").read_text()

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def plain():
    template = Template(PLAIN)
    yield template
    template.close()


@pytest.fixture(scope="module")
def with_vllm(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("imported")
    (folder / "imported.py").write_text(IMPORTED)
    dry_run(tiny, Deployment(pp=1, guard=Helper(f"{folder / 'imported.py'}:helper")), progress=False)
    template = Template([*PLAIN, *json.loads((folder / "imported.json").read_text())])
    yield template
    template.close()


def copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "glmpp", folder / "glmpp")  # with the bytecode of what is not changed
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def lines_of(source: str, name: str) -> slice:
    """The lines of a function or class by its qualified name, decorators included; "": of the whole file."""
    node = ast.parse(source)
    if not name:
        return slice(None)
    for part in name.split("."):
        (node,) = (one for one in ast.iter_child_nodes(node) if getattr(one, "name", None) == part)
    return slice(min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1, node.end_lineno)


def take_away(guard: str, package: Path) -> str:
    """Change a copy of the package; returns the test that watches over the guard."""
    place, old, new, node = MUTATIONS[guard]
    file, _, name = place.partition("::")
    source = (package / file).read_text()
    lines = source.splitlines(keepends=True)
    there = lines_of(source, name)
    text = "".join(lines[there])
    assert old in text, f"{place} has changed: bring the mutation {guard!r} up to date"
    lines[there] = [text.replace(old, new)]
    (package / file).write_text("".join(lines))
    return node


def cases(vllm: bool) -> list[str]:
    return [guard for guard, case in MUTATIONS.items() if ("test_vllm" in case[3]) == vllm]


def must_fail(template: Template, folder: Path, guard: str) -> None:
    node = take_away(guard, copy_of_the_package(folder) / "glmpp")
    code, said = template.run(folder, node)
    assert code == 1, f"{node} still passes without {guard}\n{said[-3000:]}"
    assert "1 failed" in said, said[-3000:]


@pytest.mark.parametrize("guard", MUTATIONS)
def test_a_mutation_names_a_line_and_a_test_that_are_there(guard):
    place, old, _, node = MUTATIONS[guard]
    file, _, name = place.partition("::")
    source = (ROOT / "glmpp" / file).read_text()
    assert old in "".join(source.splitlines(keepends=True)[lines_of(source, name)]), place
    file, _, test = node.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), node


@pytest.mark.mutation
@pytest.mark.parametrize("guard", cases(vllm=False))
def test_without_the_guard_its_test_fails(guard, plain, tmp_path):
    must_fail(plain, tmp_path, guard)


@pytest.mark.mutation
@pytest.mark.vllm
@pytest.mark.parametrize("guard", cases(vllm=True))
def test_without_the_guard_its_test_on_vllm_fails(guard, with_vllm, tmp_path):
    must_fail(with_vllm, tmp_path, guard)


def must_pass(template: Template, folder: Path, node: str) -> None:
    code, said = template.run(copy_of_the_package(folder), node)
    assert code == 0 and " passed" in said, said[-3000:]


@pytest.mark.mutation
def test_with_every_guard_in_place_a_test_passes(plain, tmp_path):
    """So that it is not the way of running them that makes the mutants fail."""
    must_pass(plain, tmp_path, MUTATIONS["the skip"][3])


@pytest.mark.mutation
@pytest.mark.vllm
def test_with_every_guard_in_place_a_test_on_vllm_passes(with_vllm, tmp_path):
    must_pass(with_vllm, tmp_path, MUTATIONS["every caller follows the helper's signature"][3])
