"""Which layers should select: dynamic programming over covered mass, then a local search over what is really wanted.

Dynamic programming is Kascade's (arXiv 2512.16391): with value[a, l] the mass that layer a's choice covers in
layer l, the best n selection layers minimise the sum of 1 - value over the layers that read lists, and the best chain up to
layer a does not depend on what comes behind it. Mass is a proxy, though: layers differ in what a lost percent does to the
output, and errors add up on the way. So the chain found is moved about, one selection layer at a time, as long as that lowers
a score of whole candidates, such as the KL divergence from dense output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

Layers = tuple[int, ...]


def best_chain(value: Tensor, count: int, firsts: Collection[int]) -> Layers:
    """The `count` selection layers that lose the least mass. value: [layers, layers], in [0, 1].

    firsts: allowed first selection layers; what lies before it is dense. Layers that select lose nothing. Ties go to the
    lower layers. Raises ValueError if there are not that many layers.
    """
    total = len(value)
    loss = torch.cat([torch.zeros(total, 1), (1 - value).triu(1).cumsum(1)], dim=1).double()  # [a, l]: of layers a + 1 .. l - 1
    lost = lambda a, b: float(loss[a, b] - loss[a, a + 1])  # noqa: E731
    chains: dict[int, tuple[float, Layers]] = {first: (0.0, (first,)) for first in firsts if first < total}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, Layers]] = {}
        for last, (sum_so_far, chain) in chains.items():
            for layer in range(last + 1, total):
                longer[layer] = min(longer.get(layer, (math.inf, ())), (sum_so_far + lost(last, layer), (*chain, layer)))
        chains = longer
    if not chains or count < 1:
        raise ValueError(f"there is no chain of {count} selection layers from {sorted(firsts)} in {total} layers")
    return min((cost + lost(last, total), chain) for last, (cost, chain) in chains.items())[1]


def improve(start: Layers, layers: int, firsts: Collection[int], score: Callable[[Layers], float], reach: int = 3) -> Layers:
    """Move one selection layer at a time by up to `reach` layers, as long as the score falls; `score` is asked once per set."""
    known: dict[Layers, float] = {}

    def value(chain: Layers) -> float:
        if chain not in known:
            known[chain] = score(chain)
        return known[chain]

    best = start
    while True:
        found = min((best, *_neighbours(best, layers, firsts, reach)), key=lambda chain: (value(chain), chain))
        if value(found) >= value(best):
            return best
        best = found


def _neighbours(chain: Layers, layers: int, firsts: Collection[int], reach: int) -> Iterator[Layers]:
    for i, layer in enumerate(chain):
        low = chain[i - 1] + 1 if i else min(firsts)
        high = chain[i + 1] - 1 if i + 1 < len(chain) else layers - 1
        for moved in range(max(low, layer - reach), min(high, layer + reach) + 1):
            if moved != layer and (i or moved in firsts):
                yield (*chain[:i], moved, *chain[i + 1 :])
