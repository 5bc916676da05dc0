"""How much more data would help: a power law through a few measured shares of it, with an interval.

    y(n) = level * (floor + (1 - floor) * (measured / n) ** exponent)

y is a loss, or one minus a score: what more rows make smaller. `level` is y at all the rows that were measured, `floor`
the part of it that no amount of rows takes away (Hestness et al. 2017 for the form and the range of exponents).

A handful of points decides three numbers badly, so no single best curve is taken. Many curves are drawn from what is
plausible before anything is measured, each is weighed by how well it explains the points, and what is expected at
another number of rows is read off all of them: their median, and the interval that holds 95% of their weight. Given
floor and exponent the logarithm of y is linear in that of the level, which therefore is not searched for but
integrated over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 20_000  # curves drawn beforehand
KEPT = 8_000  # curves that are read off
EXPONENTS = (0.05, 1.5)  # log-uniform
FLOORS = (0.0, 1.0)  # uniform, as a share of the level
NOISE = (0.005, 0.08)  # log-uniform: what one training differs from the next by, as a share of y
IMPLAUSIBLE = 0.001  # chance of points so far from every curve, below which they lie on no power law


@dataclass(frozen=True)
class Estimate:
    """What is expected, and the interval that holds the truth 19 times in 20."""

    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """Curves that explain the points, each as likely as any other. `fits` False: none does. All arrays [curves]"""

    measured: int  # rows of the largest share
    level: Floats
    floor: Floats
    exponent: Floats
    fits: bool

    def at(self, rows: float) -> Estimate:
        """y with this number of rows."""
        low, expected, high = np.percentile(self._values(rows), [2.5, 50, 97.5])
        return Estimate(float(expected), float(low), float(high))

    def chance_of_gain(self, rows: float, more: float, least: float) -> float:
        """How likely y falls by at least so much from `rows` to `more` rows."""
        return float(np.mean(self._values(rows) - self._values(more) >= least))

    def _values(self, rows: float) -> Floats:
        return self.level * (self.floor + (1 - self.floor) * (self.measured / rows) ** self.exponent)


def fit(rows: Sequence[int], points: Sequence[float], covariance: Floats) -> PowerLaw:
    """The curves through `points`, all above 0, measured with these numbers of `rows`, the largest last.

    covariance  [points, points] of the points' errors that come from which rows are held out: all shares are measured
                on the same ones, so that what is common to all says nothing of the slope
    """
    from scipy.stats import chi2

    y, measured = np.asarray(points, np.float64), rows[-1]
    assert len(rows) == len(y) > 2
    assert y.min() > 0
    assert max(rows) == measured
    draws = np.random.default_rng(0)
    exponent = np.exp(draws.uniform(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), DRAWS))
    floor = draws.uniform(*FLOORS, DRAWS)
    noise = np.exp(draws.uniform(math.log(NOISE[0]), math.log(NOISE[1]), DRAWS))
    # log y = log level + shape + error. In logarithms, because errors are in proportion to y: a common error of 10%
    # is then the same number for every point. [draws, points], and the errors' covariance [draws, points, points]
    shape = np.log(floor[:, None] + (1 - floor[:, None]) * (measured / np.asarray(rows)) ** exponent[:, None])
    errors = covariance / np.outer(y, y) + np.eye(len(y)) * noise[:, None, None] ** 2
    precision = np.linalg.inv(errors)
    information = precision.sum((1, 2))
    off = np.log(y) - shape
    level = np.einsum("dij,dj->d", precision, off) / information  # the likeliest logarithm, [draws]
    off -= level[:, None]
    squares = np.einsum("di,dij,dj->d", off, precision, off)
    log_weight = -0.5 * (squares + np.linalg.slogdet(errors)[1] + np.log(information))
    weight = np.exp(log_weight - log_weight.max())
    chosen = draws.choice(DRAWS, KEPT, p=weight / weight.sum())
    levels = np.exp(draws.normal(level[chosen], information[chosen] ** -0.5))
    fits = bool(chi2.sf(squares.min(), len(y) - 1) >= IMPLAUSIBLE)
    return PowerLaw(measured, levels, floor[chosen], exponent[chosen], fits)
