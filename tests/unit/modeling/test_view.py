"""`ModelView` says what the table, the config and the shapes say."""

import pytest
import torch
import transformers

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.architectures import unit_costs
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.view import ModelView
from tests.support.tiny import COVERING, case, tiny_config


@pytest.mark.parametrize("name", COVERING)
def test_it_agrees_with_config_and_modules(name):
    model = case(name)
    view = ModelView.of(model)
    assert view.spec is SPECS[model.config.model_type]
    assert view.geometry == read_geometry(model.config, view.spec)
    assert view.widths == view.geometry.layers
    assert view.costs == unit_costs(model, view.spec, view.geometry)
    assert view.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    for index, layer in enumerate(view.layers):
        assert view.num_units(index, "mlp") == view.widths[index].neurons
        assert view.num_units(index, "attention") == view.widths[index].kv_groups
        for target in view.targets(index):
            assert view.output_projection(index, target) in list(layer.modules())


def test_shapes_alone_need_no_weights():
    config = tiny_config("llama")
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    assert ModelView.of_shapes(empty).costs == ModelView.of(case("llama")).costs
    with pytest.raises(UnsupportedArchitectureError, match="meta device"):
        ModelView.of(empty)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_layers_that_share_a_weight_are_refused(part):
    model = case("llama")
    setattr(model.model.layers[2], part, getattr(model.model.layers[0], part))
    with pytest.raises(UnsupportedArchitectureError, match=rf"Layers 0 and 2 share the weight model.layers.2.{part}\."):
        ModelView.of(model)


def test_an_unknown_model_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, is_decoder=True
        )
    )
    for look in (ModelView.of, ModelView.of_shapes):
        with pytest.raises(UnsupportedArchitectureError, match="bert"):
            look(model)
