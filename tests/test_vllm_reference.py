"""The reference platform's kernels against formulas written out here, and when it may run. Whole: `tests/engine`."""

from __future__ import annotations

import pkgutil
from types import SimpleNamespace

import pytest
import torch
from glmpp_reference import platform

from glmpp.errors import GlmppError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BLOCK, HEADS, LATENT, ROTATED = 4, 3, 8, 2


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def batch(lengths: list[tuple[int, int]], generator):
    """Requests of (tokens so far, tokens of them now), whose cache blocks lie anywhere; and the slot of each token."""
    from glmpp_reference.attention import Batch, Request

    blocks = torch.randperm(40, generator=generator)
    requests, slots, start, used = [], [], 0, 0
    for length, now in lengths:
        count = -(-length // BLOCK)
        mine, used = blocks[used : used + count], used + count
        requests.append(Request(slice(start, start + now), length, torch.cat([mine, torch.zeros(3, dtype=torch.long)])))
        start += now
        slots += [mine[position // BLOCK] * BLOCK + position % BLOCK for position in range(length - now, length)]
    return Batch(requests, torch.stack(slots), start, start, len(requests))


@pytest.mark.parametrize(
    "name",
    [
        "layers.attention.mla_attention:get_mla_prefill_backend",
        "models.deepseek_v2:per_token_group_quant_fp8",
        "models.deepseek_v2:_try_load_fp8_indexer_wk",
        "models.deepseek_v2:DeepseekV32IndexerCache.get_attn_backend",
    ],
)
def test_what_it_replaces_is_there(name):
    """Under a name that has moved it would put something that nobody calls; imports that fail say so themselves."""
    assert callable(pkgutil.resolve_name(f"vllm.model_executor.{name}"))


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_it_is_active_only_where_it_is_asked_for(monkeypatch, value):
    monkeypatch.delenv(platform.ASKED_FOR_BY, raising=False)
    if value is not None:
        monkeypatch.setenv(platform.ASKED_FOR_BY, value)
    assert platform.activate() is None and platform.register() is None
    monkeypatch.setenv(platform.ASKED_FOR_BY, "1")
    assert platform.activate() == "glmpp_reference.cpu.ReferencePlatform"


def test_it_refuses_a_machine_with_a_gpu(monkeypatch):
    from glmpp_reference.cpu import ReferencePlatform

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(GlmppError, match="without a GPU, and this one has 'cuda'; unset GLMPP_REFERENCE"):
        ReferencePlatform.check_and_update_config(None)


def test_a_request_finds_its_rows_wherever_its_blocks_lie(generator):
    from glmpp_reference.attention import write_rows

    cache, rows = torch.zeros(40, BLOCK, 5), torch.randn(20, 5, generator=generator)
    whole = batch([(13, 13), (7, 7)], generator)
    write_rows(cache, rows, whole.slot_mapping)
    assert torch.equal(whole.requests[0].cached(cache), rows[:13]) and torch.equal(
        whole.requests[1].cached(cache), rows[13:]
    )
    before = cache.clone()
    write_rows(cache, rows[:3], torch.tensor([-1, -1, -1]))  # padding
    assert torch.equal(cache, before)


def test_attention_is_the_softmax_over_the_chosen_tokens(generator):
    from glmpp_reference.attention import Attention

    lengths, topk = [(13, 13), (9, 1), (6, 2)], 5
    whole = batch(lengths, generator)
    cache = torch.randn(40, BLOCK, LATENT + ROTATED, generator=generator)
    query = torch.randn(16, HEADS, LATENT + ROTATED, generator=generator)
    chosen = torch.full((20, topk), -1, dtype=torch.int32)
    for request in whole.requests:
        for token, position in zip(range(request.tokens.start, request.tokens.stop), request.positions().tolist()):
            some = torch.randperm(position + 1, generator=generator)[:topk]
            chosen[token, : len(some)] = some.int()
    kernel = Attention(HEADS, LATENT + ROTATED, 0.3, kv_lora_rank=LATENT, topk_indices_buffer=chosen)
    got, _ = kernel.forward_mqa((query[..., :LATENT], query[..., LATENT:]), cache, whole, None)
    for request in whole.requests:
        rows = request.cached(cache)
        for token in range(request.tokens.start, request.tokens.stop):
            keys = rows[[position for position in chosen[token].tolist() if position >= 0]]
            weights = (query[token] @ keys.T * 0.3).softmax(-1)
            assert torch.allclose(got[token], weights @ keys[:, :LATENT], atol=1e-6)


def test_the_indexer_chooses_the_best_of_the_tokens_so_far(generator, monkeypatch):
    from glmpp_reference import indexer

    whole = batch([(13, 13), (9, 1)], generator)
    cache = torch.randn(40, BLOCK, 6, generator=generator)
    keys, queries = torch.randn(14, 6, generator=generator), torch.randn(14, HEADS, 6, generator=generator)
    weights = torch.randn(14, HEADS, generator=generator)
    context = SimpleNamespace(attn_metadata={"layer": whole})
    monkeypatch.setattr(indexer, "get_forward_context", lambda: context)
    buffer = torch.full((20, 4), 99, dtype=torch.int32)
    this = SimpleNamespace(
        k_cache=SimpleNamespace(prefix="layer", kv_cache=cache), topk_indices_buffer=buffer, topk_tokens=4
    )
    indexer.Indexer.forward_native(this, torch.empty(14, 1), queries, keys, weights)
    rows = torch.cat([keys[:13], whole.requests[1].cached(cache)[:8], keys[13:]])
    for token, (first, last) in enumerate([(0, position + 1) for position in range(13)] + [(13, 22)]):
        score = [(weights[token] * (queries[token] @ key).relu()).sum().item() for key in rows[first:last]]
        best = sorted(range(len(score)), key=lambda position: -score[position])[:4]
        assert set(buffer[token].tolist()) - {-1} == set(best), token
    assert (buffer[14:] == 99).all()


def test_experts_are_summed_with_the_router_s_weights(generator):
    from glmpp_reference.linear import Experts

    x = torch.randn(7, 6, generator=generator)
    w13 = list(torch.randn(3, 8, 6, generator=generator).bfloat16())
    w2 = list(torch.randn(3, 6, 4, generator=generator).bfloat16())
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])
    shares = torch.rand(7, 2, generator=generator)
    layer = SimpleNamespace(w13_dequantised=w13, w2_dequantised=w2)
    got = Experts.apply(None, layer, x, shares, ids)
    for token in range(7):
        expected = torch.zeros(6)
        for expert, share in zip(ids[token].tolist(), shares[token]):
            gate, up = (w13[expert].float() @ x[token]).chunk(2)
            expected += share * (w2[expert].float() @ (gate * gate.sigmoid() * up))
        assert torch.allclose(got[token], expected, atol=1e-4)
