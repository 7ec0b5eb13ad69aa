"""`prune` on folders of models of images and text, as a user meets it."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from hf_context_prune import (
    PrunerConfig,
    RecoveryConfig,
    ThresholdConfig,
    export_model,
    load_model,
    prune,
    prune_to_folder,
    read_export,
)
from hf_context_prune.errors import ConfigError, ContextPruneError
from hf_context_prune.evaluation.speed import measure_peak_memory
from hf_context_prune.modeling.runtimes import runtimes_of
from hf_context_prune.modeling.wrappers import text_model, with_text
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.recover import recover_to_folder
from hf_context_prune.pipelines.vllm_server import vllm_command
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.storage.loading import load_meta_model
from hf_context_prune.storage.saving import save_pruned
from tests.contract.test_families import random_plan
from tests.support.hub.client import client
from tests.support.hub.process import HubProcess
from tests.support.hub.server import files_of
from tests.support.runs import OPTIONS, QUICK
from tests.support.tiny import TEXT, VOCABULARY, texts, tiny_tokenizer
from tests.support.tiny_wrappers import CASES, picture, tiny_wrapper

SIZE = 28
PRUNE = ("--data", "@data.jsonl", "--max-seq-length", 32, "--num-calibration-samples", 16, "--no-benchmark")


def tokenizer_of_images():
    """The tiny tokenizer with the tokens of images at the end of the vocabulary, where the tiny models have them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<spare{i}>" for i in range(VOCABULARY - len(tokenizer) - 3)], special_tokens=True)
    tokenizer.add_tokens(["<end>", "<begin>", "<image>"], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=128,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"eoi_token": "<end>", "boi_token": "<begin>", "image_token": "<image>"},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Gemma 3 with its processor in ``base``, others beside it, and domain text."""
    folder = tmp_path_factory.mktemp("images")
    for name in CASES:
        tiny_wrapper(name).save_pretrained(folder / name)
        tokenizer_of_images().save_pretrained(folder / name)
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    tiny_wrapper("gemma3").save_pretrained(folder / "base")
    Gemma3Processor(images, tokenizer_of_images(), image_seq_length=4).save_pretrained(folder / "base")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(TEXT.split(), k=80))}) for _ in range(40)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def seen(folder, model):
    """The logits of a model on a text with an image, by the processor of a folder."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[pixels], text=["the court <begin> finds"], return_tensors="pt"
    )
    assert (inputs["input_ids"] == VOCABULARY - 1).sum() == 4
    with torch.no_grad():
        return model(**inputs).logits


