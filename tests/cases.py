"""Which of many cases `make test` runs, and which it leaves to `make test-all`."""

import itertools

import pytest

# Left out of `make test`, run by `make test-all`.
exhaustive = pytest.mark.exhaustive


def pairwise(*options):
    """All combinations of the options, as parameters of a test: those that `make test` runs have each pair of options.

    A fault that depends on one option or on two together is found by a few combinations that have all pairs. Those
    that need three are rare; the rest of the combinations is for them, and marked `exhaustive`.

    Args:
      options: lists of the values of each option, all of which pytest can name in a test's id.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in options)))
    return _marked(options, combinations, _cover(combinations))


def each_value(*options):
    """The same for options that are known to be independent: `make test` runs combinations that have each value.

    The first combination has the first value of each option, the second one the second values, and so on.

    Args:
      options: as for `pairwise`.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in options)))
    longest = max(map(len, options))
    return _marked(options, combinations, {tuple(i % len(values) for values in options) for i in range(longest)})


def some(values, *kept):
    """All values as parameters of a test, of which `make test` runs those that are kept.

    Args:
      values: that pytest can name in a test's id.
      kept: some of the values.
    """
    return some_cases([(value,) for value in values], [(value,) for value in kept])


def some_cases(cases, kept):
    """The same for cases that are tuples, with a value for each parameter of a test."""
    return [pytest.param(*case, marks=[] if case in kept else [exhaustive]) for case in cases]


def _marked(options, combinations, chosen):
    return [
        pytest.param(
            *(values[i] for values, i in zip(options, combination, strict=True)),
            marks=[] if combination in chosen else [exhaustive],
        )
        for combination in combinations
    ]


def _cover(combinations):
    """A few of the combinations that have all pairs: each time the one with the most pairs that are still missing."""
    missing = set().union(*map(_pairs, combinations))
    chosen = set()
    while missing:
        best = max(combinations, key=lambda combination: len(_pairs(combination) & missing))
        chosen.add(best)
        missing -= _pairs(best)
    return chosen


def _pairs(combination):
    positions = list(enumerate(combination))
    # A single option has no pairs, but each of its values is wanted.
    return set(itertools.combinations(positions, 2)) or set(positions)
