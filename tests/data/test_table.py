from __future__ import annotations

import gzip
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch

from cnf.data.errors import DataError, DataWarning
from cnf.data.table import Table, table
from cnf.data.writing import write_table

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def put(tmp_path):
    """Write a file and return its path."""

    def write(content: str | bytes, name: str = "data.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def read(path, **options) -> Table:
    return table(path, **{"fitting": False, **options})


def normal(rows: int = 100, columns: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns))


TWO_ROWS = {
    "comma": "a,b\n1,2\n3,4e-1\n",
    "no last line end": "a,b\n1,2\n3,.4",
    "blank lines": "\na,b\n\n1,2\n3,0.4\n\n\n",
    "byte-order mark": b"\xef\xbb\xbfa,b\n1,2\n3,0.4\n",
    "utf-16": "a,b\n1,2\n3,0.4\n".encode("utf-16"),
    "windows": "a,b\r\n1,2\r\n3,0.4\r\n",
    "blanks after commas": "a, b\n1, 2\n3, 0.4\n",
    "semicolon": "a;b\n1;2\n3;0.4\n",
    "bar": "a|b\n1|2\n3|0.4\n",
    "tab": "a\tb\n1\t2\n3\t0.4\n",
    "white space": " a   b\n 1   2\n3  0.4 \n",
    "quoted": '"a","b"\n"1","2"\n"3","0.4"\n',
    "savetxt": "# a b\n1.0 2.0\n3.0 4.0e-1\n",
    "comments": "# by the lab\n# a,b\n1,2\n3,0.4\n",
    "gzip": gzip.compress(b"a,b\n1,2\n3,0.4\n"),
}


@pytest.mark.parametrize("content", TWO_ROWS.values(), ids=TWO_ROWS)
def test_text(put, content):
    data = read(put(content))
    assert data.columns == ("a", "b")
    assert data.x.dtype == torch.float64
    assert data.x.tolist() == [[1, 2], [3, 0.4]]
    assert data.context is None
    assert len(data) == 2


@pytest.mark.parametrize(
    ("content", "columns", "first"),
    [
        ("1,2\n3,4\n", ("x1", "x2"), [1, 2]),
        ("1 2\n3 4\n", ("x1", "x2"), [1, 2]),
        ("1.5\n2.5\n", ("x1",), [1.5]),
        ("value\n1.5\n", ("value",), [1.5]),
        ("my value\n1.5\n", ("my value",), [1.5]),
        ("0,1\n1.5,2\n", ("0", "1"), [1.5, 2]),  # pandas numbers what has no name
        ("year,2020\n1,2\n3,4\n", ("year", "2020"), [1, 2]),
        ('"a\nb",c\n1,2\n', ("a\nb", "c"), [1, 2]),
        ("grün,b\n1,2\n", ("grün", "b"), [1, 2]),
    ],
)
def test_header_is_found_out(put, content, columns, first):
    data = read(put(content))
    assert data.columns == columns
    assert data.x[0].tolist() == first


@pytest.mark.parametrize("label", ["country", ""])
def test_years_are_names_where_they_are_asked_for(put, label):
    path = put(f"{label},2019,2020\nC0,1.2,3.4\nC1,5.6,7.8\n")
    assert read(path, columns=["2020", "2019"]).x.tolist() == [[3.4, 1.2], [7.8, 5.6]]
    assert read(path, columns=["2019"], context_columns=["2020"]).context.tolist() == [[3.4], [7.8]]
    with pytest.raises(DataError, match="x2,x3, or 2019,2020 if the first row names the columns"):
        read(path)
    with pytest.raises(DataError, match=f"first row, {label},2019,2020, is read as data"):
        read(path, columns=["2018"])


def test_one_wrong_name_leaves_the_others_their_header(put):
    with pytest.raises(DataError, match=r"'2091'.*Did you mean '2019'.*: country, 2019, 2020"):
        read(put("country,2019,2020\nC0,1.2,3.4\n"), columns=["2091", "2020"])


def test_chosen_columns_keep_their_order_and_text_beside_them_is_no_matter(put):
    path = put('who,age,"size, m",kg\n"O\'Hara, ""Sam""",30,1.5,60\nann,40,1.75,70\n')
    data = read(path, columns=["kg", "size, m"], context_columns=["age"])
    assert data.columns == ("kg", "size, m")
    assert data.context_columns == ("age",)
    assert data.x.tolist() == [[60, 1.5], [70, 1.75]]
    assert data.context.tolist() == [[30], [40]]


def test_context_columns_are_not_modelled(put):
    data = read(put("a,b,c\n1,2,3\n"), context_columns=["b"])
    assert (data.columns, data.x.tolist()) == (("a", "c"), [[1, 3]])
    assert data.context.tolist() == [[2]]


