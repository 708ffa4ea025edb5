"""A platform for vLLM that serves the GLM-5 family on a CPU, slowly and exactly, in plain torch. For tests and teaching.

    GLMPP_REFERENCE=1 vllm serve CHECKPOINT --pipeline-parallel-size 2 --load-format glmpp --dtype float32

vLLM's own CPU platform refuses the model: it has no sparse attention, and no kernel for block FP8 on most machines. With
this one everything but four kernels is vLLM's: server, scheduler, worker processes, pipeline, model class, loader, paged
caches. The four are sparse attention over the latent cache, the indexer's scores and its choice, block-FP8 linear layers,
and block-FP8 experts. They compute with weights dequantised to BF16, and quantise neither activations nor caches, so that
the tokens are those of transformers' model on the dequantised checkpoint. Nothing here says how fast a GPU is.

    platform.py     is it asked for, may it run here, and which attention backend it names
    attention.py    the backend: metadata of a batch, the latent cache, attention over what the indexer chose
    indexer.py      the indexer's cache, scores and top-k
    linear.py       block-FP8 linear layers and experts
"""
