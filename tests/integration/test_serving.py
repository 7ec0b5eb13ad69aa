"""What serves and trains models of transformers takes pruned folders too: `transformers serve`, PEFT, TRL.

lm-evaluation-harness is in evaluation/test_harness.py.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_context_prune import load_pruned
from tests.support.export_folders import save
from tests.support.tiny import TEXT, tiny_tokenizer

pytestmark = pytest.mark.slow

CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
MESSAGES = [{"role": "user", "content": "has the patient a duty of care?"}]
NEW_TOKENS = 8
LONGEST_SECONDS = 240


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    root = tmp_path_factory.mktemp("serving")
    variable = save(root / "variable", variable=True, fewer_tokens=True, tokenizer=tokenizer)
    return {"stock": save(root / "stock", tokenizer=tokenizer), "variable": variable}


@contextmanager
def serving(folder, program, options=("--device", "cpu", "--log-level", "info"), *, up="Uvicorn running"):
    """A server in a process of its own, which says `up` once it is; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    bound = threading.Timer(LONGEST_SECONDS, process.kill)
    bound.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if up in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        bound.cancel()
        process.terminate()  # vLLM ends its own processes then
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_for(port):
    """Some servers say that they are up just before they listen."""
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"nothing listens on port {port}")


def ask(address, body=None, *, read=json.load):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return read(answer)


TRANSFORMERS = (
    "-c",
    "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()",
)
OURS = ("-m", "hf_context_prune")


@pytest.mark.parametrize(("kind", "program"), [("stock", TRANSFORMERS), ("variable", OURS)])
def test_the_transformers_server_answers_a_chat(folders, kind, program):
    folder = folders[kind]
    with serving(folder, program) as address:
        body = {
            "model": str(folder),
            "messages": MESSAGES,
            "stream": False,
            "generation_config": json.dumps({"do_sample": False, "max_new_tokens": NEW_TOKENS}),
        }
        answer = ask(f"{address}/v1/chat/completions", body)
    model, tokenizer = load_pruned(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    with torch.no_grad():
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, inputs["input_ids"].shape[1] :
        ]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)


PIPELINE = """
import sys
sys.modules["hf_context_prune"] = None
from transformers import pipeline

options = {"trust_remote_code": True} if sys.argv[2] == "variable" else {}
write = pipeline("text-generation", sys.argv[1], device="cpu", **options)
print(repr(write("the court", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]))
"""


@pytest.mark.parametrize("kind", ["stock", "variable"])
def test_a_pipeline_needs_the_folder_alone(folders, kind):
    """In a process that can't import this package."""
    command = [sys.executable, "-c", PIPELINE, folders[kind], kind]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model, tokenizer = load_pruned(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    inputs = tokenizer("the court", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert done.stdout.strip() == repr(tokenizer.decode(out, skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["stock", "variable"])
def test_adapters_load_on_a_folder(folders, kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = torch.tensor([[1, 40, 41, 90, 91]])
    trained = get_peft_model(load_pruned(folders[kind]), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = trained(input_ids=ids).logits
    trained.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folders[kind])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        assert not torch.allclose(plain, expected)
        torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["stock", "variable"])
def test_sft_trainer_trains_a_folder(folders, kind, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=32,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    model = load_pruned(folders[kind])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chats = [[*MESSAGES, {"role": "assistant", "content": TEXT[:40]}]] * 8
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=AutoTokenizer.from_pretrained(folders[kind]),
    )
    outcome = trainer.train()
    assert outcome.training_loss > 0
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("down_proj" in name for name in changed)
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(again) is type(model)
    ids = torch.tensor([[1, 40, 41, 90, 91]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
