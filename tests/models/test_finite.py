import pytest
import torch

from posttrain.models.weights import all_finite


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(broken: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for length in (1, 7, 33, 4099):
            values = torch.linspace(-3, 3, length).to(dtype)
            assert all_finite(values)
            for place in {0, length // 2, length - 1}:
                changed = values.clone()
                changed[place] = broken
                assert not all_finite(changed)
    assert all_finite(torch.empty(0))
