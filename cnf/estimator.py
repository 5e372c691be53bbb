"""The scikit-learn face: a flow as a density estimator for pipelines and searches.

This module is the only one that needs scikit-learn; ``import cnf`` does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cnf.flow import Flow
from cnf.models import models
from cnf.training import fit

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        'FlowDensity needs scikit-learn 1.6 or later: pip install "cnf[sklearn]"'
    ) from error

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class FlowDensity(DensityMixin, BaseEstimator):
    """A normalizing flow with scikit-learn's interface.

    Scores are log-densities in nats, in the units of X, as in ``sklearn.neighbors.KernelDensity``.

    Args:
        model: the name of a model (see ``cnf models``), or a function from the number of features
            to a flow.
        options: keyword arguments of that model, e.g. ``{"hidden": (128, 128)}``.
        steps: how many optimiser steps to make; with ``seconds`` too, whichever ends first. With
            neither, ``cnf.fit`` decides.
        seconds: how long to train.
        batch_size: rows per step.
        lr: the peak learning rate.
        patience: stop after so many validations without improvement; None trains to the end.
        dtype: ``"float32"`` or ``"float64"``, what the flow computes in.
        seed: all randomness of ``fit`` follows from it.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        chunk: score and sample at most this many rows at a time; None takes them all at once.

    Attributes:
        flow_: the fitted ``cnf.Flow``.
        history_: the ``cnf.History`` of its training.
        n_features_in_: how many columns X had.
        feature_names_in_: their names, where X had any.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 1))
        >>> density = FlowDensity("realnvp", steps=20).fit(x)
        >>> density.score_samples([[3.0], [30.0]]).round(0)
        array([ -2., ...])
        >>> density.sample(5, random_state=0).shape
        (5, 1)
    """

    def __init__(
        self,
        model: str | Callable[[int], Flow] = "nsf",
        *,
        options: Mapping[str, Any] | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        batch_size: int = 512,
        lr: float | None = None,
        patience: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        device: str = "cpu",
        chunk: int | None = 100_000,
    ):
        self.model = model
        self.options = options
        self.steps = steps
        self.seconds = seconds
        self.batch_size = batch_size
        self.lr = lr
        self.patience = patience
        self.dtype = dtype
        self.seed = seed
        self.device = device
        self.chunk = chunk

    def fit(self, X: ArrayLike, y: object = None) -> FlowDensity:
        """Train a new flow on the rows of X.

        Args:
            X: ``(rows, features)``, at least 20 rows.
            y: ignored; pipelines pass it.

        Returns:
            The estimator itself.
        """
        x = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        # initial weights come from torch's global generator: seed it here, and here only
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(self.seed)
            flow = self._build(x.shape[1]).to(DTYPES[self.dtype])
        self.history_ = fit(
            flow,
            x,
            steps=self.steps,
            seconds=self.seconds,
            batch_size=self.batch_size,
            lr=self.lr,
            patience=self.patience,
            seed=self.seed,
            device=self.device,
            progress=False,
        )
        self.flow_ = flow
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """The log-density of every row in nats, ``(rows,)``."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        with torch.no_grad():
            scores = self.flow_.log_prob(x, chunk=self.chunk)
        return scores.cpu().numpy().astype(np.float64)

    def score(self, X: ArrayLike, y: object = None) -> float:
        """The mean log-density of the rows in nats, which does not grow with their number."""
        return float(self.score_samples(X).mean())

    def sample(
        self,
        n_samples: int = 1,
        random_state: int | np.random.RandomState | None = None,
    ) -> NDArray[np.float64]:
        """Draw new rows, ``(n_samples, features)``.

        Args:
            n_samples: how many.
            random_state: a seed or a ``RandomState``; None draws from numpy's global one.
        """
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        generator = torch.Generator(self.flow_.device).manual_seed(seed)
        drawn = self.flow_.sample((n_samples,), generator=generator, chunk=self.chunk)
        return drawn.cpu().numpy().astype(np.float64)

    def _build(self, features: int) -> Flow:
        if callable(self.model):
            if self.options:
                raise ValueError("options belong to a model's name; give them to the function")
            return self.model(features)
        return models[self.model].build(features, **(self.options or {}))
