"""Time vLLM's decoding of one folder; runs in the environment that has vLLM (see `vllm_speed`).

python vllm_worker.py FOLDER IMPLEMENTATION CONTEXT NEW_TOKENS REPEATS BATCH...
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    folder, implementation = sys.argv[1:3]
    context, new_tokens, repeats, *batches = map(int, sys.argv[3:])
    model = LLM(
        folder,
        model_impl=implementation,
        trust_remote_code=True,
        max_model_len=context + new_tokens,
        dtype="bfloat16",
        enable_prefix_caching=False,
    )

    def seconds(batch: int, count: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 100 for i in range(context)]} for j in range(batch)]
        options = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        model.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - begin

    found = {}
    for batch in batches:
        seconds(batch, 2)
        speeds = []
        for _ in range(repeats):
            first = seconds(batch, 1)
            speeds.append(batch * (new_tokens - 1) / (seconds(batch, new_tokens) - first))
        found[str(batch)] = speeds
    print("found:", json.dumps(found))  # vLLM writes to stdout, too


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
