"""Bring up the real engine on the CPU and, if asked to, generate greedily and print the tokens. Run by `test_engine.py`."""

from __future__ import annotations

import json
import os
import sys


def main(model: str, load_format: str, pp_size: int, tp_size: int, ep: bool, eager: bool, generate: bool) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        load_format=load_format,
        pipeline_parallel_size=pp_size,
        tensor_parallel_size=tp_size,
        enable_expert_parallel=ep,
        distributed_executor_backend="mp" if pp_size * tp_size > 1 else None,
        skip_tokenizer_init=True,
        enforce_eager=eager,
        max_model_len=64,
        max_num_seqs=2,
        dtype="bfloat16",
        seed=0,
    )
    print("ENGINE IS UP", flush=True)
    if not generate:
        os._exit(0)  # the caller ends the workers
    prompts = [{"prompt_token_ids": ids} for ids in ([1, 5, 9, 200, 7], [17, 3, 42])]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = engine.generate(prompts, greedy, use_tqdm=False)
    print("TOKENS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    model, load_format, pp_size, tp_size, ep, mode, then = sys.argv[1:]
    main(model, load_format, int(pp_size), int(tp_size), ep == "ep", mode == "eager", then == "generate")
