from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from cnf.__main__ import main
from cnf.training import History
from cnf.training.update import Updater

pytest.importorskip("typer")

COMMANDS = ("compare", "fit", "score", "sample", "plot", "models", "targets")


@pytest.fixture
def cnf(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cnf", *map(str, arguments)])
        code = main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def csv(tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 3)) @ random.normal(size=(3, 3)) + 5
    np.savetxt(tmp_path / "rows.csv", x, delimiter=",", header="a,b,dose", comments="")
    return "rows.csv"


def read(path) -> tuple[list[str], np.ndarray]:
    with open(path) as file:
        names = file.readline().strip().split(",")
    return names, np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cnf, command) -> None:
    code, out, _ = cnf(command, "--help")
    assert code == 0
    assert f"\n    cnf {command}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_without_a_command_there_is_help(cnf) -> None:
    code, out, err = cnf()
    assert code == 2
    assert all(command in out + err for command in COMMANDS)


def test_lists(cnf) -> None:
    code, out, _ = cnf("models")
    assert code == 0
    assert "ffjord" in out
    code, out, _ = cnf("targets")
    assert code == 0
    assert "checkerboard  " in out
    assert "3.46574" in out


def test_compare(cnf, tmp_path) -> None:
    arguments = ("--models", "nice,maf", "--steps", 2)
    code, out, err = cnf("compare", "moons", *arguments)
    assert code == 0
    assert "moons: 50,000 test points" in out
    assert "written: runs/moons/results.json" in out
    assert "nice: training (1 of 2)" in err
    said = json.loads((tmp_path / "runs/moons/results.json").read_text())
    assert [row["model"] for row in said["rows"]] == ["nice", "maf"]
    assert cnf("plot", "runs/moons/maf")[0] == 0
    assert (tmp_path / "runs/moons/maf/plot.png").exists()


def test_an_interrupted_comparison_says_what_is_kept(cnf, monkeypatch, tmp_path) -> None:
    def interrupted(name, *rest, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["cnf.compare"], "train", interrupted)
    code, _, err = cnf("compare", "moons", "--models", "nice")
    assert code == 130
    assert "interrupted: 0 finished models are kept in runs/moons" in err
    assert json.loads((tmp_path / "runs/moons/results.json").read_text())["rows"] == []


def test_fit_score_sample_and_plot_a_table(cnf, csv, tmp_path) -> None:
    code, out, _ = cnf("fit", csv, "--model", "maf", "--steps", 5, "--out", "run")
    assert code == 0
    assert "on 8 validation rows" in out
    said = json.loads((tmp_path / "run/data.json").read_text())
    assert said == {
        "name": csv, "columns": ["a", "b", "dose"], "context_columns": [], "seed": 0, "key": None,
        "dequantized": False,
    }  # fmt: skip
    assert {"data.json", "flow.json", "flow.safetensors", "history.json", "results.json"} <= set(
        os.listdir(tmp_path / "run")
    )

    code, out, _ = cnf("score", "run", csv, "--out", "scores.csv")
    assert code == 0
    names, scores = read(tmp_path / "scores.csv")
    assert names == ["log_prob"]
    assert scores.shape == (80, 1)
    mean, error = scores.mean(), scores.std(ddof=1) / np.sqrt(80)
    assert f"mean log-density {mean:.4f} ± {error:.4f} nats, 80 rows" in out

    assert cnf("sample", "run", "-n", 7, "--out", "one.csv", "--seed", 3)[0] == 0
    assert cnf("sample", "run", "-n", 7, "--out", "two.csv", "--seed", 3)[0] == 0
    names, samples = read(tmp_path / "one.csv")
    assert names == ["a", "b", "dose"]
    assert samples.shape == (7, 3)
    assert np.array_equal(samples, read(tmp_path / "two.csv")[1])

    assert cnf("sample", "run", "--temperature", 0, "--out", "cold.csv")[0] == 0
    assert np.ptp(read(tmp_path / "cold.csv")[1], axis=0).max() < 1e-4
    assert cnf("plot", "run", "--out", "picture.png")[0] == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_conditional_table(cnf, csv, tmp_path) -> None:
    arguments = ("--model", "nsf", "--steps", 2, "--out", "run", "--context-columns", "dose")
    assert cnf("fit", csv, *arguments)[0] == 0
    assert cnf("score", "run", csv)[0] == 0
    assert cnf("sample", "run", "-n", 4, "--context", "dose=1.5")[0] == 0
    names, samples = read(tmp_path / "samples.csv")
    assert names == ["a", "b", "dose"]
    assert (samples[:, 2] == 1.5).all()
    assert cnf("sample", "run", "-n", 2, "--context-file", csv)[0] == 0
    names, samples = read(tmp_path / "samples.csv")
    assert samples.shape == (160, 3)
    assert np.allclose(samples[:80, 2], samples[80:, 2])
    assert cnf("plot", "run")[0] == 0

    code, _, err = cnf("sample", "run")
    assert code == 2
    assert "give --context dose=…, or --context-file" in err
    for value in ("high", "nan", "inf"):
        code, _, err = cnf("sample", "run", "--context", f"dose={value}")
        assert code == 2
        assert f"must be finite numbers: --context dose=…; got dose={value}" in err
    code, _, err = cnf("sample", "run", "--context", "dose=1e39")
    assert code == 2
    assert "beyond what float32 holds" in err


