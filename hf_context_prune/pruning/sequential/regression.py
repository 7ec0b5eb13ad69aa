"""The regression of W x + e on the kept inputs of an output projection, from sums or from the rows themselves.

For sequential reconstruction. W x is the projection's own output, which x predicts exactly. e is what the residual
stream lacks beside it, which x predicts only in part, so a few tokens are enough to overfit it. Each part has its own
ridge, which pulls towards the old weights (G = E[x x^T], D = diag G, K kept and P removed features):

    W_K' = W_K + W_P G_PK (G_KK + ridge D_KK)^-1 + E[e x^T]_K (G_KK + correction_ridge D_KK)^-1

Where a projection has a bias that takes up the mean, x and e are centred.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from typing_extensions import override

from hf_context_prune.pruning.calibration.reduce import reduce_moments
from hf_context_prune.pruning.calibration.statistics import RegressionMoments, TargetStatistics
from hf_context_prune.pruning.reconstruction import solve_ridge, split_features
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.linalg import RowSystem
from hf_context_prune.utils.precision import reduced_precision_matmul

Rows = tuple[torch.Tensor, torch.Tensor]
"""x [tokens, features] and e [tokens, outputs], float32."""


class Regression(ABC):
    """The fitted text of one output projection."""

    @property
    @abstractmethod
    def statistics(self) -> TargetStatistics:
        """Sums of x, and G or the rows."""

    @property
    @abstractmethod
    def mean_target(self) -> torch.Tensor:
        """Mean of e, [outputs], float64."""

    @abstractmethod
    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens: x [tokens, features], e [tokens, outputs], float32."""

    @abstractmethod
    def finish(self) -> None:
        """Take the last tokens into account, of all processes."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Return whether no sum of e is NaN or Inf."""

    @abstractmethod
    def errors(self, ridges: Sequence[float], withheld: Iterable[Rows]) -> list[float]:
        """Return how much the correction with each ridge changes the sum of squared errors on withheld tokens."""

    @abstractmethod
    def solve(
        self, weight: torch.Tensor, kept: Sequence[int] | None, ridge: float, correction_ridge: float
    ) -> torch.Tensor:
        """Return W_K', [outputs, kept]: float64 from sums, float32 from rows.

        Args:
            weight: Old W, [outputs, features], any floating-point dtype.
            kept: Features to keep, ascending; None keeps all.
            ridge: Share of each feature's mean square, for W x.
            correction_ridge: The same for e.
        """


def open_regression(features: int, outputs: int, tokens: int, device: torch.device, *, centre: bool) -> Regression:
    """Return a regression that keeps the rows of few tokens, or the sums of many.

    Args:
        features: Features of x.
        outputs: Features of e.
        tokens: Upper limit of the tokens.
        device: Where the sums are.
        centre: Whether a bias takes up the mean.
    """
    if keeps_rows(features, tokens) and num_processes() < 2:
        return RowRegression(centre=centre)
    return MomentRegression(features, outputs, device, centre=centre)


def keeps_rows(features: int, tokens: int) -> bool:
    """Return whether so few tokens are cheaper kept as rows than summed up."""
    return 2 * tokens <= features


class MomentRegression(Regression):
    """A regression from sums, whose cost depends on the features: for many tokens.

    Args:
        features: Features of x.
        outputs: Features of e.
        device: Where the sums are.
        centre: Whether a bias takes up the mean.
    """

    def __init__(self, features: int, outputs: int, device: torch.device, *, centre: bool) -> None:
        self._moments = RegressionMoments(features, outputs, device, centre=centre)
        self._second: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    @override
    def statistics(self) -> TargetStatistics:
        return self._moments.statistics

    @property
    @override
    def mean_target(self) -> torch.Tensor:
        return self._moments.sum_target / self.statistics.num_tokens

    @override
    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        with reduced_precision_matmul():  # bfloat16 rounding is far below the ridge
            self._moments.add(x, target)

    @override
    def finish(self) -> None:
        reduce_moments(self._moments)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._moments.cross).all())

    @override
    def errors(self, ridges: Sequence[float], withheld: Iterable[Rows]) -> list[float]:
        gram, lacking = self._second_moments()
        if _is_silent(gram):
            return [0.0] * len(ridges)
        rows = [self._centred(parts) for parts in withheld]
        if not rows:  # other processes hold them
            return [0.0] * len(ridges)
        if sum(len(x) for x, _ in rows) < lacking.shape[1]:  # the smaller right-hand side is solved
            x, e = (torch.cat(parts) for parts in zip(*rows, strict=True))
            solved = (solve_ridge(gram, None, [(ridge, x.T.double())]).float() for ridge in ridges)
            return [_excess(part.T @ lacking.float(), e) for part in solved]
        found = []
        for ridge in ridges:
            narrow = solve_ridge(gram, None, [(ridge, lacking)]).float()
            with reduced_precision_matmul():
                found.append(sum(_excess(x @ narrow, e) for x, e in rows))
        return found

    @override
    def solve(
        self, weight: torch.Tensor, kept: Sequence[int] | None, ridge: float, correction_ridge: float
    ) -> torch.Tensor:
        gram, lacking = self._second_moments()
        weight = weight.double()
        K, P = (None, None) if kept is None else split_features(weight.shape[1], kept)
        old = weight if K is None else weight[:, K]
        if _is_silent(gram):  # features that never fire have nothing that they could be fitted to
            return old
        parts: dict[float, torch.Tensor] = {}
        if K is not None and P is not None:
            # Solving for the changes keeps the old weights exact where nothing has to change.
            parts[ridge] = gram[K[:, None], P] @ weight[:, P].T
        target = lacking if K is None else lacking[K]
        parts[correction_ridge] = target if correction_ridge not in parts else parts[correction_ridge] + target
        return old + solve_ridge(gram, K, list(parts.items())).T

    def _second_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._second is None:
            self._second = self._moments.second_moments()
        return self._second

    def _centred(self, rows: Rows) -> Rows:
        x, e = rows
        if not self._moments.centre:
            return x, e
        return x - self.statistics.mean.to(x), e - self.mean_target.to(e)


