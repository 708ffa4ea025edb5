"""The command's parts that need no vLLM."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.cli import commands
from glmpp.cli.model import open_checkpoint
from glmpp.cli.report_text import _spans
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit, KVCache, Memory
from glmpp.errors import GlmppError
from glmpp.formats.tensor import TensorSpec
from glmpp.gpus import GPUS
from glmpp.layouts.layout import Layout, Layouts
from glmpp.partition import make_stages, stage_bytes
from glmpp.progress import progress_bar

CONFIG = ROOT / "data" / "glm-5.1-fp8"
pytestmark = pytest.mark.usefixtures("no_partition_variable")


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_plan_adds_up_to_the_checkpoint_and_its_balance_is_the_best_split(full, capsys):
    code, out, _ = command(capsys, "plan", CONFIG, "--pp", 4, "--gpu-gb", 320)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() or line.startswith("no stage")]
    tensors = [int(row[2].replace(",", "")) for row in rows]
    assert sum(tensors) == len(full) == 119_028
    assert [round(size / 1e9, 3) for size in stage_bytes(full, make_stages(full.config, 4))] == [
        float(row[3]) for row in rows[:4]
    ]
    assert rows[0][4] == f"{320 - float(rows[0][3]):.1f}"
    assert "balanced: VLLM_PP_LAYER_PARTITION=" in out and "% less than" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["check", "--help"], 0),
        (["check", CONFIG, "--no-such-option"], 2),
        (["check", CONFIG, "--pp", "eight"], 2),
        (["check", CONFIG, "--guard", "none"], 2),
        (["plan", "no/such/folder"], 2),
        (["plan", CONFIG, "--pp", 8], 0),
        (["plan", "FOLDER"], 0),
    ],
    ids=str,
)
def test_what_needs_no_tensors_does_not_wait_for_torch(arguments, code, tiny):
    """Counted by what is imported: torch alone takes seconds."""
    arguments = [str(tiny.directory) if one == "FOLDER" else str(one) for one in arguments]
    script = f"import sys; from glmpp import cli; code = cli.main({arguments!r}); print('code', code, file=sys.stderr);"
    script += "print('slow', sorted({'torch', 'pandas', 'vllm', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.endswith(f"code {code}\nslow []\n"), done.stderr
    before = os.times()
    subprocess.run([sys.executable, "-m", "glmpp", *arguments], capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 3  # seconds of processor time; 0.2 to 0.5 alone on a machine


def test_plan_takes_a_split_and_shares_a_stage_among_gpus(capsys):
    _, out, _ = command(
        capsys, "plan", CONFIG, "--pp", 2, "--layer-partition", "3,75", "--gpu-gb", 141, "--tp", 8, "--drafter"
    )
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert [row[1] for row in rows] == ["0-2", "3-77"]
    assert rows[1][4] == f"{141 - float(rows[1][3]) / 8:.1f}"
    assert (
        "left, at most" in out
        and "\nat most: as if TP=8 shared every tensor; what each GPU holds whole `glmpp check`" in out
    )
    assert "no stage" not in out  # the drafter's layer counts on the last stage


def test_plan_ends_with_1_where_a_stage_is_larger_than_its_gpus_and_names_how_many_would_do(full, capsys):
    code, out, _ = command(capsys, "plan", CONFIG, "--pp", 2, "--gpu-gb", 80)
    assert code == 1 and "\ndoes not fit: " in out and " for a GPU of 80 GB\n" in out
    gpus = int(re.search(r"\n(\d+) such GPUs hold the weights", out)[1])
    assert 754 / 80 < gpus <= 12
    tp, pp = (int((re.search(rf"{name}=(\d+)", out.splitlines()[-1]) or [0, 1])[1]) for name in ("TP", "PP"))
    assert tp * pp == gpus and max(stage_bytes(full, make_stages(full.config, pp))) / tp <= 80e9
    assert command(capsys, "plan", CONFIG, "--pp", pp, "--tp", tp, "--gpu-gb", 80)[0] == 0


def test_plan_finds_the_layers_under_another_name(capsys, monkeypatch):
    names = ["transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight", "vision.patch.weight"]
    names += [f"transformer.h.{n}.mlp.weight" for n in range(4)] + [f"vision.blocks.{n}.weight" for n in range(6)]
    checkpoint = Checkpoint([TensorSpec(name, "BF16", (8,)) for name in names], {"n_layer": 4}, source="x")
    monkeypatch.setattr(commands, "open_checkpoint", lambda *_: checkpoint)
    _, out, _ = command(capsys, "plan", "x", "--pp", 2)
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() or line.startswith("no stage")]
    assert [row[2] for row in rows] == ["3", "4", "7"]


def test_version_names_the_kit_and_the_vllm_that_it_runs(capsys, monkeypatch):
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"glmpp [\w.()]+, vLLM not installed\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7"), ([1, 5], "1, 5"), ([], "")]
)
def test_spans(numbers, text):
    assert _spans(numbers) == text


def test_bars_are_for_a_terminal_and_a_notebook_and_not_for_a_log(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = []
    for stream in (io.StringIO(), Terminal(), type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()):
        monkeypatch.setattr(sys, "stderr", stream)
        list(progress_bar(range(3), "counting"))
        shown.append("counting" in stream.getvalue())
    assert shown == [False, True, True]


def test_make_checkpoint_writes_a_folder_that_check_and_plan_can_read(tmp_path, capsys):
    code, out, _ = command(capsys, "make-checkpoint", CONFIG / "config.json", tmp_path / "made", "--seed", 3)
    assert code == 0 and "618 tensors" in out
    assert len(Checkpoint.from_directory(tmp_path / "made")) == 618
    assert command(capsys, "plan", tmp_path / "made", "--pp", 3)[0] == 0
    code, _, err = command(capsys, "make-checkpoint", CONFIG / "config.json", tmp_path / "made")
    assert code == 2 and err.startswith("glmpp: ") and "exists already" in err and "--overwrite" in err
    assert command(capsys, "make-checkpoint", CONFIG / "config.json", tmp_path / "made", "--seed", 4, "--overwrite")[0] == 0
    assert len(Checkpoint.from_directory(tmp_path / "made")) == 618


@pytest.mark.parametrize("what", ["file", "folder", "link", "is a file"])
def test_make_checkpoint_replaces_a_checkpoint_and_nothing_else(what, tmp_path, capsys):
    asked = made = tmp_path / "made"
    if what == "is a file":
        made.write_text("mine")
    else:
        made.mkdir()
        (made / "config.json").write_text("{}")
    if what == "link":
        (asked := tmp_path / "link").symlink_to(made)
    elif what == "folder":
        (made / "model.safetensors").mkdir()
    elif what == "file":
        (made / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = command(capsys, "make-checkpoint", CONFIG / "config.json", asked, "--overwrite")
    assert code == 2 and "not overwritten" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("variable", ["1,2,3", "20,20,20,18", "6,,6"])
def test_the_variable_is_vllms_split_where_it_fits_and_an_error_where_vllm_would_fail(variable, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", variable)
    code, out, err = command(capsys, "plan", CONFIG, "--pp", 4)
    if variable.count(",") == 3:
        rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
        assert code == 0 and [row[1] for row in rows] == ["0-19", "20-39", "40-59", "60-77"]
    else:
        assert code == 2 and f"VLLM_PP_LAYER_PARTITION={variable!r}" in err and "environment" in err
        assert command(capsys, "check", CONFIG, "--pp", 4)[::2] == (2, err)
    code, out, _ = command(capsys, "plan", CONFIG, "--pp", 2, "--layer-partition", "3,75")  # what is asked for comes first
    assert code == 0 and "3-77" in out


def test_plan_of_a_split_with_an_empty_stage(capsys):
    code, out, _ = command(capsys, "plan", CONFIG, "--pp", 3, "--layer-partition", "3,0,75")
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert code == 0 and [row[1] for row in rows] == ["0-2", "none", "3-77"]


NOTHING_TOLD = [
    (("cannot tell", False), ("cannot tell", False)),
    (("loads", False),),
    (("dies", True), ("cannot tell", False)),
]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ((("loads", True), ("cannot tell", False)), 0),
        ((("loads", None), ("dies", False)), 1),  # no room
        ((("dies", False), ("cannot be built", False), ("loads, is not complete", True)), 1),
        *((found, 2) for found in NOTHING_TOLD),
    ],
)
def test_layouts_ends_with_2_only_where_a_layout_might_serve_and_nobody_can_tell(found, code, capsys, monkeypatch):
    """Of each layout its verdict, and whether a request fits: None: no; False: nobody knows."""
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2,3")
    cache = {True: KVCache(1, (), 1, 1, 100, "auto"), None: KVCache(1, (), 1, 10**15, 100, "auto"), False: None}
    one = lambda room: Fit([Memory(1, 1, (), cache[room])], GPUS["h200"], 0.9)  # noqa: E731
    all_of_them = [Layout(Deployment(gpu="h200"), verdict, "", one(room), None, 1) for verdict, room in found]
    told = Layouts(all_of_them, (2, 100), GPUS["h200"], None, {}, {"vllm": "0"}, 1.0)
    monkeypatch.setattr(commands, "layouts", lambda *_, **__: told)
    ended, _, err = command(capsys, "layouts", CONFIG, "--gpus", 2)
    assert ended == code
    assert "VLLM_PP_LAYER_PARTITION is ignored" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "no-such-folder", "--pp", 2), "no such folder or file"),
        (("plan", ""), "the name of the model is empty"),
        (("plan", CONFIG, "--pp", 79), "79 stages for 78 layers"),
        (("plan", CONFIG, "--pp", 2, "--layer-partition", "1,2"), "adds up to 3 layers"),
        (("check", CONFIG, "--pp", 200, "--tp", 100), "takes 20,000 GPUs: expected at most 16,384"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(capsys, arguments, message):
    code, out, err = command(capsys, *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_check_without_vllm_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setenv("GLMPP_WITHOUT_VLLM", "1")
    code, _, err = command(capsys, "check", CONFIG, "--pp", 2)
    assert code == 2 and "pip install '.[vllm]'" in err


def test_a_folder_without_shards_is_read_as_a_config_and_says_so(tmp_path):
    (tmp_path / "config.json").write_text((CONFIG / "config.json").read_text())
    assert "from the config alone" in open_checkpoint(str(tmp_path)).source
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GlmppError, match="not a complete safetensors file"):
        open_checkpoint(str(tmp_path))
