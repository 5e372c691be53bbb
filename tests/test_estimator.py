from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import cnf

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from cnf.estimator import FlowDensity

MEAN, COVARIANCE = np.array([10.0, -3.0]), np.array([[4.0, 1.2], [1.2, 1.0]])


def correlated(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal(MEAN, COVARIANCE, size=rows)


def quick(**options) -> FlowDensity:
    # starts as the identity: rows scored in other company differ by rounding less than checks allow
    return FlowDensity("maf", options={"hidden": (16,), "layers": 2}, **{"steps": 5, **options})


@pytest.fixture(scope="module")
def fitted() -> FlowDensity:
    options = {"hidden": (16,), "layers": 2}
    density = FlowDensity("realnvp", options=options, steps=120, batch_size=256, lr=1e-2)
    return density.fit(correlated(2000))


def test_scores_are_nats_in_the_units_of_the_data(fitted):
    x = correlated(2000, seed=1)
    entropy = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * COVARIANCE))
    scores = fitted.score_samples(x)
    assert scores.shape == (2000,)
    assert scores.dtype == np.float64
    assert fitted.score(x) == pytest.approx(scores.mean())
    assert fitted.score(x) == pytest.approx(-entropy, abs=0.1)


def test_samples_have_the_moments_of_the_data(fitted):
    x = fitted.sample(4000, random_state=0)
    assert x.shape == (4000, 2)
    assert x.mean(axis=0) == pytest.approx(MEAN, abs=0.3)
    assert np.cov(x.T) == pytest.approx(COVARIANCE, abs=0.6)


def test_sampling_follows_its_seed(fitted):
    assert np.array_equal(fitted.sample(3, random_state=1), fitted.sample(3, random_state=1))
    assert not np.array_equal(fitted.sample(3, random_state=1), fitted.sample(3, random_state=2))


def test_fitting_follows_its_seed_and_leaves_the_global_generator_alone():
    x = correlated(100)
    before = torch.random.get_rng_state()
    first, again, other = (quick(seed=s).fit(x).score_samples(x) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clone_copies_the_arguments_only(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "flow_")
    assert copy.set_params(model="maf", steps=1).model == "maf"


def test_pickle(fitted):
    x = correlated(5)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.score_samples(x), fitted.score_samples(x))


def test_in_pipelines_and_searches():
    x = correlated(200)
    pipeline = make_pipeline(StandardScaler(), quick())
    assert np.isfinite(cross_val_score(pipeline, x, cv=2)).all()
    search = GridSearchCV(quick(), {"model": ["realnvp", "nsf"]}, cv=2).fit(x)
    assert search.best_params_["model"] in ("realnvp", "nsf")


def test_a_function_as_the_model():
    density = FlowDensity(lambda features: cnf.maf(features, hidden=(8,)), steps=2)
    assert density.fit(correlated(50)).score_samples(correlated(3)).shape == (3,)


def test_double_precision():
    density = quick(dtype="float64").fit(correlated(50))
    assert density.flow_.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float32, float64"),
        ({"model": "nsff", "options": None}, "Did you mean 'nsf'"),
        ({"model": cnf.maf}, "give them to the function"),
    ],
)
def test_unusable_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        quick().set_params(**options).fit(correlated(50))


# scikit-learn's own laws: what an estimator must do with odd input, names, copies, pickles
# these fit a handful of rows, and a flow needs 20 to have some to validate on; see the last test
TOO_SMALL = (
    "check_estimators_nan_inf",
    "check_fit2d_1feature",
    "check_n_features_in_after_fitting",
)
CHECKS = [
    (estimator, check)
    for estimator, check in estimator_checks_generator(quick(steps=1), mark=None)
    if check.func.__name__ not in TOO_SMALL
]


@pytest.mark.parametrize(
    ("estimator", "check"), CHECKS, ids=[check.func.__name__ for _, check in CHECKS]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_missing_values_and_other_widths_are_refused():
    x = correlated(50)
    gap = x.copy()
    gap[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        quick().fit(gap)
    with pytest.raises(ValueError, match="3 features, but FlowDensity is expecting 2"):
        quick().fit(x).score_samples(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least 20 rows"):
        quick().fit(x[:19])
