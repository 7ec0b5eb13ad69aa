"""Reconstruction against numpy, and against its own objective."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from hf_context_prune.config import DEFAULT_RIDGE, ReconstructionName
from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.pruning.calibration.statistics import TargetWeights
from hf_context_prune.pruning.criteria import CRITERIA, _obs_remove
from hf_context_prune.pruning.reconstruction import NEEDS_GRAM, RECONSTRUCTIONS, get_reconstruction
from hf_context_prune.utils.linalg import FLOOR, add_ridge_, cholesky, invert_spd_
from tests.support.problems import inputs, matrix, statistics_of

KEPT = [0, 2, 3, 7, 8]
FEATURES, OUT = 9, 4
RIDGES = [1e-4, 0.01, 1.0]


def problem(*, seed=0, tokens=60):
    """X, W and b."""
    X = inputs(FEATURES, seed=seed, tokens=tokens)
    return X, matrix(OUT, FEATURES, seed=seed), matrix(1, OUT, seed=seed + 5)[0]


def penalty(X, ridge, *, centred):
    """Weight of the ridge, one a kept feature."""
    moments = X.var(dim=0, correction=0) if centred else X.square().mean(dim=0)
    return ridge * (moments + FLOOR * moments.mean())[KEPT]


def objective(X, W, b, V, c, ridge):
    """Mean squared error of the outputs from the kept inputs, plus the ridge towards the old weights."""
    old = X @ W.T if b is None else X @ W.T + b
    new = X[:, KEPT] @ V.T if b is None else X[:, KEPT] @ V.T + c
    error = (old - new).square().sum() / len(X)
    return float(error + (penalty(X, ridge, centred=b is not None) * (V - W[:, KEPT]).square()).sum())


def solve_with_numpy(X, W, b, ridge):
    """The same minimum as one ordinary least-squares problem: rows for the ridge, a free column for the intercept."""
    X, W = X.numpy(), W.numpy()
    kept = X[:, KEPT] / np.sqrt(len(X))
    target = X @ W.T / np.sqrt(len(X))
    scale = np.diag(np.sqrt(penalty(torch.tensor(X), ridge, centred=b is not None).numpy()))
    A = np.vstack([kept, scale])
    B = np.vstack([target, scale @ W[:, KEPT].T])
    if b is None:
        return torch.tensor(np.linalg.lstsq(A, B, rcond=None)[0].T), None
    ones = np.concatenate([np.ones(len(X)) / np.sqrt(len(X)), np.zeros(len(KEPT))])[:, None]
    B[: len(X)] += b.numpy() / np.sqrt(len(X))
    solution = np.linalg.lstsq(np.hstack([A, ones]), B, rcond=None)[0]
    return torch.tensor(solution[:-1].T), torch.tensor(solution[-1])


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("biased", [False, True])
def test_least_squares_equals_numpy(biased, ridge):
    for seed in range(3):
        X, W, b = problem(seed=seed)
        b = b if biased else None
        V, c = get_reconstruction("least_squares")(W, b, KEPT, statistics_of(X), ridge)
        expected_V, expected_c = solve_with_numpy(X, W, b, ridge)
        torch.testing.assert_close(V, expected_V, rtol=1e-8, atol=1e-9)
        assert (c is None) == (not biased)
        if biased:
            torch.testing.assert_close(c, expected_c, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "biased", "ridge"),
    [(60, False, 1e-4), (60, True, 0.01), (60, False, 1.0), (4, True, 1e-4), (4, False, 0.01), (4, True, 1.0)],
)
def test_least_squares_minimises_its_objective(tokens, biased, ridge):
    X, W, b = problem(tokens=tokens)
    b = b if biased else None
    V, c = get_reconstruction("least_squares")(W, b, KEPT, statistics_of(X), ridge)
    best = objective(X, W, b, V, c, ridge)
    assert best <= objective(X, W, b, W[:, KEPT], b, ridge)  # plain slicing
    generator = torch.Generator().manual_seed(1)
    for step in (1e-3, 1e-2, 0.1, 1.0) * 10:
        nudge = step * torch.randn(V.shape, generator=generator, dtype=torch.float64)
        shift = step * torch.randn(OUT, generator=generator, dtype=torch.float64)
        assert objective(X, W, b, V + nudge, c, ridge) >= best
        if biased:
            assert objective(X, W, b, V, c + shift, ridge) >= best


def test_the_intercept_keeps_the_mean_output():
    X, W, b = problem()
    for name in ("least_squares", "bias"):
        V, c = get_reconstruction(name)(W, b, KEPT, statistics_of(X), 0.01)
        torch.testing.assert_close((X[:, KEPT] @ V.T + c).mean(dim=0), (X @ W.T + b).mean(dim=0))


@pytest.mark.parametrize("biased", [False, True])
def test_bias(biased):
    X, W, b = problem()
    b = b if biased else None
    V, c = get_reconstruction("bias")(W, b, KEPT, statistics_of(X), 0.01)
    assert torch.equal(V, W[:, KEPT])
    for row in range(OUT):
        removed = [j for j in range(FEATURES) if j not in KEPT]
        expected = sum(float(W[row, j]) * float(X[:, j].mean()) for j in removed)
        assert float(c[row]) == pytest.approx(expected + (float(b[row]) if biased else 0.0))


@pytest.mark.parametrize("biased", [False, True])
def test_none_only_slices(biased):
    X, W, b = problem()
    b = b if biased else None
    V, c = get_reconstruction("none")(W, b, KEPT, statistics_of(X), 0.01)
    assert torch.equal(V, W[:, KEPT])
    assert c is b


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_nothing_removed_changes_nothing(name, subtests):
    for dtype, biased in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        with subtests.test(dtype=dtype, biased=biased):
            X, W, b = problem()
            W, b = W.to(dtype), b.to(dtype) if biased else None
            V, c = get_reconstruction(name)(W, b, list(range(FEATURES)), statistics_of(X), 0.01)
            assert torch.equal(V, W)
            assert c is None if b is None else torch.equal(c, b)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_a_dead_layer_is_sliced(name):
    _, W, bias = problem()
    for b in (None, bias):
        V, c = get_reconstruction(name)(W, b, KEPT, statistics_of(torch.zeros(10, FEATURES)), 0.01)
        assert torch.equal(V, W[:, KEPT])
        assert c is None or torch.equal(c, torch.zeros(OUT, dtype=torch.float64) if b is None else b)


def test_dead_features_get_no_share_of_the_repair():
    X, W, _ = problem()
    X[:, 3] = 0
    V, _ = get_reconstruction("least_squares")(W, None, KEPT, statistics_of(X), 0.01)
    assert bool(torch.isfinite(V).all())
    assert torch.equal(V[:, KEPT.index(3)], W[:, 3])


@pytest.mark.parametrize(("biased", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_low_precision_weights_are_refitted_in_float64(biased, dtype):
    X, W, b = problem()
    W, b = W.to(dtype), b.to(dtype) if biased else None
    fit = get_reconstruction("least_squares")
    V, c = fit(W, b, KEPT, statistics_of(X), 0.01)
    expected_V, expected_c = fit(W.double(), None if b is None else b.double(), KEPT, statistics_of(X), 0.01)
    assert V.dtype == torch.float64
    assert torch.equal(V, expected_V)
    assert c is None if b is None else torch.equal(c, expected_c)


@pytest.mark.parametrize("size", [1, 3])
def test_the_surgeons_weights_are_the_least_squares_weights(size):
    """Removing columns one unit after the other, with updates, ends at the refit of all at once."""
    X, W = inputs(12), matrix(OUT, 12)
    stats = statistics_of(X)
    rank = CRITERIA["obs"].function(TargetWeights(W, size, torch.zeros(12 // size)), stats, torch.Generator())
    output, inverse = W.clone(), invert_spd_(add_ridge_(stats.gram.clone(), DEFAULT_RIDGE))
    alive = list(range(12))
    for unit in rank.argsort().tolist()[: 8 // size]:
        gone = list(range(unit * size, (unit + 1) * size))
        _obs_remove(output, inverse, torch.tensor(gone))
        alive = [feature for feature in alive if feature not in gone]
        V, _ = get_reconstruction("least_squares")(W, None, alive, stats, DEFAULT_RIDGE)
        torch.testing.assert_close(output[:, alive], V, rtol=1e-8, atol=1e-9)


def test_what_is_missing_is_named():
    X, W, _ = problem()
    stats = statistics_of(X)
    with pytest.raises(DataError, match="Gram"):
        get_reconstruction("least_squares")(W, None, KEPT, replace(stats, gram=None), 0.01)
    assert torch.equal(get_reconstruction("none")(W, None, KEPT, replace(stats, gram=None), 0.01)[0], W[:, KEPT])
    assert {"least_squares"} == NEEDS_GRAM
    with pytest.raises(ConfigError, match=r"'least_square'.*'least_squares'\?"):
        get_reconstruction("least_square")
    # Sequential reconstruction is no function of one layer's statistics: pruning/sequential has it.
    assert (*RECONSTRUCTIONS, "sequential") == get_args(ReconstructionName)


def test_linear_algebra():
    X = inputs(5)
    G = X.T @ X
    torch.testing.assert_close(
        add_ridge_(G.clone(), 0.1), G + 0.1 * (G.diagonal() + FLOOR * G.diagonal().mean()).diag()
    )
    torch.testing.assert_close(invert_spd_(G.clone()) @ G, torch.eye(5, dtype=torch.float64))
    with pytest.raises(NumericsError, match="ridge"):
        cholesky(-G)
    for value, said in ((0.0, "zero at every token"), (float("nan"), "NaN"), (float("inf"), "too large")):
        with pytest.raises(NumericsError, match=rf"{said}.*weights before it.*checkpoint is damaged"):
            add_ridge_(torch.full((3, 3), value).double(), 0.01)
