"""The whole path in Python, on a tiny model: prune, save, reload, prove; and what it refuses."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_context_prune import (
    PrunerConfig,
    PruningPlan,
    apply_plan,
    calibrate,
    evaluate,
    load_pruned,
    make_plan,
    prune,
)
from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import BudgetError, ConfigError, DataError, LoadError, NumericsError, SaveError
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.planner import reconstruct_with
from hf_context_prune.pruning.scoring import Requirements
from tests.support.runs import OPTIONS, QUICK, trained_model
from tests.support.tiny import case, texts, tiny_model


def run(model, tokenizer, **options):
    evaluation = options.pop("evaluation", QUICK)
    eval_data = options.pop("eval_data", None)
    data = options.pop("data", texts())
    config = PrunerConfig(**OPTIONS | options)
    return prune(model, data, config, tokenizer=tokenizer, eval_data=eval_data, eval_options=evaluation)


@pytest.mark.parametrize(
    ("criterion", "reconstruction"),
    [
        *(("random", "none"), ("magnitude", "least_squares"), ("l1", "none"), ("wanda", "least_squares")),
        *(("flap", "none"), ("taylor", "least_squares"), ("obs", "none"), ("obs", "least_squares")),
    ],
)
def test_every_criterion_and_every_reconstruction(model, tokenizer, criterion, reconstruction):
    result = run(
        model, tokenizer, mlp_ratio=0.25, attention_ratio=0.34, criterion=criterion, reconstruction=reconstruction
    )
    assert {(w.neurons, w.kv_groups) for w in result.plan.widths} == {(30, 2)}
    size = result.report.size
    assert size.pruned_parameters == size.base_parameters - 3 * (10 * 3 * 48 + (8 * 2 * 2 + 8 * 2) * 48)
    assert result.report.loss.comparison.num_documents > 1


def test_bias_needs_biases_or_stays_in_memory(model, tokenizer):
    config = PrunerConfig(**OPTIONS, mlp_ratio=0.25, attention_ratio=0.34, criterion="flap", reconstruction="bias")
    with pytest.raises(ConfigError, match=r"bias.*llama.*least_squares.*apply_plan"):
        run(model, tokenizer, mlp_ratio=0.25, criterion="flap", reconstruction="bias")
    biased = run(tiny_model("opt"), tokenizer, mlp_ratio=0.25, criterion="flap", reconstruction="bias")
    assert biased.native_fit.fits
    samples = tokenize_samples(load_documents(texts()), tokenizer, num_samples=16, max_seq_length=32)
    needs = Requirements.of(config)
    stats = calibrate(model, batches_of(samples), targets=needs.targets, statistics=needs.statistics)
    smaller = apply_plan(model, make_plan(model, stats, config), reconstruct=reconstruct_with(stats, config))
    gone = 3 * (10 * 3 * 48 + (8 * 2 * 2 + 8 * 2) * 48)
    # an output bias per target and layer, in memory
    assert smaller.num_parameters() == model.num_parameters() - gone + 2 * 3 * 48


def test_asked_and_achieved_and_the_input_model_untouched(model, tokenizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, tokenizer, pruning_ratio=0.1, units="neurons,kv_groups", native_architecture=False)
    size = result.report.size
    assert size.asked_ratio == 0.1
    assert 0.1 <= size.achieved_ratio < 0.1 + 3 * 3 * 48 / size.base_parameters
    assert size.pruned_parameters == result.model.num_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_same_inputs_and_seed_give_the_same_plan_and_weights(model, tokenizer):
    first, second = (run(model, tokenizer, mlp_ratio=0.3, criterion="random") for _ in range(2))
    other = run(model, tokenizer, mlp_ratio=0.3, criterion="random", pruning_seed=1)
    assert first.plan == second.plan
    assert first.plan.sha256 != other.plan.sha256
    weights = second.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.model.state_dict().items())


def test_saved_folder_reloads_and_tells_its_story(model, tokenizer, tmp_path):
    result = run(model, tokenizer, mlp_ratio=0.25)
    folder = result.save_pretrained(tmp_path / "out")
    again = load_pruned(folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
    plan = PruningPlan.load(folder / "pruning_plan.json")
    assert plan == result.plan
    assert plan.provenance["config"]["mlp_ratio"] == 0.25
    assert plan.provenance["data"]["fingerprint"]
    report = json.loads((folder / "eval_report.json").read_text())
    assert report["size"]["pruned_weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "pruning_plan.json").read_text()
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(SaveError, match="not made by this package"):
        result.save_pretrained(tmp_path / "base")


def test_every_stage_by_itself_gives_what_prune_gives(model, tokenizer):
    options = {"reconstruction": "least_squares", "refit_lm_head": False}
    config = PrunerConfig(mlp_ratio=0.25, **options, **OPTIONS)
    result = prune(model, texts(), config, tokenizer=tokenizer, eval_data=texts(5, seed=9), eval_options=QUICK)
    source = load_documents(texts())
    samples = tokenize_samples(source, tokenizer, num_samples=16, max_seq_length=32)
    needs = Requirements.of(config)
    stats = calibrate(model, batches_of(samples), targets=needs.targets, statistics=needs.statistics)
    plan = make_plan(model, stats, config)
    assert plan.sha256 == result.plan.sha256
    smaller = apply_plan(model, plan, reconstruct=reconstruct_with(stats, config))
    weights = result.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in smaller.state_dict().items())


def test_repair_lowers_the_loss_of_a_model_that_was_trained(tokenizer):
    """On a random model nothing matters; a few steps make it one that reconstruction can help."""
    model = trained_model()
    held_out = texts(12, seed=5)
    excess = {
        name: run(
            model, tokenizer, mlp_ratio=0.5, criterion="wanda", reconstruction=name, eval_data=held_out
        ).report.loss.comparison.excess_nats_per_token.value
        for name in ("none", "least_squares")
    }
    assert excess["least_squares"] < excess["none"]


def test_what_the_walk_cannot_do_is_refused_before_anything_is_measured(tokenizer, monkeypatch):
    losses = "hf_context_prune.pipelines.comparison.document_losses"
    monkeypatch.setattr(losses, lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="reconstruction='least_squares'"):
        run(case("opt-post-norm"), tokenizer, mlp_ratio=0.25)


def test_held_out_documents_are_never_calibrated_on(model, tokenizer):
    result = run(model, tokenizer, mlp_ratio=0.25)
    assert "held out before calibration, by document" in result.report.dataset.held_out
    own = run(model, tokenizer, mlp_ratio=0.25, data=texts(20), eval_data=[*texts(20)[:5], "the dose of the court"])
    assert "5 of these 6 documents were dropped" in own.report.dataset.held_out
    with pytest.raises(DataError, match="also in the calibration text"):
        run(model, tokenizer, mlp_ratio=0.25, data=texts(20), eval_data=texts(20)[:5])
    for disguised in ([text + "\n" for text in texts(20)], [text.title() + " ." for text in texts(20)]):
        with pytest.raises(DataError, match="also in the calibration text"):
            run(model, tokenizer, mlp_ratio=0.25, data=texts(20), eval_data=disguised)
    merged = [{"text": text, "doc": "all"} for text in texts(20)]
    with pytest.raises(DataError, match="also in the calibration text"):
        run(model, tokenizer, mlp_ratio=0.25, data=texts(20), eval_data=merged)
    with pytest.raises(DataError, match="eval-data"):
        run(model, tokenizer, mlp_ratio=0.25, data=["one document only, " * 40])


def test_held_out_documents_that_repeat_the_rest_are_dropped_and_counted(model, tokenizer):
    alike = [f"{text} {i}" for text in texts(4) for i in range(10)]
    how = run(model, tokenizer, mlp_ratio=0.25, data=[*alike, *texts(20, seed=3)]).report.dataset.held_out
    assert "6 of 60 documents of in-memory were held out before calibration, by document." in how
    assert "of these 6 documents were dropped" in how
    with pytest.raises(DataError, match=r"held-out.*--eval-data"):
        run(model, tokenizer, mlp_ratio=0.25, data=alike)


def test_datasets_and_messages_are_text_too(model, tokenizer):
    dataset = Dataset.from_dict({"text": texts(30), "other": list(range(30))})
    assert run(model, tokenizer, mlp_ratio=0.25, data=dataset).report.dataset.name == "in-memory"


def test_adaptive_widths_reach_the_budget(model, tokenizer):
    result = run(model, tokenizer, pruning_ratio=0.2, allocation="adaptive")
    assert result.report.size.achieved_ratio >= 0.2
    both = run(model, tokenizer, mlp_ratio=0.25, attention_ratio=0.34, allocation="adaptive")
    assert sum(w.neurons for w in both.plan.widths) == 3 * 30
    assert sum(w.kv_groups for w in both.plan.widths) == 3 * 2


@pytest.mark.parametrize(
    ("family", "allocation"),
    [("llama", "adaptive"), ("gemma2", "uniform"), ("gpt_neox", "adaptive"), ("opt", "uniform")],
)
def test_the_sequential_walk_end_to_end(tokenizer, tmp_path, family, allocation):
    options = {"mlp_ratio": 0.25, "attention_ratio": 0.34, "allocation": allocation, "reconstruction": "sequential"}
    result = run(tiny_model(family), tokenizer, **options)
    neurons = [w.neurons for w in result.plan.widths]
    assert sum(neurons) == 3 * 30
    assert allocation == "adaptive" or len(set(neurons)) == 1
    folder = result.save_pretrained(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_pruned(folder)(input_ids=ids).logits, result.model(input_ids=ids).logits)
    loss = result.model(input_ids=ids, labels=ids).loss
    loss.backward()  # the refitted weights are ordinary parameters
    with pytest.raises(ConfigError, match="gradients"):
        PrunerConfig(reconstruction="sequential", criterion="taylor")


def test_dry_run_agrees_with_the_real_run(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = PrunerConfig(pruning_ratio=0.15, attention_ratio=0.34, **OPTIONS)
    outline = dry_run(tmp_path, config)
    result = prune(tmp_path, texts(), config, eval_options=QUICK)
    assert outline.widths == result.plan.widths
    assert outline.pruned_parameters == result.report.size.pruned_parameters
    assert outline.native_fit == result.native_fit


def test_stock_plans_only_what_stays_stock(tokenizer):
    model = tiny_model("opt")
    with pytest.raises(BudgetError, match=r"\b6\b"):
        run(model, tokenizer, mlp_ratio=0.25, attention_ratio=0.5, native_architecture=True)
    assert run(model, tokenizer, mlp_ratio=0.25, native_architecture=True).native_fit.fits
    assert not run(model, tokenizer, mlp_ratio=0.25, attention_ratio=0.5).native_fit.fits


def test_bad_input_is_refused_before_anything_happens(model, tokenizer, tmp_path):
    with pytest.raises(BudgetError, match="together can give"):
        run(model, tokenizer, pruning_ratio=0.9)
    with pytest.raises(ConfigError, match="tokenizer"):
        prune(model, texts(), PrunerConfig(**OPTIONS))
    with pytest.raises(DataError, match="no text"):
        run(model, tokenizer, data=["", "  "])
    with pytest.raises(LoadError, match="does not exist"):
        prune(tmp_path / "absent", texts())
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(NumericsError):
        run(broken, tokenizer, mlp_ratio=0.25)
    small = tiny_model("llama", vocab_size=64)
    with pytest.raises(DataError, match="64"):
        run(small, tokenizer, mlp_ratio=0.25)


def test_a_pickle_checkpoint_is_refused(model, tokenizer, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pickle"):
        prune(tmp_path, texts())


def test_a_damaged_folder_is_refused(model, tokenizer, tmp_path):
    folder = run(model, tokenizer, mlp_ratio=0.25).save_pretrained(tmp_path / "out")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        load_pruned(folder)


def test_evaluate_measures_one_model(model, tokenizer):
    report = evaluate(model, texts(6), tokenizer=tokenizer, max_seq_length=32, eval_options=QUICK)
    assert report.size.pruned_parameters is None
    assert report.loss.base.bits_per_byte.value > 0


def test_too_little_text_warns_with_the_number_used(model, tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(model, tokenizer, mlp_ratio=0.25, num_calibration_samples=5000)
    used = result.plan.provenance["num_calibration_samples"]
    assert any(f"{used}" in str(w.message) and "5000" in str(w.message) for w in caught)


def test_import_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, hf_context_prune; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert AutoModelForCausalLM is not None
