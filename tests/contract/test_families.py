"""The exactness tests of DESIGN.md, for every entry of the architecture table and its variants."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_context_prune import PrunerConfig, RecoveryConfig, prune, recover
from hf_context_prune.errors import LoadError, LoadWarning, SaveError
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.plan_vocabulary import Vocabulary
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.architecture.contract import masked, random_plan
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import load_meta_model, load_model
from hf_context_prune.storage.saving import save_pruned
from tests.support.marks import nightly_beside
from tests.support.tiny import (
    CASES,
    COVERING,
    FAMILIES,
    MOE_FAMILIES,
    VOCABULARY,
    case,
    features_of,
    texts,
    tiny_model,
    tiny_tokenizer,
    tokens,
)

IDS = tokens(2, 24).clamp(max=VOCABULARY - 9)
HEADS = COVERING[:6]
"""For tests of the LM head, which depends on no layer."""
BY_NIGHT = nightly_beside(COVERING, CASES)
SCRIPT = Path(__file__).parents[1] / "support" / "reload_without_package.py"


def spec_of_case(name):
    return SPECS[case(name).config.model_type]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        *(pytest.param(True, name, id=f"variable-{name}") for name in CASES),
        *(pytest.param(False, *one.values, id=f"uniform-{one.values[0]}", marks=one.marks) for one in BY_NIGHT),
    ],
)
def test_sliced_equals_masked(name, variable):
    model = case(name)
    plan = random_plan(model, variable=variable)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = apply_plan(model, plan)
    expected = logits(masked(model, plan))
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-5)
    assert (logits(model) - expected).abs().max() > 1e-2  # the plan does remove something that mattered
    assert smaller.num_parameters() < model.num_parameters()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in smaller.parameters()}
    assert not shared
    tied = model.config.tie_word_embeddings
    assert (smaller.get_input_embeddings().weight is smaller.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", CASES)
def test_empty_plan_is_the_identity(name):
    model = case(name)
    spec = spec_of_case(name)
    plan = PruningPlan.identity(model.config.model_type, read_geometry(model.config, spec))
    same = apply_plan(model, plan)
    assert plan.is_empty
    assert type(same) is type(model)
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("name", BY_NIGHT)
def test_cached_equals_uncached_and_static_equals_dynamic(name):
    model = case(name)
    smaller = apply_plan(model, random_plan(model))
    assert isinstance(smaller, get_model_class(spec_of_case(name)))
    full, caches = logits(smaller), [DynamicCache(config=smaller.config)]
    # GPT-Neo's own attention cuts its mask by the length of the whole static cache.
    static = not name.startswith("gpt_neo") or name.startswith("gpt_neox")
    if static:
        caches.append(StaticCache(config=smaller.config, max_cache_len=32))
    for cache in caches:
        with torch.no_grad():
            name_of_cache = "layer_past" if "layer_past" in smaller.forward.__code__.co_varnames else "cache"
            steps = [
                smaller(
                    input_ids=part,
                    use_cache=True,
                    attention_mask=torch.ones(2, end, dtype=torch.long),
                    position_ids=torch.arange(end - part.shape[1], end)[None],
                    **{name_of_cache: cache},
                ).logits
                for part, end in ((IDS[:, :16], 16), (IDS[:, 16:17], 17), (IDS[:, 17:], 24))
            ]
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    dynamic = smaller.generate(IDS, **options)
    assert torch.equal(dynamic, smaller.generate(IDS, use_cache=False, **options))
    if static:
        assert torch.equal(dynamic, smaller.generate(IDS, cache_implementation="static", **options))


@pytest.mark.parametrize("name", BY_NIGHT)
def test_trains_with_gradient_checkpointing_and_runs_in_bfloat16(name):
    model = case(name)
    smaller = apply_plan(model, random_plan(model))
    smaller.train()
    smaller(input_ids=IDS, labels=IDS).loss.backward()
    plain = {key: value.grad.clone() for key, value in smaller.named_parameters() if value.grad is not None}
    assert set(plain) == {key for key, _ in smaller.named_parameters()}
    smaller.zero_grad()
    smaller.gradient_checkpointing_enable()
    smaller(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for key, value in smaller.named_parameters():
        if key in plain:
            torch.testing.assert_close(value.grad, plain[key], atol=1e-5, rtol=1e-4)
    smaller.eval()
    half = copy.deepcopy(smaller).bfloat16()
    assert torch.isfinite(logits(half)).all()
    smaller.set_attn_implementation("eager")
    eager = logits(smaller)
    if smaller._supports_sdpa:  # Gemma 2 caps its attention logits, which sdpa can't
        smaller.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(smaller), eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *(pytest.param(torch.float32, name, id=f"fp32-{name}") for name in CASES),
        *(pytest.param(torch.bfloat16, *one.values, id=f"bf16-{one.values[0]}", marks=one.marks) for one in BY_NIGHT),
    ],
)
def test_saved_model_reloads_bit_equal(name, dtype, tmp_path):
    weights = case(name)
    model = AutoModelForCausalLM.from_config(weights.config, dtype=dtype).eval()  # what stays in float32, stays so
    model.load_state_dict(weights.state_dict())
    for variable in (True, False) if name in COVERING else (True,):
        plan = random_plan(model, variable=variable)
        smaller = apply_plan(model, plan)
        folder = save_pruned(smaller, tmp_path / f"{variable}", plan=plan)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert type(again) is type(smaller)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(smaller))
        assert PruningPlan.load(folder / "pruning_plan.json") == plan
        twice = save_pruned(again, tmp_path / f"{variable}-twice", plan=plan)
        for file in ("config.json", "model.safetensors"):
            assert (twice / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", BY_NIGHT)
def test_a_native_model_loads_without_a_warning(name, tokenizer, tmp_path, recwarn):
    model = case(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    assert not [warning for warning in recwarn if issubclass(warning.category, LoadWarning)]
    assert load_meta_model(tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_process_without_the_package(dtype, tmp_path):
    expected = {}
    for name in CASES if dtype == "float32" else COVERING:
        model = case(name).to(getattr(torch, dtype))
        for variable in (True, False) if name in COVERING else (True,):
            smaller = apply_plan(model, random_plan(model, variable=variable))
            folder = save_pruned(smaller, tmp_path / f"{name}-{variable}")
            remote = json.loads((folder / "config.json").read_text())["model_type"].startswith("context_pruned_")
            assert remote or not variable or name == "llama-mqa-tied"
            torch.save(logits(smaller), tmp_path / f"{folder.name}.pt")
            expected[str(folder)] = remote, 0
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "cases.json").write_text(json.dumps(expected))
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"checked": len(expected)}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "qwen3"])
def test_a_pruned_model_can_be_pruned_again(name):
    model = case(name)
    once = apply_plan(model, random_plan(model))
    plan = random_plan(once, seed=3, variable=False)
    twice = apply_plan(once, plan)
    assert twice.num_parameters() < once.num_parameters()
    assert read_geometry(twice.config, SPECS[name]).layers == plan.widths


def folder_of(model, folder, *, tied, change=lambda weights: None):
    """Save a model with a head of its own, then say in its config whether it is tied, and change its tensors."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = "embed_out.weight" if "embed_out.weight" in weights else "lm_head.weight"
    names = {"head": head, "embedding": f"{name_of(model, model.get_input_embeddings())}.weight"}
    change(Tensors(weights, names))
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    return folder


