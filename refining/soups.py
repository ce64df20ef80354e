"""Means of weights: of all members, or greedily of those that help.

Source: Model soups (arXiv:2203.05482); stochastic weight averaging (arXiv:1803.05407) for checkpoints of one run."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

State = dict[str, Tensor]
T = TypeVar("T")


class Sum(NamedTuple):
    """State dicts added up: floating-point tensors in float64; of whole numbers, which count batches, the largest."""

    totals: State
    like: State
    count: int = 0

    def plus(self, state: State) -> "Sum":
        """This and one more, of the same names."""
        wide = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
        totals = {name: _joined(self.totals[name], value) for name, value in wide.items()} if self.count else wide
        return Sum(totals, self.like or {name: torch.empty(0, dtype=value.dtype) for name, value in state.items()}, self.count + 1)

    def mean(self) -> State:
        """In the members' own types."""
        values = {name: total / self.count if total.is_floating_point() else total for name, total in self.totals.items()}
        return {name: value.to(self.like[name].dtype) for name, value in values.items()}


NOTHING = Sum({}, {})


def _joined(one: Tensor, other: Tensor) -> Tensor:
    return one + other if one.is_floating_point() else torch.maximum(one, other)


def uniform(states: Iterable[State]) -> State:
    """The mean of all."""
    total = NOTHING
    for state in states:
        total = total.plus(state)
    return total.mean()


def greedy(ranked: Sequence[T], read: Callable[[T], State], finish: Callable[[State], State], score: Callable[[State], float]) -> tuple[list[T], State]:
    """The members kept, and their mean as `finish` makes it: the first of `ranked`, then in turn each with which the score does not fall.

    `ranked`: best first, by the score of each alone. The mean's score is at least the first's, which alone stays as it is."""
    kept, total = [ranked[0]], NOTHING.plus(read(ranked[0]))
    best = total.mean()
    best_score = score(best)
    for member in ranked[1:]:
        candidate = total.plus(read(member))
        state = finish(candidate.mean())
        found = score(state)
        if found >= best_score:
            kept, total, best, best_score = [*kept, member], candidate, state, found
    return kept, best
