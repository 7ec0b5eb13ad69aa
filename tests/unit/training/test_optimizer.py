"""The optimizer goes on with narrower weights as if it had had them all along."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan, kept_entries
from hf_context_prune.training.callback.optimizer import (
    STATES,
    check_optimizer,
    clear_entries,
    map_state,
    replace_parameters,
)
from hf_context_prune.training.callback.transplant import compose_plans, scatter, transplant
from tests.support.tiny import COVERING, case, tiny_model

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
}
IDS = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(0))


def plan_for(model, seed=0):
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    generator = torch.Generator().manual_seed(seed)

    def choose(total):
        count = max(1, round(0.6 * total))
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    layers = tuple(LayerPlan(choose(widths.neurons), choose(widths.kv_groups)) for widths in geometry.layers)
    return PruningPlan(spec.model_type, geometry.layers, layers, fingerprint(model))


def step(model, optimizer):
    model.train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def prune_in_place(model, optimizer, plan):
    own = dict(model.named_parameters())
    map_state(optimizer, ((own[name], places) for name, places in kept_entries(model, plan)))
    smaller = apply_plan(model, plan)
    replace_parameters(optimizer, transplant(model, smaller))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_are_those_of_the_kept_entries(name, kind):
    model = case(name)
    optimizer = OPTIMIZERS[kind](
        [{"params": list(model.parameters())[::2]}, {"params": list(model.parameters())[1::2]}]
    )
    for _ in range(2):
        step(model, optimizer)
    plan = plan_for(model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    places = dict(kept_entries(model, plan))
    before = {names[p]: (p.shape, dict(state)) for p, state in optimizer.state.items()}
    sizes, rates = [len(group["params"]) for group in optimizer.param_groups], [g["lr"] for g in optimizer.param_groups]
    prune_in_place(model, optimizer, plan)
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert [group["lr"] for group in optimizer.param_groups] == rates
    after = {
        key: optimizer.state[parameter] for key, parameter in model.named_parameters() if parameter in optimizer.state
    }
    assert after.keys() == before.keys()
    assert len(optimizer.state) == len(after)
    checked = 0
    for key, (shape, state) in before.items():
        for field, value in state.items():
            got = after[key][field]
            if not isinstance(value, torch.Tensor) or value.numel() == 1 or key not in places:
                assert got is value or torch.equal(torch.as_tensor(got), torch.as_tensor(value))
                continue
            # Brute force: give every entry of the weight its state, cut the weight, and read the state off it.
            if value.shape == shape:
                wide = value
            elif STATES[type(optimizer)][field] == "rows":
                wide = value.reshape(-1, 1).expand(shape)
            else:
                wide = value.reshape(1, -1).expand(shape)
            cut = wide.reshape(-1)[places[key]]
            narrow = cut if value.shape == shape else cut[:, 0] if STATES[type(optimizer)][field] == "rows" else cut[0]
            assert torch.equal(got.reshape(narrow.shape), narrow)
            assert got.ndim == value.ndim
            checked += 1
    assert checked > 5
    step(model, optimizer)  # and it goes on


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_silent_and_cut_out_units_learn_the_same(name, kind):
    cut, silent = case(name), case(name)
    optimizers = [OPTIMIZERS[kind](model.parameters()) for model in (cut, silent)]
    for model, optimizer in zip((cut, silent), optimizers, strict=True):
        step(model, optimizer)
    plan = plan_for(cut)
    prune_in_place(cut, optimizers[0], plan)
    narrow, wide = apply_plan(silent, plan).state_dict(), dict(silent.named_parameters())
    for key, places in kept_entries(silent, plan):
        scatter(wide[key], narrow[key], places)
        clear_entries(optimizers[1], wide[key], places)
    for _ in range(4):
        step(cut, optimizers[0])
        step(silent, optimizers[1])
    for key, places in kept_entries(silent, plan):
        gone = torch.ones(wide[key].numel(), dtype=torch.bool)
        gone[places.flatten()] = False
        assert not wide[key].detach().flatten()[gone].any()  # nothing moved what was removed
    after = apply_plan(silent, compose_plans(None, plan, model_fingerprint=fingerprint(silent)))
    # Logits, not weights: biases of keys change nothing, and Adam blows their rounding noise up to full steps.
    with torch.no_grad():
        expected = cut.eval()(input_ids=IDS).logits
        torch.testing.assert_close(after.eval()(input_ids=IDS).logits, expected, atol=2e-3, rtol=1e-3)


def test_two_prunings_are_one_plan():
    model = tiny_model("llama")
    first = plan_for(model)
    once = apply_plan(model, first)
    second = plan_for(once, seed=1)
    twice = apply_plan(once, second).state_dict()
    both = apply_plan(model, compose_plans(first, second)).state_dict()
    assert all(torch.equal(value, both[key]) for key, value in twice.items())


class Unknown(torch.optim.SGD):
    pass


class Lookahead(torch.optim.Optimizer):
    """Slow weights around another optimizer, which nobody could map."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state


def with_averages(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter]["average"] = parameter.detach().clone()
    return optimizer


def test_a_state_that_nobody_knows_is_refused_before_anything_is_cut():
    model = tiny_model("llama")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer)
    for parameter in model.parameters():
        optimizer.state[parameter]["average"] = parameter.detach().clone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [state["exp_avg"].shape for state in optimizer.state.values()]
    with pytest.raises(ConfigError, match="holds 'average' of shape"):
        prune_in_place(model, optimizer, plan_for(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [state["exp_avg"].shape for state in optimizer.state.values()] == moments


def test_moments_of_whole_rows_need_one_process():
    for kind in ("torch-adafactor", "adafactor"):
        model = tiny_model("llama")
        optimizer = OPTIMIZERS[kind](model.parameters())
        check_optimizer(optimizer, model, 1)
        with pytest.raises(ConfigError, match="With several processes, Adafactor would keep"):
            check_optimizer(optimizer, model, 2)


def test_optimizers_that_are_refused(subtests):
    for make, said in (
        (lambda model: None, "no optimizer"),
        (
            lambda model: Unknown(model.parameters(), lr=0.1),
            r"test_optimizer\.Unknown can't be mapped .* torch\.optim\.sgd\.SGD",
        ),
        (
            lambda model: Lookahead(torch.optim.AdamW(model.parameters())),
            r"test_optimizer\.Lookahead can't be mapped",
        ),
        (lambda model: torch.optim.RMSprop(model.parameters()), r"RMSprop can't be mapped"),
        (lambda model: torch.optim.SGD(tiny_model("llama").parameters(), lr=0.1), "tensors that are not weights"),
        (with_averages, r"state of AdamW holds 'average' of shape \[\d+, 48\]"),
    ):
        with subtests.test(said):
            model = tiny_model("llama")
            with pytest.raises(ConfigError, match=said):
                check_optimizer(make(model), model)