class Tensors:
    """The tensors of a file; "head" and "embedding" stand for the names that a family has for them."""

    def __init__(self, weights, names):
        self.weights, self.names = weights, names

    def copy_embedding(self):
        self.weights[self.names["head"]] = self.weights[self.names["embedding"]].clone()

    def drop(self, which):
        del self.weights[self.names[which]]

    def add(self):
        self.weights["extra.weight"] = torch.ones(3)

    def mix(self):
        for name, tensor in self.weights.items():
            self.weights[name] = tensor.bfloat16()
        norms = [name for name in self.weights if "norm" in name or "ln_" in name]
        other = (norms or [name for name in self.weights if ".0." in name])[0]  # OLMo's norms have no weights
        self.weights[other] = self.weights[other].float() + 1e-4
        self.weights[self.names["head"]] = self.weights[self.names["head"]].half() * 1.001


def name_of(model, module):
    return next(name for name, each in model.named_modules() if each is module)


DISAGREEING = {  # what the config says, and what is done to the tensors; the loaded head is tied or not
    "a head of its own, said to be tied": (True, lambda tensors: None, False),
    "an equal head, said to be tied": (True, Tensors.copy_embedding, True),
    "an equal head, said to be untied": (False, Tensors.copy_embedding, False),
    "no head": (True, lambda tensors: tensors.drop("head"), True),
    "no embedding": (True, lambda tensors: tensors.drop("embedding"), True),
    "another tensor": (False, Tensors.add, False),
    "several dtypes": (False, Tensors.mix, False),
    "several dtypes, said to be tied": (True, Tensors.mix, False),
}


