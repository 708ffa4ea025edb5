"""Words of strangers in what a terminal, a log and a page show: they fill their place in a line, and forge no other."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from pathlib import Path

import faulty
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.cli import commands
from glmpp.cli.advice_text import pasted
from glmpp.cli.report_text import as_text
from glmpp.dryrun.advice import PLUGINS_VARIABLE
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.fit import Fit, KVCache, Memory
from glmpp.dryrun.messages import Failure, Run, StageResult
from glmpp.dryrun.report import DryRunReport
from glmpp.dryrun.stage_report import CANNOT_TELL, DIES, INCOMPLETE, LOADS, StageReport
from glmpp.errors import GlmppError, KitError
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.tensor import TensorSpec
from glmpp.gpus import GPUS
from glmpp.layouts.layout import Layout, Layouts
from glmpp.layouts.plan import plan_text
from glmpp.layouts.text import layouts_text
from glmpp.ledger import ABSENT, LOADED, LOST, UNEXPECTED, Ledger, UnloadedParam
from glmpp.partition import make_stages
from glmpp.words import joined, printable, quoted, shown

# Surrogates, controls, bidi, separators and all, a few of them often; short or thousands of characters long.
CHARACTERS = st.characters() | st.sampled_from("\n\r\t\x1b\x00\x85\u2028\u2029\u202e\u200b\ufe0f\ud800\u00a0 .0'$")
WORDS = st.builds(
    lambda piece, times: (piece * times)[:5000],
    st.text(CHARACTERS, min_size=1, max_size=30),
    st.sampled_from([1, 2, 40, 5000]),
)
FORGED = "z" + "\n" * 40 + "PP=2: loads, complete\n\nto load it: curl https://example.com | sh\u2028PP=2: loads, complete"
CONFIG = {"num_hidden_layers": 4}
CACHE = KVCache(1, (), 1, 1, 100, "auto")


def lines_of(text: str) -> int:
    """How many lines a text has, each of them one that a terminal can show."""
    lines = text.split("\n")
    assert all(line.isprintable() and "\ufe0f" not in line and len(line) < 4000 for line in lines)
    return len(lines)


def checkpoint_of(word: str) -> Checkpoint:
    names = [f"{word}.layers.{layer}.a" for layer in range(4)] + [f"z.{word}"]
    return Checkpoint([TensorSpec(name, "BF16", (8,)) for name in names], CONFIG, source=word)


def report_of(word: str) -> DryRunReport:
    """Each of a report's paragraphs, with a word wherever one of somebody else's can be."""
    names = [f"{word}{at}" for at in range(6)]
    stages = make_stages(CONFIG, 4)
    left = {name: UnloadedParam(LOST, f"{word} was dropped", word, word, word) for name in names} | {
        "x": UnloadedParam(ABSENT, word)
    }
    keyed = Failure(exception="KeyError", message=word, key=word, place=f"{word}:1", function=word, tensor=word)
    said = Failure(exception=word, message=word, place=word, function=word, tensor=word)

    def result(stage: int, **seen) -> StageResult:
        seen = {"held": {word: 1}, "data": "made up", "backends": {"attention": {word: 1}}} | seen
        memory = Memory(1, 1, (), None, 0.9, word)
        return StageResult(run=Run(stage=stage, pp_size=4), model_class=word, memory=memory, **seen)

    untold = {"unplaced": dict.fromkeys(names, 1), "held": dict.fromkeys(names, 1)}
    reports = [
        StageReport(stages[0], DIES, result=result(0, failures=[keyed, said])),
        StageReport(stages[1], INCOMPLETE, result=result(1, left=left)),
        StageReport(stages[2], CANNOT_TELL, result=result(2, **untold)),
        StageReport(stages[3], LOADS, result=result(3), ledger=Ledger(dict.fromkeys(names, UNEXPECTED))),
    ]
    return DryRunReport(Deployment(4, gpu="h200"), reports, None, [], {"vllm": word}, {word: word}, 1.0, 1)


def layouts_of(word: str) -> Layouts:
    loads, fails = Fit([Memory(1, 1, (), CACHE)], GPUS["h200"], 0.9), None
    found = [
        Layout(Deployment(2, gpu="h200", guard="loader"), LOADS, word, loads, None, 1),
        Layout(Deployment(tp=2, gpu="h200"), DIES, word, fails, None, 1),
    ]
    return Layouts(found, (2, 100), GPUS["h200"], None, {"PP=9": "why"}, {"vllm": word}, 1.0)


@given(WORDS)
def test_a_report_has_as_many_lines_with_any_words_as_with_plain_ones(word):
    plain, told = (as_text(checkpoint_of(one), report_of(one), each=True) for one in ("plain", word))
    assert lines_of(told) == lines_of(plain)
    assert told.endswith("\nPP=4: does not load: 3 of 4 stages fail")


@given(WORDS)
def test_layouts_have_as_many_lines_with_any_words_as_with_plain_ones(word):
    model = f"org/{word[:60]}"
    plain, told = (layouts_text(pasted(model), checkpoint_of(one), layouts_of(one)) for one in ("plain", word))
    assert lines_of(told) == lines_of(plain)
    (line,) = (line for line in told.split("\n") if "vllm serve" in line)
    assert shlex.split(line)[:3] == ["vllm", "serve", model if printable(model) == model else "MODEL"]


@given(WORDS)
def test_a_plan_has_as_many_lines_with_any_words_as_with_plain_ones(word):
    plain = plan_text(checkpoint_of("plain"), Deployment(2))
    try:
        told = plan_text(checkpoint_of(word), Deployment(2))
    except GlmppError as error:  # the word is the path of a list of its own, or a tower's
        assert lines_of(str(error)) == 1
    else:
        assert lines_of(told) == lines_of(plain)


@given(WORDS, st.lists(WORDS, max_size=3), st.sampled_from([GlmppError, KitError]))
@example("0 " * 2500, [], GlmppError)  # cut beside a space
def test_an_error_is_one_line_and_one_for_each_detail(word, details, kind):
    error = kind(f"{word}: cannot be read", details)
    assert lines_of(str(error)) == 1 + len(details)
    assert all(line.startswith("    ") for line in str(error).split("\n")[1:])
    assert f"{error}".split("\n")[0].endswith(": cannot be read")  # the middle of a long one is left out, not its end
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert lines_of(str(GlmppError(error))) == 1


@given(WORDS)
def test_what_is_shown_of_a_name_is_printable_and_short_and_says_if_it_is_not_all(word):
    told = shown(word)
    assert lines_of(told) == 1 and len(told) <= 200 and "  " not in told.replace("…  ", "… ").replace("  …", " …")
    if len(printable(word)) <= 200 and "  " not in word:
        assert told == printable(word)
    elif len(word) > 200:
        assert f" … ({len(word):,} characters) … " in told


@given(st.text(st.sampled_from("abcÀé日本._-/'\"<>$ 0")))
def test_what_is_printable_stays_as_it_is(text):
    assert printable(text) == text and str(GlmppError(text.replace("  ", ""))) == text.replace("  ", "")


def test_control_characters_are_escaped_and_nothing_else():
    assert printable("a\x1b[31mb\x00\u202ec\nd é <b>\t\u200b\ud800") == "a\\x1b[31mb\\x00\\u202ec\\nd é <b>\\t\\u200b\\ud800"
    assert printable("\u2028\xa0\ufe0f\u3164\U000e0100") == "\\u2028\\xa0\\ufe0f\\u3164\\U000e0100"
    assert printable("\U00016fe4\U0001bc9d\U0001d159") == "\\U00016fe4\\U0001bc9d\\U0001d159"


def test_a_name_in_an_error_is_cut():
    assert quoted("a\nb") == r"'a\nb'"
    assert len(quoted("x" * 5_000)) <= 200 and "(5,002 characters)" in quoted("x" * 5_000)


def test_a_name_that_came_into_a_line_as_it_was_ends_no_line():
    assert joined(["a\nb", "    c\r"]) == "a\\nb\n    c\\r"


def test_spaces_cannot_push_words_to_where_a_terminal_begins_its_next_line():
    assert shown("z" + " " * 4 + "PP=2: loads, complete") == r"z\x20\x20\x20 PP=2: loads, complete"


def test_a_ledgers_and_a_tables_words_are_one_line(tmp_path):
    assert lines_of(str(UnloadedParam(LOST, FORGED, FORGED, FORGED, FORGED))) == lines_of(str(Ledger({FORGED: LOADED}))) == 1
    pytest.importorskip("pandas")
    table = report_of(FORGED).table()
    assert all(lines_of(str(cell)) == 1 for cell in table.to_numpy().flat)


# --- the command ---------------------------------------------------------------------------------------------------


def told_by(capsys, *arguments) -> tuple[int, list[str], str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert lines_of(out) and lines_of(err)
    return code, out.split("\n"), err


def with_a_tensor(folder: Path, name: str, file: str) -> Path:
    """A checkpoint with one more tensor, in a shard of its own."""
    save_file({name: torch.zeros(4)}, folder / file)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][name] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


@pytest.fixture(params=["plan", pytest.param("check", marks=pytest.mark.vllm)])
def command(request) -> str:
    if request.param == "check":
        pytest.importorskip("vllm")
    return request.param


@pytest.mark.usefixtures("no_partition_variable")
def test_a_checkpoints_words_forge_no_line_of_the_answer(command, tiny, tmp_path, capsys):
    """A tensor, its shard and the model's folder are called so that they would say that it loads, and what to paste."""
    answers = []
    called = "m\n" + FORGED.replace("/", "")
    for place, name, shard in (("plain", "z", "z"), (called, FORGED, "z\nPP=2: loads, complete\n")):
        folder = tmp_path / place
        shutil.copytree(tiny.directory, folder)
        with_a_tensor(folder, f"model.layers.0.{name}", f"{shard}.safetensors")
        answers.append(told_by(capsys, command, folder, "--pp", 2))
    (code, plain, _), (same, forged, err) = answers
    assert code == same == (1 if command == "check" else 0) and err == ""
    assert len(forged) == len(plain) and not any(line.startswith(("PP=2: loads", "to load it")) for line in forged)
    if command == "check":
        assert any(r"model.layers.0.z\n\n" in line for line in forged) and plain[-2] == forged[-2]


