"""What a measurement does and reports; never how fast it is."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_context_prune.errors import ConfigError, LoadError, UnsupportedArchitectureError
from hf_context_prune.evaluation.speed import SpeedMeasurement, Spread, measure_peak_memory, measure_speed, speed_ratio
from hf_context_prune.modeling.generation import time_generation
from hf_context_prune.storage.saving import count_weight_bytes


def tiny_llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def recorder(model, calls, name):
    """Append (name, shape of the ids, positions already cached, logits asked for) at each forward of `model`."""

    def record(module, args, kwargs):
        calls.append(
            (name, tuple(kwargs["input_ids"].shape), kwargs["cache"].get_seq_length(), kwargs["logits_to_keep"])
        )

    model.register_forward_pre_hook(record, with_kwargs=True)
    return model


def test_models_take_turns_in_alternating_order():
    calls = []
    models = {name: recorder(tiny_llama(), calls, name) for name in ("base", "pruned")}
    result = measure_speed(models, prompt_tokens=20, new_tokens=3, repeats=3, batch_size=2)
    prefills = [call for call in calls if call[2] == 0]
    assert [call[0] for call in prefills] == ["base", "pruned", "pruned", "base"] * 2  # the first pair warms up
    one_run = [((2, 20), 0, 1), ((2, 1), 20, 1), ((2, 1), 21, 1), ((2, 1), 22, 1)]
    assert [call[1:] for call in calls] == one_run * 8
    assert list(result) == ["base", "pruned"]
    for measured in result.values():
        assert len(measured.prefill_rounds) == len(measured.decode_rounds) == 3
        assert measured.prefill.q1 <= measured.prefill.median <= measured.prefill.q3
        assert min(measured.decode_rounds) <= measured.decode.median <= max(measured.decode_rounds)
        assert (measured.prompt_tokens, measured.new_tokens, measured.batch_size) == (20, 3, 2)
        assert (measured.dtype, measured.device, measured.threads) == ("float32", "cpu", torch.get_num_threads())
        assert measured.hardware


def test_the_prompt_fits_the_shorter_model_and_both_vocabularies():
    calls = []
    models = {"a": recorder(tiny_llama(), calls, "a"), "b": tiny_llama(max_position_embeddings=32, vocab_size=8)}
    result = measure_speed(models, prompt_tokens=512, new_tokens=4, repeats=1)
    assert result["a"].prompt_tokens == result["b"].prompt_tokens == 28
    assert calls[0][1] == (1, 28)


def test_the_mode_is_given_back():
    model = tiny_llama().train()
    measure_speed({"m": model}, prompt_tokens=4, new_tokens=1, repeats=1)
    assert all(module.training for module in model.modules())


def test_other_families_decode_with_a_cache():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    assert measure_speed({"m": model}, prompt_tokens=8, new_tokens=2, repeats=2)["m"].prompt_tokens == 8


def test_a_model_without_a_cache_is_refused():
    class Cacheless(PreTrainedModel):
        config_class = LlamaConfig
        _supports_sdpa = True

        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UnsupportedArchitectureError, match=r"Cacheless\.forward"):
        time_generation(Cacheless(tiny_llama().config), torch.zeros(1, 4, dtype=torch.long), 1)


IMPOSSIBLE_SETTINGS = [
    ({"new_tokens": 64}, "the model has 64 positions. Use at most 63"),
    ({"new_tokens": 0}, "new_tokens 0"),
    ({"prompt_tokens": 0}, "prompt_tokens is 0"),
    ({"repeats": 0}, "repeats is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
]


def test_impossible_settings_are_refused(subtests):
    for options, message in IMPOSSIBLE_SETTINGS:
        with subtests.test(options=options, message=message), pytest.raises(ConfigError, match=message):
            measure_speed({"m": tiny_llama()}, **options)


def test_no_models_are_refused():
    with pytest.raises(ConfigError, match="models is empty"):
        measure_speed({})


def measurement(prefill, decode, **changes):
    facts = {"prompt_tokens": 8, "new_tokens": 2, "batch_size": 1, "dtype": "float32", "threads": 1}
    facts |= {"device": "cpu", "hardware": "a processor", "prefill": Spread(0, 0, 0), "decode": Spread(0, 0, 0)}
    return SpeedMeasurement(prefill_rounds=prefill, decode_rounds=decode, **(facts | changes))


def test_the_ratio_is_taken_round_by_round():
    # The machine halves its speed halfway: the medians say 1.0 for the prefill, the paired rounds 2.0.
    base = measurement((10.0, 10.0, 5.0), (1.0, 2.0, 4.0))
    pruned = measurement((20.0, 20.0, 10.0), (1.0, 3.0, 8.0))
    ratio = speed_ratio(base, pruned)
    assert ratio.prefill == Spread(2.0, 2.0, 2.0)
    assert ratio.decode == Spread(1.5, 1.25, 1.75)


def test_unlike_measurements_have_no_ratio():
    base = measurement((1.0,), (1.0,))
    with pytest.raises(ConfigError, match="threads is 1 for the base and 2"):
        speed_ratio(base, measurement((1.0,), (1.0,), threads=2))
    with pytest.raises(ConfigError, match="rounds can't be paired"):
        speed_ratio(base, measurement((1.0, 1.0), (1.0, 1.0)))


def test_tied_parameters_count_once():
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert untied.num_parameters() - tied.num_parameters() == 128 * 32
    assert tied.num_parameters() == sum({id(p): p.numel() for p in tied.parameters()}.values())


def test_weight_bytes_are_those_on_disk(tmp_path):
    with pytest.raises(LoadError, match=r"no \*.safetensors"):
        count_weight_bytes(tmp_path)
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    assert 4 * model.num_parameters() <= count_weight_bytes(tmp_path) < 4 * model.num_parameters() + 10_000


def test_no_model_folder_is_refused_without_a_process(tmp_path):
    with pytest.raises(LoadError, match=r"no config\.json"):
        measure_peak_memory(tmp_path)
    with pytest.raises(ConfigError, match="new_tokens 0"):
        measure_peak_memory(tmp_path, new_tokens=0)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    ballast = np.ones(2**30 // 8)  # 1 GiB in this process: the child must not count it
    measured = measure_peak_memory(tmp_path, prompt_tokens=512, new_tokens=4)
    assert ballast.nbytes == 2**30
    assert 2**26 < measured.baseline_rss <= measured.peak_rss < measured.baseline_rss + 2**29
    assert (measured.prompt_tokens, measured.new_tokens, measured.dtype) == (60, 4, "bfloat16")
    assert measured.load_seconds > 0


@pytest.mark.slow
def test_a_failing_process_tells_why(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"timeout_seconds=0\.01"):
        measure_peak_memory(tmp_path, timeout_seconds=0.01)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(LoadError, match=r"(?s)exit status 1.*stderr ends with:.*[Ss]afetensor"):
        measure_peak_memory(tmp_path)
