"""Small model folders that claim huge sizes, or that are not what they look like, get an answer at once."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.cli import app
from hf_context_prune.errors import (
    ContextPruneError,
    LoadError,
    LoadWarning,
    NumericsError,
    UnsupportedArchitectureError,
)
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import load_meta_model, load_model
from hf_context_prune.storage.manifest import write_manifest
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from tests.support.limits import within
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

LOADERS = (load_model, load_meta_model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A native and a variable-width folder; the manifest is left out, since files are changed on purpose."""
    root, model = tmp_path_factory.mktemp("folders"), tiny_model("llama")
    widths = read_geometry(model.config, spec_of(model.config)).layers
    layers = tuple(LayerPlan(tuple(range(30 - i)), (0, 2)) for i in range(3))
    smaller = apply_plan(model, PruningPlan("llama", widths, layers))
    for name, each in (("native", model), ("variable", smaller)):
        each.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    for family in ("gpt2", "phi", "smollm3"):
        tiny_model(family).save_pretrained(root / family)
        tiny_tokenizer().save_pretrained(root / family)
    return root


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders / name, tmp_path / name, dirs_exist_ok=True)


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


HUGE = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 1000),  # of which the weights know nothing
    ("vocab_size", 2 * 10**7),
    ("vocab_size", 10**7),
    ("vocab_size", 10**12),
    ("vocab_size", 10**30),
    ("hidden_size", 6 * 10**6),
    ("head_dim", 10**7),
    ("num_attention_heads", 3 * 10**6),
    ("num_key_value_heads", 10**9),
    ("intermediate_size", 10**7),
    ("intermediate_size", 10**15),
    ("max_position_embeddings", 10**12),
    ("max_position_embeddings", 0),
    ("per_layer_config", {str(i): {"intermediate_size": 1} for i in range(5000)}),
    ("per_layer_config", {str(i): {} for i in range(200_000)}),  # longer than a config may be
    ("per_layer_config", {"-1": {"intermediate_size": 3}}),
    ("per_layer_config", {str(10**12): {"intermediate_size": 3}}),
    ("per_layer_config", [1, 2]),
    ("layer_types", ["full_attention"] * 20_000),
]


@pytest.mark.parametrize("name", ["native", "variable"])
def test_huge_values_in_a_config_are_refused_at_once(copied, name, subtests):
    folder = copied(name)
    original = (folder / "config.json").read_bytes()
    model_class = get_model_class(SPECS["llama"]) if name == "variable" else None
    for field, value in HUGE:
        (folder / "config.json").write_bytes(original)
        edit(folder, **{field: value})
        for load in LOADERS:
            with subtests.test(field=field, value=str(value)[:30], load=load.__name__), within():
                if name == "variable" and (field, value) == ("intermediate_size", 10**7):
                    load(folder)  # a value that every layer overrides
                    continue
                with pytest.raises(ContextPruneError) as caught:
                    load(folder)
                assert len(str(caught.value)) < 2000
        if model_class:
            with subtests.test(field=field, value=str(value)[:30]), within():
                _answer(model_class, folder, field)


def _answer(model_class, folder, field):
    """Load with the shipped class, which has no errors of the package; it may take what does no harm to it."""
    try:
        model_class.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError):
        return
    assert field in ("intermediate_size", "max_position_embeddings", "layer_types")


def test_lists_and_tables_of_other_families_are_bounded(copied, subtests):
    for name, field, value in (
        ("gpt2", "n_positions", 10**7),
        ("gpt2", "n_layer", 10**9),
        ("gpt2", "n_ctx", 10**12),
        ("gpt2", "n_embd", 10**7),
        ("gpt2", "n_inner", 10**9),
        ("phi", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}),
        ("smollm3", "no_rope_layers", [1] * 160_000),
        ("smollm3", "num_hidden_layers", 10**9),
    ):
        for load in LOADERS:
            folder = copied(name)
            edit(folder, **{field: value})
            with subtests.test(name=name, field=field, load=load.__name__), within():
                if field in ("n_ctx", "no_rope_layers"):  # the model does not use it, or not beyond its layers
                    load(folder)
                    continue
                with pytest.raises(ContextPruneError) as caught:
                    load(folder)
                assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["native", "variable"])
