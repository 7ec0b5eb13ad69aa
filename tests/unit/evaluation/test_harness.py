"""lm-evaluation-harness on our folders: the same log-likelihoods, question by question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hf_context_prune import prune_vocabulary
from hf_context_prune.data.questions import format_prompt
from hf_context_prune.errors import SaveError
from hf_context_prune.evaluation.harness import write_harness_task
from hf_context_prune.evaluation.multiple_choice import answer_questions
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.tiny_domain import documents, model_for
from tests.support.tiny_tokenizers import tokenizer_of
from tests.unit.evaluation.test_multiple_choice import questions


def test_the_task_has_our_prompts(tmp_path):
    asked = questions(12)
    name = write_harness_task(asked, tmp_path / "task", num_fewshot=1)
    write_harness_task(replace(asked, name="others.jsonl", questions=asked.questions[:1]), tmp_path / "task")
    task = yaml.safe_load((tmp_path / f"task/{name}.yaml").read_text())
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert len(rows) == 12  # another task in the folder does not replace them
    for row, question in zip(rows, asked.questions, strict=True):
        assert row["prompt"] == format_prompt(question, asked.examples[question.source][:1])
        assert (tuple(row["choices"]), row["answer"]) == (question.choices, question.answer)
    assert task["task"] == name == "context_prune_in_memory"
    (tmp_path / "task/config.json").touch()
    with pytest.raises(SaveError, match="holds a model"):
        write_harness_task(asked, tmp_path / "task")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Name a folder that can be"):
        write_harness_task(asked, tmp_path / "file")


def test_files_of_others_under_the_names_of_a_task_are_not_replaced(tmp_path, subtests):
    asked = questions(3)
    name = "context_prune_in_memory"
    others = {
        "rows of others": {f"{name}.jsonl": "mine"},
        "a task of others": {f"{name}.yaml": f"task: {name}"},
        "no YAML": {f"{name}.yaml": "a: [", f"{name}.jsonl": "mine"},
        "a list": {f"{name}.yaml": "[]"},
    }
    for what, files in others.items():
        folder = tmp_path / what
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        with subtests.test(what), pytest.raises(SaveError, match="no task that this package wrote"):
            write_harness_task(asked, folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == files
    write_harness_task(asked, tmp_path / "ours")
    (tmp_path / f"ours/{name}.jsonl").unlink()
    (tmp_path / f"ours/{name}.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(SaveError, match="it is a link"):
        write_harness_task(asked, tmp_path / "ours")
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "variable", "pruned vocabulary"])
def test_log_likelihoods_agree(kind, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    if kind == "pruned vocabulary":
        tokenizer = tokenizer_of("gpt2")
        text = documents(count=200)
        smaller = prune_vocabulary(
            model_for("llama", tokenizer), tokenizer, text, vocab_size=330, criterion="frequency", refit=False
        )
        assert len(smaller.tokenizer) < len(tokenizer)
        model, tokenizer = smaller.model, smaller.tokenizer
    if kind == "variable":
        layers = (
            LayerPlan(tuple(range(30)), (0, 2)),
            LayerPlan(tuple(range(9, 40)), (1,)),
            LayerPlan((5, 6), (0, 1, 2)),
        )
        geometry = read_geometry(model.config, spec_of(model.config))
        model = apply_plan(model, PruningPlan("llama", geometry.layers, layers, fingerprint(model)))
    asked = questions(12)
    tokenizer.model_max_length = 512
    folder = save_pruned(model, tmp_path / "model", tokenizer=tokenizer)
    name = write_harness_task(asked, tmp_path / "task", num_fewshot=1)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32"},
        tasks=[name],
        num_fewshot=0,
        device="cpu",
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
    )
    torch.set_num_threads(1)
    own = {
        answer.id: answer for answer in answer_questions(model, tokenizer, asked, scorer="likelihood", num_fewshot=1)
    }
    samples = found["samples"][name]
    assert len(samples) == 12
    for sample in samples:
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert own[sample["doc"]["id"]].scores == pytest.approx(theirs, abs=1e-3)
    accuracy = sum(answer.correct for answer in own.values()) / len(own)
    assert found["results"][name]["acc,none"] == pytest.approx(accuracy)
