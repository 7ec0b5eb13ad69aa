"""The process that renders chat templates for `chat_templates.py`, under limits of memory and of processor time.

It reads one JSON request a line from stdin, answers with one JSON line on stdout, and ends with its parent. The system
ends it when the time is over: nothing else stops a template that is busy in native code. It imports no torch.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_SECONDS, _SECONDS_PER_BYTE = 1.0, 2e-7
_MEMORY, _MEMORY_PER_BYTE = 128 * 2**20, 16
_RESULT, _RESULT_PER_BYTE = 2**20, 16
_LONGEST_ERROR = 500


class _Tokenizer:
    """The part of a tokenizer that renders: the methods of transformers, on the template and the special tokens."""

    apply_chat_template = PreTrainedTokenizerBase.apply_chat_template
    get_chat_template = PreTrainedTokenizerBase.get_chat_template

    def __init__(self, chat_template: Any, special_tokens_map: dict[str, str]) -> None:  # noqa: ANN401 - one or several
        self.chat_template, self.special_tokens_map = chat_template, special_tokens_map


def _answer(line: bytes) -> dict[str, Any]:
    """Return ``{"results": [{"text": ...} or {"refusal": ...}, ...]}``, or ``{"limit": ...}``."""
    request = json.loads(line)
    tokenizer: Any = _Tokenizer(request["chat_template"], request["special_tokens_map"])
    longest = _RESULT + _RESULT_PER_BYTE * len(line)
    results = []
    for job in request["jobs"]:
        try:
            text = tokenizer.apply_chat_template(job["messages"], tokenize=False, **job["options"])
        except MemoryError:
            return {"limit": "needs more memory than it may"}
        except Exception as error:  # Jinja's errors, and whatever the template raises itself
            results.append({"refusal": str(error)[:_LONGEST_ERROR] or type(error).__name__})
            continue
        longest -= len(text)
        if longest < 0:
            return {"limit": "writes much more text than it is given"}
        results.append({"text": text})
    return {"results": results}


def _limit_memory(size: int) -> None:
    """Limit the growth of this process; Linux alone counts address space reliably."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY + _MEMORY_PER_BYTE * size, hard))


def _set_alarm(seconds: float) -> None:
    """Let the system end this process after some seconds of processor time; 0 takes that back. Windows has no alarm."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process too
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        _limit_memory(len(line))
        _set_alarm(_SECONDS + _SECONDS_PER_BYTE * len(line))
        try:
            answer = json.dumps(_answer(line))
        except MemoryError:
            answer = json.dumps({"limit": "needs more memory than it may"})
        _set_alarm(0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