def test_a_config_that_is_long_or_deep_is_refused_at_once(copied, name, subtests):
    folder = copied(name)
    contents = {
        "deep": '{"model_type": "llama", "x": ' + "[" * 5000 + "]" * 5000 + "}",
        "deep values": '{"model_type": "llama", "x": ' + '{"a":' * 900 + "1" + "}" * 900 + "}",
        "unclosed": "[" * 5000,
        "long": '{"x": "' + "a" * 100_000_000 + '"}',
    }
    for kind, content in contents.items():
        (folder / "config.json").write_text(content)
        for load in LOADERS:
            with subtests.test(kind=kind, load=load.__name__), within(), pytest.raises(LoadError) as caught:
                load(folder)
            assert len(str(caught.value)) < 2000
    with within(), pytest.raises(ValueError, match="100,000,009 bytes"):
        get_model_class(SPECS["llama"]).from_pretrained(folder)


def test_headers_and_indices_that_lie_are_refused_at_once(copied, subtests):
    huge = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [10**9, 10**4], "data_offsets": [0, 4 * 10**13]}}
    many = {f"model.layers.{i}.x": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for i in range(200_000)}
    for kind, content in {
        "huge": _file(json.dumps(huge).encode()),
        "many": _file(json.dumps(many).encode()),
        "length": (2**62).to_bytes(8, "little") + b"{}",
        "no JSON": _file(b"\xff" * 100),
        "deep": _file(b"[" * 5000),
        "list": _file(b"[]"),
        "shape": _file(b'{"model.norm.weight": {"dtype": "F32", "shape": 5, "data_offsets": [0, 4]}}'),
        "short": b"abc",
        "empty": b"",
    }.items():
        folder = copied("native")
        (folder / "model.safetensors").write_bytes(content)
        for load in LOADERS:
            with subtests.test(kind=kind, load=load.__name__), within(), pytest.raises(LoadError):
                load(folder)
    for kind, index in {
        "missing": {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}},
        "outside": {"weight_map": {"model.norm.weight": "../other.safetensors"}},
        "absolute": {"weight_map": {"model.norm.weight": "/etc/x.safetensors"}},
        "other kind": {"weight_map": {"model.norm.weight": "pytorch_model.bin"}},
        "list": {"weight_map": {"model.norm.weight": ["a"]}},
        "no map": {},
        "no object": [],
        "long": {"weight_map": {f"a{i}": f"model-{i}.safetensors" for i in range(300_000)}},
    }.items():
        folder = copied("native")
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for load in LOADERS:
            with subtests.test(kind=kind, load=load.__name__), within(), pytest.raises(LoadError):
                load(folder)


def _file(header):
    return len(header).to_bytes(8, "little") + header


def test_quantised_folders_are_refused_before_they_are_loaded(copied, subtests):
    folder = copied("native")
    for method in ("gptq", "bitsandbytes", "zzz", None):
        edit(folder, quantization_config={"quant_method": method, "bits": 4})
        for load in LOADERS:
            with (
                subtests.test(method=method, load=load.__name__),
                pytest.raises(UnsupportedArchitectureError, match=rf"quant_method '{method}'.*can't be sliced exactly"),
            ):
                load(folder)


