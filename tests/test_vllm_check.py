"""`glmpp check`: every kind of verdict found and named, on small models that have one known fault each."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import faulty
import jsonschema
import pytest
from conftest import ROOT

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.cli import commands
from glmpp.cli.advice_text import NO_RELEASE
from glmpp.cli.report_text import as_text
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import CANNOT_BUILD, CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.errors import KitError
from glmpp.formats.tensor import TensorSpec

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("no_partition_variable")]
ADDRESS = "takes one address for one tensor"
affected = pytest.mark.skipif(vllm_version() != "0.22.1", reason="pins what the last affected release does")
SCHEMA = json.loads((ROOT / "tests" / "check.schema.json").read_text())


@pytest.fixture
def checked(tmp_path):
    """Dry run of a faulty model at PP=3: stages hold layers 0-3, 4-7 and 8-11."""

    def run(fault: str, guard: str = "installed", **options):
        model = faulty.write_faulty(fault, tmp_path)
        report = dry_run(Checkpoint.from_directory(model), Deployment(3, guard=guard), progress=False, **options)
        assert report.control.verdict == LOADS
        assert {stage.model_class for stage in report.stages} <= {"faulty.FaultyForCausalLM", None}
        return report

    return run


def test_a_model_without_a_fault_loads(checked):
    report = checked("none")
    assert [stage.verdict for stage in report.stages] == [LOADS] * 3
    assert [stage.held for stage in report.stages] == [{}] * 3
    assert report.stand_ins.keys() - {"driver"} == {"platform", "class inspection", "pipeline group"}


def test_an_unguarded_lookup_is_a_death_with_its_key_tensor_and_line(checked):
    report = checked("unguarded lookup")
    assert [stage.verdict for stage in report.stages] == [DIES] * 3
    # vLLM hands a shard's tensors over by name: layer 10 comes before layer 2.
    assert [stage.key for stage in report.stages] == [f"model.layers.{n}.ab.weight" for n in (10, 0, 0)]
    assert [stage.tensor for stage in report.stages] == [f"model.layers.{n}.b.weight" for n in (10, 0, 0)]
    lines = Path(faulty.__file__).read_text().splitlines()
    file, _, number = report.stages[1].place.partition(":")
    assert file == "faulty.py" and "named_parameters())[name.replace" in lines[int(number) - 1]


def test_a_placeholders_attribute_while_loading_is_a_death_without_a_key(checked):
    report = checked("attribute of a placeholder, loading")
    assert [(stage.verdict, stage.exception, stage.key) for stage in report.stages] == [(DIES, "AttributeError", None)] * 3
    assert "'PPMissingLayer' object has no attribute 'scale'" in report.stages[2].message
    assert report.stages[1].tensor == "model.layers.0.a.weight"


def test_a_placeholders_attribute_while_building_is_told_from_a_model_that_cannot_be_built_at_all(checked):
    report = checked("attribute of a placeholder, building")
    assert [(stage.verdict, stage.exception) for stage in report.stages] == [(CANNOT_BUILD, "AttributeError")] * 3
    assert report.stages[0].place.startswith("faulty.py:") and report.stages[0].ledger is None


def test_what_stood_in_for_a_part_of_one_stage_is_gone_when_the_next_is_built(tmp_path, side_by_side):
    side_by_side(1)
    model = faulty.write_faulty("an operator of the GPU library on the first stage", tmp_path)
    report = dry_run(Checkpoint.from_directory(model), 2, control=False, progress=False)
    assert ["custom operators" in stage.stand_ins for stage in report.stages] == [True, False]


@pytest.mark.parametrize("weights", ["meta", "real"])
def test_rows_that_vllm_adds_to_a_vocabulary_may_stay_at_init_and_others_may_not(tmp_path, weights):
    """The embedding has 96 rows for a vocabulary of 64, and is written slice by slice."""
    for fault, guard, expected in (
        ("padded vocabulary", "installed", LOADS),
        ("padded vocabulary", "loader", LOADS),
        ("padded vocabulary, a slice never written", "installed", INCOMPLETE),
        ("padded vocabulary, a slice never written", "loader", DIES if weights == "real" else INCOMPLETE),
    ):
        (tmp_path / fault / guard).mkdir(parents=True)
        checkpoint = Checkpoint.from_directory(faulty.write_faulty(fault, tmp_path / fault / guard))
        report = dry_run(checkpoint, Deployment(pp=2, guard=guard), weights=weights, control=False, progress=False)
        assert [stage.verdict for stage in report.stages] == [expected, LOADS], (fault, guard)
        if expected != LOADS:
            assert report.stages[0].unaccounted == ["model.embed_tokens.weight"]


def test_none_where_a_placeholder_belongs_is_a_death_and_the_load_format_does_not_cure_it(checked, tmp_path):
    report = checked("None for a placeholder")
    assert [stage.verdict for stage in report.stages] == [LOADS, DIES, DIES]
    assert "'NoneType' object has no attribute 'weight'" in report.stages[1].message
    again = dry_run(
        Checkpoint.from_directory(tmp_path / "model"), Deployment(pp=3, guard="loader"), control=False, progress=False
    )
    assert [stage.verdict for stage in again.stages] == [LOADS, DIES, DIES]


def test_a_guard_too_wide_that_vllm_is_silent_about_leaves_named_parameters_at_init(checked):
    report = checked("guard too wide")
    assert [stage.verdict for stage in report.stages] == [INCOMPLETE] * 3
    assert [stage.unaccounted for stage in report.stages] == [[f"model.layers.{n}.ab.weight"] for n in (0, 4, 8)]


def test_a_guard_after_buffering_loads_and_what_it_holds_is_named(checked):
    report = checked("guard after buffering")
    for stage in report.stages:
        foreign = {f"model.layers.{n}.{part}.weight" for n in range(12) if n not in stage.stage.layers for part in "ab"}
        assert stage.verdict == LOADS and stage.held == dict.fromkeys(foreign, 16 * 16 * 2)


def test_all_goes_on_after_a_death_and_finds_every_one(checked):
    report = checked("dies twice", all_failures=True)
    found = [[failure.key for failure in stage.failures] for stage in report.stages]
    assert [sorted(set(keys)) for keys in found] == [
        ["model.layers.11.ab.weight"],
        ["model.layers.1.ab.weight", "model.layers.11.ab.weight"],
        ["model.layers.1.ab.weight"],
    ]
    assert [len(keys) for keys in found] == [2, 4, 2]  # both halves of each
    assert [stage.unaccounted for stage in report.stages] == [[]] * 3  # what the rest of the checkpoint filled


@pytest.mark.parametrize("fault", ["unguarded lookup", "attribute of a placeholder, loading", "guard after buffering"])
def test_the_load_format_cures_what_comes_from_being_handed_a_foreign_tensor(checked, fault):
    report = checked(fault, guard="loader")
    assert report.loads and [stage.held for stage in report.stages] == [{}] * 3


# --- what is asked of a tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*faulty.ASKS, *faulty.MOVES, ADDRESS])
def test_what_a_model_asks_of_data_is_answered_with_the_bytes_of_a_small_checkpoint(checked, fault):
    report = checked(fault)
    assert [(stage.verdict, stage.data) for stage in report.all] == [(LOADS, "the checkpoint's")] * 4, report.stages[
        0
    ].message
    assert "tried again on the CPU with values: the checkpoint's" in as_text(Checkpoint([], {}), report)


@pytest.mark.parametrize("fault", [*faulty.ASKS, *faulty.ASKS_TOO_MUCH, ADDRESS, "unguarded lookup"])
def test_what_torch_has_no_answer_for_without_data_cannot_be_told_of_a_large_checkpoint(fault, tmp_path):
    small = Checkpoint.from_directory(faulty.write_faulty(fault, tmp_path))
    large = Checkpoint([*small.values(), TensorSpec("unused.large", "BF16", (40_000, 40_000))], small.config)
    report = dry_run(large, 2, progress=False)
    known = (DIES, DIES) if fault == "unguarded lookup" else (DIES,) * 3
    expected = (CANNOT_TELL,) * 3 if fault in faulty.ASKS or fault == ADDRESS else known
    assert tuple(stage.verdict for stage in report.all)[: len(expected)] == expected, report.stages[0].message
    assert ("no verdict" in report.messages[1].failures[0].message) == (expected[0] == CANNOT_TELL)


@pytest.mark.parametrize("fault", ["takes ones for a fault", "goes on without an answer", ADDRESS])
def test_values_that_are_made_up_show_that_it_loads_and_never_that_it_dies(fault, tmp_path):
    """The headers are known, as of a repository on the Hub, and the bytes are not."""
    held = Checkpoint.from_directory(faulty.write_faulty(fault, tmp_path))
    report = dry_run(Checkpoint([*held.values()], held.config), 2, progress=False)
    expected = (LOADS, "made up") if fault == ADDRESS else (CANNOT_TELL, "none")
    assert [(stage.verdict, stage.data) for stage in report.all] == [expected] * 3, report.stages[0].message


@pytest.mark.parametrize("fault", faulty.NEEDS_A_GPU)
def test_what_needs_a_gpu_while_it_loads_cannot_be_told(fault, tmp_path):
    report = dry_run(Checkpoint.from_directory(faulty.write_faulty(fault, tmp_path)), 2, progress=False)
    assert [stage.verdict for stage in report.all] == [CANNOT_TELL] * 3, report.stages[0].message


def test_what_a_launcher_or_a_list_of_plugins_sets_decides_nothing(tmp_path):
    model = faulty.write_faulty("unguarded lookup", tmp_path)
    variables = {"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "VLLM_PLUGINS": "faulty"}
    arguments = [sys.executable, "-m", "glmpp", "check", str(model), "--pp", "2", "--guard", "loader"]
    done = subprocess.run(arguments, env=os.environ | variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and done.stdout.endswith("PP=2: loads, complete\n"), done.stdout + done.stderr


@pytest.mark.parametrize("fault", faulty.ASKS_TOO_MUCH)
def test_what_no_tensor_has_an_answer_to_is_a_death(fault, tmp_path):
    report = dry_run(Checkpoint.from_directory(faulty.write_faulty(fault, tmp_path)), 2, progress=False)
    assert [stage.verdict for stage in report.all] == [DIES] * 3
    assert {stage.place.partition(":")[0] for stage in report.all} == {"faulty.py"}


# --- what is no verdict -------------------------------------------------------------------------------------------


def test_a_fault_of_the_kit_is_said_to_be_one_and_ends_with_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = faulty.write_faulty("breaks the kit", tmp_path)
    with pytest.raises(
        KitError, match=r"TypeError: 'NoneType' object is not callable\n(.|\n)*glmpp/dryrun/child/tensor_outcomes\.py:\d+"
    ):
        dry_run(Checkpoint.from_directory(model), 2, progress=False)
    code, out, err = command(capsys, "check", model, "--pp", 2)
    assert code == 3 and out == ""
    (report,) = tmp_path.glob("glmpp-fault-*.txt")
    assert err == f"glmpp: a fault of glmpp, and no verdict; please report it with {report}\n"
    assert "glmpp/dryrun/child/tensor_outcomes.py" in report.read_text() and f"vLLM {vllm_version()}" in report.read_text()


def test_a_fault_of_the_command_itself_ends_with_3_too(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(commands, "dry_run", lambda *args, **kwargs: {}["no such"])
    code, _, err = command(capsys, "check", tiny.directory)
    (report,) = tmp_path.glob("glmpp-fault-*.txt")
    assert code == 3 and str(report) in err and "KeyError: 'no such'" in report.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not" / "there"))
    assert "KeyError: 'no such'" in command(capsys, "check", tiny.directory)[2]


def test_a_class_that_cannot_be_imported_is_no_verdict_and_the_package_is_named(tmp_path, capsys):
    model = faulty.write_faulty("needs a name that transformers lacks", tmp_path)
    code, out, _ = command(capsys, "check", model, "--pp", 2)
    assert code == 2 and out.endswith("PP=2: cannot tell: PP=1 cannot be built here either\n")
    assert "ImportError: cannot import name 'NoSuchConfig' from 'transformers'" in " ".join(out.split())
    assert "is newer than vLLM" in out and "install an older transformers" in " ".join(out.split())


# --- the command --------------------------------------------------------------------------------------------------


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@affected
@pytest.mark.parametrize("above", ["vllm", "glmpp/site-packages"])
def test_a_vllm_that_lies_elsewhere_is_told_of_in_the_same_words(above, tiny, tmp_path):
    """As an editable one does: a link leads to the package from a folder that nobody installs into."""
    folder = tmp_path / above
    folder.mkdir(parents=True)
    (folder / "vllm").symlink_to(Path(importlib.util.find_spec("vllm").origin).parent)
    paths = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": paths}
    arguments = [sys.executable, "-m", "glmpp", "check", str(tiny.directory), "--pp", "2"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "\n        in vllm/model_executor/models/deepseek_v2.py:774 _try_load_fp8_indexer_wk" in done.stdout
    assert "known to load from vLLM 0.23.0" in done.stdout and str(folder) not in done.stdout


@affected
def test_check_says_where_every_stage_dies_and_ends_with_1(tiny, capsys):
    code, out, _ = command(capsys, "check", tiny.directory, "--pp", 4)
    assert code == 1
    assert "\nstages 1-3    layers 3-11     dies\n" in out
    assert out.count("    KeyError: 'layers.0.self_attn.indexer.wk_weights_proj.weight'\n") == 1
    assert (
        "in vllm/model_executor/models/deepseek_v2.py:774 _try_load_fp8_indexer_wk, handed model.layers.0.self_attn." in out
    )
    assert "PP=1 control  layers 0-11     loads\n" in out
    assert "PP=4: does not load: 4 of 4 stages fail although PP=1 loads\n" in out
    line = f"vllm serve {tiny.directory} --pipeline-parallel-size 4 --load-format glmpp"
    assert f"with --load-format glmpp stages 0-3 load (glmpp has to be installed where vLLM runs):\n    {line}\n" in out
    assert out.splitlines()[-2].startswith("known to load from vLLM 0.23.0 on (vLLM PR 42944")
    nearest = "vLLM 0.23.0 is the nearest release that is known to load GlmMoeDsaForCausalLM at PP=2 (from the record of 2"
    assert out.splitlines()[-1].startswith(nearest) and out.endswith(", tiny checkpoints)\n")


@affected
def test_each_gives_every_stage_a_paragraph_of_its_own(tiny, capsys):
    _, out, _ = command(capsys, "check", tiny.directory, "--pp", 4, "--each", "--layer-partition", "3,3,3,3")
    assert out.count("    KeyError: 'layers.0.self_attn.indexer.wk_weights_proj.weight'\n") == 3
    assert "\n    VLLM_PP_LAYER_PARTITION=3,3,3,3 vllm serve " in out


def checked_by_command(fault: str, tmp_path, capsys) -> tuple[str, dict]:
    model = faulty.write_faulty(fault, tmp_path)
    code, text, _ = command(capsys, "check", model, "--pp", 3)
    again, out, _ = command(capsys, "check", model, "--pp", 3, "--json")
    report = json.loads(out)
    jsonschema.validate(report, SCHEMA)
    assert code == again == 1 and report["known_to_load_from"] is report["nearest_in_record"] is None
    assert NO_RELEASE not in text  # of this architecture the record says nothing
    return text, report


def test_what_the_load_format_does_not_cure_is_said_with_where_it_still_dies(tmp_path, capsys):
    text, report = checked_by_command("None for a placeholder", tmp_path, capsys)
    assert "\n--load-format glmpp does not cure it: stage 1 dies\n    AttributeError: 'NoneType' object has no" in text
    assert [stage["verdict"] for stage in report["with_load_format"]["stages"]] == ["dies", "dies"]


def test_what_the_load_format_cures_is_said_where_no_release_is_known_to(tmp_path, capsys):
    text, report = checked_by_command("attribute of a placeholder, loading", tmp_path, capsys)
    assert "\nstages 1-2    layers 4-11     dies\n" in text  # of the same tensor
    assert "with --load-format glmpp stages 0-2 load (" in text and report["with_load_format"]["verdict"] == "loads"


def test_check_with_the_load_format_ends_with_0_and_prints_the_same_twice(tiny, capsys):
    first = command(capsys, "check", tiny.directory, "--pp", 3, "--guard", "loader", "--layer-partition", "1,9,2")
    assert (
        first[0] == 0
        and first[1].endswith("PP=3: loads, complete\n")
        and "stages 0-2    layers 0-11     loads\n" in first[1]
    )
    assert command(capsys, "check", tiny.directory, "--pp", 3, "--guard", "loader", "--layer-partition", "1,9,2") == first


@affected
def test_all_lists_every_death_of_every_stage(tiny, capsys):
    code, out, _ = command(capsys, "check", tiny.directory, "--pp", 4, "--all", "--json")
    report = json.loads(out)
    assert code == 1
    for stage in report["stages"]:
        first, last = stage["layers"]
        missing = {f"layers.{n}.self_attn.indexer.wk_weights_proj.weight" for n in range(12) if not first <= n <= last}
        assert {failure["key"] for failure in stage["failures"]} == missing and len(stage["failures"]) == len(missing)


@pytest.mark.parametrize("options", [(), ("--all",), ("--strict",), ("--guard", "loader")])
def test_json_follows_its_schema(tiny, capsys, options):
    code, out, _ = command(capsys, "check", tiny.directory, "--pp", 2, "--json", *options)
    report = json.loads(out)
    jsonschema.validate(report, SCHEMA)
    assert code == {"loads": 0, "dies": 1, "cannot tell": 2}[report["verdict"]]
    assert len(report["stages"]) == 2 and report["checkpoint"]["tensors"] == len(tiny)


def test_strict_refuses_stand_ins_and_cannot_tell(tiny, capsys):
    code, out, _ = command(capsys, "check", tiny.directory, "--pp", 2, "--strict", "--gpu", "cpu")
    assert code == 2 and "stand-ins: platform, class inspection, pipeline group\n" in out
    assert out.endswith("PP=2: cannot tell: PP=1 cannot be built here either\n")


def test_strict_has_nothing_to_refuse_on_a_gpu(tiny, capsys):
    assert command(capsys, "check", tiny.directory, "--pp", 2, "--strict", "--guard", "loader")[0] == 0


@pytest.mark.parametrize(("gpu", "ends", "verdict"), [("cpu", 2, "cannot tell"), ("h200", 1, "cannot be built")])
def test_an_architecture_that_vllm_does_not_know_is_refused_in_its_words(tiny, tmp_path, capsys, gpu, ends, verdict):
    """On a GPU what vLLM refuses on purpose is its verdict; a CPU is nobody's target, and tells nothing."""
    shutil.copytree(tiny.directory, tmp_path, dirs_exist_ok=True)
    config = {**tiny.config, "architectures": ["NobodysForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = command(capsys, "check", tmp_path, "--pp", 2, "--gpu", gpu)
    assert code == ends and f"stages 0-1    layers 0-11     {verdict}\n" in out and "NobodysForCausalLM" in out
    assert " loads" not in out


def test_a_tensor_that_the_checkpoint_lacks_is_not_called_a_pipeline_fault(tiny, capsys, monkeypatch):
    lost = "model.layers.2.mlp.down_proj.weight"
    partial = Checkpoint([spec for spec in tiny.values() if spec.name != lost], tiny.config, source="partial")
    monkeypatch.setattr(commands, "open_checkpoint", lambda *_, **__: partial)
    code, out, _ = command(capsys, "check", "partial", "--pp", 2, "--guard", "loader")
    assert code == 1 and out.count(f"    left at init: {lost}\n") == 2  # on its stage and at PP=1
    assert out.endswith("PP=2: loads, and is not complete, nor is PP=1: 1 absent\n")


def test_a_way_of_quantising_whose_parameters_have_no_shape_yet_dies_in_vllms_words(tiny, tmp_path):
    """GGUF's, asked for of safetensors: they cannot be looked at, and hide nothing."""
    shutil.copytree(tiny.directory, tmp_path / "gguf")
    config = {**tiny.config, "quantization_config": {**tiny.config["quantization_config"], "quant_method": "gguf"}}
    (tmp_path / "gguf" / "config.json").write_text(json.dumps(config))
    (stage,) = dry_run(Checkpoint.from_directory(tmp_path / "gguf"), 1, progress=False).stages
    assert stage.verdict != LOADS and "glmpp" not in (stage.place or ""), stage.message
