"""The measurements' tools: fair turns, tables, and peers that compute the same."""

import argparse
import importlib.util
import json
import os
import sys
import time

import pytest
import torch

import cnf
from benchmarks import (
    breakdown,
    continuous,
    discrete,
    harness,
    memory,
    reference,
    revisions,
    rnode,
    scaling,
    summary,
)
from cnf import compiling


def test_a_race_ranks_by_time():
    entrants = {"slow": lambda: time.sleep(0.012), "fast": lambda: time.sleep(0.006)}
    slow, fast = harness.race(entrants, "slow", rounds=5, warmup=1)
    assert (slow.speedup, slow.name) == (1.0, "slow")
    assert fast.speedup > 1.2
    assert fast.low <= fast.speedup <= fast.high
    assert fast.ms >= 6


def test_a_race_takes_everyone_in_turn():
    calls = []
    longer = 1.2 * harness.TURN
    entrants = {name: lambda name=name: (calls.append(name), time.sleep(longer)) for name in "abc"}
    harness.race(entrants, "a", rounds=4, warmup=1)
    timed = calls[-12:]
    assert all(sorted(timed[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
    assert {timed[i] for i in range(0, 12, 3)} == {"a", "b", "c"}


def test_short_calls_are_repeated_until_a_turn_is_over():
    calls = []
    entrants = {"a": lambda: (calls.append(1), time.sleep(harness.TURN / 8))}
    (row,) = harness.race(entrants, "a", rounds=1, warmup=1)
    # one to warm up, one to see how long it takes, and the turn's
    assert 2 + 2 <= len(calls) <= 2 + 8
    assert harness.TURN / 8 <= row.ms / 1e3 < harness.TURN / 2


def test_a_race_keeps_what_each_round_took():
    entrants = {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.001)}
    a, b = harness.race(entrants, "a", rounds=4, warmup=1)
    assert len(a.seconds) == len(b.seconds) == 4
    assert b.against(a) == (b.low, b.speedup, b.high)


def test_discrete_flows_are_compared_within_rounds(monkeypatch):
    # the machine is three times slower in the second round, and hits nobody's ratio
    times = {
        "cnf": (2, 6, 2), "zuko": (4, 12, 4), "nflows": (3, 9, 6), "normflows": (5, 5, 5),
        "compiled": (1, 3, 1), "flowjax": (1, 4.5, 2),
    }  # fmt: skip

    def race(entrants, reference, rounds, warmup, clock):
        medians = {name: sorted(times[name])[1] for name in entrants}
        return [harness.Row(n, medians[n], 0, 0, 0, rounds, times[n]) for n in entrants]

    monkeypatch.setattr(discrete, "race", race)
    row = discrete._row("affine, train", dict.fromkeys(times), 3, False)
    assert list(row)[-6:] == [
        "eager ×", "quartiles", "compiled ×",
        "compiled quartiles", "flowjax ×", "flowjax quartiles",
    ]  # fmt: skip
    # zuko's median is the smallest
    assert (row["eager ×"], row["quartiles"]) == (2, "2.00 to 2.00")
    assert (row["compiled ×"], row["compiled quartiles"]) == (4, "4.00 to 4.00")
    assert (row["flowjax ×"], row["flowjax quartiles"]) == (1.5, "1.25 to 1.75")
    eager = discrete._row("affine, train", dict.fromkeys(list(times)[:4]), 3, False)
    assert list(eager)[-2:] == ["eager ×", "quartiles"]


def test_a_race_needs_its_reference():
    with pytest.raises(ValueError, match="the reference 'x' is none of a, b"):
        harness.race({"a": time.time, "b": time.time}, "x")


def test_results_are_written_as_json_and_markdown(tmp_path, monkeypatch):
    folders = ["--out", str(tmp_path), "--picture", str(tmp_path / "check.png")]
    words = ["check", *folders, "--torchdyn", sys.executable, "--rows", "9"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    row = harness.Row("ours", 1.5, 2.0, 1.9, 2.1, 10)
    tables = [
        harness.table("Steps", [row], "One core."),
        harness.table("Errors", [{"": "a", "error": 1e-5}, {"": "b", "nats": 0.25}]),
    ]
    page = harness.write("check", tables, tmp_path).read_text()
    assert "| ours | 1.50 | 2.00 | 1.90 to 2.10 |" in page
    assert "| a | 1.0e-05 | – |" in page
    assert "| b | – | 0.250 |" in page
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["command"] == "python -m benchmarks check --torchdyn PYTHON --rows 9"
    assert found["tables"][0]["rows"][0]["speedup"] == 2.0
    assert found["machine"]["threads"] >= 1


def test_figures_are_reported_with_command_and_machine(tmp_path, monkeypatch, capsys):
    out = tmp_path / "accuracy.json"
    words = ["accuracy", f"{tmp_path}/", "--points", "9", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    harness.report({"points": 9}, out, tmp_path)
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["command"] == "python -m benchmarks accuracy FOLDER --points 9"
    assert found["machine"]["threads"] >= 1
    assert found["points"] == 9


@pytest.mark.parametrize("page", summary.PAGES, ids=lambda page: page.name)
def test_the_docs_tables_are_the_results(page):
    text = page.read_text()
    assert summary.PLACE.findall(text)
    assert summary.refreshed(text) == text
    assert summary.refreshed(summary.PLACE.sub(r"\1\3", text)) == text


def test_results_say_what_the_compiler_found_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "fxgraph").mkdir()
    assert harness.compiler_cache() == "empty"
    file = tmp_path / "fxgraph" / "code"
    file.write_text("of this process")
    assert harness.compiler_cache() == "empty"
    os.utime(file, (harness.START - 60, harness.START - 60))
    assert harness.compiler_cache() == "warm"
    # only where something was compiled
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
    assert "compiler cache" not in harness.machine()
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", None)
    assert harness.machine()["compiler cache"] == "warm"


def test_peers_that_are_missing_are_said(capsys):
    assert harness.installed("torch")
    assert not harness.installed("torch", "no_such_package")
    assert "no_such_package not installed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def field():
    torch.manual_seed(0)
    return cnf.ffjord(3).transform.field


@pytest.fixture(scope="module")
def x():
    return torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(field, x):
    return continuous.ours(field, x.double(), None, continuous.EXACT).look()


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(continuous, "TOLERANCE", 1e-6)


def differs(found, truth):
    away = (found.gradient.double() - truth.gradient).norm() / truth.gradient.norm()
    return max(abs(found.loss - truth.loss), float(away))


def test_the_reference_takes_over_a_field(field, x):
    net = reference.Net(3, continuous.HIDDEN).take(field)
    for time_ in (0.0, 0.7):
        t = torch.tensor(time_)
        assert torch.allclose(net(t, x), field(t, x), atol=1e-6)


@pytest.mark.usefixtures("tight")
def test_ffjords_method_agrees_with_ours(field, x, truth):
    found = continuous.plain(field, x, None).look()
    assert differs(found, truth) < 1e-4
    assert found.forward > 0
    assert found.backward > 0
    for solver in continuous.cnf_modes().values():
        assert differs(continuous.ours(field, x, None, solver).look(), truth) < 1e-4


@pytest.mark.usefixtures("tight")
def test_probes_are_shared(field, x):
    t = torch.ones(())
    probe = cnf.Hutchinson().draw(field, t, x, None, torch.Generator().manual_seed(0))[0]
    ours = continuous.ours(field, x.double(), probe, continuous.EXACT).look()
    assert differs(continuous.plain(field, x, probe).look(), ours) < 1e-4


def test_the_reference_samples_what_it_scores(field, x):
    flow = reference.FFJORD(3, tolerance=1e-6)
    flow.net.take(field)
    ours = continuous.flow_with(field, cnf.Solver())
    assert torch.allclose(flow.decode(x), ours.decode(x), atol=1e-4)
    assert flow.sample(5).shape == (5, 3)


def test_a_trainable_end_time_has_a_gradient(x):
    flow = reference.FFJORD(3, (8,), end_time=0.5)
    flow.log_prob(x).mean().backward()
    assert flow.root_time.grad != 0


def test_zuko_agrees(field, x, truth):
    pytest.importorskip("zuko")
    assert differs(continuous.zuko_step(field, x).look(), truth) < 1e-3


@pytest.mark.usefixtures("tight")
def test_torchdyn_agrees(field, x, truth):
    pytest.importorskip("torchdyn")  # of an environment of its own, if that is what runs this
    found = continuous.torchdyn_step(field, x, None, sys.executable).look()
    assert differs(found, truth) < 1e-4
    assert min(found.forward, found.backward) > 0
    entrant = dict(continuous.evaluators(field, sys.executable))
    (name,) = [name for name in entrant if name.startswith("torchdyn")]
    density, ours = entrant[name].at(1e-6), entrant[name].truth
    for peer, own in ((density.log_prob, ours.log_prob), (density.decode, ours.decode)):
        assert torch.allclose(torch.as_tensor(peer(x)).double(), own(x.double()), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (harness.count, {"1": 1, "512": 512}, ("0", "-3", "1.5", "two", "")),
        (harness.amount, {"0.5": 0.5, "3": 3.0}, ("0", "-1", "inf", "nan", "soon")),
    ],
)
def test_options_take_numbers_above_zero(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="above zero, got"):
            kind(text)


@pytest.mark.parametrize(
    "ladder", [memory.TOLERANCES, scaling.BATCHES, scaling.DIMENSIONS, harness.ROUNDS]
)
def test_more_effort_is_more_work(ladder):
    parser = argparse.ArgumentParser()
    harness.add_effort(parser)
    asked = [parser.parse_args(words).effort for words in (["--quick"], [], ["--full"])]
    sizes = [ladder[effort] for effort in asked]
    work = [size if isinstance(size, int) else len(size) for size in sizes]
    assert work == sorted(set(work))


def test_the_adjoint_keeps_as_much_at_any_tolerance(tmp_path):
    torch.manual_seed(0)
    field = cnf.ffjord(2).transform.field
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loose, tight = rows = [memory.kept_at(tolerance, field, x) for tolerance in (1e-3, 1e-8)]
    assert loose["adjoint"] == tight["adjoint"] < loose["backprop"] < tight["backprop"]
    assert all(loose[f"NFE {mode}"] < tight[f"NFE {mode}"] for mode in memory.MODES)
    memory.draw(tmp_path / "memory.png", rows)
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_an_interpreter_without_torchdyn_says_how_to_make_one(field, x):
    if importlib.util.find_spec("torchdyn") is not None:
        pytest.skip("this one has torchdyn")
    for python in (sys.executable, "no-such-python"):
        with pytest.raises(SystemExit, match=r"--torchdyn: .* how its environment is made"):
            continuous.torchdyn_step(field, x, None, python)


def test_the_net_in_jax_agrees(field, x, monkeypatch):
    pytest.importorskip("diffrax")
    from benchmarks import peers_jax

    with torch.no_grad():
        velocity, divergence = field.trace(torch.tensor(0.3), x, None)
    parameters = peers_jax.parameters_of(field)
    assert len(peers_jax.flatten(parameters)) == sum(p.numel() for p in field.parameters())
    for unrolled in (0, 4):
        monkeypatch.setattr(peers_jax, "UNROLLED", unrolled)
        found = peers_jax.exact(parameters, 0.3, x.numpy())
        assert torch.allclose(torch.tensor(found[0].tolist()), velocity, atol=1e-5)
        assert torch.allclose(torch.tensor(found[1].tolist()), divergence, atol=1e-5)


def test_weights_are_chosen_by_the_validation_points_alone():
    def row(name, val, test, nfe):
        return {
            "": name, "gap, val.": val, "gap, test": test,
            "NFE, batch norm": nfe, "NFE, sample norm": nfe,
        }  # fmt: skip

    rows = [
        row("FFJORD", 0.020, 0.020, 60),
        row("weak", 0.025, 0.000, 40),
        row("strong", 0.029, 0.090, 30),
        row("too strong", 0.031, 0.000, 20),
    ]
    rnode.mark(rows)
    assert [row[""] for row in rows if row["chosen"]] == ["strong"]


def test_revisions_are_compared_by_their_middle_processes(capfd):
    found = list(zip(3 * ["new"] + 3 * ["old"], range(1, 7), strict=True))
    rows = list(revisions._rows(found, ["new", "old"]))
    assert [(row["ms"], row["speedup"]) for row in rows] == [(2, 2.5), (5, 1.0)]
    with pytest.raises(SystemExit, match="git does not know this revision"):
        revisions._named("no-such-revision")


def test_what_is_not_spent_in_compiled_code_is_the_rest():
    x = torch.randn(300, 300)
    loading = breakdown.CppWrapperCodeCache.load_pybinding
    with breakdown.watched() as in_code:
        run = compiling.compiled(lambda x: (x @ x).sin(), whole=True, native=True)

        def call():
            run(x)
            time.sleep(0.02)

        (row,) = breakdown.rows("kind", {"pass": call}, 3, in_code)
        assert row[""] == "kind, pass"
        assert 0 < row["code"] < row["ms"] - 20
        assert row["rest"] == row["ms"] - row["code"]
        before = in_code()
        x @ x
        assert in_code() == before
    assert breakdown.CppWrapperCodeCache.load_pybinding == loading