class RowRegression(Regression):
    """A regression from the rows themselves, whose cost depends on the tokens: for fewer of them than features.

    Args:
        centre: Whether a bias takes up the mean.
    """

    def __init__(self, *, centre: bool) -> None:
        self._centre = centre
        self._rows: list[Rows] = []
        self._statistics = TargetStatistics(0, *(torch.zeros(0, dtype=torch.float64) for _ in range(3)))
        self._targets = torch.zeros(0)

    @property
    @override
    def statistics(self) -> TargetStatistics:
        return self._statistics

    @property
    @override
    def mean_target(self) -> torch.Tensor:
        return self._targets.double().mean(dim=0)

    @override
    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        self._rows.append((x.T.contiguous(), target.clone()))

    @override
    def finish(self) -> None:
        columns = torch.cat([x for x, _ in self._rows], dim=1)
        self._targets = torch.cat([target for _, target in self._rows])
        self._rows.clear()
        wide = torch.float64
        squares = torch.linalg.vector_norm(columns, dim=1, dtype=wide).square()
        total, absolute = (values.sum(dim=1, dtype=wide) for values in (columns, columns.abs()))
        stats = self._statistics = TargetStatistics(columns.shape[1], total, absolute, squares)
        if bool((squares > 0).any()) and bool(torch.isfinite(squares).all()):
            stats.system = RowSystem(columns, stats.mean if self._centre else None)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._targets).all())

    @override
    def errors(self, ridges: Sequence[float], withheld: Iterable[Rows]) -> list[float]:
        system, targets = self._statistics.system, self._centred(self._targets)
        if system is None:
            return [0.0] * len(ridges)
        rows = [(system.products_with(x), self._centred(e)) for x, e in withheld]
        found = []
        for ridge in ridges:
            factor = system.factor(system.products, ridge)
            found.append(sum(_excess(system.predict(factor, targets, products), e) for products, e in rows))
        return found

    @override
    def solve(
        self, weight: torch.Tensor, kept: Sequence[int] | None, ridge: float, correction_ridge: float
    ) -> torch.Tensor:
        system = self._statistics.system
        K, P = (None, None) if kept is None else split_features(weight.shape[1], kept)
        old = (weight if K is None else weight[:, K]).float()
        if system is None:
            return old
        targets = self._centred(self._targets)
        parts: dict[float, torch.Tensor] = {}
        products = system.products
        if K is not None and P is not None:
            products = system.without(P)
            parts[ridge] = system.outputs(weight, P)
        parts[correction_ridge] = targets if correction_ridge not in parts else parts[correction_ridge] + targets
        solved = sum(system.solve(system.factor(products, share), target) for share, target in parts.items())
        assert isinstance(solved, torch.Tensor)
        return old + system.change(solved, K)

    def _centred(self, target: torch.Tensor) -> torch.Tensor:
        return target - self.mean_target.to(target) if self._centre else target


def _is_silent(gram: torch.Tensor) -> bool:
    return not bool(gram.diagonal().any())


def _excess(predicted: torch.Tensor, lacking: torch.Tensor) -> float:
    """Return sum |e - C x|^2 - sum |e|^2."""
    return float((predicted * (predicted - 2 * lacking)).sum(dtype=torch.float64))
