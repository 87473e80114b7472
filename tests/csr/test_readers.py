"""Several readers of one image."""

import numpy as np
import pytest

from moectl.csr.readers import agreement, averaged, fleiss_kappa, voted


def test_aggregation_of_three_readers():
    values = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]], np.float32)
    images = np.array([0, 0, 0, 1])
    assert averaged(values, images, "any").tolist() == [[1, 1, 0], [1, 0, 1]]
    assert averaged(values, images, "majority").tolist() == [[0, 1, 0], [1, 0, 1]]
    np.testing.assert_allclose(averaged(values, images, "mean"), [[1 / 3, 2 / 3, 0], [1, 0, 1]])


def test_half_is_no_majority():
    images = np.array([0, 0])
    assert averaged(np.array([[1], [0]], np.float32), images, "majority").tolist() == [[0]]


def test_kappa_of_the_published_example():
    # Ten subjects, fourteen readers, five categories: Fleiss 1971, kappa 0.210.
    votes = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(np.array(votes)) == pytest.approx(0.210, abs=5e-4)


def test_kappa_by_hand():
    # Agreement (1 + 1/3) / 2 = 2/3; positives 4 of 6, so chance is 4/9 + 1/9 = 5/9.
    assert fleiss_kappa(np.array([[0, 3], [2, 1]])) == pytest.approx((2 / 3 - 5 / 9) / (4 / 9))


def test_full_agreement_is_one_and_single_readings_do_not_count():
    assert fleiss_kappa(np.array([[3, 0], [0, 3], [1, 0]])) == 1


def test_kappa_without_variation_or_second_reading_is_undefined():
    assert np.isnan(fleiss_kappa(np.array([[3, 0], [3, 0]])))
    assert np.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]])))
    columns = {"a": np.array([0.0, 0.0]), "b": np.array([1, 0])}
    assert agreement(columns, np.array([0, 0])) == {"a": None, "b": pytest.approx(-1)}


def test_most_readers_decide_on_a_class_and_ties_are_counted():
    classes, ties = voted(np.array([2, 1, 2, 0, 1]), np.array([0, 0, 0, 1, 1]))
    assert classes.tolist() == [2, 0]
    assert ties == 1