def test_digits_survive(tmp_path):
    values = normal(50, 3) * 10.0 ** np.arange(-12, 38)[:, None]
    for name in ("a.csv", "a.tsv", "a.csv.gz", "a.parquet", "a.npz", "a.npy"):
        path = write_table(tmp_path / name, ["u", "v", "w w"], values)
        data = read(path)
        assert np.array_equal(data.x.numpy(), values), name
        assert data.columns == (("x1", "x2", "x3") if name == "a.npy" else ("u", "v", "w w"))


ERRORS = {
    # content, what the message must say
    "text": (
        "s,a,b\nash,1,2\n",
        r"data.csv, line 2, column 1 \('s'\): 'ash' is text.*--columns.*a,b",
    ),
    "text below": ("a,b\n1,2\n\n3,four\n", r"line 4, column 2 \('b'\): 'four' is text"),
    "text without header": ("ash,1\noak,2\n", "line 1, column 1: 'ash' is text"),
    "underscore": ("a,b\n1,1_0\n", "'1_0' is text"),
    "thousands": ('a,b\n"1,000",2\n', "'1,000' is text.*decimal point"),
    "decimal comma": ("a;b\n1,5;2,5\n1,5;2,5\n", "'1,5' is text.*decimal point"),
    "empty cell": ("a,b\n1,2\n\n3,\n", r"line 4, column 2 \('b'\): the value is missing.*--drop-"),
    "NA": ("a,b\n1,2\nNA,3\n", r"line 3, column 1 \('a'\).*missing \('NA'\).*1 of 2"),
    "nan": ("a,b\n1,2\nnan,3\n", r"missing \('nan'\)"),
    "null": ("a,b\n1,2\n3,null\n", r"missing \('null'\)"),
    "question": ("a,b\n1,2\n3, ?\n", r"missing \('\?'\)"),
    "infinite": ("a,b\n1,2\n3,-inf\n", r"line 3.*infinite \('-inf'\)"),
    "no value": ("a,b\n1,\n2,\n", r"column 2 \('b'\): no row has a value.*--columns a"),
    "long row": ("a,b\n1,2\n3,4,5\n", "line 3: 3 cells, but its names say 2 columns"),
    "short row": ("1,2\n3,4\n5\n", "line 3: 1 cell, but the first row says 2 columns"),
    "empty": ("", "is empty"),
    "blank": ("\n  \n", "is empty"),
    "header": ("a,b\n", "no rows"),
    "comment": ("# a,b\n", "no rows"),
    "binary": (bytes(range(256)), "binary file"),
    "latin-1": (b"a,b\n1,2\n\xe9,3\n", r"line 3: the byte 0xe9 is not UTF-8"),
    "cut gzip": (gzip.compress(TWO_ROWS["comma"].encode() * 999)[:-20], "gzip|line"),
    "spoilt gzip": (b"\x1f\x8b" + b"spoilt" * 9, "gzip file is damaged"),
    "duplicate names": ("a,b,a\n1,2,3\n", "columns 1 and 3 are both called 'a'"),
    "long cell": ('{"data":"' + "x" * 200_000 + '"}', "line 1: not a row .*field larger than"),
    "long cell below": ("a,b\n1,2\n3," + "x" * 200_000 + "\n", "line 3: not a row .*larger than"),
    "quote": ('a,b\n"1,2\n3,4\n', "line 2: 1 cell"),
}


@pytest.mark.parametrize(("content", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_place(put, content, message):
    path = put(content)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_a_ragged_row_is_seen_beside_chosen_columns(put):
    with pytest.raises(DataError, match="line 3: 4 cells"):
        read(put("a,b,c\n1,2,x\n3,4,y,5\n"), columns=["a"])


def test_drop_missing(put):
    content = "a,b\n1,2\n,3\n4,NA\n5,6\n7,inf\nnan,8\n"
    data = read(put(content), drop_missing=True)
    assert data.x.tolist() == [[1, 2], [5, 6]]
    assert data.dropped == 4
    with pytest.raises(DataError, match=r"2 rows left after leaving out 4, but a fit needs .* 20"):
        table(put(content), drop_missing=True)


def test_gaps_in_other_columns_do_not_matter(put):
    assert read(put("a,b\n1,\n2,NA\n"), columns=["a"]).x.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["hieght"]}, "no column 'hieght'. Did you mean 'height'.*height, weight"),
        ({"context_columns": ["x"]}, "no column 'x'"),
        ({"columns": ["height", "height"]}, "asked for twice"),
        ({"columns": ["height"], "context_columns": ["height"]}, "as a column and as a context"),
        ({"context_columns": ["height", "weight"]}, "no column is left"),
        ({"columns": []}, "no column is left"),
    ],
)
def test_unusable_choices(put, options, message):
    with pytest.raises(DataError, match=message):
        read(put("height,weight\n1,2\n"), **options)


