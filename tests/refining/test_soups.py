"""Means of weights against numbers worked out by hand, and which members a greedy soup keeps."""

import pytest
import torch

from refining import soups


def state(value: float, batches: int = 0) -> dict:
    return {"weight": torch.tensor([value, 2 * value]), "half": torch.tensor(value, dtype=torch.float16), "num_batches_tracked": torch.tensor(batches)}


def test_the_uniform_soup_is_the_mean_in_the_members_types():
    found = soups.uniform([state(1.0, 5), state(2.0, 9), state(6.0, 7)])
    assert found["weight"].tolist() == [3, 6] and found["weight"].dtype == torch.float32
    assert found["half"].item() == 3 and found["half"].dtype == torch.float16
    assert found["num_batches_tracked"].item() == 9


def test_sums_lose_nothing_that_the_mean_shows():
    """In float32 the sum of these would be 2**24, and so the mean 1.5 less."""
    found = soups.uniform([{"weight": torch.tensor([value])} for value in (2.0**24, 3.0, 3.0, 3.0, -(2.0**24))])
    assert found["weight"].item() == pytest.approx(9 / 5, rel=1e-7)


@pytest.mark.parametrize(
    ("values", "kept", "mean"),
    [
        ([1.0, -1.0, 3.0], [1.0, -1.0], 0.0),  # the third would make it 1
        ([1.0, -3.0, 4.0], [1.0, -3.0, 4.0], 2 / 3),  # of the two it is -1, which is as good
        ([0.0, 1.0, -2.0], [0.0], 0.0),  # -2 would be joined to 0 alone
        ([2.0, 3.0, -3.0], [2.0, -3.0], -0.5),
    ],
)
def test_a_greedy_soup_keeps_whom_it_is_not_worse_with(values, kept, mean):
    """The score is how near to 0 the weight is."""
    finished = []

    def finish(found):
        finished.append(found)
        return found

    members, found = soups.greedy(values, lambda value: {"weight": torch.tensor(value)}, finish, lambda found: -abs(found["weight"].item()))
    assert members == kept and found["weight"].item() == pytest.approx(mean)
    assert abs(found["weight"].item()) <= min(abs(value) for value in values)
    assert len(finished) == len(values) - 1


def test_a_greedy_soup_is_what_was_scored():
    """Statistics that are taken anew belong to the soup that they were taken for."""
    _, found = soups.greedy(
        [1.0, 3.0], lambda value: {"weight": torch.tensor(value)}, lambda found: {"weight": found["weight"] + 10}, lambda found: found["weight"].item()
    )
    assert found["weight"].item() == 12
