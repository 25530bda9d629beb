"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from speechbrain_jepa.schedules import LinearRamp, WarmupCosine, warmup_share


def rates(schedule, total):
    return np.array([schedule(step, total) for step in range(total)])


@pytest.mark.parametrize("total", [2, 7, 30, 1000])
@pytest.mark.parametrize("share", [0.0, 20 / 300, 0.5, 0.9])
def test_warmup_cosine_equals_its_closed_form(total, share):
    peak, final = 3e-4, 1e-6
    warmup = round(share * total)
    up = peak * np.arange(1, warmup + 1) / max(warmup, 1)
    angle = np.pi * np.arange(total - warmup) / (total - warmup)
    down = final + 0.5 * (peak - final) * (1 + np.cos(angle))
    ours = rates(WarmupCosine(peak, share, final), total)
    np.testing.assert_allclose(ours, np.concatenate([up, down]), rtol=1e-12)


def test_warmup_cosine_rises_to_the_peak_then_falls():
    schedule = WarmupCosine(3e-4)
    ours = rates(schedule, 300)  # 20 of the published 300 epochs warm up
    assert (np.diff(ours[:20]) > 0).all()
    assert ours[19] == ours[20] == ours.max() == 3e-4
    assert (np.diff(ours[20:]) < 0).all()
    assert ours.min() > 0


def test_warmup_cosine_half_way_down_is_the_mean_of_its_ends():
    schedule = WarmupCosine(1.0, warmup_share=0.2, final_rate=0.1)
    assert schedule(60, 100) == pytest.approx(0.55)  # half way from step 20 to step 100


@pytest.mark.parametrize("beyond", [100, 101, 10_000])
def test_warmup_cosine_stays_at_its_end_beyond_the_last_step(beyond):
    assert WarmupCosine(1.0, final_rate=0.25)(beyond, 100) == pytest.approx(0.25)


def test_warmup_cosine_of_a_run_of_one_step_trains():
    assert WarmupCosine(3e-4)(0, 1) == 3e-4


@pytest.mark.parametrize(
    "wrong", [{"warmup_share": 1.0}, {"warmup_share": -0.1}, {"final_rate": 2.0}]
)
def test_warmup_cosine_refuses_what_does_not_fit(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WarmupCosine(1.0, **wrong)


@pytest.mark.parametrize("total", [2, 11, 5000])
def test_ema_rate_is_linear_from_start_to_end(total):
    ours = rates(LinearRamp(0.99995, 0.99999), total)  # the released code's ends
    np.testing.assert_allclose(ours, np.linspace(0.99995, 0.99999, total), rtol=1e-12)
    assert (np.diff(ours) > 0).all()


def test_ema_rate_has_its_ends_exactly_and_stays():
    ramp = LinearRamp(0.5, 1.0)
    assert [ramp(step, 9) for step in (0, 8, 9, 1000)] == [0.5, 1.0, 1.0, 1.0]
    assert LinearRamp(0.9, 0.9)(3, 10) == 0.9


def test_ema_rate_of_a_run_of_one_step_is_its_start():
    assert LinearRamp(0.99, 1.0)(0, 1) == 0.99


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1.0), (0.9, 1.1), (math.nan, 1.0)])
def test_ema_rate_outside_0_to_1_is_refused(start, end):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        LinearRamp(start, end)


@pytest.mark.parametrize(("warmup", "epochs"), [(20, 10), (3, 3), (-1, 10)])
def test_a_warmup_that_is_not_shorter_than_the_run_names_both_lines_and_the_fix(warmup, epochs):
    message = rf"warmup_epochs={warmup} .* number_of_epochs={epochs}: --warmup_epochs"
    with pytest.raises(ValueError, match=message):
        warmup_share(warmup, epochs)
    assert warmup_share(20, 300) == 20 / 300