def test_an_optional_context_and_guidance(cnf, csv, tmp_path) -> None:
    arguments = ("--steps", 2, "--context-columns", "dose", "--out", "run")
    assert cnf("fit", csv, "--model", "ffjord+fm-only", "--optional-context", *arguments)[0] == 0
    assert cnf("sample", "run", "-n", 3)[0] == 0
    names, samples = read(tmp_path / "samples.csv")
    assert (names, samples.shape) == (["a", "b"], (3, 2))
    assert cnf("sample", "run", "-n", 3, "--context", "dose=5", "--guidance", 2)[0] == 0
    assert read(tmp_path / "samples.csv")[1].shape == (3, 3)

    assert cnf("fit", csv, "--model", "maf", *arguments)[0] == 0
    code, _, err = cnf("sample", "run", "-n", 3, "--context", "dose=5", "--guidance", 2)
    assert code == 2
    assert "optional_context=True" in err


def test_a_support(cnf, tmp_path) -> None:
    shares = np.random.default_rng(0).dirichlet([1, 2, 3], size=60)
    np.savetxt(tmp_path / "shares.csv", shares, delimiter=",", header="a,b,c", comments="")
    arguments = ("shares.csv", "--model", "nice", "--steps", 2, "--out", "run", "--support")
    assert cnf("fit", *arguments, "simplex")[0] == 0
    assert cnf("sample", "run", "-n", 5)[0] == 0
    assert np.allclose(read(tmp_path / "samples.csv")[1].sum(1), 1, atol=1e-5)
    assert cnf("fit", *arguments, "0,inf")[0] == 0
    for support, message in (
        ("simplx", "Did you mean 'simplex'"),
        ("5,3", "a finite lower end and a larger upper one"),
        ("0.5,0.6", "samples lie outside of the flow's support"),
    ):
        code, out, err = cnf("fit", *arguments, support)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err


def test_an_archive_of_several_arrays(cnf, tmp_path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "two.npz", train=random.normal(size=(40, 2)), test=np.zeros((9, 2)))
    arguments = ("two.npz", "--model", "nice", "--steps", 2, "--out", "run")
    code, _, err = cnf("fit", *arguments)
    assert code == 2
    assert "name one with --key" in err
    assert cnf("fit", *arguments, "--key", "train")[0] == 0
    assert cnf("score", "run", "two.npz", "--key", "test")[0] == 0
    assert len(read(tmp_path / "scores.csv")[1]) == 9
    assert cnf("plot", "run")[0] == 0


def test_a_fit_is_resumed(cnf, csv, monkeypatch, tmp_path) -> None:
    arguments = (csv, "--model", "nice", "--steps", 40, "--out")
    assert cnf("fit", *arguments, "whole")[0] == 0
    steps, make = [], Updater.step

    def killed(*rest):
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return make(*rest)

    monkeypatch.setattr(Updater, "step", killed)
    assert cnf("fit", *arguments, "run")[0] == 130
    code, _, err = cnf("fit", *arguments, "run", "--resume", "--seed", 1)
    assert code == 2
    assert "nothing to resume" in err
    assert cnf("fit", *arguments, "run", "--resume")[0] == 0
    assert len(steps) == 41
    assert cnf("score", "run", csv, "--out", "one.csv")[0] == 0
    assert cnf("score", "whole", csv, "--out", "two.csv")[0] == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert cnf("fit", *arguments, "run", "--resume", "--model", "maf")[0] == 2
    assert cnf("plot", "run")[0] == 0


@pytest.mark.filterwarnings("ignore:.*values repeat")
def test_noise_is_not_forgotten_on_resuming(cnf, tmp_path) -> None:
    np.savetxt(tmp_path / "counts.csv", np.random.default_rng(0).poisson(9, (80, 2)))
    arguments = ("counts.csv", "--model", "nice", "--steps", 2, "--out", "run", "--resume")
    assert cnf("fit", *arguments, "--dequantize")[0] == 0
    code, _, err = cnf("fit", *arguments)
    assert code == 2
    assert "nothing to resume" in err


def test_a_flow_that_cannot_be_measured_is_kept(cnf, csv, monkeypatch, tmp_path) -> None:
    def unmeasured(*given):
        raise FloatingPointError("1 of 8 test points have no finite log-density")

    monkeypatch.setattr("cnf.cli.fitting.measure", unmeasured)
    code, out, _ = cnf("fit", csv, "--model", "nice", "--steps", 2, "--out", "run")
    assert code == 2
    assert "failed: 1 of 8 test points" in out
    assert cnf("score", "run", csv)[0] == 0
    assert cnf("plot", "run")[0] == 0


