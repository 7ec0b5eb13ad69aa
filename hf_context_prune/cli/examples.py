"""Examples at the end of every command's help. A test parses each; a line fits into 80 columns."""

from __future__ import annotations

_EXAMPLES = {
    "demo": ("demo", "demo --data contracts.jsonl --output mini-gpt"),
    "prune": (
        "prune demo --data contracts.jsonl --output mini-gpt",
        "prune Qwen/Qwen3-0.6B --data notes --output mini \\\n      --recover-minutes 30",
        "prune model.gguf --pruning-ratio 0.3 --dry-run",
    ),
    "chat": (
        "chat mini-gpt",
        "chat mini-gpt --base demo",
        "chat mini-gpt --format json < prompts.txt",
    ),
    "recover": (
        "recover mini-gpt --data contracts.jsonl --output better",
        "recover mini-gpt --data contracts.jsonl --output better \\\n      --base demo --max-minutes 30",
    ),
    "evaluate": (
        "evaluate mini-gpt --data more-contracts.jsonl --base demo",
        "evaluate mini-gpt --data more-contracts.jsonl --format json",
    ),
    "bench": ("bench demo mini-gpt", "bench demo mini-gpt --new-tokens 64 --output speed"),
    "inspect": ("inspect mini-gpt", "inspect mini-gpt --format json"),
    "report": ("report mini-gpt smaller", "report mini-gpt smaller speed --output comparison"),
    "check": ("check Qwen/Qwen3-0.6B", "check my-model --trust-remote-code"),
    "export": (
        "export mini-gpt --to gguf --output mini-gguf",
        "export mini-gpt --to onnx --output mini-onnx --data a.txt",
    ),
    "serve": ("serve mini-gpt --port 8001", "serve mini-gpt --engine vllm --python vllm/bin/python"),
    "space": (
        "space mini-gpt --base demo --output mini-space",
        "space me/mini-gpt --output mini-space --push me/mini-space",
    ),
    "card": ("card mini-gpt", "card mini-gpt --name me/mini-gpt --overwrite"),
    "push": ("push mini-gpt me/mini-gpt --private", "push mini-gpt me/mini-gpt --create-pr"),
    "cross-domain": (
        "cross-domain demo --domain law=a.jsonl --domain care=b.csv \\\n      --output all",
        "cross-domain demo --domain law=a.txt --domain general=b.csv \\\n      --mix law=0.25 --output all",
    ),
    "paper-grid": (
        "paper-grid demo --data contracts.jsonl --output grid",
        "paper-grid demo --data notes.txt --linear 1e-3 --output grid",
    ),
    "env": ("env", "env --format json"),
}


def examples_of(command: str) -> str:
    """Return the lines that end a command's help."""
    return "\n".join(["Examples:", *(f"  hf-context-prune {line}" for line in _EXAMPLES[command])])
