"""The fresh process of `measure_peak_memory`: load a model folder, use it, and write one JSON line to stdout."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from hf_context_prune.modeling.generation import draw_prompt, fit_prompt, time_generation
from hf_context_prune.modeling.inference import dtype_name, max_positions, vocabulary_rows
from hf_context_prune.modeling.wrappers import auto_class


def peak_rss() -> tuple[int, str]:
    """Return the highest resident size of this process so far (bytes) and the name of its source.

    On Linux this is not `ru_maxrss`, which survives exec: a child starts with the peak of the process that started it,
    which here holds both models.
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset), "peak_wset"
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024, "VmHWM"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), "ru_maxrss"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    baseline = psutil.Process().memory_info().rss
    start = time.perf_counter()
    config = AutoConfig.from_pretrained(options.folder, trust_remote_code=options.trust_remote_code)
    auto = auto_class(config)
    model = auto.from_pretrained(
        options.folder, dtype="auto", use_safetensors=True, trust_remote_code=options.trust_remote_code
    )
    load_seconds = time.perf_counter() - start
    prompt_tokens = fit_prompt([max_positions(model)], options.prompt_tokens, options.new_tokens)
    time_generation(model, draw_prompt(vocabulary_rows(model), 1, prompt_tokens, seed=0), options.new_tokens)
    peak, method = peak_rss()
    result = {
        "baseline_rss": baseline,
        "peak_rss": peak,
        "load_seconds": load_seconds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": options.new_tokens,
        "dtype": dtype_name(model),
        "method": method,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