def test_fit_a_toy_in_double_precision(cnf, tmp_path) -> None:
    code, out, _ = cnf("fit", "moons", "--model", "nice", "--steps", 2, "--double", "--out", "run")
    assert code == 0
    assert "gap" in out
    assert "on 50,000 test points" in out
    assert json.loads((tmp_path / "run/flow.json").read_text())["dtype"] == "float64"
    assert cnf("score", "run", "moons", "-n", 50)[0] == 0
    assert len(read(tmp_path / "scores.csv")[1]) == 50


def test_an_interrupted_fit_keeps_what_it_has(cnf, csv, monkeypatch) -> None:
    def interrupted(flow, *rest, **given) -> History:
        return History(stopped="interrupted")

    monkeypatch.setattr("cnf.trial.fit", interrupted)
    code, out, _ = cnf("fit", csv, "--model", "nice", "--out", "run")
    assert code == 130
    assert "written: run" in out
    assert cnf("score", "run", csv)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "pinweel"), "Did you mean 'pinwheel'?"),
        (("compare", "moons", "--models", "nfs"), "Did you mean 'nsf'?"),
        (("compare", "moons", "--models", ","), "name one or more models, each once"),
        (("compare", "moons", "--seconds", "-1"), "--seconds"),
        (("compare", "moons", "--device", "toaster"), "no device"),
        (("compare", "moons", "--columns", "a"), "for tables only"),
        (("fit", "absent.csv", "--out", "run"), "there is no file absent.csv"),
        (("fit", "rows.csv", "--columns", "doze", "--out", "run"), "Did you mean 'dose'?"),
        (("fit", "rows.csv", "--objective", "guess", "--out", "run"), "no objective"),
        (("fit", "rows.csv", "--out", "."), "is not a cnf run"),
        (("fit", "rows.csv"), "--out"),
        (("score", "nowhere", "rows.csv"), "no such run folder"),
        (("score", ".", "rows.csv"), "not a finished run"),
        (("sample", "nowhere", "--out", "samples.doc"), "should be a name and end in"),
        (("sample", "nowhere", "--out", ".csv"), "should be a name and end in"),
        (("sample", "nowhere", "--out", ".csv.gz"), "should be a name and end in"),
        (("sample", "nowhere", "--seed", str(2**64)), "--seed"),
        (("sample", "nowhere", "--temperature", "inf"), "a finite number, got inf"),
        (("sample", "nowhere", "--device", "meta"), "no device 'meta' here"),
        (("sample", "nowhere", "--device", "vulkan"), "no device 'vulkan' here"),
    ],
)
def test_wrong_arguments_are_one_clear_line(cnf, csv, tmp_path, arguments, message) -> None:
    before = sorted(os.listdir(tmp_path))
    code, out, err = cnf(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_a_damaged_record_is_one_line(cnf, csv, tmp_path) -> None:
    fit = ("fit", csv, "--model", "nice", "--steps", 2, "--out", "run")
    assert cnf(*fit)[0] == 0
    lacking = json.dumps({"name": csv, "columns": ["a"], "seed": 0})
    for name, content, command in (
        ("history.json", "{", ("sample", "run")),
        ("history.json", "[]", ("plot", "run")),
        ("results.json", "[]", ("score", "run", csv)),
        ("data.json", "{", ("sample", "run")),
        ("data.json", lacking, (*fit, "--resume")),
    ):
        path = tmp_path / "run" / name
        whole = path.read_text()
        path.write_text(content)
        code, out, err = cnf(*command)
        path.write_text(whole)
        assert (code, out) == (2, "")
        assert err.startswith(f"cnf: run/{name} is damaged (")
        assert err.endswith("with another --out\n")
        assert err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_one_line(cnf, csv, tmp_path) -> None:
    fit = ("fit", csv, "--model", "nice", "--steps", 2, "--out", "run")
    assert cnf(*fit)[0] == 0
    for arguments, name in (
        (("sample", "run", "--out"), "full.csv"),
        (("sample", "run", "--out"), "full.npy"),
        (("sample", "run", "--out"), "full.npz"),
        (("score", "run", csv, "--out"), "full.csv.gz"),
        (("plot", "run", "--out"), "full.png"),
        (fit, "run/flow.safetensors"),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/dev/full")
        code, out, err = cnf(*arguments, *[name][: arguments != fit])
        assert (code, out) == (2, "")
        assert err.splitlines()[-1] == f"cnf: {name}: No space left on device"


def test_a_missing_extra_is_named(cnf, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = cnf("compare", "moons", "--models", "nice", "--steps", 1)
    assert code == 2
    assert err == 'cnf: pictures need matplotlib: pip install "cnf[plot]"\n'


def test_without_typer_the_command_says_what_to_install(monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.startswith("cnf.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main() == 2
    assert 'pip install "cnf[cli]"' in capsys.readouterr().err


def test_what_nobody_expected_keeps_its_traceback(cnf, monkeypatch) -> None:
    def broken(*rest, **given):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["cnf.compare"], "train", broken)
    with pytest.raises(ZeroDivisionError):
        cnf("compare", "moons", "--models", "nice")
