"""When and how far a training prunes."""

from __future__ import annotations

import pytest

from hf_context_prune import PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.training.callback.schedule import PruningSchedule, config_for_pruning


def test_steps(subtests):
    for schedule, expected in (
        (PruningSchedule(0.1, 0.5, 3), (10, 30, 50)),
        (PruningSchedule(10, 0.5, 5), (10, 20, 30, 40, 50)),
        (PruningSchedule(1, 99, 2), (1, 99)),
        (PruningSchedule(7, 9, 3), (7, 8, 9)),
        (PruningSchedule(0.25, 0.9, 1), (25,)),
        (PruningSchedule(0.001, 0.5, 1), (1,)),
        (PruningSchedule(7.0, 9.0, 3), (7, 8, 9)),  # as a command line gives them
    ):
        with subtests.test(schedule=str(schedule)):
            assert schedule.steps(100) == expected


def test_shares():
    cubic, linear = PruningSchedule(num_prunings=4), PruningSchedule(num_prunings=4, shape="linear")
    assert [cubic.share(index) for index in range(4)] == pytest.approx([0.578125, 0.875, 0.984375, 1])
    assert [linear.share(index) for index in range(4)] == [0.25, 0.5, 0.75, 1]
    assert PruningSchedule(num_prunings=1).share(0) == 1


def test_bad_values(subtests):
    for options, said in (
        ({"start": 0}, "start is 0; it must be a share of the training"),
        ({"start": 1.5}, r"start is 1\.5"),
        ({"end": True}, "end is True"),
        ({"end": float("nan")}, "end is nan"),
        ({"num_prunings": 0}, "num_prunings is 0"),
        ({"num_prunings": 2.0}, r"num_prunings is 2\.0"),
        ({"start": 0.5, "end": 0.2}, "start is 0.5, after its end 0.2; swap them"),
        ({"shape": "square"}, "Unknown shape 'square'; allowed are cubic, linear"),
    ):
        with subtests.test(**options), pytest.raises(ConfigError, match=said):
            PruningSchedule(**options)


def test_schedules_longer_than_the_training(subtests):
    for schedule, said in (
        (PruningSchedule(0.5, 100, 2), "last pruning is at step 100, but the training ends with step 100"),
        (PruningSchedule(200, 0.5, 1), "last pruning is at step 200"),
        (PruningSchedule(60, 0.2, 2), "at most 1 fit there"),
        (PruningSchedule(10, 12, 4), "4 prunings between step 10 and step 12; at most 3 fit"),
    ):
        with subtests.test(said), pytest.raises(ConfigError, match=said):
            schedule.steps(100)


def test_uniform_widths_on_the_way():
    dense, final = (LayerWidths(40, 6),) * 2, (LayerWidths(20, 3),) * 2
    config = PrunerConfig(pruning_ratio=0.3, round_to=4)
    first = config_for_pruning(0.5, config, dense, dense, final, 1000)
    assert (first.mlp_ratio, first.attention_ratio) == (1 - 32 / 40, 1 - 4 / 6)  # 30 neurons, up to a multiple of 4
    assert first.pruning_ratio is None
    last = config_for_pruning(1.0, config, dense, (LayerWidths(32, 4),) * 2, final, 1000)
    assert (last.mlp_ratio, last.attention_ratio) == (1 - 20 / 32, 1 - 3 / 4)


def test_a_mixture_has_layers_without_neurons_on_the_way():
    for dense in ((LayerWidths(0, 6, 8),) * 2, (LayerWidths(0, 6, 8), LayerWidths(40, 6))):
        final = tuple(LayerWidths(layer.neurons and 20, 3, layer.experts) for layer in dense)
        half = config_for_pruning(0.5, PrunerConfig(attention_ratio=0.5, mlp_ratio=0.5), dense, dense, final, 1000)
        assert half.attention_ratio == 1 - 4 / 6
        assert half.mlp_ratio == (1 - 30 / 40 if dense[1].neurons else 0.0)


def test_budgets_on_the_way():
    config = PrunerConfig(pruning_ratio=0.3, allocation="adaptive")
    half = config_for_pruning(0.5, config, (), (), None, 1000)
    assert (half.pruning_ratio, half.target_params) == (None, 850)
    assert config_for_pruning(1.0, config, (), (), None, 1000).target_params == 700
