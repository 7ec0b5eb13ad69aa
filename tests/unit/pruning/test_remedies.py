"""What an error advises works when it is done, and the cause that it names is the cause."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from hf_context_prune import prune_vocabulary
from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import BudgetError, NumericsError, PruningWarning
from hf_context_prune.evaluation.multiple_choice import _answer
from hf_context_prune.evaluation.options import QuestionOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.vocabulary.prune import mean_probability
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.schedule import PruningSchedule
from tests.support.callback_cases import config_for, trainer_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import COVERING, case, texts, tiny_model, tiny_tokenizer, tokens

pytestmark = TINY_TEXT


def error_of(kind, run):
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def test_a_share_that_an_error_names_can_be_asked_for(subtests):
    """For every family and allocation: ask for too much, then for the share in the message."""
    for name in COVERING:
        model = case(name, vocab_size=len(tiny_tokenizer()))
        for options in (
            {"allocation": "uniform"},
            {"allocation": "uniform", "round_to": 16},
            {},
            {"units": "tokens", "pad_to_multiple_of": 1},
            {"units": "neurons,kv_groups"},
            {"vocab_size": 300, "pad_to_multiple_of": 1},
        ):
            with subtests.test(f"{name} {options}"):
                said = error_of(
                    BudgetError,
                    lambda model=model, options=options: check_budget(
                        model, tiny_tokenizer(), PrunerConfig(pruning_ratio=0.97, **options)
                    ),
                )
                share = float(re.findall(r"\((0\.\d{4})(?: of all)?\)", said)[-1])
                if "vocab_size" not in options:  # there the share is beside what goes with the tokens
                    check_budget(model, tiny_tokenizer(), PrunerConfig(pruning_ratio=share, **options))
                assert "--units" in said or "uniform" in str(options) or not options


def test_ratios_that_an_error_names_can_be_asked_for(subtests):
    model = tiny_model("llama")
    for ratio in ("mlp_ratio", "attention_ratio"):
        with subtests.test(ratio):
            said = error_of(
                BudgetError,
                lambda ratio=ratio: plan_widths(model, PrunerConfig(**{ratio: 0.001}, allocation="uniform")),
            )
            for value in {float(part) for part in re.findall(r"0\.\d+", said)} - {0.001, 0.0}:
                widths = plan_widths(model, PrunerConfig(**{ratio: value}, allocation="uniform"))
                assert widths != ModelView.of(model).widths
    for name in COVERING:
        for wanted in (0.17, 0.34, 0.5):
            options = {"attention_ratio": wanted, "native_architecture": True}
            whole = ModelView.of(case(name)).widths
            try:
                plan_widths(case(name), PrunerConfig(**options))
                continue
            except BudgetError as error:
                said = str(error)
            with subtests.test(f"native, {name} {wanted}: {said}"):
                if "native architecture can't hold" not in said:
                    assert any(why in said for why in ("single KV group", "removes no KV group", "no attention head"))
                elif found := re.search(r"Ask for (0\.\d+), or leave out --native", said):
                    assert (
                        plan_widths(case(name), PrunerConfig(**options | {"attention_ratio": float(found[1])})) != whole
                    )
                else:
                    assert "Leave out attention_ratio, or leave out --native-architecture" in said
                if "single KV group" not in said and "no attention head" not in said:
                    plan_widths(case(name), PrunerConfig(attention_ratio=wanted))


def test_sizes_of_the_vocabulary_that_an_error_names_can_be_asked_for(subtests):
    model, tokenizer = tiny_model("llama", vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    for size, multiple in ((10, 1), (10, 64), (10, 100), (280, 64), (280, 160), (10**6, 1)):
        with subtests.test(f"{size}, {multiple}"):
            options = {"vocab_size": size, "pad_to_multiple_of": multiple}
            said = error_of(
                BudgetError, lambda options=options: check_budget(model, tokenizer, PrunerConfig(**options))
            )
            least, most = (re.search(rf"Ask for at {word} (\d+)", said) for word in ("least", "most"))
            for named in (least, most):
                if named:
                    check_budget(model, tokenizer, PrunerConfig(**options | {"vocab_size": int(named[1])}))
            assert "Ask for" in said
            if "smaller pad_to_multiple_of" in said:
                check_budget(model, tokenizer, PrunerConfig(**options | {"pad_to_multiple_of": 1}))
            if exact := re.search(r"for (\d+) and pad_to_multiple_of=1", said):
                check_budget(model, tokenizer, PrunerConfig(vocab_size=int(exact[1]), pad_to_multiple_of=1))
    assert prune_vocabulary(model, tokenizer, texts(), vocab_size=280, pad_to_multiple_of=1, refit=False)


def test_a_wider_data_type_is_advised_only_where_there_is_one(subtests):
    """Weights that overflow, in bfloat16 and in float32."""
    tokenizer, text = tiny_tokenizer(), load_documents(texts(), tokenizer=tiny_tokenizer())
    thresholds = ThresholdConfig(linear_threshold=0.1, num_calibration_samples=4, max_seq_length=16)
    words = {torch.bfloat16: "float32 .*bfloat16 may have overflowed", torch.float32: "No wider data type"}
    for dtype, said in words.items():
        model = tiny_model("llama").to(dtype)
        with torch.no_grad():
            model.lm_head.weight.fill_(3e38)  # finite: only what is computed from it is not
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.lm_head.weight[3, 3] = float("nan")
        inner = copy.deepcopy(tiny_model("llama")).to(dtype)
        with torch.no_grad():
            inner.model.layers[1].mlp.up_proj.weight.fill_(3e38)
        runs = {
            "weights": lambda broken=broken: check_weights_finite(broken),
            "losses": lambda model=model: document_losses(model, tokenizer, text, max_seq_length=32),
            "probabilities": lambda model=model: mean_probability(model, tokens()),
            "thresholds": lambda inner=inner: prune_model(
                inner, tokenizer, CalibrationSet(text, thresholds), thresholds
            ),
            "answers": lambda dtype=dtype: _answer(QUESTIONS.questions[0], [float("nan")], 0, dtype),
        }
        for name, run in runs.items():
            with subtests.test(f"{name}, {dtype}"), pytest.raises(NumericsError, match=said):
                run()


QUESTION = {"question": "What is it?", "choices": ["a", "b"], "answer": 0, "source": "law", "split": "test"}
QUESTIONS = QuestionOptions([QUESTION]).load()


def test_examples_that_there_are_not(tmp_path):
    with pytest.warns(PruningWarning, match="num_fewshot=3 has no effect: .* no rows of the split dev"):
        QuestionOptions([QUESTION], num_fewshot=3).load()
    file = tmp_path / "questions.jsonl"
    rows = [QUESTION, QUESTION | {"split": "dev", "question": "What was it?"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert QuestionOptions(str(file), num_fewshot=3).load().examples


def test_a_dead_layer_is_not_blamed_on_the_learning_rate(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.gate_proj.weight.requires_grad_(False)
    hook = ContextPruneCallback(config_for(attention_ratio=None), PruningSchedule(start=2, num_prunings=1))
    with pytest.raises(NumericsError, match=r"The pruning after step 2 failed: .*zero") as caught:
        trainer_for(tmp_path, hook, model=model).train()
    assert "learning rate" not in str(caught.value)
