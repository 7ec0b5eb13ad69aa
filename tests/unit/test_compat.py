"""Private parts of other libraries, one test each: the message says what breaks in this package when one changes."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.modeling_utils import PushToHubMixin

import hf_context_prune
from hf_context_prune.modeling import modeling_context_pruned
from hf_context_prune.modeling.geometry import LayerWidths, read_geometry
from hf_context_prune.modeling.native_fit import build_variable_config
from hf_context_prune.modeling.registry import build_auto_map, get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.utils import compat
from tests.support.callback_cases import arguments, dataset
from tests.support.tiny import tiny_config, tiny_model


def variable_model():
    config, spec = tiny_config("llama"), SPECS["llama"]
    widths = [LayerWidths(40, 3), LayerWidths(20, 2), LayerWidths(40, 3)]
    return get_model_class(spec)(build_variable_config(config, spec, widths)).eval()


def test_warnings_of_torchao_are_those_that_are_silenced():
    """If this fails, the command line shows warnings where torchao is installed."""
    code = (
        "import torch; from hf_context_prune.utils.compat import silence_import_warnings as silence; silence()\n"
        "import transformers.quantizers, torchao\n"
        "assert torch.utils._pytree.log.name == 'torch.utils._pytree' and torchao.logger.name == 'torchao'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert "torchao" not in done.stderr
    assert "_pytree" not in done.stderr


@pytest.mark.parametrize("first", ["hf_context_prune", "transformers.models.auto.configuration_auto"])
def test_register_on_demand(first, tmp_path):
    """In a fresh process, plain auto classes open a variable-width folder once the package is imported."""
    model = variable_model()
    model.config.auto_map = build_auto_map(SPECS["llama"])
    model.save_pretrained(tmp_path)
    script = f"""
