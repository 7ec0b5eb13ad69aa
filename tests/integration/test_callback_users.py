"""What people run around the callback: the example script, and TRL's SFTTrainer."""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_context_prune import PruningPlan, load_pruned
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from tests.support.callback_cases import SCHEDULE, STEPS, config_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import TEXT, model_and_text, tiny_model, tiny_tokenizer

pytestmark = TINY_TEXT

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_and_prune.py"


def test_the_example_script_trains_resumes_and_saves(tmp_path, monkeypatch):
    model_and_text(tmp_path, "data.jsonl")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # as that of GPT-2, Pythia, Llama and Mistral
    tokenizer.save_pretrained(tmp_path / "base")
    words = f"--model {tmp_path / 'base'} --data {tmp_path / 'data.jsonl'} --output_dir {tmp_path / 'out'} "
    words += (
        "--pruning_ratio 0.2 --num_calibration_samples 8 --max_seq_length 32 --max_steps 8 --use_cpu --disable_tqdm 1 "
    )
    words += "--start 2 --end 0.75 --report_to none --save_steps 7 --learning_rate 3e-3 --per_device_train_batch_size 4"
    monkeypatch.setattr(sys, "argv", ["train_and_prune.py", *words.split()])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    model = load_pruned(tmp_path / "out/model")
    assert model.num_parameters() <= 0.8 * tiny_model("llama").num_parameters()
    prunings = PruningPlan.load(tmp_path / "out/model/pruning_plan.json").provenance["prunings"]
    assert [entry["step"] for entry in prunings] == [2, 4, 6]
    assert (tmp_path / "out/model/README.md").exists()
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["eval_loss"] > 0
    again = ["--resume_from_checkpoint", str(tmp_path / "out/checkpoint-7")]
    monkeypatch.setattr(sys, "argv", ["train_and_prune.py", *words.split(), *again])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    resumed = load_pruned(tmp_path / "out/model").state_dict()
    assert all((value == resumed[name]).all() for name, value in model.state_dict().items())
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    draw = random.Random(0)
    rows = Dataset.from_list(
        [{"text": " ".join(draw.choices(TEXT.split(), k=draw.randint(5, 40)))} for _ in range(120)]
    )
    hook = ContextPruneCallback(config_for(), SCHEDULE)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        max_length=48,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        tiny_model("llama"), args=arguments, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[hook]
    )
    trainer.train()
    assert trainer.model.model.layers[0].mlp.up_proj.out_features == 20
    assert hook.plan.provenance["prunings"][0]["tokens"] <= 16 * 32
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "final"))
    assert load_checkpoint(tmp_path / "final").num_parameters() == trainer.model.num_parameters()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
