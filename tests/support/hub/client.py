"""The real Hub client in a fresh process, against the local server.

It reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, hence the processes; as each costs some seconds,
they are few, with several steps each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.hub.process import HubProcess
from tests.support.hub.server import sha256

ROOT = Path(__file__).parents[3]
#: Steps of every client: it prints one line of JSON, last.
PREAMBLE = """
import hashlib, json, sys, torch
torch.set_num_threads(1)
arguments = json.loads(sys.argv[1])

def digest(model):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()

def attempt(function, *args, **options):
    from hf_context_prune.errors import ContextPruneError
    try:
        function(*args, **options)
    except ContextPruneError as error:
        return [type(error).__name__, str(error)]
"""


def digest(model) -> str:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return sha256(logits.numpy().tobytes())


def client(
    hub: HubProcess,
    folder: Path,
    home: Path,
    code: str,
    *,
    arguments: dict | None = None,
    package: bool = True,
    **variables: str,
) -> dict:
    """Run code in a fresh process, in a folder and with a cache of its own; returns the JSON of its last line."""
    prefixes = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",  # it would also ask for a list of tools to name itself after
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT) if package else "",
    }
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, json.dumps(arguments)],
        cwd=folder,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert not [request for request in hub.log if request.status == 501]
    return json.loads(result.stdout.splitlines()[-1])
