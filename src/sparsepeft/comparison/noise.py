"""How far chance alone moves a score: by which rows happen to be scored, and by the seeds of the training."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from sparsepeft.tasks import TaskSpec

LEVEL = 0.05  # of tests; intervals hold a score with 1 - LEVEL
RESAMPLES = 500
_DEVIATIONS = statistics.NormalDist().inv_cdf(1 - LEVEL / 2)
_SEED = 0


class Scorer:
    """Scores answers to the same rows by a task's main metric.

    Args:
        spec: the task.
        labels: of the rows, (N,), or (N, C) where several may hold.

    Attributes:
        interval_by: how :meth:`interval` finds an interval, in words.
    """

    def __init__(self, spec: TaskSpec, labels: np.ndarray) -> None:
        is_one = spec.main_metric in spec.metrics  # else a mean of several, all of which are needed
        self._spec = dataclasses.replace(spec, metrics=(spec.main_metric,)) if is_one else spec
        self._labels = labels
        self._is_share = spec.main_metric == "accuracy"
        self.interval_by = "Wilson's interval" if self._is_share else f"bootstrap of the rows, {RESAMPLES} samples"

    def scores(self, answers: np.ndarray) -> list[float]:
        """The score of each seed, from logits (S, N, C)."""
        return self._scores(answers, self._labels)

    def interval(self, answers: np.ndarray) -> tuple[float, float]:
        """Where a method's score may lie on other rows like these, with 95 % confidence.

        For accuracies Wilson's interval, which is right for few rows and for none wrong; else the percentiles of scores
        on rows drawn with replacement.

        Source: E. B. Wilson, JASA 22 (1927); B. Efron, Annals of Statistics 7 (1979).

        Args:
            answers: logits of S seeds, (S, N, C), whose mean score is meant.
        """
        count = len(self._labels)
        if self._is_share:
            share, spread = statistics.mean(self.scores(answers)), _DEVIATIONS**2 / count
            middle = (share + spread / 2) / (1 + spread)
            half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
            return max(0.0, middle - half), min(1.0, middle + half)
        random, drawn = np.random.default_rng(_SEED), []
        for _ in range(RESAMPLES):
            rows = random.integers(count, size=count)
            drawn.append(statistics.mean(self._scores(answers[:, rows], self._labels[rows])))
        least, most = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
        return float(least), float(most)

    def is_within_noise(self, best: np.ndarray, other: np.ndarray) -> bool:
        """Whether a score is lower than the best one by no more than chance explains.

        It is, unless the difference is more than chance in the rows explains and, where there are several seeds, more
        than twice its standard error over the seeds. For the rows: the answers of both methods to each row are
        exchanged or not by a coin, which would change nothing if the methods were equally good; the share of such
        exchanges that make a difference as large is the test's p, and below 5 % the difference is more than chance.

        Source: the paired test by approximate randomization, E. W. Noreen, Computer-Intensive Methods for Testing
        Hypotheses (1989). It holds for any metric and for few rows. Each method is tested by itself: of many methods
        that are equally good, one in twenty is called worse.

        Args:
            best, other: logits of S seeds, (S, N, C).
        """
        scores = self.scores(best), self.scores(other)
        difference = statistics.mean(scores[0]) - statistics.mean(scores[1])
        if difference <= 0:
            return True
        if len(best) > 1:
            error = math.sqrt(sum(statistics.variance(each) for each in scores) / len(best))
            if difference <= 2 * error:
                return True
        return self._p_value(best, other, difference) >= LEVEL

    def _p_value(self, first: np.ndarray, second: np.ndarray, difference: float) -> float:
        random, as_large = np.random.default_rng(_SEED), 0
        for _ in range(RESAMPLES):
            is_exchanged = (random.random(len(self._labels)) < 0.5)[None, :, None]
            one = self.scores(np.where(is_exchanged, second, first))
            two = self.scores(np.where(is_exchanged, first, second))
            as_large += abs(statistics.mean(one) - statistics.mean(two)) >= difference - 1e-12
        return (1 + as_large) / (1 + RESAMPLES)

    def _scores(self, answers: np.ndarray, labels: np.ndarray) -> list[float]:
        return [self._spec.compute_metrics(logits, labels)[self._spec.main_metric] for logits in answers]
