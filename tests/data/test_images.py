from __future__ import annotations

import numpy as np
import pytest
import torch

import cnf
from cnf.data import DataError, images
from cnf.plots import images as draw

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6)).astype(np.uint8)


@pytest.fixture
def write(tmp_path):
    def write(array=None, **arrays):
        path = tmp_path / ("x.npz" if arrays else "x.npy")
        np.savez(path, **arrays) if arrays else np.save(path, array)
        return path

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arrays_become_tensors_of_the_same_numbers(write, dtype):
    x = images(write(PIXELS), dtype=dtype)
    assert x.dtype == dtype
    assert x.numpy().tolist() == PIXELS.tolist()


def test_grey_images_get_a_channel(write):
    assert images(write(PIXELS[:, 0])).shape == (5, 1, 4, 6)


def test_flat_images_get_a_shape(write):
    flat = write(PIXELS[:, 0].reshape(5, -1))
    assert torch.equal(images(flat, shape=(4, 6)), images(write(PIXELS[:, 0])))
    assert images(flat, shape=(2, 3, 4)).shape == (5, 2, 3, 4)


def test_channels_may_come_last(write):
    path = write(np.moveaxis(np.repeat(PIXELS, 2, 2), 1, -1))
    assert torch.equal(
        images(path, channels_last=True), torch.from_numpy(PIXELS).repeat_interleave(2, 2).float()
    )
    with pytest.raises(DataError, match="channels_last=True if the 3 are their channels"):
        images(path)


def test_whole_numbers_of_any_kind_are_pixels(write):
    assert torch.equal(images(write(PIXELS.astype(float))), images(write(PIXELS)))


def test_archives_know_their_arrays(write):
    path = write(train=PIXELS, test=PIXELS[:2])
    assert images(path, key="test").shape == (2, 3, 4, 6)
    assert images(write(only=PIXELS)).shape == (5, 3, 4, 6)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"a": PIXELS, "b": PIXELS}, {}, "several arrays, a, b: name one by key"),
        ({"train": PIXELS}, {"key": "trian"}, "Did you mean 'train'"),
        ({"x": PIXELS[0, 0]}, {}, r"shape \(4, 6\); images are"),
        ({"x": PIXELS}, {"shape": (5, 5)}, r"not the 25 numbers of shape=\(5, 5\)"),
        ({"x": PIXELS / 255}, {}, "other numbers than 0, 1, …, 255"),
        ({"x": PIXELS.astype(int) - 1}, {}, "from -1 to 254"),
        ({"x": np.array(["a"])}, {}, "not numbers from 0 to 255"),
        ({"x": np.array([None])}, {}, "no NPY or NPZ file of numbers"),
    ],
)
def test_what_is_no_image_is_named(write, arrays, options, message):
    with pytest.raises(DataError, match=message):
        images(write(**arrays), **options)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        images(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="or it is damaged"):
        images(tmp_path / "bad.npz")


def test_digits():
    pytest.importorskip("sklearn")
    x = cnf.data.digits(dtype=torch.float64)
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.float64
    assert (x.min(), x.max()) == (0, 16)
    assert torch.equal(x, x.round())


def test_a_picture_of_images():
    pytest.importorskip("matplotlib")
    x = torch.arange(5.0 * 12).reshape(5, 1, 3, 4)
    figure = draw({"grey": x, "colours": x.expand(5, 3, 3, 4)}, high=60, columns=2, title="two")
    grey, colours = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    # three rows of two, with a line after each image, and one place left empty
    assert grey.shape == (3 * 4, 2 * 5)
    assert colours.shape == (3 * 4, 2 * 5, 3)
    np.testing.assert_allclose(grey[4:7, 5:9], x[3, 0].numpy() / 60, rtol=1e-6)
    assert (grey[8:, 5:] == 0.5).all()
    with pytest.raises(ValueError, match="with 1 or 3 channels"):
        draw({"two": x.expand(5, 2, 3, 4)})