def test_a_string_is_not_a_list_of_names(put):
    with pytest.raises(TypeError, match="list of names"):
        read(put("a,b\n1,2\n"), columns="ab")


def test_paths_that_are_no_files(put, tmp_path):
    put("a,b\n1,2\n", "measurements.csv")
    with pytest.raises(DataError, match=r"no file .*measurement\.csv.*'measurements\.csv'"):
        read(tmp_path / "measurement.csv")
    with pytest.raises(DataError, match=r"is a directory; name a file in it: measurements\.csv"):
        read(tmp_path)
    with pytest.raises(DataError, match="spreadsheet; export"):
        read(put(b"PK\x03\x04", "a.xlsx"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}]), "Python objects.*could run code"),
        (np.array(["a", "b"]), "not real numbers"),
        (np.ones((2, 2)) * 1j, "complex128"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "datetime64"),
        (np.ones(()), r"shape \(\)"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\).*reshape"),
        (np.ones((0, 2)), "0 rows"),
        (np.ones((2, 0)), "no column is left"),
        (np.array([[1.0, 2], [3, np.nan]]), "row 2, column 2: the value is missing"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_unusable_arrays(tmp_path, array, message, suffix):
    path = tmp_path / f"a{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, array)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i1", "i8", "u2", "?"])
def test_arrays_of_any_real_dtype(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([[1, 0], [0, 1]], dtype=dtype))
    assert read(tmp_path / "a.npy").x.tolist() == [[1, 0], [0, 1]]


def test_arrays_with_names(tmp_path):
    rows = np.array([(1, 2.5), (3, 4.5)], dtype=[("u", "i4"), ("v", "f8")])
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", u=rows["u"], v=rows["v"])
    for name in ("a.npy", "b.npz"):
        data = read(tmp_path / name)
        assert (data.columns, data.x.tolist()) == (("u", "v"), [[1, 2.5], [3, 4.5]])
        assert read(tmp_path / name, columns=["v"]).x.tolist() == [[2.5], [4.5]]


def test_one_array_of_several(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, train=normal(5), test=normal(3))
    assert read(path, key="test").x.shape == (3, 2)
    with pytest.raises(DataError, match=r"train \(5, 2\), test \(3, 2\); name one with"):
        read(path)
    with pytest.raises(DataError, match=r"no array 'tset'\. Did you mean 'test'"):
        read(path, key="tset")