def test_weights_that_are_integers_are_refused(copied):
    folder = copied("native")
    weights = load_file(folder / "model.safetensors")
    weights = {name: value.to(torch.int8) if value.ndim == 2 else value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lm_head\.weight.*not floating-point weights \(I8\)"):
        load_model(folder)


def test_unknown_functions_are_refused_with_the_known_ones(copied, subtests):
    for field, value, said in (
        ("hidden_act", "evil", r"hidden_act 'evil'; allowed are .*silu"),
        ("hidden_act", "swilu", r"Did you mean 'silu'"),
        ("rope_scaling", {"rope_type": "evil", "factor": 2.0}, r"rope_type 'evil'; allowed are default, .*yarn"),
        ("rope_parameters", {"rope_type": "evil", "rope_theta": 1e4}, r"rope_type 'evil'; allowed are default, .*yarn"),
    ):
        folder = copied("native")
        edit(folder, **{field: value})
        for load in LOADERS:
            with subtests.test(field=field, load=load.__name__), pytest.raises(LoadError, match=said):
                load(folder)


def test_labels_are_bounded_before_tables_of_them_are_made(copied, subtests):
    for name, value in itertools.product(("native", "variable"), (2 * 10**7, 10**30, -1, "many", True)):
        folder = copied(name)
        edit(folder, num_labels=value)
        for load in (*LOADERS, load_checkpoint, get_model_class(SPECS["llama"]).from_pretrained):
            if name == "native" and load not in LOADERS:
                continue
            said = (LoadError, ValueError, StrictDataclassError)
            with (
                subtests.test(name=name, value=value, load=load.__name__),
                within(),
                pytest.raises(said, match=r"num_labels is .*; it must be an integer from 0 to 10,000"),
            ):
                load(folder)
    edit(folder, num_labels=3)
    load_meta_model(folder)


def test_values_that_no_model_has_are_named(copied, subtests):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    for name, field, value, said in (
        ("native", "rope_parameters", yarn | {"attention_factor": "x"}, "attention_factor of the rotation = 'x'"),
        ("native", "rope_parameters", yarn | {"factor": 0}, "factor of the rotation = 0"),
        ("native", "rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_theta of the rotation = 0"),
        ("native", "rms_norm_eps", math.nan, "rms_norm_eps = nan; it must be a finite number"),
        ("native", "rms_norm_eps", -1.0, r"rms_norm_eps = -1.0; it must be a number from 0 to 1"),
        ("native", "dtype", "load", "dtype = 'load'; it must be the name of a torch dtype"),
        ("native", "torch_dtype", "float99", "torch_dtype = 'float99'"),
        ("native", "sliding_window", 0, "sliding_window = 0; it must be an integer from 1"),
        ("gpt2", "resid_pdrop", 1e300, "resid_pdrop = 1e[+]300; it must be a number from 0 to 1"),
        ("native", "query_pre_attn_scalar", 0, "query_pre_attn_scalar = 0; it must be a number above 0"),
        ("native", "final_logit_softcapping", 1e300, "at most 1,000,000"),
        ("smollm3", "no_rope_layer_interval", 0, "no_rope_layer_interval = 0; it must be an integer from 1"),
    ):
        folder = copied(name)
        if field == "no_rope_layer_interval":
            edit(folder, no_rope_layers=None)
        edit(folder, **{field: value})
        for load in LOADERS:
            with subtests.test(field=field, value=value, load=load.__name__), pytest.raises(LoadError, match=said):
                load(folder)


def test_what_a_config_says_of_the_outputs_is_not_followed(copied):
    for name in ("native", "variable"):
        folder = copied(name)
        expected = load_model(folder).model(torch.tensor([[1, 2, 3]])).logits
        edit(folder, return_dict=False, output_attentions=True, output_hidden_states=True)
        model = load_model(folder).model
        result = model(torch.tensor([[1, 2, 3]]))
        assert torch.equal(result.logits, expected)
        assert result.hidden_states is None
        assert result.attentions is None
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        assert not {"output_attentions"} & set(saved)
        assert saved.get("return_dict", True)


def test_no_kernel_is_fetched_because_a_config_names_it(copied, subtests):
    for field in ("attn_implementation", "_attn_implementation"):
        for value, said in (
            ("attacker/evil-kernel", "'attacker/evil-kernel'; allowed are eager, sdpa.*remove"),
            ("kernels-community/flash-attn2", "Kernels of the Hub, which are native code, are not run"),
            ({"": "attacker/evil-kernel"}, "allowed are eager, sdpa"),
            ("flash_attention_2", "not installed on this machine. Install it"),
        ):
            if value == "flash_attention_2" and is_flash_attn_2_available():
                continue
            folder = copied("native")
            edit(folder, **{field: value})
            for load in LOADERS:
                with (
                    subtests.test(field=field, value=value, load=load.__name__),
                    pytest.raises(LoadError, match=said),
                ):
                    load(folder)
        edit(folder, **{field: "eager"})
        assert load_model(folder).model.config._attn_implementation == "eager"


def test_a_long_config_has_one_remedy(copied):
    folder = copied("native")
    edit(folder, x="a" * 600_000)
    with pytest.raises(LoadError, match="bytes; a model config has at most") as caught:
        load_model(folder)
    assert "ValueError" not in str(caught.value)
    assert str(caught.value).count("again") == 1


def test_adapters_are_named_as_such_with_the_way_to_merge(copied, tmp_path, subtests):
    alone, beside = tmp_path / "alone", copied("native")
    alone.mkdir()
    for folder in (alone, beside):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
        for load in LOADERS:
            with (
                subtests.test(folder=folder.name, load=load.__name__),
                pytest.raises(LoadError, match=r"PEFT adapter \(adapter_config\.json\).*merge_and_unload"),
            ):
                load(folder)


def test_a_tensor_in_more_precision_is_named_when_it_is_rounded(copied, recwarn):
    folder = copied("native")
    edit(folder, dtype="bfloat16")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert not [warning for warning in recwarn if issubclass(warning.category, LoadWarning)]
    for name, dtype in (("model.norm.weight", torch.float32), ("lm_head.weight", torch.float16)):
        mixed = weights | {name: weights[name].to(dtype)}
        save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.warns(LoadWarning, match=rf"{name} in another precision.*loaded as bfloat16"):
            load_model(folder)
    load_model(folder, dtype="float32")


def test_weights_of_no_trained_model_are_named_as_the_cause(subtests):
    options = PrunerConfig(pruning_ratio=0.2, num_calibration_samples=8, max_seq_length=32)
    for factor in (0.0, 1e30):
        model = tiny_model("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.ndim == 2 else 1)
        with (
            subtests.test(factor=factor),
            pytest.raises(NumericsError, match=r"weights before it.*checkpoint is damaged"),
        ):
            prune(model, data=texts(40), tokenizer=tiny_tokenizer(), config=options)


def test_a_config_without_weights_is_bounded_too(tmp_path, subtests):
    """As for a dry run of a Hub model: sizes up to the limits are worked out, larger ones are refused."""
    limits = {"intermediate_size": 2**24, "vocab_size": 2**24, "max_position_embeddings": 2**24}
    within_limits = limits | {"hidden_size": 2**20, "num_attention_heads": 2**20, "num_key_value_heads": 2**20}
    config = tiny_model("llama").config.to_dict()
    for allocation in ("adaptive", "uniform"):
        (tmp_path / "config.json").write_text(json.dumps(config | within_limits))
        with subtests.test(allocation=allocation), within():
            sizes = dry_run(tmp_path, PrunerConfig(pruning_ratio=0.2, allocation=allocation))
            assert sizes.pruned_parameters < 0.81 * sizes.base_parameters
    for field, value in (*((field, value + 1) for field, value in limits.items()), ("num_hidden_layers", 513)):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with subtests.test(field=field), within(), pytest.raises(LoadError, match=field):
            dry_run(tmp_path, PrunerConfig(pruning_ratio=0.2))


COMMANDS = {
    "prune": "prune {model} --data {data} --output {out}",
    "prune by plan": "prune {model} --data {data} --output {out} --dry-run",
    "evaluate": "evaluate {model} --data {data}",
    "bench": "bench {model}",
    "export": "export {model} --to gguf --output {out}",
    "recover": "recover {model} --data {data} --output {out}",
    "space": "space {model} --output {out}",
    "inspect": "inspect {model}",
}


def test_every_command_answers_a_hostile_config_at_once(tmp_path, subtests, monkeypatch, capfd):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(40)))
    options = PrunerConfig(mlp_ratio=0.2, allocation="uniform", num_calibration_samples=8, max_seq_length=32)
    result = prune(tiny_model("llama"), data=texts(40), tokenizer=tiny_tokenizer(), config=options)
    folder = result.save_pretrained(tmp_path / "model")
    original = (folder / "config.json").read_bytes()
    for field, value in (("num_hidden_layers", 10**9), ("vocab_size", 10**7), ("hidden_size", 6 * 10**6)):
        (folder / "config.json").write_bytes(original)
        edit(folder, **{field: value})
        (folder / "manifest.json").unlink()
        write_manifest(folder)  # whoever makes such a folder can write one
        for name, line in COMMANDS.items():
            words = line.format(model=folder, data=tmp_path / "data.jsonl", out=tmp_path / "out").split()
            monkeypatch.setattr("sys.argv", ["hf-context-prune", *words])
            with subtests.test(field=field, command=name), within():
                with pytest.raises(SystemExit) as ended:
                    app.main()
                said = capfd.readouterr()
                assert "Traceback" not in said.err
                assert ended.value.code in ((0,) if name == "inspect" else (1, 2)), said
                assert not (tmp_path / "out").exists()
