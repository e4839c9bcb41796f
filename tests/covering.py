"""Parameters of tests in fewer combinations than their product."""

import itertools


def pairwise(*parameters) -> list[tuple]:
    """Combinations that contain every pair of values of any two parameters at least once."""
    values = [list(values) for values in parameters]
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(values)), 2)
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }
    candidates = [tuple(enumerate(places)) for places in itertools.product(*(range(len(v)) for v in values))]
    pairs = {candidate: set(itertools.combinations(candidate, 2)) for candidate in candidates}
    chosen = []
    while missing:
        best = max(candidates, key=lambda candidate: len(pairs[candidate] & missing))
        missing -= pairs[best]
        chosen.append(tuple(values[i][place] for i, place in best))
    return chosen