def test_an_archive_of_other_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no arrays \(data\.csv\); unpack it"):
        read(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.parquet"])
def test_damaged_files(tmp_path, name):
    path = write_table(tmp_path / name, ["a", "b"], normal())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:9], b"text", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(name)):
            read(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {"n": [1, 2, None], "s": ["x", "y", "z"], "v": [1.5, 2.5, 3.5]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=r"column 2 \('s'\): holds string"):
        read(path)
    with pytest.raises(DataError, match=r"row 3, column 1 \('n'\): the value is missing"):
        read(path, columns=["v", "n"])
    data = read(path, columns=["v", "n"], drop_missing=True)
    assert data.x.tolist() == [[1.5, 1], [2.5, 2]]


@pytest.mark.parametrize(("start", "what"), [("0", "counts the rows"), ("1", "counts the rows")])
def test_an_index_is_left_out(put, start, what):
    path = put(f",a,b\n{start},1.5,2\n{int(start) + 1},3,4\n")
    with pytest.warns(DataWarning, match=f"column 1 has no name and {what}"):
        data = read(path)
    assert (data.columns, data.x.tolist()) == (("a", "b"), [[1.5, 2], [3, 4]])


def test_an_empty_last_column_is_left_out(put):
    with pytest.warns(DataWarning, match="column 3 has no name and is empty"):
        data = read(put("a,b,\n1,2,\n3,4,\n"), drop_missing=True)
    assert data.x.tolist() == [[1, 2], [3, 4]]


def test_constants_are_refused_for_a_fit(tmp_path):
    values = np.hstack([normal(), np.full((100, 1), 7.0)])
    path = write_table(tmp_path / "a.csv", ["a", "b", "c"], values)
    with pytest.raises(DataError, match=r"column 3 \('c'\): every row says 7.*--columns a,b"):
        table(path)
    with pytest.raises(DataError, match="constant context"):
        table(path, context_columns=["c"])
    assert table(path, columns=["a", "b"]).x.shape == (100, 2)
    assert read(path).x.shape == (100, 3)


def test_too_few_rows_for_a_fit(tmp_path):
    path = write_table(tmp_path / "a.csv", ["a", "b"], normal(7))
    with pytest.raises(DataError, match="7 rows, but a fit needs at least 20"):
        table(path)
    assert len(table(path, minimum_rows=5)) == 7


def test_continuous_columns_need_no_warning(tmp_path):
    np.save(tmp_path / "a.npy", normal(200_000).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = table(tmp_path / "a.npy", dequantize=True)
    assert data.dequantized == {}


def quantized() -> np.ndarray:
    """Whole numbers, steps of 0.1, a continuous column, and one with a lump at zero."""
    values = normal(1000, 4)
    values[:, 0] = np.round(10 * values[:, 0])
    values[:, 1] = np.round(values[:, 1], 1)
    values[:100, 3] = 0
    return values


def test_repeated_values_are_warned_of(tmp_path):
    path = write_table(tmp_path / "a.csv", ["n", "r", "c", "l"], quantized())
    with pytest.warns(DataWarning) as warned:
        table(path)
    (message,) = [str(w.message) for w in warned]
    assert "'n': whole numbers" in message
    assert re.search(r"'r': \d\d different values in 1000 rows", message)
    assert "'l': 0 in 10.0% of the rows" in message
    assert "'c'" not in message
    assert "--dequantize" in message
    assert warned[0].filename == __file__


def test_huge_floats_are_no_whole_numbers(tmp_path, recwarn):
    path = write_table(tmp_path / "a.csv", ["a", "b"], 1e20 * normal(1000, 2))
    table(path)
    assert not recwarn.list


def test_whole_numbers_are_fine_as_context(tmp_path):
    path = write_table(tmp_path / "a.csv", ["n", "r", "c", "l"], quantized())
    data = table(path, columns=["c"], context_columns=["n"])
    assert data.context.shape == (1000, 1)


def test_dequantize_fills_the_steps(tmp_path):
    values = quantized()[:, :3]
    path = write_table(tmp_path / "a.csv", ["n", "r", "c"], values)
    draws = [
        table(path, dequantize=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0].x, draws[1].x)
    assert not torch.equal(draws[0].x, draws[2].x)
    assert draws[0].dequantized == {"n": 1.0, "r": 0.1}
    noise = draws[0].x.numpy() - values
    assert (noise[:, 2] == 0).all()
    for column, step in ((0, 1.0), (1, 0.1)):
        assert np.abs(noise[:, column]).max() <= step / 2
        # uniform: variance step²/12, and no two rows alike
        assert noise[:, column].var() == pytest.approx(step**2 / 12, rel=0.15)
        assert len(np.unique(draws[0].x[:, column])) == 1000


def test_noise_does_not_cure_a_lump(tmp_path):
    path = write_table(tmp_path / "a.csv", ["l"], quantized()[:, 3])
    with pytest.warns(DataWarning, match="stays a peak whatever noise"):
        table(path, dequantize=True)


def test_a_column_far_from_zero_is_warned_of(tmp_path):
    path = write_table(tmp_path / "a.csv", ["a", "t"], normal() + np.array([0.0, 1e6]))
    with pytest.warns(DataWarning, match="'t' varies little.*offset"):
        table(path)


def test_written_text(tmp_path):
    path = write_table(tmp_path / "a.csv", ["a,b", "c"], torch.tensor([[0.1, -1e-30]]))
    assert path.read_text() == '"a,b",c\n0.1,-1e-30\n'
    assert write_table(tmp_path / "b.tsv", ["n"], [3, 4]).read_text() == "n\n3\n4\n"
    special = write_table(tmp_path / "c.csv", ["v"], [np.inf, -np.inf, np.nan])
    assert special.read_text().split() == ["v", "inf", "-inf", "nan"]


def test_an_archive_takes_any_name(tmp_path):
    names = ["file", "km/h", "../a", ""]
    path = write_table(tmp_path / "a.npz", names, normal(5, 4))
    with np.load(path) as archive:
        assert archive.files == names
    assert np.array_equal(read(path, columns=["km/h"]).x[:, 0], normal(5, 4)[:, 1])


@pytest.mark.parametrize(
    ("name", "columns", "values", "message"),
    [
        ("a.xlsx", ["a"], [1.0], "ends in .csv"),
        ("a", ["a"], [1.0], "ends in .csv"),
        ("a.csv", ["a"], [[1.0, 2.0]], r"shape \(rows, 1\)"),
        ("a.csv", ["a", "a"], [[1.0, 2.0]], "different column names"),
        ("a.csv", ["a"], [1j], "real numbers"),
    ],
)
def test_unusable_output(tmp_path, name, columns, values, message):
    with pytest.raises(ValueError, match=message):
        write_table(tmp_path / name, columns, values)
    assert list(tmp_path.iterdir()) == []
