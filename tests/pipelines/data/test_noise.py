"""Label noise of training pairs: shares, scores and the order of answers."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config.data_schema import NoiseParams
from pipelines.data.noise import with_noise
from posttrain.errors import ConfigError

PAIRS: list[dict[str, Any]] = [
    {"id": i, "prompt": str(i), "chosen": "good", "rejected": "bad", "chosen_score": 1.0, "rejected_score": 0.9} for i in range(1000)
]  # fmt: skip


def test_without_noise_nothing_changes() -> None:
    assert with_noise(PAIRS, NoiseParams(), 0) is PAIRS


def test_a_share_of_pairs_is_swapped_and_keeps_the_order_of_its_scores() -> None:
    noisy = with_noise(PAIRS, NoiseParams(flipped=0.3), 0)
    swapped = sum(row["chosen"] == "bad" for row in noisy)
    assert 260 < swapped < 340  # 300 expected, standard deviation 14.5
    assert {(row["chosen"], row["rejected"]) for row in noisy} == {("good", "bad"), ("bad", "good")}
    assert {row["chosen_score"] for row in noisy} == {1.0}
    assert noisy == with_noise(PAIRS, NoiseParams(flipped=0.3), 0)
    assert noisy != with_noise(PAIRS, NoiseParams(flipped=0.3), 1)


def test_noisy_scores_swap_pairs_of_nearly_equal_scores() -> None:
    noisy = with_noise(PAIRS, NoiseParams(scores=0.1), 0)
    assert all(row["chosen_score"] >= row["rejected_score"] for row in noisy)
    # a difference of .1 with a noise of sqrt(2) x .1 is negative with probability Phi(-.707) = .24
    assert 200 < sum(row["chosen"] == "bad" for row in noisy) < 280
    far = [row | {"rejected_score": 0.0} for row in PAIRS]
    assert all(row["chosen"] == "good" for row in with_noise(far, NoiseParams(scores=0.1), 0))


def test_noise_of_scores_needs_scores() -> None:
    plain = [{"prompt": "1", "chosen": "good", "rejected": "bad"}]
    with pytest.raises(ConfigError, match="the pairs have no chosen_score and rejected_score"):
        with_noise(plain, NoiseParams(scores=0.1), 0)
