"""The error bar catches what an operator may get wrong: all elements a little, or a few of many entirely."""

import pytest
import torch
from tolerances import assert_error


def test_a_few_wrong_elements_of_millions_are_caught():
    exact = torch.randn(3, 1024, 1024, dtype=torch.float64)
    plain = exact.to(torch.bfloat16)
    assert_error(plain, exact, plain, "x")
    wrong = plain.clone()
    wrong.view(-1)[:: exact.numel() // 32] = 0
    assert (wrong != plain).sum() == 32
    with pytest.raises(AssertionError, match="x: largest_error"):
        assert_error(wrong, exact, plain, "x")


def test_a_small_error_of_all_elements_is_caught():
    exact = torch.randn(1024, 1024, dtype=torch.float64)
    plain = exact.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="x: relative_error"):
        assert_error((plain * 1.008).to(torch.bfloat16), exact, plain, "x")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_is_caught(value):
    exact = torch.randn(8, dtype=torch.float64)
    wrong = exact.float()
    wrong[3] = value
    with pytest.raises(AssertionError):
        assert_error(wrong, exact, exact.float(), "x")
