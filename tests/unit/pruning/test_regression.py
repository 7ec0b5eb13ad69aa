"""The regression of sequential reconstruction: both forms minimise their objective, and are one another's equal."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune.errors import NumericsError
from hf_context_prune.pruning.calibration.statistics import TargetStatistics, TargetWeights
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.pruning.sequential.regression import MomentRegression, RowRegression, open_regression
from hf_context_prune.utils.linalg import FLOOR, RowSystem, cholesky_

KEPT = [0, 2, 3, 7, 8]
CPU = torch.device("cpu")


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens=60, features=9, outputs=4, *, mean=0.0):
    X = drawn(tokens, features, seed=0) * torch.linspace(0.2, 3.0, features) + mean
    return X, drawn(tokens, outputs, seed=1) + 2 * mean, drawn(outputs, features, seed=2).double()


def filled(regression, X, E):
    for x, e in zip(X.split(7), E.split(7), strict=True):
        regression.add(x, e)
    regression.finish()
    return regression


def both(X, E, *, centre=False):
    return [
        filled(MomentRegression(X.shape[1], E.shape[1], CPU, centre=centre), X, E),
        filled(RowRegression(centre=centre), X, E),
    ]


@pytest.mark.parametrize("form", [0, 1], ids=["moments", "rows"])
@pytest.mark.parametrize("kept", [None, KEPT])
@pytest.mark.parametrize("tokens", [60, 6])
def test_the_regression_minimises_its_objective(kept, form, tokens):
    X, E, W = problem(tokens)
    K = list(range(9)) if kept is None else kept
    found = both(X, E)[form].solve(W, kept, 0.1, 0.1).double()
    T, second = X.double() @ W.T + E, X.double().T @ X.double() / tokens
    scale = second.diagonal()[K] + FLOOR * second.diagonal().mean()

    def objective(weight):
        return ((X.double()[:, K] @ weight.T - T) ** 2).sum() / tokens + 0.1 * (scale * (weight - W[:, K]) ** 2).sum()

    best = objective(found)
    assert best <= objective(W[:, K])
    for seed in range(20):
        assert best <= objective(found + 1e-2 * drawn(*found.shape, seed=seed).double())


@pytest.mark.parametrize("form", [0, 1], ids=["moments", "rows"])
@pytest.mark.parametrize("centre", [False, True])
def test_a_ridge_of_its_own_for_what_x_does_not_give(form, centre):
    """The own output is refitted with one ridge, the rest of the target with another; both minimise their part."""
    X, E, W = problem(mean=1.0)
    found = both(X, E, centre=centre)[form].solve(W, KEPT, 0.1, 2.0).double()
    X, E = X.double(), E.double()
    if centre:
        X, E = X - X.mean(dim=0), E - E.mean(dim=0)
    G = X.T @ X / 60
    eye = (G.diagonal()[KEPT] + FLOOR * G.diagonal().mean()).diag()
    system = G[KEPT][:, KEPT]
    own = torch.linalg.solve(system + 0.1 * eye, (G @ W.T)[KEPT] - system @ W[:, KEPT].T).T
    rest = torch.linalg.solve(system + 2.0 * eye, (X.T @ E / 60)[KEPT]).T
    torch.testing.assert_close(found, W[:, KEPT] + own + rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [0, 1], ids=["moments", "rows"])
@pytest.mark.parametrize("centre", [False, True])
def test_errors_are_those_on_the_withheld_tokens(form, centre):
    X, E, W = problem(mean=0.5)
    fit = both(X[:40], E[:40], centre=centre)[form]
    ridges = (0.1, 1.0, 3.0)
    found = fit.errors(ridges, [(X[40:50], E[40:50]), (X[50:], E[50:])])
    for ridge, error in zip(ridges, found, strict=True):
        change = fit.solve(W, None, ridge, ridge) - W
        x, e = X[40:].double(), E[40:].double()
        if centre:
            x, e = x - X[:40].double().mean(dim=0), e - E[:40].double().mean(dim=0)
        assert error == pytest.approx(float((e - x @ change.T).square().sum() - e.square().sum()), rel=1e-3, abs=1e-3)


def test_nothing_removed_and_nothing_lacking_changes_nothing():
    X, E, W = problem()
    for fit in both(X, torch.zeros_like(E)):
        assert torch.equal(fit.solve(W, None, 0.3, 1.0), W)


@pytest.mark.parametrize("centre", [False, True])
def test_features_that_never_fire_keep_their_weights(centre):
    X, E, W = problem()
    for fit in both(torch.zeros_like(X), E, centre=centre):
        assert torch.equal(fit.solve(W, KEPT, 0.3, 1.0), W[:, KEPT])
        assert fit.errors((0.1, 1.0), [(torch.zeros(3, 9), E[:3])]) == [0.0, 0.0]
    X[:, 2] = 0  # one of them
    first, second = (fit.solve(W, KEPT, 0.3, 1.0).double() for fit in both(X, E, centre=centre))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_values_that_are_not_finite_are_seen():
    X, E, _ = problem()
    E[3, 1] = torch.inf
    assert not any(fit.is_finite() for fit in both(X, E))
    with pytest.raises(NumericsError, match="too large to be squared"):
        RowSystem(torch.full((2, 4), torch.inf))
    with pytest.raises(NumericsError, match="positive definite"):
        cholesky_(-torch.eye(3, dtype=torch.float64))


def test_few_tokens_keep_their_rows_and_many_their_sums():
    kinds = {tokens: type(open_regression(64, 8, tokens, CPU, centre=False)) for tokens in (1, 32, 33, 500)}
    assert kinds == {1: RowRegression, 32: RowRegression, 33: MomentRegression, 500: MomentRegression}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_the_surgeon_ranks_by_rows_as_by_the_gram_matrix(size, centred):
    X, W = drawn(40, 60, seed=3) @ drawn(60, 60, seed=4) + 0.5, drawn(8, 60, seed=5)
    wide = X.double()
    sums = wide.sum(dim=0), wide.abs().sum(dim=0), wide.square().sum(dim=0)
    weights = TargetWeights(W, size, torch.zeros(60 // size), has_bias=centred, channel_scale=torch.rand(8, 1) + 0.5)
    by_gram, by_rows = (
        CRITERIA["obs"].function(weights, TargetStatistics(40, *sums, **more), torch.Generator())
        for more in ({"gram": X.T @ X}, {"system": RowSystem(X.T.contiguous())})
    )
    assert torch.equal(by_gram, by_rows)


@pytest.mark.parametrize("kind", ["gram", "rows"])
def test_the_surgeon_stops_where_the_rest_stays(kind):
    X, W = drawn(50, 80, seed=6), drawn(8, 80, seed=7)
    wide = X.double()
    given = {"gram": X.T @ X} if kind == "gram" else {"system": RowSystem(X.T.contiguous())}
    stats = TargetStatistics(50, wide.sum(dim=0), wide.abs().sum(dim=0), wide.square().sum(dim=0), **given)
    whole = CRITERIA["obs"].function(TargetWeights(W, 1, torch.zeros(80)), stats, torch.Generator())
    assert sorted(whole.tolist()) == list(range(80))
    for least in (1, 30, 79):
        part = CRITERIA["obs"].function(
            TargetWeights(W, 1, torch.zeros(80), least_kept=least), stats, torch.Generator()
        )
        best = [set(ranks.argsort(descending=True, stable=True)[:least].tolist()) for ranks in (whole, part)]
        assert best[0] == best[1]
        assert (part == 80).sum() > 0.8 * least - 1
