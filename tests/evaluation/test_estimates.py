"""Standard errors against numpy's formulas and against repeated sampling; the moving average by hand."""

import numpy as np
import pytest

from attnlab.evaluation import estimates


def test_mean_and_error_are_numpys():
    values = np.random.default_rng(0).normal(3, 2, 17)
    expected = (values.mean(), values.std(ddof=1) / np.sqrt(17))
    np.testing.assert_allclose(estimates.mean(values), expected, rtol=1e-12)


@pytest.mark.smoke
def test_ratio_by_hand():
    # R = 12/6 = 2, residuals 1, -2, 1: SE^2 = 3/2 * 6 / 36
    R, error = estimates.ratio(np.array([3.0, 2.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert R == 2
    np.testing.assert_allclose(error, 0.5, rtol=1e-12)


def test_error_of_a_ratio_is_the_spread_over_repeated_samples():
    rng = np.random.default_rng(1)
    x = rng.gamma(2.0, 50.0, (3000, 40))
    y = x * rng.normal(1.5, 0.3, x.shape)
    ratios, errors = np.array([estimates.ratio(*pair) for pair in zip(y, x, strict=True)]).T
    np.testing.assert_allclose(errors.mean(), ratios.std(), rtol=0.06)


def test_too_little_data_has_no_error():
    assert estimates.ratio(np.array([2.0]), np.array([4.0]))[0] == 0.5
    assert np.isnan(estimates.ratio(np.array([2.0]), np.array([4.0]))[1])
    assert np.isnan(estimates.ratio(np.array([2.0, 3.0]), np.zeros(2))).all()
    assert np.isnan(estimates.ratio(np.zeros(0), np.zeros(0))).all()


def test_moving_average_is_centred_to_the_ends():
    values = np.array([1.0, 5.0, 0.0, 4.0, 2.0, 9.0])
    np.testing.assert_allclose(estimates.moving_average(values, 5), [1, 2, 2.4, 4, 5, 9])
    np.testing.assert_allclose(estimates.moving_average(values, 1), values)
    line = np.linspace(-3, 8, 23)
    np.testing.assert_allclose(estimates.moving_average(line, 7), line)
