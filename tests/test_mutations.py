"""Take a guard away and the test that claims to watch it must fail.

Each case changes one piece of source in a copy of the package and runs one test against the copy. Those are here whose
promise no other test would miss: a verdict, a number or a file that would be wrong and look right.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SKIP = """    if name.startswith(tuple(pp_missing_layer_names)):
        return True
    layer ="""

# file in glmpp/, source to replace, replacement, test that must fail
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
        "partition.py::Stage._owner",
        "self.is_first or (self.tied and self.is_last)",
        "self.is_first",
        "test_partition.py::test_every_tensor_of_the_model_has_an_owner",
    ),
    "a stage that does not fit": (
        "layouts/split.py::cache_cost",
        "if left > 0 else math.inf",
        "if left else math.inf",
        "test_partition.py::test_the_split_that_leaves_most_tokens_equals_brute_force",
    ),
    "weights that do not fit leave no blocks": (
        "dryrun/fit.py::Memory.blocks",
        "max(0, self.room(gpu, utilization))",
        "self.room(gpu, utilization)",
        "test_fit.py::test_weights_that_do_not_fit_leave_no_tokens",
    ),
    "a tower is not the language model": (
        "layouts/layer_list.py::layer_list",
        'if words.isdisjoint(re.split(r"[._]", path))',
        "",
        "test_partition.py::test_the_list_of_layers_is_the_language_models_whatever_lies_beside_it",
    ),
    "a layout of which nobody can tell": (
        "layouts/layout.py::Layouts.verdict",
        "CANNOT_TELL if any(one.untold for one in self.layouts) else DIES",
        "DIES",
        "test_cli.py::test_layouts_ends_with_2_only_where_a_layout_might_serve_and_nobody_can_tell",
    ),
    "a record of another question": (
        "records.py::check",
        "if differ:",
        "if False:",
        "test_records.py::test_another_question_is_an_error_that_says_in_what",
    ),
    "a record of another checkpoint": (
        "records.py::digest",
        "[(spec.name, spec.dtype, spec.shape) for spec in checkpoint.values()]",
        "sorted(checkpoint)",
        "test_records.py::test_each_change_of_a_checkpoint_changes_its_digest",
    ),
    "what is no checkpoint is not overwritten": (
        "synthetic.py::_check_replaceable",
        "directory.iterdir() if directory.exists() else ()",
        "()",
        "test_cli.py::test_make_checkpoint_replaces_a_checkpoint_and_nothing_else",
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
    "a missing shard": (
        "checkpoint.py::Checkpoint.from_directory",
        "for file in found.missing(listed):",
        "for file in ():",
        "test_checkpoint.py::test_a_missing_shard_is_named_with_a_tensor_it_should_hold",
    ),
    "NaN codes are reported": (
        "dequant.py::dequantize",
        "    if nan_codes:",
        "    if False:",
        "test_dequant.py::test_nan_codes_stay_nan_and_are_reported",
    ),
    "large scales take the slow path": (
        "dequant.py::_fits_shift",
        "and largest < 2.0**8",
        "",
        "test_dequant.py::test_scales_outside_the_fast_path_take_the_slow_one",
    ),
    "the mask of the kernel": (
        "triton_dequant.py::_dequantize_kernel",
        "inside = (row < rows) & (col < cols)",
        "inside = (row < rows) & (col < cols + 1)",
        "test_dequant.py::test_triton_kernel_in_the_cpu_interpreter_gives_the_same_float32_bits",
    ),
    "every caller follows the helper's signature": (
        "dryrun/child/helper_patch.py::HelperPatch.install",
        "self.callers is None or name",
        "name",
        "test_vllm_dry_run.py::test_mtp_must_follow_the_new_signature",
    ),
    "the check is made": (
        "serving/load_format.py::StageModelLoader.load_weights",
        "self.check(left(self.written, model, model_config, gone), model_config)",
        "left(self.written, model, model_config, gone)",
        "test_vllm_plugin.py::test_a_filter_one_layer_too_wide_is_caught_by_the_books",
    ),
    "missing prefixes afresh": (
        "serving/stage_filter.py::missing_prefixes",
        'return [f"{path}." for path, module in model.named_modules() if isinstance(module, kinds)]',
        "return model_utils.get_pp_missing_layer_names(model)",
        "test_vllm_plugin.py::test_missing_prefixes_do_not_come_from_vllms_cache_by_id",
    ),
    "of nested prefixes the outer one is kept": (
        "partition.py::PrefixSet.__init__",
        "if not (self._sorted and prefix.startswith(self._sorted[-1])):",
        "if True:",
        "test_partition.py::test_prefixes_cover_what_startswith_says",
    ),
    "the same region written twice is one": (
        "serving/filled.py::filled_by",
        "((times > 0) * area)",
        "(times * area)",
        "test_loader.py::test_a_load_is_seen_to_write_what_it_writes[one shard twice]",
    ),
    "a header that lists a name twice": (
        "formats/header.py::read_header",
        "if twin is not None:",
        "if False:",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "bytes that fit the shape": (
        "formats/header.py::read_header",
        "if (end - start) * 8 != nbits[kind]",
        "if False and nbits[kind]",
        "test_shards.py::test_what_is_wrong_with_a_header_is_said",
    ),
    "the exercise looks at what is left behind": (
        "lab/exercise.py::ToyStage.hand_over",
        "if (self.loaded, self.pending) != before:",
        "if False:",
        "test_exercise.py::test_wrong_answers_differ_where_they_are_wrong",
    ),
    "the second shard of a fused parameter": (
        "lab/forward.py::_restored",
        "return weight[-rows:] if where.shard else weight[:rows]",
        "return weight[:rows]",
        "test_forward.py::test_logits_of_the_stages_are_those_of_the_unsplit_model_bit_for_bit",
    ),
    "a secret that the server says": (
        "formats/hub_requests.py::Requests.without_secrets",
        'text = text.replace(secret, "***")',
        "pass",
        "test_hub.py::test_what_the_server_says_of_credentials_is_not_printed[token-403]",
    ),
    "control characters in the output": (
        "words.py::printable",
        "if not char.isprintable() or",
        "if",
        "test_words.py::test_control_characters_are_escaped_and_nothing_else",
    ),
    "strict": (
        "dryrun/pretend/cpu_stand_ins.py::StandIns.__init__",
        "[] if strict else CANDIDATES",
        "CANDIDATES",
        "test_vllm_check.py::test_strict_refuses_stand_ins_and_cannot_tell",
    ),
    "the bytes have the last word": (
        "serving/unloaded.py::confirmed",
        "and _holds(tensors[name], stored):",
        "and False:",
        "test_vllm_losses.py::test_a_finding_that_the_bytes_do_not_confirm_is_none",
    ),
    "an exit code for what leaves parameters at init": (
        "dryrun/report.py::DryRunReport.overall",
        "(INCOMPLETE, CROSSES, NO_FIT, CANNOT_TELL)",
        "(CROSSES, NO_FIT, CANNOT_TELL)",
        "test_vllm_check.py::test_a_tensor_that_the_checkpoint_lacks_is_not_called_a_pipeline_fault",
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
    "paths out of the folder": (
        "formats/index.py::shard_path",
        "    if leads_out:",
        "    if False:",
        "test_untrusted.py::test_an_index_cannot_lead_out_of_the_folder",
    ),
    "a fork ends with who asked for it": (
        "dryrun/child/main.py::end",
        "os.kill(pid, signal.SIGKILL)",
        "return None",
        "test_faults.py::test_a_fork_ends_when_its_asker_has_gone_and_no_other_does",
    ),
    "a fault of the kit is not the connection's": (
        "formats/hub_requests.py::Requests.ask",
        "except NoAnswer as none:",
        "except Exception as none:",
        "test_hub.py::test_a_fault_of_the_kit_is_not_told_as_one_of_the_connection",
    ),
    "a GPU of another memory is another": (
        "gpus.py::default_target",
        "and memory in (gpu.memory, *[None] * gpu.limits.integrated):",
        "or memory is None:",
        "test_gpus.py::test_the_gpu_that_is_here_is_the_default_with_its_own_title_architecture_and_memory",
    ),
    "an index without data": (
        "serving/indexed_writes.py::_place",
        "(IndexError, RuntimeError)",
        "ZeroDivisionError",
        "test_loader.py::test_an_index_without_data_is_no_verdict[0]",
    ),
    "a number of a storage that another tensor has now": (
        "serving/write_tracking.py::WriteRecorder.__init__",
        "self._alive.append(StorageWeakRef(tensor.untyped_storage()))",
        "pass",
        "test_loader.py::test_a_storage_that_is_given_back_is_no_longer_the_parameters",
    ),
    "the shard of a rank": (
        "dryrun/pretend/ranks.py::pretend",
        '"_TP": ranks[run.dp_rank, run.stage],',
        '"_TP": mine,',
        "test_vllm_layouts.py::test_the_ranks_of_a_layout_put_together_are_the_single_rank_bit_for_bit[2-1-False]",
    ),
    "a rank that waits is not dead": (
        "dryrun/pretend/failures.py::kind_of",
        "or RANKS_AWAY in str(error)",
        "or False",
        "test_vllm_layouts.py::test_a_rank_that_waits_for_others_is_not_told_dead[building]",
    ),
    "of an architecture's variants the worst": (
        "../tools/sweep/releases.py::known_of",
        "worst_first[0] if",
        "worst_first[-1] if",
        "test_releases.py::test_of_the_variants_the_worst_is_kept_with_where_it_dies",
    ),
    "a refusal of what stock loads": (
        "../tools/sweep/same_bytes.py::compare_stage",
        "if stock.verdict == LOADS:",
        "if False:",
        "test_no_false_alarm.py::test_a_stage_loaded_by_both[refused for nothing]",
    ),
    "a fix on a release that it was not tried on": (
        "serving/fixes/__init__.py::chosen",
        "if not tried_on(name, release):",
        "if False:",
        "test_fixes.py::test_a_release_that_a_fix_was_not_tried_on_is_refused_and_nothing_is_applied[0.34.0]",
    ),
    "fixes before the model is built": (
        "serving/load_format.py::StageModelLoader.load_model",
        "        self.fix(model_config)\n        return super().load_model("
        "vllm_config=vllm_config, model_config=model_config, prefix=prefix)",
        "        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)\n"
        "        self.fix(model_config)\n        return model",
        "test_vllm_fixes.py::test_the_load_format_applies_what_is_asked_for_before_the_model_is_built[known-active2]",
    ),
}


def copy_of_the_package(folder: Path) -> Path:
    for part in ("glmpp", "tools/sweep"):
        shutil.copytree(ROOT / part, folder / part)  # with the bytecode of what is not changed
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


@pytest.mark.parametrize("guard", MUTATIONS)
def test_a_mutation_names_a_line_and_a_test_that_are_there(guard):
    place, old, _, node = MUTATIONS[guard]
    file, _, name = place.partition("::")
    source = (ROOT / "glmpp" / file).read_text()
    assert old in "".join(source.splitlines(keepends=True)[lines_of(source, name)]), place
    file, _, test = node.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), node


def run(folder: Path, node: str) -> tuple[int, str]:
    """Exit code and output of a test, run with the package that lies in the folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "GLMPP_MUTANT": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", ROOT / "tests" / node]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def marked(guard: str):
    return pytest.param(guard, marks=pytest.mark.vllm if "test_vllm" in MUTATIONS[guard][3] else ())


@pytest.mark.mutation
@pytest.mark.parametrize("guard", [marked(guard) for guard in MUTATIONS])
def test_without_the_guard_its_test_fails(guard, tmp_path):
    node = take_away(guard, copy_of_the_package(tmp_path) / "glmpp")
    code, said = run(tmp_path, node)
    assert code == 1, f"{node} still passes without {guard}\n{said[-3000:]}"
    assert "1 failed" in said, said[-3000:]


@pytest.mark.mutation
def test_with_every_guard_in_place_a_test_passes(tmp_path):
    """So that it is not the way of running them that makes the mutants fail."""
    copy_of_the_package(tmp_path)
    code, said = run(tmp_path, MUTATIONS["the skip"][3])
    assert code == 0 and " passed" in said, said[-3000:]
