"""How far to trust a mean: bootstrap intervals over conversations, paired ones, and chance.

Several answers to one conversation are no independent witnesses: whole conversations are drawn
(the cluster bootstrap), with a seed, and the interval is the middle 95 % of the means drawn.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc

Sums = NDArray[np.float64]  # [..., terms]: of what a statistic is made of
LEVEL = 0.95
YES_OR_NO = {(0.0, 1.0), (1.0, 1.0)}
MOST = 2**22  # numbers drawn at a time


class Estimate(NamedTuple):
    """A statistic, and how it varies over conversations drawn again."""

    value: float
    low: float
    high: float
    std: float
    n: int  # conversations
    is_share: bool = False  # of conversations, each right or wrong

    @property
    def interval(self) -> tuple[float, float] | None:
        """The middle 95 %; one conversation has none, and none several that are all alike."""
        is_spread = self.is_share or self.std > 1e-12  # rounding is no spread
        return (self.low, self.high) if self.n > 1 and is_spread else None


def ratio(sums: Sums) -> NDArray[np.float64]:
    """The weighted mean, of sums of weight * value and of weight, [..., 2] -> [...]."""
    found: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return found


def clipped(sums: Sums) -> NDArray[np.float64]:
    """The same, clipped to [0, 1]: HealthBench's mean."""
    return np.clip(ratio(sums), 0.0, 1.0)


def bootstrap(
    terms: Sequence[Sequence[float]],
    clusters: Sequence[Hashable],
    statistic: Callable[[Sums], NDArray[np.float64]],
    *,
    seed: int,
    resamples: int,
) -> Estimate:
    """A statistic of summed terms, with its interval; of shares of conversations, Wilson's.

    Args:
        terms: Of each answer, what is summed, [answers, terms].
        clusters: Of each answer, what it belongs to, such as its conversation.
        statistic: From sums [..., terms] to values [...].
        seed: Of the resampling.
        resamples: Number of samples drawn.
    """
    own = _by_cluster(terms, clusters)
    value = float(statistic(own.sum(0)))
    drawn = np.concatenate([statistic(part) for part in _draws(own, seed, resamples)])
    is_share = statistic is ratio and all(one in YES_OR_NO for one in map(tuple, terms))
    if is_share and (len(own) == len(terms) or not drawn.std()):
        return _wilson(value, len(own))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), float(drawn.std()), len(own))


def _wilson(share: float, n: int) -> Estimate:
    """Of n conversations: unlike a bootstrap, it is no point where none or all succeed."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(share, low, high, math.sqrt(share * (1 - share) / n), n, True)


def paired(
    a: dict[str, list[tuple[float, float]]],
    b: dict[str, list[tuple[float, float]]],
    statistic: Callable[[Sums], NDArray[np.float64]],
    *,
    seed: int,
    resamples: int,
) -> Estimate | None:
    """The statistic of b minus that of a over the conversations that both have; None for none.

    Args:
        a: Terms of each answer, by conversation.
        b: The same of the other model.
        statistic: As `bootstrap` takes it.
        seed: Of the resampling; both models' same conversations are drawn.
        resamples: Number of samples drawn.
    """
    both = [name for name in a if name in b]
    if not both:
        return None
    sums = [[np.sum(own[name], axis=0) for name in both] for own in (a, b)]
    terms = np.concatenate([np.array(own, float) for own in sums], axis=1)
    half = terms.shape[1] // 2

    def difference(sums: Sums) -> NDArray[np.float64]:
        return statistic(sums[..., half:]) - statistic(sums[..., :half])

    return bootstrap(terms.tolist(), both, difference, seed=seed, resamples=resamples)


def beside_chance(found: Estimate, chance: float | None) -> str:
    """Whether guessing would often do as well (5 %, two-sided); "" where there is no guessing.

    Of shares by the binomial distribution, which is exact where few were asked.
    """
    if chance is None:
        return ""
    if found.is_share:
        right = round(found.value * found.n)
        tail = (1 - LEVEL) / 2
        is_above = right > 0 and bdtrc(right - 1, found.n, chance) < tail
        is_below = bdtr(right, found.n, chance) < tail
    else:
        is_above, is_below = found.n > 1 and found.low > chance, found.n > 1 and found.high < chance
    return "above chance" if is_above else "below chance" if is_below else "at chance"


def _by_cluster(terms: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> Sums:
    """The terms summed within each cluster, [clusters, terms]."""
    place = {name: at for at, name in enumerate(dict.fromkeys(clusters))}
    own = np.zeros((len(place), len(terms[0])))
    np.add.at(own, [place[name] for name in clusters], np.asarray(terms, float))
    return own


def _draws(own: Sums, seed: int, resamples: int) -> list[Sums]:
    """Sums over as many clusters as there are, drawn with replacement, [resamples, terms]."""
    rng, step = np.random.default_rng(seed), max(1, MOST // len(own))
    sizes = [min(step, resamples - at) for at in range(0, resamples, step)]
    return [own[rng.integers(len(own), size=(size, len(own)))].sum(1) for size in sizes]