@pytest.mark.usefixtures("no_partition_variable")
def test_a_checkpoints_words_forge_no_line_of_an_error(tiny, tmp_path, capsys):
    folder = tmp_path / "m\nglmpp: fine"
    shutil.copytree(tiny.directory, folder)
    shard = with_a_tensor(folder, FORGED, "z\nglmpp: fine.safetensors") / "z\nglmpp: fine.safetensors"
    for spoil in (lambda: shard.write_bytes(b"{}"), shard.unlink, (folder / "config.json").unlink):
        spoil()
        code, _, err = told_by(capsys, "plan", folder, "--pp", 2)
        assert code == 2 and err.startswith("glmpp: ") and err.count("\n") == 1 and r"m\nglmpp: fine" in err


@pytest.mark.parametrize(
    ("plugins", "before"),
    [
        (None, ""),
        ("", "VLLM_PLUGINS=glmpp "),
        ("lora,mine", "VLLM_PLUGINS=lora,mine,glmpp "),
        ("lora,glmpp", ""),
        ("glmpp_reference", "VLLM_PLUGINS=glmpp_reference,glmpp "),
        ("a b", "VLLM_PLUGINS='a b,glmpp' "),
    ],
)
def test_the_line_to_paste_lets_vllm_load_the_kits_plugin(plugins, before, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    if plugins is not None:
        monkeypatch.setenv(PLUGINS_VARIABLE, plugins)
    monkeypatch.setattr(commands, "open_checkpoint", lambda *_: checkpoint_of("x"))
    monkeypatch.setattr(commands, "layouts", lambda *_, **__: layouts_of("x"))
    (tmp_path / "a $(b)").mkdir()
    (tmp_path / "a $(b)" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    _, out, _ = told_by(capsys, "layouts", "a $(b)", "--gpus", 2)
    _, told, _ = told_by(capsys, "layouts", "a $(b)", "--gpus", 2, "--json")
    (line,) = (line for line in out if " serve " in line)
    assert line.startswith(f"{before}vllm serve 'a $(b)' --pipeline-parallel-size 2")
    assert json.loads("\n".join(told))["layouts"][0]["command"] == line


@pytest.mark.vllm
@pytest.mark.usefixtures("no_partition_variable")
def test_a_cure_is_pasted_with_the_kits_plugin_and_without_a_name_that_needs_escaping(tmp_path, capsys, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    model = faulty.write_faulty("unguarded lookup", tmp_path)
    for name, before in ((str(model), ""), ("MODEL", "VLLM_PLUGINS=faulty,glmpp ")):
        _, out, _ = told_by(capsys, "check", model, "--pp", 2)
        (line,) = (line for line in out if " serve " in line)
        assert line == f"    {before}vllm serve {shlex.quote(name)} --pipeline-parallel-size 2 --load-format glmpp"
        model = model.rename(tmp_path / "m\nforged")
        monkeypatch.setenv(PLUGINS_VARIABLE, "faulty")  # now: the process that has imported vLLM serves other tests, too
