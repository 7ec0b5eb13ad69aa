"""Run in an environment with vLLM: continue token ids greedily, and print "found:" and the new ones as JSON."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm import LLM, SamplingParams

    folder, dtype, ids, new_tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    model = LLM(
        folder,
        model_impl="transformers",
        trust_remote_code=True,
        max_model_len=len(ids) + new_tokens,
        dtype=dtype,
        enforce_eager=True,
    )
    options = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": ids}], options)
    print("found:", json.dumps(list(answer.outputs[0].token_ids)))  # vLLM writes to stdout, too