def others(model):
    """The weights outside of the text part."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }


def test_the_command_prunes_the_text_part_and_the_folder_still_sees(run, place):
    code, out, err = run("prune", "@base", *PRUNE, "--output", "@out", "--pruning-ratio", 0.2)
    assert code == 0, err
    assert "AutoModelForImageTextToText" in out
    assert "Prune with --text-only" in out
    base, smaller = (AutoModelForImageTextToText.from_pretrained(place / name) for name in ("base", "out"))
    kept = others(smaller)
    assert all(torch.equal(kept[name], value) for name, value in others(base).items())
    assert text_model(smaller).num_parameters() < 0.81 * text_model(base).num_parameters()
    assert smaller.config.text_config.vocab_size == VOCABULARY
    assert (seen(place / "base", smaller) - seen(place / "out", smaller)).abs().max() == 0
    assert (seen(place / "out", smaller) - seen(place / "base", base)).abs().max() > 1e-3
    report = json.loads((place / "out" / "eval_report.json").read_text())
    notes = " ".join(report["notes"])
    assert "All tokens stay: the model and its processor name tokens of images by their ids" in notes
    assert "reads images too" in notes
    assert f"Saved as {type(smaller).__name__}: " in notes
    assert report["size"]["base_parameters"] == text_model(base).num_parameters()
    card = (place / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert read_facts(place / "out").reads_images
    code, out, _ = run("evaluate", "@out", "--data", "@data.jsonl", "--max-seq-length", 32, "--no-benchmark")
    assert code == 0


def test_the_text_part_alone_is_a_causal_lm_with_fewer_tokens(run, place):
    size = ("--pruning-ratio", 0.2, "--vocab-size", 304, "--pad-to-multiple-of", 16)
    code, _, err = run("prune", "@base", *PRUNE, "--output", "@text", "--text-only", *size)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(place / "text")
    assert type(model).__name__.endswith("Gemma3ForCausalLM")
    assert model.config.vocab_size == 304
    assert not (place / "text" / "processor_config.json").exists()
    assert "pipeline_tag: text-generation" in (place / "text" / "README.md").read_text()
    assert load_model(place / "text").wrapper is None


@pytest.mark.parametrize("native", [True, False], ids=["uniform", "variable"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_every_family_is_pruned_to_a_folder_that_sees(name, native, place, tmp_path):
    config = PrunerConfig(pruning_ratio=0.2, native_architecture=native, **OPTIONS)
    result = prune_to_folder(place / name, texts(40), tmp_path / "out", config, eval_options=QUICK)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(again) is type(result.whole_model())
    assert type(again).__name__.startswith("ContextPruned") != native
    base, kept = others(tiny_wrapper(name)), others(again)
    assert all(torch.equal(kept[key], value) for key, value in base.items())
    with torch.no_grad():
        assert torch.equal(again(**picture(name)).logits, result.whole_model()(**picture(name)).logits)
    alone = prune_to_folder(place / name, texts(40), tmp_path / "text", config, eval_options=QUICK, text_only=True)
    ids = {"input_ids": picture(name)["input_ids"].clamp(max=VOCABULARY - 9)}
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "text")(**ids).logits
        assert torch.equal(written, alone.model(**ids).logits)
        if native:  # the same run, but for where it is saved
            assert torch.equal(written, again(**ids).logits)


@pytest.mark.slow
def test_a_model_in_memory_is_left_as_it_is_and_recovered_in_its_wrapper(place, tmp_path):
    wrapper = tiny_wrapper("gemma3")
    before = {name: value.clone() for name, value in wrapper.state_dict().items()}
    config = PrunerConfig(pruning_ratio=0.2, **OPTIONS)
    result = prune(wrapper, texts(40), config, tokenizer=tokenizer_of_images(), eval_options=QUICK)
    assert all(torch.equal(value, before[name]) for name, value in wrapper.state_dict().items())
    assert "Gemma3ForCausalLM" in type(result.model).__name__
    assert "Gemma3ForConditionalGeneration" in type(result.whole_model()).__name__
    result.save_pretrained(tmp_path / "pruned")
    short = RecoveryConfig(max_steps=1, max_seq_length=32)
    recovered = recover_to_folder(tmp_path / "pruned", texts(60), tmp_path / "again", short, eval_options=QUICK)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, recovered.model.lm_head.weight)
    kept = others(again)
    assert all(torch.equal(kept[name], value) for name, value in others(wrapper).items())


@pytest.mark.parametrize(
    "config",
    [
        PrunerConfig(vocab_size=304),
        PrunerConfig(pruning_ratio=0.1, units="tokens,neurons"),
        ThresholdConfig(embedding_threshold=1),
    ],
    ids=["size", "units", "threshold"],
)
def test_the_vocabulary_is_refused_with_the_way_out(config, place):
    with pytest.raises(ConfigError, match=r"vocabulary of base can't be pruned.*--text-only"):
        prune(place / "base", texts(40), config, eval_options=QUICK)


def test_whole_layers_are_refused_with_the_way_out(place):
    config = PrunerConfig(num_layers=1, removable_layers="0-1")
    for call in (partial(prune, place / "base", texts(40)), partial(dry_run, place / "base")):
        with pytest.raises(ConfigError, match=r"Whole layers of .*base can't be removed .*--text-only"):
            call(config)


def test_text_only_is_refused_for_a_causal_lm(place, tmp_path, model, tokenizer):
    for call in (prune, dry_run):
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        arguments = (texts(40), PrunerConfig()) if call is prune else (PrunerConfig(),)
        with pytest.raises(ConfigError, match="is a LlamaForCausalLM, which reads text alone"):
            call(tmp_path, *arguments, text_only=True)


def test_a_dry_run_knows_the_sizes_of_the_text_part(place):
    text = load_model(place / "base").model
    config = PrunerConfig(pruning_ratio=0.2, allocation="uniform")
    found, alone = (dry_run(place / "base", config, text_only=only) for only in (False, True))
    assert found.base_parameters == alone.base_parameters == text.num_parameters()
    fewer = PrunerConfig(vocab_size=304, pad_to_multiple_of=16)
    with pytest.raises(ConfigError, match="--text-only"):
        dry_run(place / "base", fewer)
    assert dry_run(place / "base", fewer, text_only=True).tokens == 304


DAMAGES = {
    "no text part": (lambda config: config.pop("text_config"), "text_config = None"),
    "another text part": (lambda config: config["text_config"].update(model_type="llama"), "'llama'; supported are"),
    "too many layers": (lambda config: config["vision_config"].update(num_hidden_layers=10**9), "at most 512 layers"),
    "a huge image": (lambda config: config["vision_config"].update(image_size=2**40), "vision_config.image_size"),
    "a quantised tower": (lambda config: config["vision_config"].update(quantization_config={}), "quantization_config"),
    "a width of zero": (lambda config: config["text_config"].update(intermediate_size=0), "intermediate_size = 0"),
    "another width": (lambda config: config["text_config"].update(intermediate_size=41), "does not belong to these"),
    "more layers": (
        lambda config: config["text_config"].update(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "layer 2",
    ),
}


def test_a_damaged_config_is_refused_with_its_field(place, tmp_path, subtests):
    for number, (damage, message) in enumerate(DAMAGES.values()):
        folder = tmp_path / f"{number}"
        shutil.copytree(place / "base", folder)
        config = json.loads((folder / "config.json").read_text())
        damage(config)
        (folder / "config.json").write_text(json.dumps(config))
        for load in (load_model, load_meta_model):
            with subtests.test(message=message, load=load.__name__), pytest.raises(ContextPruneError, match=message):
                load(folder)


def test_vllm_is_refused_where_widths_vary(tmp_path):
    wrapper = tiny_wrapper("qwen3_vl")
    text = text_model(wrapper)
    smaller = with_text(wrapper, apply_plan(text, random_plan(text)))
    folder = save_pruned(smaller, tmp_path / "pruned", tokenizer=tokenizer_of_images())
    with pytest.raises(ConfigError, match=r"--native-architecture.*--text-only"):
        vllm_command(folder)
    opens = {runtime.name: runtime.opens for runtime in runtimes_of(smaller.config.to_dict(), str(folder))}
    assert opens == {"transformers": True, "llama.cpp, Ollama": False, "vLLM": False}


def test_the_text_part_is_exported(tmp_path):
    model = tiny_wrapper("qwen3_vl")
    smaller = with_text(model, apply_plan(text_model(model), random_plan(text_model(model), variable=True)))
    folder = save_pruned(smaller, tmp_path / "pruned", tokenizer=tokenizer_of_images())
    export_model(folder, tmp_path / "out", format="torchao")
    assert read_export(tmp_path / "out").format == "torchao"
    stock = runtimes_of(model.config.to_dict(), "base")
    assert next(runtime for runtime in stock if "llama" in runtime.name).how.endswith("(its text part)")


@pytest.mark.slow
def test_memory_is_measured_of_the_whole_model(place):
    for name in ("base", "qwen3_vl", "mistral3-mistral"):
        assert measure_peak_memory(place / name, prompt_tokens=16, new_tokens=4).peak_rss > 0


@pytest.mark.slow
def test_a_repository_is_pruned_with_its_processor(place, tmp_path):
    with HubProcess() as hub:
        hub.repo("models", "org/images", files_of(place / "base"))
        code = """
from hf_context_prune import EvalOptions, PrunerConfig, prune_to_folder
config = PrunerConfig(pruning_ratio=0.2, max_seq_length=32, num_calibration_samples=16)
options = EvalOptions(max_tokens=600, benchmark=False, memory=False)
prune_to_folder("org/images", arguments["data"], "out", config, eval_options=options)
from transformers import AutoProcessor
print(json.dumps(type(AutoProcessor.from_pretrained("out")).__name__))
"""
        found = client(hub, tmp_path, tmp_path / "home", code, arguments={"data": str(place / "data.jsonl")})
    assert found == "Gemma3Processor"