import sys
import {first}
import hf_context_prune
assert {first!r} != "hf_context_prune" or "torch" not in sys.modules
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "hf_context_prune.modeling" not in sys.modules
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__module__)
for kind in (AutoModel, AutoModelForCausalLM):
    print(type(kind.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    breaks = f"`import hf_context_prune` no longer lets AutoModelForCausalLM open a folder: {done.stderr[-1500:]}"
    assert done.stdout.split() == [
        "hf_context_prune.modeling.configuration_context_pruned",
        "ContextPrunedLlamaModel",
        "ContextPrunedLlamaForCausalLM",
    ], breaks


def test_attention_implementation():
    breaks = "check_attention no longer refuses flash attention in float32, and a resumed pruning mistakes its model"
    assert compat.attention_implementation(LlamaConfig()) is None, breaks
    for name in ("eager", "sdpa"):
        model = transformers.LlamaForCausalLM._from_config(tiny_config("llama"), attn_implementation=name)
        assert compat.attention_implementation(model.config) == name, breaks


def test_copy_attention_implementation():
    source, target = tiny_config("llama"), tiny_config("llama")
    source._attn_implementation = "eager"
    compat.copy_attention_implementation(source, target)
    model = transformers.LlamaForCausalLM(target)
    assert compat.attention_implementation(model.config) == "eager", "a pruned model runs other attention than its base"


def test_computed_buffers_and_fill_computed_buffers():
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    breaks = "apply_plan copies rotary tables that a cast has rounded, and a saved model does not reload bit-equal"
    assert "inv_freq" in compat.computed_buffers(rotary), breaks
    assert not compat.computed_buffers(model.lm_head), breaks
    wanted = rotary.inv_freq.clone()
    rotary.to(torch.bfloat16)
    rotary.to_empty(device="cpu").float()
    compat.fill_computed_buffers(model, rotary)
    assert torch.equal(rotary.inv_freq, wanted), breaks


@pytest.fixture
def fresh_accelerate_state():
    """Trainers of other tests leave a state of another precision behind, in this process."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    AcceleratorState._shared_state.update(before)


def test_class_forward(fresh_accelerate_state):
    model = tiny_model("llama")
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
    ids = torch.arange(3, 9)[None]
    breaks = "a pruning inside of a Trainer with bf16 measures rounded logits, and recover trains the given model"
    assert "forward" in vars(prepared), breaks
    with torch.no_grad(), compat.class_forward(prepared):
        assert torch.equal(prepared(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits), breaks
    assert "forward" in vars(prepared)
    with compat.class_forward(model := tiny_model("llama")):
        pass
    assert "forward" not in vars(model)


def test_limit_to_one_gpu(tmp_path):
    options = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    options._n_gpu = 4
    assert options.n_gpu == 4, "recover trains in a DataParallel where several GPUs are visible"
    compat.limit_to_one_gpu(options)
    assert options.n_gpu == 1


def test_claim_training(tmp_path):
    class Claim(TrainerCallback):
        before = ()

        def on_train_begin(self, args, state, control, **_):
            self.before += (compat.claim_training(state, self),)

    first, second = Claim(), Claim()
    trainer = Trainer(
        tiny_model("llama"), arguments(tmp_path, max_steps=1), train_dataset=dataset(8), callbacks=[first, second]
    )
    trainer.train()
    trainer.train()
    breaks = "two ContextPruneCallbacks in one Trainer prune twice, or a second training is refused"
    assert first.before == (None, None), breaks
    assert second.before == (first, first), breaks
    assert "_context_prune" not in json.loads(json.dumps(vars(TrainerState()))), breaks


class Pushing(compat.CheckpointPushHook, Trainer):
    """Notes pushes, and makes none."""

    def __init__(self, *given, **how):
        self.pushed = []
        super().__init__(*given, **how)

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = "org/x"

    def push_checkpoint(self):
        self.pushed.append(self.state.global_step)

    def push_to_hub(self, *given, **how):
        self.pushed.append("end")


def pushing(folder, **options):
    options = arguments(folder, max_steps=2, push_to_hub=True, hub_token="none", **options)
    return Pushing(tiny_model("llama"), options, train_dataset=dataset(8))


def test_checkpoint_push_hook(tmp_path):
    trainer = pushing(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.pushed == [1, 2], "the Trainer pushes checkpoints itself, with training_args.bin and wide weights"


def test_save_for_push(tmp_path):
    trainer = pushing(tmp_path)
    compat.save_for_push(trainer)
    assert (tmp_path / "model.safetensors").is_file()
    assert trainer.pushed == [], "push_to_hub of the mixin calls itself without end: saving begins a push of its own"
    trainer.save_model()
    assert trainer.pushed == ["end"]


def test_track_push_and_finish_push(tmp_path):
    class Job(Future):
        waited = False

        def result(self, timeout=None):
            return None

    trainer, job = pushing(tmp_path), Future()
    compat.track_push(trainer, job)
    breaks = "a training ends, or pushes its end, while a checkpoint is still being uploaded"
    assert trainer.push_in_progress.jobs == [job], breaks
    assert not trainer.push_in_progress.is_done(), breaks
    job.set_running_or_notify_cancel()
    job.set_result(None)
    compat.finish_push(trainer)
    assert trainer.push_in_progress.is_done(), breaks
    assert "_finish_current_push" in inspect.getsource(Trainer), breaks


def test_unwrap_quanto():
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny_model("llama")
    quanto.quantize(model, weights=quanto.qint8)
    wrapped = quanto.QuantizedModelForCausalLM(model)
    assert compat.unwrap_quanto(wrapped) is model, "an export to quanto can't be opened"


# --- the modeling files that travel with a saved model ----------------------------------------------------------------


def test_configs_give_values_without_asking_for_a_layer():
    config = variable_model().config
    name = "_getattr_without_heterogeneous_validation"
    assert getattr(config, name)("intermediate_size") == 40, "a variable-width config can't check its widths"


def test_configs_keep_widths_by_layer_and_drop_them_by_none():
    config = copy.deepcopy(variable_model().config)
    breaks = "a variable-width model can't be built: its class hides the widths from the native class and restores them"
    assert config.to_dict()["per_layer_config"].keys() in ({1}, {"1"}), breaks
    assert config.per_layer_config[1].intermediate_size == 20, breaks
    overrides, config.per_layer_config = config.width_overrides(), None
    assert config.intermediate_size == 40, breaks
    config.per_layer_config = overrides
    assert config.width_overrides() == {
        1: {"intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    }


def test_validators_of_a_config_are_overridden_by_name():
    config = variable_model().config
    config.per_layer_config = {1: {"intermediate_size": 99}}
    with pytest.raises(Exception, match="99; it must be from 1 to 40"):
        config.validate()
    assert "validate_architecture" in vars(LlamaConfig), "widths of a variable-width config are not checked"


def test_rotary_embeddings_are_known_by_name_and_keep_a_config():
    breaks = "rotary tables of a variable-width model read head counts that are ambiguous"
    rotary = [module for module in variable_model().modules() if "RotaryEmbedding" in type(module).__name__]
    assert rotary, breaks
    assert all(read_geometry(module.config, SPECS["llama"]).layers[1].neurons == 40 for module in rotary), breaks


def test_a_trainer_knows_causal_models_by_the_name_of_their_class():
    source = inspect.getsource(Trainer)
    breaks = "label_smoothing_factor smooths labels of variable-width models that were not shifted"
    assert variable_model()._get_name() == "LlamaForCausalLM", breaks
    assert re.search(r"unwrapped_model\._get_name\(\)\n?\s*\)?\s*", source), breaks
    assert "LlamaForCausalLM" in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_push_to_hub_uploads_by_a_method_that_the_class_overrides(monkeypatch, tmp_path):
    sent = []
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", lambda self, folder, *_, **__: sent.append(folder))
    api = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="org/x"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    seen = []
    monkeypatch.setattr(modeling_context_pruned, "UPLOAD_CHECKS", [lambda folder, token: seen.append(folder)])
    variable_model().push_to_hub("org/x")
    assert seen == sent != [], "push_to_hub of a variable-width model uploads files that nobody has checked"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_apply_expert_gate(family):
    module = tiny_model(family).model.layers[1].mlp.experts.eval()
    both = torch.randn(5, module.gate_up_proj.shape[1 if family == "mixtral" else 2])
    breaks = f"the experts of {family} can't be refitted: their own gate is not found"
    assert callable(getattr(module, "_apply_gate", None)), breaks
    found = compat.apply_expert_gate(module, both)
    assert found.shape == (5, both.shape[1] // 2), breaks
    if family == "mixtral":
        gate, up = both.chunk(2, dim=1)
        torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up)


def test_no_private_hook_outside_of_compat():
    """A new use of a private name of another library belongs into utils/compat.py, with a test here."""
    package = Path(hf_context_prune.__file__).parent
    shipped = {package / "modeling" / name for name in modeling_context_pruned.MODELING_FILES}
    # Of this package, and of the standard library (`_replace` of a namedtuple).
    own = {"_llama_worker", "_memory_worker", "_context_prune_shards", "_context_prune_unsavable"}
    own |= {"_exit", "_export", "_replace"}
    found = []
    for file in package.rglob("*.py"):
        if file in shipped or file.name == "compat.py":
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for holder, name in re.findall(r"(\w+|\))\.(_[a-z]\w*)", line.partition("#")[0]):
                if holder not in ("self", "cls") and name not in own:
                    found.append(f"{file.relative_to(package)}:{number} {holder}.{name}")
    assert not found
