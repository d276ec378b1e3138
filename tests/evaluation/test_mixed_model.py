"""The closed form of a comparison agrees with a mixed model that is fitted by restricted maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import optimize

from posttrain.evaluation.crossed import crossed_difference, two_way_bootstrap

ALGORITHMS, PROMPTS, SEEDS = 2, 10, 3


@dataclass
class MixedModel:
    """y = algorithm + prompt + (algorithm x prompt) + run + rest, with the algorithm as the only fixed effect."""

    y: np.ndarray
    """Scores [algorithms, prompts, seeds]."""

    def __post_init__(self) -> None:
        a, p, s = (index.ravel() for index in np.indices(self.y.shape))
        self.fixed = np.stack([np.ones(a.size), a == 0], axis=1).astype(float)
        groups = (p, a * PROMPTS + p, a * SEEDS + s, np.arange(a.size))
        self.parts = [(group[:, None] == group[None, :]).astype(float) for group in groups]

    def fit(self) -> tuple[float, float]:
        """Return the difference of the two algorithms and its standard error at the restricted likelihood's maximum."""
        start = np.log([0.3, 0.3, 0.05, 0.3])
        found = optimize.minimize(
            self.minus_log_likelihood,
            start,
            method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 4000},
        )
        assert found.success
        inverse = np.linalg.inv(self.covariance(found.x))
        information = self.fixed.T @ inverse @ self.fixed
        effects = np.linalg.solve(information, self.fixed.T @ inverse @ self.y.ravel())
        return float(effects[1]), float(np.sqrt(np.linalg.inv(information)[1, 1]))

    def covariance(self, logs: np.ndarray) -> np.ndarray:
        return sum(variance * part for variance, part in zip(np.exp(logs), self.parts, strict=True))

    def minus_log_likelihood(self, logs: np.ndarray) -> float:
        """REML (Patterson and Thompson 1971): log|V| + log|X'V^-1 X| + r'V^-1 r, halved."""
        covariance = self.covariance(logs)
        inverse = np.linalg.inv(covariance)
        information = self.fixed.T @ inverse @ self.fixed
        rest = self.y.ravel() - self.fixed @ np.linalg.solve(information, self.fixed.T @ inverse @ self.y.ravel())
        whole = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1] + rest @ inverse @ rest
        return float(whole / 2)


def drawn(seed: int) -> np.ndarray:
    """Scores [algorithms, prompts, seeds]; all four variances are estimated above 0, so none is at the limit of the likelihood."""
    generator = np.random.Generator(np.random.PCG64(seed))
    shape = (ALGORITHMS, PROMPTS, SEEDS)
    parts = [generator.normal(0, 1.5, (1, PROMPTS, 1)), generator.normal(0, 0.9, (ALGORITHMS, PROMPTS, 1))]
    parts += [generator.normal(0, 0.5, (ALGORITHMS, 1, SEEDS)), generator.normal(0, 0.4, shape)]
    return sum(parts, np.zeros(shape)) + np.array([0.3, 0.0])[:, None, None]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_the_bootstrap_and_the_fitted_mixed_model_agree(seed: int) -> None:
    y = drawn(seed)
    value, error = MixedModel(y).fit()
    found = crossed_difference(y[0], y[1])
    assert found.from_runs > 0
    # a balanced table: the moments are the restricted likelihood's maximum, up to the optimiser's tolerance
    assert (found.value, found.standard_error) == pytest.approx((value, error), rel=1e-3)
    assert two_way_bootstrap(y[0], y[1], 1000).std() == pytest.approx(error, rel=0.2)
