import pytest

from robustness import scores
from robustness.scores import ALEXNET, CLEAN, CORRUPTIONS


def test_a_corruption_error_is_the_mean_error_relative_to_alexnets():
    assert scores.mean_acc1([80, 70, 60, 50, 40]) == 60
    assert scores.corruption_error([80, 70, 60, 50, 40], scores.reference_errors(ALEXNET, None)["fog"]) == pytest.approx(40 / 0.819324)
    assert scores.corruption_error([0, 0, 0, 0, 0], scores.ALEXNET_ERRORS["brightness"]) == pytest.approx(177.119053)
    assert scores.corruption_error([80, None, 60, 50, 40], 81.9324) is None


def test_off_imagenet_it_is_relative_to_the_clean_error_where_there_is_one():
    assert scores.corruption_error([80, 70, 60, 50, 40], scores.reference_errors(CLEAN, 90.0)["fog"]) == pytest.approx(400)
    assert scores.corruption_error([80, 70, 60, 50, 40], scores.reference_errors(CLEAN, 100.0)["fog"]) is None
    assert scores.corruption_error([80, 70, 60, 50, 40], scores.reference_errors(CLEAN, None)["fog"]) is None


def test_mce_is_their_mean_and_needs_all_fifteen():
    errors = {name: float(i) for i, name in enumerate(CORRUPTIONS)}
    assert len(CORRUPTIONS) == 15 and scores.mean_corruption_error(errors) == 7
    assert scores.mean_corruption_error({**errors, "snow": None}) is None
    assert scores.mean_corruption_error({name: error for name, error in errors.items() if name != "snow"}) is None


def test_alexnet_itself_has_an_mce_of_a_hundred():
    errors = {name: scores.corruption_error([100 - error] * 5, error) for name, error in scores.ALEXNET_ERRORS.items()}
    assert scores.mean_corruption_error(errors) == pytest.approx(100)
