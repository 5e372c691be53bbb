from __future__ import annotations

import dataclasses
import importlib
import json
import math

import pytest
import torch
from torch import Tensor

import cnf
from cnf import trial
from cnf.compare import align, compare
from cnf.data import Target, table
from cnf.data.table import write_table
from cnf.data.targets import Noise
from cnf.ode import SolverError
from cnf.registry import UnknownNameError
from cnf.runs import COMPARISON, OutputError, claim, kind, open_run, resolve
from cnf.training import History
from cnf.trial import RecipeError, Row, measure, recipe, split

# the package's function of that name stands before the module
comparing = importlib.import_module("cnf.compare")

KEYS = [
    "model",
    "test_nll",
    "test_nll_stderr",
    "gap",
    "gap_stderr",
    "steps",
    "train_seconds",
    "nfe",
    "log_prob_per_second",
    "samples_per_second",
    "inverse_error",
    "parameters",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broad(Target):
    """N(0, 4 I): twice as broad as an untrained flow, so that the gap has a closed form."""

    def _draw(self, n: int, noise: Noise) -> Tensor:
        return 2.0 * noise.normal(n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        return -x.square().sum(-1) / 8 - math.log(8 * math.pi)


BROAD = Broad(name="broad", entropy=math.log(8 * math.pi) + 1)


@pytest.fixture
def csv(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    return write_table(tmp_path / "rows.csv", ["a", "b", "dose"], x)


# ---- the data ------------------------------------------------------------------------------


def test_a_seed_gives_the_same_points_and_another_seed_others() -> None:
    first, again, other = (split(BROAD, seed=s, train_size=50, test_size=40) for s in (1, 1, 2))
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    assert len(first.train) == 50
    assert len(first.validation) == 5


def test_no_point_is_both_trained_and_tested_on() -> None:
    parts = split(BROAD, train_size=40, test_size=40)
    seen = torch.cat([parts.train, parts.validation])
    assert not (seen[:, None] == parts.test[None]).all(-1).any()


def test_a_table_is_parted_whole(csv) -> None:
    parts = split(table(csv), seed=3)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [48, 6, 6]
    every = torch.cat([parts.train, parts.validation, parts.test])
    assert torch.equal(every.sort(0).values, table(csv).x.sort(0).values)
    assert len(split(table(csv), test=False).train) == 54


def test_a_table_keeps_each_row_with_its_context(csv) -> None:
    whole = table(csv).x
    parts = split(table(csv, context_columns=["dose"]))
    assert parts.contexts[2] is not None
    joined = torch.cat([parts.test, parts.contexts[2]], -1)
    assert (joined[:, None] == whole[None]).all(-1).any(1).all()


def test_what_is_neither_toy_nor_file_is_named(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'pinwheel'"):
        resolve("pinweel")
    with pytest.raises(cnf.DataError, match="there is no file"):
        resolve(tmp_path / "absent.csv")
    with pytest.raises(cnf.DataError, match="for tables only"):
        resolve("moons", columns=["x"])


def test_a_recipe_names_a_model_and_how_to_train_it() -> None:
    assert recipe("nsf") == ("nsf", None)
    assert recipe("nsf+ml") == ("nsf", ("likelihood",))
    with pytest.raises(UnknownNameError, match="no model is called 'nfs'"):
        recipe("nfs")
    assert recipe("ffjord+fm") == ("ffjord", ("flow-matching", "likelihood"))
    with pytest.raises(RecipeError, match="maf has no velocity"):
        recipe("maf", ["flow-matching"])
    with pytest.raises(UnknownNameError, match="no training suffix is called 'xy'"):
        recipe("nsf+xy")


# ---- the numbers ---------------------------------------------------------------------------


def test_the_gap_is_the_divergence_from_the_truth() -> None:
    parts = split(BROAD, train_size=10, test_size=20_000)
    row = measure("nice", cnf.nice(2), History(steps=3, seconds=1.5), parts)
    # KL(N(0, 4 I) || N(0, I)) = 3 - 2 log 2, and its per-point standard deviation is 3
    assert row.gap == pytest.approx(3 - 2 * math.log(2), abs=0.1)
    assert row.gap_stderr == pytest.approx(3 / math.sqrt(20_000), rel=0.1)
    assert row.test_nll == pytest.approx(4 + math.log(2 * math.pi), abs=0.1)
    assert row.test_nll_stderr == pytest.approx(4 / math.sqrt(20_000), rel=0.1)
    assert (row.steps, row.train_seconds, row.nfe) == (3, 1.5, None)
    assert row.inverse_error < 1e-5


def test_the_same_density_has_no_gap_and_no_error() -> None:
    parts = split(BROAD, train_size=10, test_size=500)
    flow = cnf.nice(2).double()
    flow.scaling.scale.fill_(2.0)
    row = measure("nice", flow, History(), parts)
    assert row.gap == pytest.approx(0.0, abs=1e-6)
    assert row.gap_stderr == pytest.approx(0.0, abs=1e-6)


def test_a_continuous_flow_counts_its_evaluations() -> None:
    parts = split(BROAD, train_size=10, test_size=50)
    row = measure("ffjord", cnf.ffjord(2, hidden=(8,)), History(), parts)
    assert row.nfe is not None
    assert row.nfe >= 6


def test_a_density_that_is_not_finite_is_an_error() -> None:
    parts = split(BROAD, train_size=10, test_size=50)
    flow = cnf.nice(2)
    flow.scaling.loc.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="50 of 50 test points have no finite"):
        measure("nice", flow, History(), parts)


# ---- the comparison ------------------------------------------------------------------------


def small(target=BROAD, models=("nice", "maf"), **given):
    return compare(target, models, steps=2, train_size=200, test_size=100, progress=False, **given)


def test_a_comparison_writes_the_promised_files(tmp_path) -> None:
    lines: list[str] = []
    found = small(out=tmp_path / "out", report=lines.append)
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(said) == ["target", "entropy", "test_size", "rows"]
    assert said["target"] == "broad"
    assert said["entropy"] == pytest.approx(BROAD.entropy)
    assert said["test_size"] == 100
    assert [list(row) for row in said["rows"]] == [KEYS, KEYS]
    assert said["rows"] == [row.as_dict() for row in found.rows]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert lines[0] == "nice: training (1 of 2)"
    run = open_run(tmp_path / "out" / "maf")
    x = BROAD.sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(run.flow.log_prob(x), found.flows["maf"].log_prob(x))
    assert run.history.steps == 2
    assert run.results["model"] == "maf"


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_state() -> None:
    state = torch.random.get_rng_state()
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row.test_nll for row in first.rows] == [row.test_nll for row in again.rows]
    assert [row.test_nll for row in first.rows] != [row.test_nll for row in other.rows]


def test_training_an_estimated_density_leaves_the_global_state() -> None:
    state = torch.random.get_rng_state()
    arguments = {"hidden": (4,), "divergence": cnf.Hutchinson()}
    data = split(BROAD, train_size=100, test_size=40)
    trial.train("ffjord", data, steps=1, arguments=arguments, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_table_has_no_truth(csv, tmp_path) -> None:
    found = small(csv, out=tmp_path / "out")
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert said["entropy"] is None
    assert {row["gap"] for row in said["rows"]} == {None}
    assert "gap ± se" not in str(found)
    assert open_run(tmp_path / "out" / "maf").source.columns == ("a", "b", "dose")


def test_a_conditional_table_is_compared(csv) -> None:
    found = small(table(csv, columns=["a", "b"], context_columns=["dose"]), ("nsf",))
    assert found.flows["nsf"].context_features == 1
    assert found.panels[1].samples.shape == (60, 2)
    found.figure()


def test_a_model_that_fails_becomes_a_row(monkeypatch, tmp_path) -> None:
    real = trial.train

    def broken(name, *rest, **given):
        if name == "nice":
            raise SolverError("the step underflows")
        return real(name, *rest, **given)

    monkeypatch.setattr(comparing, "train", broken)
    found = small(out=tmp_path / "out")
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "the step underflows" in said["rows"][0]["error"]
    assert said["rows"][0]["test_nll"] is None
    assert "error" not in said["rows"][1]
    assert list(found.flows) == ["maf"]
    assert "nice" in str(found)
    assert "failed: " in str(found)


@pytest.mark.parametrize("swallowed", [True, False])
def test_an_interrupt_leaves_what_was_finished(monkeypatch, tmp_path, swallowed) -> None:
    real = trial.train

    def interrupted(name, *rest, **given):
        if name != "maf":
            return real(name, *rest, **given)
        if not swallowed:
            raise KeyboardInterrupt
        return cnf.maf(2), History(stopped="interrupted")

    monkeypatch.setattr(comparing, "train", interrupted)
    found = small(out=tmp_path / "out")
    assert found.interrupted
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in said["rows"]] == ["nice"]
    assert (tmp_path / "out" / "nice" / "flow.json").exists()


def test_wrong_requests_are_refused_before_anything_runs(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'maf'"):
        small(models=("nice", "maff"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="one or more different names"):
        small(models=("nice", "nice"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(OutputError, match="is not a cnf comparison"):
        small(models=("nice",), out=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="is a file"):
        claim(tmp_path / "thesis.tex", COMPARISON)


def test_an_own_folder_is_written_over(tmp_path) -> None:
    small(models=("nice",), out=tmp_path)
    assert kind(tmp_path) == COMPARISON
    assert small(models=("nice",), seed=1, out=tmp_path).rows[0].test_nll is not None
    with pytest.raises(cnf.DataError, match="is a comparison; its runs are"):
        open_run(tmp_path)


# ---- the table -----------------------------------------------------------------------------


def test_the_table_is_aligned_and_fits_100_columns() -> None:
    found = small(models=("nice",))
    found.rows.append(
        Row("residual_flow", -12.3456, 0.0123, -0.0123, 0.0012, 123_456, 3600.0, 123.0)
    )
    found.rows[-1] = dataclasses.replace(
        found.rows[-1],
        log_prob_per_second=1_234_567.0,
        samples_per_second=1_234_567.0,
        inverse_error=1e-6,
        parameters=1_234_567,
    )
    lines = str(found).splitlines()
    assert lines[0].startswith("broad: 100 test points, entropy")
    assert max(map(len, lines[1:])) <= 100
    assert len({len(line) for line in lines[2:]}) == 1
    marks = found.markdown().splitlines()
    assert marks[1].startswith("| --- | ---: |")
    assert len({line.count("|") for line in marks}) == 1


def test_a_remark_does_not_widen_the_columns() -> None:
    text = align([["model", "nll", "gap"], ["a", "1.0", "0.1"], ["b", "failed: for a reason"]])
    assert text.splitlines()[0] == "model  nll  gap"
