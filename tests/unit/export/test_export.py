"""`export`: what every format has in common, and what each promises."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_context_prune
from hf_context_prune import load_pruned
from hf_context_prune.errors import ConfigError, DataError, ExportError, LoadError, SaveError
from hf_context_prune.evaluation import paper_scoring
from hf_context_prune.export import run as run_module
from hf_context_prune.export.formats import FORMATS
from hf_context_prune.export.report import ExportReport
from hf_context_prune.export.run import open_export, read_export
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.export.sample import own_sample
from hf_context_prune.export.verify import Tolerance, Verification
from hf_context_prune.modeling.generation import generate_completion
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.publishing.hub import files_to_push
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.manifest import write_manifest
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.storage.staging import staged_folder
from tests.support.export_folders import save
from tests.support.limits import within
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

IDS = (1, 40, 41, 90, 91, 200, 201, 7)
EASY = {"tolerance": 1e6}  # random tiny models: only the path is tested, not how much is lost


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {"stock": save(root / "stock"), "variable": save(root / "variable", variable=True, fewer_tokens=True)}


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "torchao"])  # as quanto: only the files differ
def test_an_export_has_a_card_and_may_be_published(folders, format, tmp_path):
    """A push once refused an export: "export_report.json, model.gguf, which may not go to a model repository"."""
    folder = tmp_path / "stock"
    shutil.copytree(folders["stock"], folder)
    plan = PruningPlan.load(folder / "pruning_plan.json")
    base = {"id": "org/base", "license": "apache-2.0", "stated_by": "its model card"}
    facts = {"base_card": base, "base_model": "org/base"}
    save_pruned(load_pruned(folder), folder, tokenizer=tiny_tokenizer(), plan=replace(plan, provenance=facts))
    found = export_model(folder, tmp_path / "out", format=format, **EASY)
    files, left_out = files_to_push(found.folder, "model")
    assert {"README.md", "export_report.json", "manifest.json"} < set(files)
    assert left_out == ()
    card = ModelCard.load(found.folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "quantized")
    assert (card.data.license, format in card.data.tags) == ("apache-2.0", True)
    assert "It applies to this model too" in card.text
    assert "`stock` was pruned from `org/base`" in card.text
    line = "ollama create out -f Modelfile" if format == "gguf" else "open_export('out')"
    assert line in card.text
    assert f"Losses of {found.report.verification.num_tokens:,} tokens" in card.text


def test_the_card_of_an_export_without_a_plan_gives_no_licence(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    folder = export_model(tmp_path / "dense", tmp_path / "out", format="gguf", **EASY).folder
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None
    assert "The licence of the base is not known" in card.text
    assert "pruned from" not in card.text


def losses_of(folder):
    return TorchRuntime(load_pruned(folder)).losses(IDS)


@pytest.mark.parametrize(
    ("kind", "format", "weights"),
    [
        *(("stock", "quanto", "int8"), ("variable", "quanto", "int8"), ("variable", "torchao", "int8")),
        pytest.param("variable", "quanto", "int4", marks=pytest.mark.nightly),  # its kernel is compiled
    ],
)
def test_quantised_weights_reload_and_are_smaller(folders, kind, format, weights, tmp_path):
    result = export_model(folders[kind], tmp_path / "out", format=format, dtype=weights, **EASY)
    found = result.report.verification
    assert found.bytes_after < found.bytes_before
    assert found.tokens_per_second_after > 0
    runtime = open_export(result.folder)
    near = 0.5 if weights == "int8" else 6.0
    assert runtime.losses(IDS) == pytest.approx(losses_of(folders[kind]), abs=near)
    again = open_export(result.folder)
    assert again.losses(IDS) == runtime.losses(IDS)
    assert again.generate(IDS, 5) == runtime.generate(IDS, 5)


@pytest.mark.parametrize("format", ["quanto", "torchao", "onnx"])
def test_a_format_that_needs_the_whole_model_says_how_much_memory(folders, tmp_path, format, monkeypatch):
    monkeypatch.setattr("hf_context_prune.export.formats.free_memory", lambda: 1000)
    with pytest.raises(ExportError, match=rf"Writing {format} takes about .* GiB of memory.*Export to gguf"):
        export_model(folders["stock"], tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_the_model_is_measured(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure", lambda *_: pytest.fail("measured before"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(SaveError, match=rf"{re.escape(str(tmp_path))} has 999 bytes free, but saving needs"):
        export_model(folders["stock"], tmp_path / "new" / "out", format="GGUF")
    assert not (tmp_path / "new").exists()


def test_what_the_generation_config_of_a_folder_asks_for_is_not_run(folders, tmp_path, subtests):
    for options in (
        {"num_beams": 100_000, "num_return_sequences": 100_000},
        {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "low"},
        {"sequence_bias": {"x": 1}},
        {"cache_implementation": "x", "max_time": 1e-9, "min_length": 9, "return_dict_in_generate": True},
    ):
        with subtests.test(options=options):
            loaded = load_model(folders["stock"])
            plain = TorchRuntime(loaded.model).generate(IDS, 3), own_sample(loaded, seed=0)
            for name, value in options.items():  # in a file, transformers refuses some and takes others
                setattr(loaded.model.generation_config, name, value)
            with within(seconds=5, megabytes=500):
                assert TorchRuntime(loaded.model).generate(IDS, 3) == plain[0]
                assert own_sample(loaded, seed=0) == plain[1]
                generate_completion(loaded.model, loaded.tokenizer, "the", new_tokens=2)
                paper_scoring._generate(loaded.model, loaded.tokenizer, ["the"])


def test_ids_that_end_a_text_are_whole_numbers(folders):
    runtime = TorchRuntime(load_pruned(folders["stock"]))
    for wrong in ("x", [10**30], {"a": 1}, [1, None], 1.5):
        runtime._model.generation_config.eos_token_id = wrong
        with pytest.raises(LoadError, match="as eos_token_id"):
            runtime.generate(IDS, 1)


def test_nothing_generates_by_the_generation_config_of_a_folder():
    calls = [
        line.strip()
        for file in Path(hf_context_prune.__file__).parent.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"(model|self\._model)\.generate\(", line)
    ]
    calls = [line for line in calls if not line.startswith("print(")]  # a line of the code that a card shows
    assert calls == ["self._model.generate("]  # of the Space, whose model is a plain copy


@pytest.mark.slow
@pytest.mark.nightly  # the library compiles its kernels
def test_int4_falls_back_to_int8_where_inputs_have_no_groups(folders, tmp_path):
    folder = export_model(folders["stock"], tmp_path / "out", format="quanto", dtype="int4", **EASY).folder
    types = {name: entry["weights"] for name, entry in json.loads((folder / "quanto_qmap.json").read_text()).items()}
    assert types["model.layers.0.mlp.down_proj"] == "qint4"  # 32 inputs
    assert types["model.layers.0.mlp.up_proj"] == "qint8"  # 48
    assert "lm_head" not in types


def test_quanto_reads_back_a_head_that_checkpoints_call_otherwise(tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")  # as embed_out, like Pythia's on the Hub
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = export_model(tmp_path / "model", tmp_path / "out", format="quanto").report.verification
    assert found.largest_difference < 1.0


@pytest.mark.parametrize("format", ["quanto", "torchao"])
@pytest.mark.parametrize(
    ("family", "message"), [("gpt2", r"gpt2 model are Conv1D.*onnx"), ("mixtral", r"experts of a mixtral model.*gguf")]
)
def test_projections_that_are_not_quantised_are_refused(tmp_path, format, family, message):
    folder = tmp_path / "model"
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ExportError, match=message):
        export_model(folder, tmp_path / "out", format=format, **EASY)
    assert not (tmp_path / "out").exists()


def test_torchao_opens_with_transformers_alone(folders, tmp_path):
    folder = export_model(folders["stock"], tmp_path / "out", format="torchao", **EASY).folder
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert "LlamaForCausalLM" in type(plain).__name__
    assert TorchRuntime(plain).losses(IDS) == open_export(folder).losses(IDS)


def test_text_gives_bits_a_byte(folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    result = export_model(folders["stock"], tmp_path / "out", format="quanto", data=tmp_path / "text.txt", **EASY)
    found = result.report.verification
    assert found.bits_per_byte_before > 0
    assert found.bits_per_byte_after == pytest.approx(found.bits_per_byte_before * found.after / found.before)
    assert "text.txt" in found.text
    assert read_export(result.folder) == result.report
    with pytest.raises(DataError):
        export_model(folders["stock"], tmp_path / "other", format="quanto", data=tmp_path / "missing.txt")
    assert not (tmp_path / "other").exists()


def test_the_random_state_of_the_caller_is_left_alone(folders, tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = export_model(folders["stock"], tmp_path / "out", format="quanto", **EASY).report.verification
    assert torch.equal(torch.get_rng_state(), state)
    second = export_model(folders["stock"], tmp_path / "again", format="quanto", **EASY).report.verification
    assert (first.before, first.after, first.largest_gap) == (second.before, second.after, second.largest_gap)


def test_what_fails_its_tolerance_is_not_left(folders, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"differs by .* allowed are 0\.00%"):
        export_model(folders["variable"], tmp_path / "out", format="quanto", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(TorchRuntime, "generate", broken)
    monkeypatch.setattr(run_module, "measure", lambda runtime, *_: runtime.generate(IDS, 2))
    with pytest.raises(RuntimeError):  # the folder's own model: not an export's fault
        export_model(folders["stock"], tmp_path / "out", format="quanto")
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_that_does_not_run_is_not_left(folders, tmp_path, monkeypatch):
    module = FORMATS["quanto"].module()
    monkeypatch.setattr(module, "load", lambda folder: json.loads("nonsense"))
    with pytest.raises(ExportError, match="can't be opened by the runtime of quanto"):
        export_model(folders["stock"], tmp_path / "out", format="quanto")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_not_left(folders, tmp_path, monkeypatch, subtests):
    for error, kind, words in (
        (IndexError("tuple index out of range"), ExportError, "can't be written as quanto: IndexError"),
        (OSError("data file is shorter than expected"), ExportError, "can't be written as quanto: OSError"),  # onnx_ir
        (OSError(28, "No space left on device"), SaveError, "No space left on device"),
    ):
        with subtests.test(error=error):

            def fail(*_, error=error):
                raise error

            monkeypatch.setattr(FORMATS["quanto"].module(), "write", fail)
            with pytest.raises(kind, match=words):
                export_model(folders["stock"], tmp_path / "out", format="quanto")
            assert list(tmp_path.iterdir()) == []


def test_options_are_checked_first(tmp_path, subtests):
    for options, words in (
        ({"format": "quant"}, "Did you mean 'quanto'"),
        ({"format": "torchao", "dtype": "int4"}, "allowed are int8"),
        ({"format": "quanto", "tolerance": -1.0}, "at least 0"),
    ):
        with subtests.test(**options), pytest.raises(ConfigError, match=words):
            export_model(tmp_path / "no model is read", tmp_path / "out", **options)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    gone = ("optimum", "torchao", "onnx", "onnxruntime", "onnxscript", "xllamacpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(gone) else find(name))
    for format in FORMATS.values():
        with pytest.raises(ConfigError, match=rf'pip install "\.\[{format.extra}\]"'):
            export_model(tmp_path, tmp_path / "out", format=format.name)


def test_a_model_is_not_replaced_by_an_export(folders, tmp_path):
    model = shutil.copytree(folders["stock"], tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(SaveError, match="was made by this package"):
        export_model(folders["variable"], model, format="onnx")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_an_output_that_is_not_ours_is_kept(folders, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(SaveError, match="not made by this package"):
        export_model(folders["stock"], target, format="quanto")
    assert (target / "thesis.txt").read_text() == "mine"
    with pytest.raises(SaveError, match=r"inside lies in .*, a folder that this package saved"):
        export_model(folders["stock"], folders["stock"] / "inside", format="quanto")
    with pytest.raises(ConfigError, match="would then be damaged"):
        export_model(folders["stock"], folders["stock"], format="quanto")


def test_an_export_is_not_exported_again(folders, tmp_path):
    folder = export_model(folders["stock"], tmp_path / "out", format="quanto", **EASY).folder
    with pytest.raises(ConfigError, match=r"export to quanto.*\(stock\)"):
        export_model(folder, tmp_path / "again", format="torchao")


def test_a_damaged_artefact_is_not_opened(folders, tmp_path):
    folder = export_model(folders["stock"], tmp_path / "out", format="quanto", **EASY).folder
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match="changed or damaged"):
        open_export(folder)
    with pytest.raises(LoadError, match="not an export"):
        open_export(folders["stock"])


@pytest.mark.parametrize("format", ["torchao", "quanto"])
def test_a_pickle_in_place_of_the_weights_is_not_opened(tmp_path, format):
    model = tiny_model("llama")
    found = Verification("text", 1, *[1.0] * 6, 5, 32, 5, 0.0, 1.0, 1.0, 2, 1, Tolerance(0.1))
    with staged_folder(tmp_path / "out", required_bytes=0) as staging:
        model.config.save_pretrained(staging)
        torch.save(model.state_dict(), staging / "pytorch_model.bin")
        (staging / "quanto_qmap.json").write_text("{}")
        ExportReport(format, "int8", "mini", None, {}, "machine", found).save(staging / "export_report.json")
    with pytest.raises(LoadError, match=r"lists pytorch_model\.bin, but this package saves no pickles"):
        open_export(tmp_path / "out")
    (tmp_path / "out/pytorch_model.bin").unlink()
    (tmp_path / "out/manifest.json").unlink()
    write_manifest(tmp_path / "out")
    with pytest.raises(ExportError, match=r"can't be opened.*safetensor"):
        open_export(tmp_path / "out")


BROKEN = ({"weights": 7}, {"format": []}, {"more": 1}, {"verification": {"before": "x"}}, {"bytes_before": 0}, "[")


def test_a_report_that_is_none_is_said_to_be_none(tmp_path, subtests):
    found = Verification("text", 1, *[1.0] * 6, 5, 32, 5, 0.0, 1.0, 1.0, 2, 1, Tolerance(0.1))
    report = ExportReport("gguf", "f16", "mini", None, {}, "machine", found)
    path = tmp_path / "export_report.json"
    report.save(path)
    assert ExportReport.load(path) == report
    values = report.to_dict()
    for change in BROKEN:
        if "bytes_before" in change:  # of which the artefact's bytes would be a share
            change = {"verification": values["verification"] | change}
        path.write_text("[" * 100_000 if change == "[" else json.dumps(values | change))
        with subtests.test(change=str(change)[:60]), pytest.raises(LoadError, match="is not an export report"):
            ExportReport.load(path)


@pytest.fixture
def place(folders, tmp_path):
    (tmp_path / "stock").symlink_to(folders["stock"])
    return tmp_path


def test_the_command_writes_shows_and_inspects(place, run):
    code, stdout, _ = run("export", "@stock", "--to", "quanto", "--output", "@out", "--tolerance", 10)
    assert code == 0
    assert "tokens per second" in stdout
    assert "the model itself writes" in stdout
    code, stdout, _ = run("inspect", "@out", "--format", "json")
    assert code == 0
    assert json.loads(stdout)["format"] == "quanto"
    (place / "out/config.json").write_text("{}")
    code, _, stderr = run("inspect", "@out")
    assert code == 1
    assert "config.json" in stderr
    code, _, stderr = run("export", "@stock", "--to", "wav", "--output", "@other")
    assert code == 2
    assert "allowed are" in stderr


def test_serving_needs_its_packages_and_a_whole_folder(place, run, monkeypatch):
    (place / "copy").mkdir()
    for path in (place / "stock").iterdir():
        (place / "copy" / path.name).write_bytes(path.read_bytes())
    (place / "copy/config.json").write_text("{}")
    code, _, stderr = run("serve", "@copy", "--port", 1)
    assert code == 1
    assert "config.json" in stderr
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    code, _, stderr = run("serve", "@stock")
    assert code == 2
    assert 'pip install ".[serving]"' in stderr


def test_an_export_that_transformers_cannot_read_is_not_served(place, run):
    export_model(place / "stock", place / "out", format="quanto", **EASY)
    code, _, stderr = run("serve", "@out", "--port", 1)
    assert code == 2
    assert "an export to quanto" in stderr
    assert "(stock)" in stderr
