"""Take a guard away and the test that claims to watch it must fail.

Each case changes one piece of source in a copy of the package and runs one test against the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

SKIP = """    if name.startswith(tuple(pp_missing_layer_names)):
        return True
    layer ="""

# file, source to replace, replacement, test that must fail
MUTATIONS = {
    "the skip": (
        "loader.py",
        SKIP,
        "    layer =",
        "test_loader.py::test_a_foreign_layer_leaves_buffer_parameters_and_loaded_untouched",
    ),
    "the skip moved behind the buffering": (
        "loader.py",
        SKIP + ' name.rsplit(".wk.", 1)[0]\n    pending.setdefault(layer, {})[part] = tensor\n',
        '    layer = name.rsplit(".wk.", 1)[0]\n    pending.setdefault(layer, {})[part] = tensor\n'
        "    if name.startswith(tuple(pp_missing_layer_names)):\n        return True\n",
        "test_loader.py::test_a_foreign_layer_leaves_buffer_parameters_and_loaded_untouched",
    ),
    "the pair is forgotten once stored": (
        "loader.py",
        "pending.pop(layer)",
        "pending[layer]",
        "test_loader.py::test_every_arrival_order_of_two_layers_gives_the_same_parameters",
    ),
    "the dot at the end of a layer prefix": (
        "partition.py",
        'f"{self.layer_list}.{index}."',
        'f"{self.layer_list}.{index}"',
        "test_partition.py::test_a_missing_layer_1_does_not_hide_layer_11",
    ),
    "all digits of a layer number": (
        "partition.py",
        "return int(number)",
        "return int(number[:1] or 0)",
        "test_partition.py::test_stage_with_layer_1_does_not_own_layer_11",
    ),
    "the tied embedding on the last stage": (
        "partition.py",
        "self.is_first or (self.tied and self.is_last)",
        "self.is_first",
        "test_partition.py::test_every_tensor_of_the_model_has_an_owner",
    ),
    "more stages than layers": (
        "partition.py",
        "if pp_size > num_layers:",
        "if False:",
        "test_partition.py::test_more_stages_than_layers_is_an_error_for_stages",
    ),
    "wrong number of layer counts": (
        "partition.py",
        "if len(counts) != pp_size:",
        "if False:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "wrong sum of layer counts": (
        "partition.py",
        "if sum(counts) != num_layers or min(counts) < 0:",
        "if min(counts) < 0:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "negative layer counts": (
        "partition.py",
        "if sum(counts) != num_layers or min(counts) < 0:",
        "if sum(counts) != num_layers:",
        "test_partition.py::test_bad_layer_counts_are_clear_errors",
    ),
    "zero layers or stages": (
        "partition.py",
        "if pp_size < 1 or num_layers < 1:",
        "if False:",
        "test_partition.py::test_nothing_to_split_is_an_error",
    ),
    "a scale grid that does not fit": (
        "dequant.py",
        "if shape == blocks:",
        "if len(shape) == 2:",
        "test_dequant.py::test_a_grid_that_does_not_fit_names_both_shapes",
    ),
    "bad scales": (
        "dequant.py",
        "if check and not",
        "if False and not",
        "test_dequant.py::test_a_bad_scale_is_an_error_unless_asked_for",
    ),
    "E8M0 code 255": (
        "dequant.py",
        "codes == 255, math.nan",
        "codes == 256, math.nan",
        "test_dequant.py::test_e8m0_code_255_is_nan_and_refused",
    ),
    "dtype and rank of the weight": (
        "dequant.py",
        "if weight.dtype != FP8 or weight.ndim != 2:",
        "if False:",
        "test_dequant.py::test_a_weight_that_is_not_an_fp8_matrix_is_an_error",
    ),
    "the shape of out": (
        "dequant.py",
        "elif out.shape != weight.shape:",
        "elif False:",
        "test_dequant.py::test_out_is_written_in_place_and_nothing_else_is",
    ),
    "the scale of a block of zeros": (
        "dequant.py",
        "torch.where(scale > 0, scale, 1.0)",
        "scale",
        "test_dequant.py::test_a_block_of_zeros_survives",
    ),
    "the ledger against ownership": (
        "loader.py",
        "if column != expected:",
        "if False:",
        "test_loader.py::test_a_guard_that_is_one_layer_too_wide_is_caught",
    ),
    "the ledger against the checkpoint": (
        "loader.py",
        "if self.tensors.keys() != checkpoint.keys():",
        "if False:",
        "test_loader.py::test_a_tensor_nobody_owns_is_unexpected_and_the_books_do_not_close",
    ),
    "parameters left at init": (
        "loader.py",
        "if left := sorted(set(self.left_at_init) - set(may_stay_at_init)):",
        "if left := []:",
        "test_loader.py::test_a_parameter_left_at_init_is_caught_unless_accounted_for",
    ),
    "parameters written twice": (
        "loader.py",
        "if self.written_twice:",
        "if False:",
        "test_loader.py::test_a_parameter_written_twice_is_caught",
    ),
    "pairs held back are not loaded": (
        "loader.py",
        "for part in parts:",
        "for part in ():",
        "test_loader.py::test_the_books_do_not_close_when_half_of_a_pair_is_held_back",
    ),
    "the write under another name": (
        "checkpoint.py",
        'partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))',
        "directory.mkdir(); partial = directory",
        "test_checkpoint.py::test_the_folder_appears_only_when_it_is_complete",
    ),
    "cleaning up after a failed write": (
        "checkpoint.py",
        "shutil.rmtree(partial, ignore_errors=True)",
        "pass",
        "test_checkpoint.py::test_a_failed_write_leaves_nothing",
    ),
    "an existing folder": (
        "checkpoint.py",
        "if directory.exists() and not overwrite:",
        "if False:",
        "test_checkpoint.py::test_an_existing_folder_is_not_overwritten_unasked",
    ),
    "a missing shard": (
        "checkpoint.py",
        "            if not path.exists():",
        "            if False:",
        "test_checkpoint.py::test_a_missing_shard_is_named_with_a_tensor_it_should_hold",
    ),
    "index entries the shard lacks": (
        "checkpoint.py",
        "if missing := sorted(listed - held):",
        "if missing := []:",
        "test_checkpoint.py::test_an_index_that_names_a_tensor_its_shard_does_not_hold",
    ),
    "tensors the index lacks": (
        "checkpoint.py",
        "if extra := sorted(held - listed):",
        "if extra := []:",
        "test_checkpoint.py::test_a_tensor_that_the_index_does_not_name",
    ),
    "another model type": (
        "checkpoint.py",
        'if config.get("model_type") != "glm_moe_dsa":',
        "if False:",
        "test_checkpoint.py::test_from_config_of_another_model_is_an_error",
    ),
    "NaN codes take the slow path": (
        "dequant.py",
        "elif on_cpu and not nan_codes and",
        "elif on_cpu and",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "NaN codes are reported": (
        "dequant.py",
        "    if nan_codes:",
        "    if False:",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "negative NaN codes are counted": (
        "dequant.py",
        "codes.max() < 0xFF and",
        "",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "large scales take the slow path": (
        "dequant.py",
        "and largest < 2.0**8",
        "",
        "test_dequant.py::test_scales_outside_the_fast_path_take_the_slow_one",
    ),
    "a scale of -0.0 takes the slow path": (
        "dequant.py",
        "or torch.signbit(grid).any()",
        "",
        "test_dequant.py::test_scales_outside_the_fast_path_take_the_slow_one",
    ),
    "flushed subnormals take the slow path": (
        "dequant.py",
        "bool(subnormal * _BIAS_GAP > 0)",
        "True",
        "test_dequant.py::test_flushed_subnormals_take_the_slow_path",
    ),
    "the sign of zeros": (
        "dequant.py",
        "torch.full((channels,), -0.0,",
        "torch.full((channels,), 0.0,",
        "test_dequant.py::test_fast_and_slow_path_agree_on_the_real_shapes_and_any_strides",
    ),
    "types and devices spelt out": (
        "dequant.py",
        'float32 = {"dtype": torch.float32, "device": "cpu"}',
        "float32 = {}",
        "test_dequant.py::test_the_default_dtype_and_device_of_the_caller_do_not_matter",
    ),
    "the band that bounds the memory": (
        "dequant.py",
        "min(_BAND_ELEMENTS, weight.numel() // 16)",
        "weight.numel()",
        "test_dequant.py::test_extra_memory_is_under_a_tenth_of_the_output",
    ),
    "CUDA tensors only for triton": (
        "triton_dequant.py",
        "if not weight.is_cuda and",
        "if False and",
        "test_dequant.py::test_triton_refuses_a_cpu_tensor",
    ),
    "the mask of the kernel": (
        "triton_dequant.py",
        "inside = (row < rows) & (col < cols)",
        "inside = (row < rows) & (col < cols + 1)",
        "test_dequant.py::test_triton_kernel_in_the_cpu_interpreter_gives_the_same_float32_bits",
    ),
    "an unknown backend": (
        "dequant.py",
        'if backend not in ("auto", "torch", "triton"):',
        "if False:",
        "test_dequant.py::test_an_unknown_backend_is_an_error",
    ),
    "NaN in an error measure": (
        "error.py",
        "if math.isnan(norm) or math.isnan(size):",
        "if False:",
        "test_error.py::test_a_nan_is_an_error_not_an_error_measure",
    ),
    "more tokens picked than there are": (
        "error.py",
        "if not 0 < k <= scores.shape[-1]:",
        "if False:",
        "test_error.py::test_topk_overlap_counts_common_tokens",
    ),
    "an FP8 weight without a scale": (
        "error.py",
        "if scale is None:",
        "if False:",
        "test_error.py::test_an_fp8_weight_without_its_scale_is_named",
    ),
    "clearing vLLM's cache of missing layers between models": (
        "_dry_run_child.py",
        "utils._model_to_pp_missing_layer_names.clear()",
        "pass",
        "test_vllm_dry_run.py::test_a_list_that_vllm_cached_under_a_reused_id_is_not_read",
    ),
    "crediting both halves of a buffered pair": (
        "_dry_run_child.py",
        'or re.sub(r"_scale(_inv)?$", "", name) in stems',
        "",
        "test_vllm_dry_run.py::test_several_models_in_one_process_do_not_share_missing_layers",
    ),
    "counting parameters that were left at init": (
        "dry_run.py",
        "if report.verdict == LOADS and report.unaccounted:",
        "if False:",
        "test_vllm_dry_run.py::test_a_tensor_missing_from_the_checkpoint_is_found_although_vllm_says_nothing",
    ),
    "every caller follows the helper's signature": (
        "_dry_run_child.py",
        "self.callers is None or name",
        "name",
        "test_vllm_dry_run.py::test_mtp_must_follow_the_new_signature",
    ),
    "the dot at the end of a missing prefix": (
        "vllm_plugin.py",
        'return [f"{path}." for path',
        'return [f"{path}" for path',
        "test_vllm_plugin.py::test_layer_11_is_not_dropped_for_layer_1",
    ),
    "the check after loading": (
        "vllm_plugin.py",
        "if unknown := [name for name in left if name not in known]:",
        "if unknown := []:",
        "test_vllm_plugin.py::test_a_filter_one_layer_too_wide_is_caught_by_the_books",
    ),
    "the check is made": (
        "vllm_plugin.py",
        "self.check(written.left_at_init(), model, model_config)",
        "pass",
        "test_vllm_plugin.py::test_a_filter_one_layer_too_wide_is_caught_by_the_books",
    ),
    "missing prefixes afresh": (
        "vllm_plugin.py",
        'return [f"{path}." for path, module in model.named_modules() if isinstance(module, kinds)]',
        "return model_utils.get_pp_missing_layer_names(model)",
        "test_vllm_plugin.py::test_missing_prefixes_do_not_come_from_vllms_cache_by_id",
    ),
    "names are mapped before they are asked about": (
        "vllm_plugin.py",
        "return rename if mappers else None",
        "return None",
        "test_vllm_plugin.py::test_the_mappers_of_parts_that_load_themselves_are_applied_after_the_outer_one",
    ),
    "tied embeddings pass": (
        "vllm_plugin.py",
        'if getattr(text, "tie_word_embeddings", False) and',
        "if False and",
        "test_vllm_plugin.py::test_tied_embedding_and_head_pass_where_the_stage_has_one_of_them",
    ),
    "the drafter's rule is for its own numbering": (
        "vllm_plugin.py",
        "and min(map(int, keys)) == num_hidden_layers",
        "",
        "test_vllm_plugin.py::test_a_drafter_numbered_after_the_main_model_is_not_handed_the_main_layers",
    ),
    "files with nothing for the stage stay closed": (
        "vllm_plugin.py",
        "if os.path.basename(file) not in unneeded",
        "",
        "test_vllm_plugin.py::test_no_file_is_opened_that_holds_nothing_for_the_stage",
    ),
    "a name that no index lists is asked about": (
        "vllm_plugin.py",
        "return name in known or (name not in weight_map and selection.wants(prefix + name))",
        "return name in known",
        "test_vllm_plugin.py::test_a_name_that_the_index_does_not_list_is_still_handed_over",
    ),
    "a folder of consolidated files is left to vLLM": (
        "vllm_plugin.py",
        " and not consolidated",
        "",
        "test_vllm_plugin.py::test_files_are_located_as_the_default_loader_does",
    ),
    "of nested prefixes the outer one is kept": (
        "partition.py",
        "if not (self._sorted and prefix.startswith(self._sorted[-1])):",
        "if True:",
        "test_partition.py::test_prefixes_cover_what_startswith_says",
    ),
    "the same region written twice is one": (
        "loader.py",
        "calls = calls[new]",
        "pass",
        "test_loader.py::test_the_log_of_writes_knows_what_is_left_at_init",
    ),
    "an expert that lacks a part": (
        "loader.py",
        "return bool((each == each[0]).all() and each[0] > 0)",
        "return True",
        "test_loader.py::test_the_log_of_writes_knows_what_is_left_at_init",
    ),
    "a header that lists a name twice": (
        "checkpoint.py",
        "if twin is not None:",
        "if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "a header longer than the file": (
        "checkpoint.py",
        "if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):",
        "if False:",
        "test_shards.py::test_a_cut_header_is_refused_before_it_is_read",
    ),
    "tensors without holes": (
        "checkpoint.py",
        "        if start != at:",
        "        if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "tensors to the end of the file": (
        "checkpoint.py",
        "    if at != size:",
        "    if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "bytes that fit the shape": (
        "checkpoint.py",
        "if (end - start) * 8 != nbits[kind]",
        "if False and nbits[kind]",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "alignment of a tensor in its file": (
        "checkpoint.py",
        "            if start % itemsize == 0:",
        "            if True:",
        "test_shards.py::test_any_tensors_at_any_alignment_come_back",
    ),
    "no reading ahead in a shard that is wanted in part": (
        "checkpoint.py",
        "sparse = (len(names) < len(specs) or",
        "sparse = False and (len(names) < len(specs) or",
        "test_shards.py::test_of_a_shard_that_is_wanted_in_part_only_that_part_is_read",
    ),
    "the exercise looks at what is left behind": (
        "exercise.py",
        "if (self.loaded, self.pending) != before:",
        "if False:",
        "test_exercise.py::test_wrong_answers_differ_where_they_are_wrong",
    ),
    "the exercise asks for `loaded`": (
        "exercise.py",
        "return STORED if _fused(layer) in self.loaded else",
        "return STORED if True else",
        "test_exercise.py::test_wrong_answers_differ_where_they_are_wrong",
    ),
    "a parameter that a stage's forward pass lacks": (
        "forward.py",
        "if parameter not in params:",
        "if False:",
        "test_forward.py::test_a_parameter_that_was_not_loaded_is_named",
    ),
    "the second shard of a fused parameter": (
        "forward.py",
        "return weight[-rows:] if where.shard else weight[:rows]",
        "return weight[:rows]",
        "test_forward.py::test_logits_of_the_stages_are_those_of_the_unsplit_model_bit_for_bit",
    ),
    "a tensor that comes in two shards": (
        "vllm_plugin.py",
        "self.twice += sorted(self.names.intersection(handed))",
        "pass",
        "test_vllm_plugin.py::test_a_shard_counted_at_once_is_counted_like_its_tensors",
    ),
    "a rank that does not exist": (
        "dry_run.py",
        "if stray := [rank for rank in ranks if rank not in range(pp_size)]:",
        "if stray := []:",
        "test_vllm_dry_run.py::test_bad_arguments_are_refused_before_a_process_is_started",
    ),
    "an unknown guard": (
        "dry_run.py",
        "if guard not in GUARDS:",
        "if False:",
        "test_vllm_dry_run.py::test_bad_arguments_are_refused_before_a_process_is_started",
    ),
    "every request names the commit": (
        "hub.py",
        "revision=self.sha, endpoint",
        "revision=None, endpoint",
        "test_hub.py::test_one_commit_is_read_although_its_branch_moves",
    ),
    "the range of a request": (
        "hub.py",
        'f"bytes=0-{end - 1}"',
        '"bytes=0-"',
        "test_hub.py::test_no_weight_is_downloaded",
    ),
    "hanging up on a server without ranges": (
        "hub.py",
        "if len(data) >= end or self.stopped.is_set():",
        "if False:",
        "test_hub.py::test_a_server_that_ignores_the_range_is_hung_up_on",
    ),
    "a header longer than the first request": (
        "hub.py",
        "if len(head) < end <= min(size, MAX_HEADER_BYTES):",
        "if False:",
        "test_hub.py::test_a_header_longer_than_the_first_request_takes_a_second_one",
    ),
    "a silent cut": (
        "hub.py",
        "if len(data) < min(end, size):",
        "if False:",
        "test_hub.py::test_two_faults_of_the_connection_are_survived_and_three_are_not",
    ),
    "a folder without shards": (
        "cli.py",
        'or any(path.glob("*.safetensors"))',
        "",
        "test_cli.py::test_a_folder_without_shards_is_read_as_a_config_and_says_so",
    ),
    "control characters in the output": (
        "checkpoint.py",
        "char if char.isprintable() or char",
        "char if True or char",
        "test_checkpoint.py::test_control_characters_are_escaped_and_nothing_else",
    ),
    "a stage that cannot be built when PP=1 cannot either": (
        "dry_run.py",
        "report.verdict = CANNOT_TELL if",
        "report.verdict = report.verdict if",
        "test_vllm_check.py::test_strict_refuses_stand_ins_and_cannot_tell",
    ),
    "strict": (
        "_stand_ins.py",
        "[] if strict else CANDIDATES",
        "CANDIDATES",
        "test_vllm_check.py::test_strict_refuses_stand_ins_and_cannot_tell",
    ),
    "tensors held to the end": (
        "_dry_run_child.py",
        "self.held = {} if lists_all or",
        "self.held = {} if True or",
        "test_vllm_check.py::test_a_guard_after_buffering_loads_and_what_it_holds_is_named",
    ),
    "going on after a death": (
        "_dry_run_child.py",
        "if self.survives(self.load_all) or not all_deaths:",
        "if self.survives(self.load_all) or True:",
        "test_vllm_check.py::test_all_goes_on_after_a_death_and_finds_every_one",
    ),
    "an exit code for what leaves parameters at init": (
        "cli.py",
        "{DIES, CANNOT_BUILD, LEAVES_AT_INIT}",
        "{DIES, CANNOT_BUILD}",
        "test_vllm_check.py::test_a_tensor_that_the_checkpoint_lacks_is_not_called_a_pipeline_fault",
    ),
    "paths out of the folder": (
        "checkpoint.py",
        "    if leads_out:",
        "    if False:",
        "test_untrusted.py::test_an_index_cannot_lead_out_of_the_folder",
    ),
    "links out of the folder": (
        "checkpoint.py",
        "if not leads_out and (path.is_symlink()",
        "if False and (path.is_symlink()",
        "test_untrusted.py::test_an_index_cannot_lead_out_of_the_folder",
    ),
    "shards that the index does not name": (
        "checkpoint.py",
        "        if stray := [",
        "        if False and [",
        "test_untrusted.py::test_a_shard_that_the_index_does_not_name_is_an_error_and_another_file_is_not",
    ),
    "shapes that overflow": (
        "checkpoint.py",
        "if math.prod(filter(None, info.shape)) >= 2**63:",
        "if False:",
        "test_untrusted.py::test_a_shape_whose_product_overflows_is_an_error",
    ),
    "bytes of a tensor without a dimension": (
        "loader.py",
        ".contiguous().view(-1)  # a scalar",
        ".contiguous()  # a scalar",
        "test_loader.py::test_two_digests_agree_exactly_if_dtype_shape_and_bytes_do",
    ),
    "layers given as a list": (
        "checkpoint.py",
        "if key in LAYER_LISTS and",
        "if False and",
        "test_checkpoint.py::test_layers_are_counted_by_number_or_by_list",
    ),
    "the field that decides how many layers": (
        "checkpoint.py",
        "DECISIVE.get(kind, ()) if",
        "() if",
        "test_checkpoint.py::test_layers_are_counted_by_number_or_by_list",
    ),
    "bits that fill no byte": (
        "checkpoint.py",
        "if (end - start) * 8 != nbits[kind]:",
        "if end - start != nbits[kind] // 8:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "two elements of F4 in one of torch's": (
        "checkpoint.py",
        'if dtype != "F4":',
        "if True:",
        "test_shards.py::test_every_type_that_can_be_saved_comes_back_as_the_library_reads_it",
    ),
    "a dtype that only the library knows": (
        "checkpoint.py",
        "for size in range(1, 129) if",
        "for size in () if",
        "test_shards.py::test_a_dtype_that_only_the_library_knows_goes_through_the_library",
    ),
    "a dtype that torch has no type for": (
        "checkpoint.py",
        "    except Exception as error:  # any: of a type",
        "    except ImportError as error:  # any: of a type",
        "test_shards.py::test_a_header_of_any_dtype_is_read_or_refused_as_the_library_does",
    ),
    "a shard that changes while it is read": (
        "checkpoint.py",
        "if after is None or any(",
        "if False and any(",
        "test_faults.py::test_a_shard_that_changes_while_it_is_read_is_an_error",
    ),
    "somebody else's checkpoint": (
        "checkpoint.py",
        "        if overwrite:\n            shutil",
        "        if True:\n            shutil",
        "test_faults.py::test_of_two_runs_that_write_the_same_folder_one_wins_and_the_other_is_told",
    ),
    "halves that came alone, in the ledger": (
        "loader.py",
        "for came, missing in self.unpaired.items():",
        "for came, missing in ():",
        "test_loader.py::test_the_books_do_not_close_when_half_of_a_pair_is_held_back",
    ),
    "a tensor that would be spread over its rows": (
        "loader.py",
        "if rows.shape != tensor.shape:",
        "if False:",
        "test_loader.py::test_a_tensor_of_another_shape_is_an_error_with_its_name",
    ),
    "names that vLLM has moved": (
        "_contract.py",
        "if gone := missing(part):",
        "if gone := []:",
        "test_vllm_contract.py::test_a_name_that_has_moved_is_named_with_the_release_it_was_last_seen_in_and_what_still_works",
    ),
}


def mutant(guard: str, folder: Path) -> subprocess.CompletedProcess:
    """Run the guard's test in a fresh interpreter that imports a copy of the package without the guard."""
    file, old, new, node = MUTATIONS[guard]
    shutil.copytree(ROOT / "glmpp", folder / "glmpp", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").symlink_to(ROOT / "data")
    source = (folder / "glmpp" / file).read_text()
    assert old in source, f"{file} has changed: bring the mutation {guard!r} up to date"
    (folder / "glmpp" / file).write_text(source.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(folder), "GLMPP_MUTANT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / node)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """All selected mutants, started at once and run two at a time: each is mostly the import of torch."""
    chosen = {
        item.callspec.params["guard"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            guard: pool.submit(mutant, guard, tmp_path_factory.mktemp("mutant")) for guard in MUTATIONS if guard in chosen
        }


@pytest.mark.mutation
@pytest.mark.parametrize(
    "guard", [pytest.param(name, marks=[pytest.mark.vllm] * ("test_vllm" in case[3])) for name, case in MUTATIONS.items()]
)
def test_without_the_guard_its_test_fails(guard, results):
    result = results[guard].result()
    node = MUTATIONS[guard][3]
    assert result.returncode == 1, f"{node} still passes without {guard}\n{result.stdout[-2000:]}{result.stderr[-1000:]}"
    assert "1 failed" in result.stdout