@pytest.mark.filterwarnings("ignore::hf_context_prune.errors.LoadWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in (*HEADS, "llama") else pytest.mark.nightly) for name in FAMILIES]
)
def test_what_is_loaded_is_what_is_pruned_and_saved_whatever_the_config_says(name, tmp_path, subtests):
    model = case(name, tie_word_embeddings=False)
    for number, (said, (tied, change, expected)) in enumerate(DISAGREEING.items()):
        with subtests.test(said=said):
            folder = folder_of(model, tmp_path / f"{number}", tied=tied, change=change)
            loaded = load_model(folder, device="cpu").model
            check_kept(loaded, expected, tmp_path / f"{number}")
            assert load_meta_model(folder).num_parameters() == loaded.num_parameters()
    missing = folder_of(model, tmp_path / "missing", tied=False, change=lambda tensors: tensors.drop("head"))
    for load in (load_model, load_meta_model):
        with pytest.raises(LoadError, match=r"asks for lm_head\.(bias|weight)"):
            load(missing)


def check_kept(model, tied, folder):
    """Pruning by the identity, by widths and by tokens, and saving of each, keep the head that the model has."""
    expected = logits(model)
    assert has_tied_head(model) == tied
    geometry = read_geometry(model.config, SPECS[model.config.model_type])
    identity = PruningPlan.identity(model.config.model_type, geometry)
    kept = tuple(range(VOCABULARY - 8))
    tokens = dataclasses.replace(identity, vocabulary=Vocabulary(VOCABULARY, kept))
    for plan in (identity, tokens, random_plan(model)):
        smaller = apply_plan(model, plan)
        assert smaller.config.tie_word_embeddings == has_tied_head(smaller) == tied
        now = logits(smaller)
        if plan is identity:
            assert torch.equal(now, expected)
        if plan is tokens:
            torch.testing.assert_close(now, expected[..., : len(kept)], atol=1e-2, rtol=1e-2)
            continue
        again = AutoModelForCausalLM.from_pretrained(save_pruned(smaller, folder / "saved"), dtype="auto")
        assert torch.equal(logits(again), now)
        assert has_tied_head(again) == tied
        shutil.rmtree(folder / "saved")


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_tied_if_it_is_tied_in_memory(name, tmp_path, subtests):
    for said in (True, False):
        for tied in (True, False):
            model = case(name, tie_word_embeddings=False)
            if tied:
                model.get_output_embeddings().weight = model.get_input_embeddings().weight
            model.config.tie_word_embeddings = said
            with subtests.test(said=said, tied=tied):
                check_kept(model, tied, tmp_path)
                assert model.config.tie_word_embeddings == said  # the given model is unchanged
                again = AutoModelForCausalLM.from_pretrained(save_pruned(model, tmp_path / "itself"))
                assert torch.equal(logits(again), logits(model))
                shutil.rmtree(tmp_path / "itself")


def test_runs_keep_a_head_that_the_config_denies(tmp_path):
    folder = folder_of(tiny_model("llama", tie_word_embeddings=False), tmp_path / "base", tied=True)
    before = load_model(folder, device="cpu").model
    result = prune(
        folder, data=texts(40), config=PrunerConfig(pruning_ratio=0.0, num_calibration_samples=8, max_seq_length=32)
    )
    assert result.report.size.pruned_parameters == before.num_parameters()
    result.save_pretrained(tmp_path / "pruned")
    recovered = recover(
        result.model, texts(60), RecoveryConfig(max_steps=1, max_seq_length=32), tokenizer=result.tokenizer
    ).model
    save_pruned(recovered, tmp_path / "recovered", tokenizer=result.tokenizer)
    for name, model in (("pruned", before), ("recovered", recovered)):
        again = load_model(tmp_path / name, device="cpu").model
        assert torch.equal(logits(again), logits(model))
        assert not has_tied_head(again)


def test_a_model_of_several_dtypes_is_not_saved_as_one(tmp_path):
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    same = apply_plan(model, PruningPlan.identity("llama", read_geometry(model.config, SPECS["llama"])))
    assert {name: tensor.dtype for name, tensor in same.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    with pytest.raises(SaveError, match="weights are bfloat16 and float32"):
        save_pruned(same, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_covering_set_has_every_feature():
    assert set().union(*map(features_of, COVERING)) == set().union(*map(features_of, CASES))


def test_every_entry_has_a_tiny_model():
    assert set(FAMILIES) | set(MOE_FAMILIES) == set(SPECS)
    for spec in SPECS.values():
        assert hasattr(transformers, spec.config_class)
        assert hasattr(transformers, spec.model_class)
