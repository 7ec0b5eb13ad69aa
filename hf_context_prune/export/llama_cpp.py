"""GGUF files in llama.cpp itself, through the prebuilt server of the package xllamacpp."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_context_prune.errors import ExportError

_WORKER = Path(__file__).with_name("_llama_worker.py")
_POSITIONS = 512
_TIMEOUT = 600
_CANDIDATES = 10
_TRIES = 40


class LlamaCppRuntime:
    """A process that serves a GGUF file on this machine, and ends with this object.

    Args:
        file: The GGUF file.
        threads: Number of threads.
        positions: Largest number of tokens of a sequence.
        sequences: Largest number of sequences that are decoded together.

    Raises:
        ExportError: llama.cpp can't open the file; the message has its output.
    """

    def __init__(self, file: Path, *, threads: int, positions: int = _POSITIONS, sequences: int = 1) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            # -P: the worker's folder has modules with the names of libraries.
            [sys.executable, "-P", str(_WORKER), str(file), *map(str, (positions, sequences, threads))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._address = ""
        assert self._process.stdout is not None
        self._expired = False
        limit = threading.Timer(_TIMEOUT, self._expire)
        limit.daemon = True
        limit.start()
        for line in self._process.stdout:
            if line.startswith(b'{"address"'):
                self._address = json.loads(line)["address"]
                break
        limit.cancel()
        if not self._address:
            reason = f"it did not answer within {_TIMEOUT} s" if self._expired else self._last_errors()
            self.close()
            raise ExportError(f"llama.cpp can't open {file.name}: {reason}")

    def losses(self, ids: Sequence[int], expected: Sequence[float] | None = None) -> list[float]:
        """Return losses as [`Runtime`][] does, one token per request.

        The server returns the probabilities of the likeliest tokens alone. So the logit of the target is raised to
        bring its probability near 1/2, and the effect of the raise is computed out of the returned probability.
        """
        about = [5.0] * (len(ids) - 1) if expected is None else expected
        return [self._loss(ids[: i + 1], ids[i + 1], about[i]) for i in range(len(ids) - 1)]

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Continue a text as [`Runtime`][] does."""
        found = self._complete(list(ids), n_predict=new_tokens, temperature=0.0, cache_prompt=False)
        tokens = [int(token) for token in found["tokens"]]
        return tokens[:-1] if found["stop_type"] == "eos" else tokens

    def time_generation(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Time a generation as [`Runtime`][] does: llama.cpp's own times, which the server and HTTP have no part in.

        Every prompt is read into a slot of its own. Then all slots decode at once: each reads its last token again and
        draws its first, then comes one common step per token.
        """
        slots = list(enumerate(map(list, prompts)))
        prefill = sum(
            self._complete(prompt, n_predict=0, cache_prompt=False, id_slot=slot)["timings"]["prompt_ms"]
            for slot, prompt in slots
        )
        options = {"n_predict": new_tokens + 1, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1}
        with ThreadPoolExecutor(len(slots)) as pool:
            done = list(pool.map(lambda item: self._complete(item[1], id_slot=item[0], **options), slots))
        decode = max(found["timings"]["predicted_ms"] for found in done)
        return prefill / 1000, decode / 1000

    def encode(self, text: str) -> list[int] | None:
        """Tokenize a text as [`Runtime`][] does."""
        return [int(token) for token in self._post("/tokenize", content=text, parse_special=True)["tokens"]]

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # it has nothing to save
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _loss(self, before: Sequence[int], token: int, about: float) -> float:
        bias = about + math.log(max(-math.expm1(-about), 1e-6))  # log((1 - p) / p)
        for seed in range(_TRIES):
            found = self._complete(
                list(before),
                n_predict=1,
                temperature=1.0,
                samplers=[],
                seed=seed,
                logit_bias=[[token, bias]],
                n_probs=_CANDIDATES,
                post_sampling_probs=True,
            )
            if "completion_probabilities" not in found:
                continue  # an end-of-text token was drawn, for which the server returns no probabilities
            likeliest = {int(item["id"]): item["prob"] for item in found["completion_probabilities"][0]["top_probs"]}
            raised = likeliest.get(token, 0.0)
            if 0.0 < raised < 0.999:  # nearer to 1, float32 has too few digits
                return math.log(raised + (1.0 - raised) * math.exp(bias)) - math.log(raised)
            bias += 8.0 if raised == 0.0 else -8.0
        return math.inf

    def _complete(self, prompt: list[int], **options: Any) -> Any:  # noqa: ANN401
        return self._post("/completion", prompt=prompt, return_tokens=True, **{"cache_prompt": True, **options})

    def _post(self, path: str, **body: Any) -> Any:  # noqa: ANN401
        request = urllib.request.Request(
            self._address + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with self._open(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except OSError as error:
            raise ExportError(f"llama.cpp failed: {error}. {self._last_errors()}") from error

    def _last_errors(self) -> str:
        """Return the last errors in the log of the process."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines
        return " ".join(" ".join(errors[-3:]).split())[-500:]
