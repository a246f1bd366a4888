"""Calibration: bins, error and shares against a restatement, and a picture whatever there is to draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.calibration import (
    calibration,
    calibration_error,
    draw_reliability,
    reliability_bins,
)

PROBES = st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=60)


def arrays(probes):
    return np.array([c / 100 for c, _ in probes]), np.array([right for _, right in probes])


@given(PROBES)
def test_calibration_error_is_the_gap_of_each_tenth_weighted_by_its_probes(probes):
    confidence, correct = arrays(probes)
    tenth = [min(c // 10, 9) for c, _ in probes]  # whole hundredths: no rounding
    gaps = [
        abs(sum(correct[i] - confidence[i] for i in range(len(probes)) if tenth[i] == t)) for t in range(10)
    ]
    found = calibration(confidence, correct, 0.95)
    assert found["ece"] == pytest.approx(sum(gaps) / len(probes))
    assert [own["count"] for own in found["bins"]] == [tenth.count(t) for t in range(10)]


@given(PROBES, st.integers(0, 100))
def test_precision_is_of_the_probes_strictly_above_delta(probes, delta):
    found = calibration(*arrays(probes), delta / 100)
    above = [right for c, right in probes if c > delta]
    assert found["share_above_delta"] == pytest.approx(len(above) / len(probes))
    assert found["precision_above_delta"] == (pytest.approx(np.mean(above)) if above else None)
    assert found["count"] == len(probes) and found["accuracy"] == pytest.approx(np.mean(arrays(probes)[1]))


def test_a_model_that_is_as_right_as_it_is_sure_has_no_error():
    confidence = np.repeat([0.25, 0.75], 4)
    correct = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    assert calibration_error(reliability_bins(confidence, correct)) == pytest.approx(0)
    assert calibration_error(reliability_bins(confidence, ~correct)) == pytest.approx(0.5)


def test_ends_of_the_scale_belong_to_the_outer_bins():
    bins = reliability_bins(np.array([0.0, 1.0]), np.array([False, True]))
    assert (bins[0]["count"], bins[-1]["count"]) == (1, 1)
    assert (bins[-1]["low"], bins[-1]["high"]) == (0.9, 1.0)


def test_without_probes_there_are_no_means_but_still_a_picture(tmp_path):
    found = calibration(np.array([]), np.array([], bool), 0.95)
    assert found["ece"] is None and found["accuracy"] is None and found["count"] == 0
    some = calibration(np.array([0.2, 0.97]), np.array([False, True]), 0.95)
    draw_reliability({"none": found, "some": some}, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
