"""Samples are read as what they are, known by their content, and refused with a reason."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from gendiff.feedback import samples
from gendiff.feedback.samples import SampleError

RNG = np.random.default_rng(0)
UNIT = RNG.uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
BYTES = RNG.integers(0, 256, (5, 8, 6, 3), np.uint8)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, pixels in enumerate(BYTES):
        Image.fromarray(pixels).save(tmp_path / (f"sub/img{i}.png" if i > 2 else f"img{7 + i}.png"))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (BYTES, "image"),
        (BYTES[..., 0], "image"),
        (BYTES[..., :1], "image"),
        (UNIT, "image"),
        (UNIT[..., 0] * 1.01, "image"),
        (UNIT[:, 0, :2, 0], "point"),
        (UNIT[:, 0, :, :2] * 50, "trajectory"),
        (UNIT[:, :, :6].astype(np.float64) * 3, "motion"),
    ],
)
def test_kinds_are_inferred(array, kind, tmp_path):
    np.save(tmp_path / "samples.npy", array)
    found = samples.load(tmp_path)
    assert (found.kind, len(found), found.ids) == (kind, 5, tuple("01234"))
    np.testing.assert_array_equal(found[3], array[3])
    assert len(set(found.hashes)) == 5
    assert found.folder == tmp_path
    assert samples.load(tmp_path / "samples.npy").hashes == found.hashes


def test_what_may_be_either_is_asked_for():
    either = UNIT[:, :5]
    with pytest.raises(SampleError, match=r"must come with --kind image \(.*\) or --kind motion \("):
        samples.of(either)
    assert samples.of(either, "motion").kind == "motion"
    assert samples.of(either, "image").kind == "image"


def test_image_files_come_in_natural_order_with_the_hash_of_their_pixels(images):
    found = samples.load(images)
    assert found.ids == ("img7.png", "img8.png", "img9.png", "sub/img3.png", "sub/img4.png")
    assert found.hashes == samples.of(BYTES).hashes
    np.testing.assert_array_equal(found[4], BYTES[4])
    shutil.move(images / "img7.png", images / "img10.png")
    moved = samples.load(images)
    assert moved.ids[2] == "img10.png"
    assert set(moved.hashes) == set(found.hashes)


def test_modes_of_images(tmp_path):
    grey = Image.fromarray(BYTES[0, ..., 0])
    grey.save(tmp_path / "a.png")
    grey.convert("P").save(tmp_path / "b.png")
    Image.fromarray(BYTES[0]).convert("RGBA").save(tmp_path / "c.png")
    Image.fromarray(BYTES[0]).convert("CMYK").save(tmp_path / "d.JPEG")
    found = samples.load(tmp_path)
    assert [found[i].shape for i in range(4)] == [(8, 6), (8, 6, 3), (8, 6, 4), (8, 6, 3)]


def test_the_hash_knows_type_shape_and_content():
    base = np.zeros((2, 3), np.float32)
    others = [base.reshape(3, 2), base.astype(np.float64), base + 1, base.view(np.int32)]
    assert len({samples.content_hash(each) for each in [base, *others]}) == 5
    assert samples.content_hash(np.asfortranarray(base)) == samples.content_hash(base)


def test_npz_arrays_and_parents(tmp_path):
    motions = UNIT * 4
    np.savez(tmp_path / "samples.npz", samples=motions, parents=np.array([-1, 0, 1, 2, 3, 4, 5, 6]))
    assert samples.load(tmp_path).parents.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]
    np.savez(tmp_path / "samples.npz", motions[:, :6], labels=np.zeros(5))
    found = samples.load(tmp_path)
    assert (found.kind, found.left_out) == ("motion", "1 array labels")
    np.savez(tmp_path / "samples.npz", a=motions, b=motions)
    with pytest.raises(SampleError, match="must have an array called samples, got a, b"):
        samples.load(tmp_path)
    np.savez(tmp_path / "samples.npz", samples=motions, parents=np.array([0, 1]))
    with pytest.raises(SampleError, match=r"parents in .*must be integers below 8 of shape \(8,\), got int64"):
        samples.load(tmp_path)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("how", ["npy", "npz", "raw"])
def test_nothing_is_unpickled(tmp_path, how):
    objects = np.array([Evil(), Evil()], object)
    if how == "npz":
        np.savez(tmp_path / "samples.npz", samples=objects)
    elif how == "npy":
        np.save(tmp_path / "samples.npy", objects, allow_pickle=True)
    else:
        objects.dump(tmp_path / "samples.npy")
    with pytest.raises(SampleError, match=r"samples\.np. must be plain arrays \(nothing pickled\)"):
        samples.load(tmp_path)


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path


def saved(tmp_path, array):
    np.save(tmp_path / "samples.npy", array)
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "must be a folder, or an .npz or .npy file, got nothing"),
        (lambda path: path, r"must hold samples.npz, samples.npy or PNG, JPEG, WebP or BMP files, got none"),
        (
            lambda path: broken(path, "a.png", b"\x89PNG\r\n\x1a\nxx"),
            "sample .*a.png must be a PNG, JPEG, WebP or BMP image",
        ),
        (lambda path: broken(path, "a.jpg", b"GIF89a"), "sample .*a.jpg must be a PNG, JPEG, WebP or BMP image"),
        (lambda path: broken(path, "samples.npy", b"\x93NUMPY\x01"), r"samples.npy must be plain arrays"),
        (lambda path: broken(path, "samples.npz", b"PK\x03\x04broken"), r"samples.npz must be plain arrays"),
        (lambda path: broken(path, "x.txt", b"") / "x.txt", "must be a folder, or an .npz or .npy file, got .txt"),
        (lambda path: saved(path, np.float64(1)), r"must hold at least one, got shape \(\)"),
        (lambda path: saved(path, np.zeros((0, 2))), r"must hold at least one, got shape \(0, 2\)"),
        (lambda path: saved(path, np.zeros((4, 2), np.int64)), r"images: uint8 or float .* got int64 of shape"),
        (lambda path: saved(path, np.zeros((4, 2, 2, 2, 2))), r"got float64 of shape \(4, 2, 2, 2, 2\)"),
        (lambda path: saved(path, np.array([[0, 1], [np.nan, 1]])), "sample 1 of .*must have finite numbers"),
        (lambda path: saved(path, np.full((2, 9, 9), 255.0)), r"must be floats in \[-1, 1\], got up to 255"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(SampleError, match=message):
        samples.load(make(tmp_path))


def test_two_array_files_are_ambiguous(tmp_path):
    np.savez(saved(tmp_path, UNIT) / "samples.npz", UNIT)
    with pytest.raises(SampleError, match=r"must hold samples.npz or samples.npy, got both"):
        samples.load(tmp_path)


def test_a_kind_that_does_not_fit_is_refused(tmp_path, images):
    with pytest.raises(SampleError, match=r"as points must be .* got float32 of shape"):
        samples.of(UNIT, "point")
    with pytest.raises(SampleError, match="must hold an array file for kind motion, got images"):
        samples.load(images, "motion")


def test_links_out_of_the_folder_are_refused(images, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.fromarray(BYTES[0]).save(outside)
    (images / "inside.png").symlink_to(images / "img7.png")
    assert len(samples.load(images)) == 6
    (images / "out.png").symlink_to(outside)
    with pytest.raises(SampleError, match=r"out\.png must be a file inside .* got a link to .*secret\.png"):
        samples.load(images)
    (images / "out.png").unlink()
    np.save(outside.with_suffix(".npy"), UNIT)
    (images / "samples.npy").symlink_to(outside.with_suffix(".npy"))
    with pytest.raises(SampleError, match=r"samples\.npy must be a file inside"):
        samples.load(images)


def test_a_file_that_changed_is_not_shown_as_the_old_one(images):
    found = samples.load(images)
    Image.fromarray(BYTES[1]).save(images / "img7.png")
    with pytest.raises(SampleError, match=r"sample img7\.png must keep the content it was loaded with, got another"):
        found[0]


@pytest.mark.parametrize(
    ("array", "kinds"),
    [
        ((UNIT + 1) * 127.5, "image motion"),
        ((UNIT[:, :, :6] + 1) * 127.5, "image motion"),
        (UNIT * 3, "image motion"),
        (UNIT.reshape(5, -1, 3), "image"),
        (BYTES[0], "image"),
        (BYTES[..., :2, 0], "image"),
    ],
)
def test_kinds_that_are_not_certain_are_asked_for(array, kinds):
    message = " or ".join(rf"--kind {kind} \(.*\)" for kind in kinds.split())
    with pytest.raises(SampleError, match=rf"must come with {message}, because .* may be something else"):
        samples.of(array)
    assert samples.of(array / 255, "image").kind == "image"


def test_parents_tell_motions_from_images(tmp_path):
    np.savez(tmp_path / "samples.npz", samples=UNIT, parents=np.arange(8) - 1)
    assert samples.load(tmp_path).kind == "motion"
    found = samples.load(tmp_path, "image")
    assert (found.kind, found.parents, found.left_out) == ("image", None, "1 array parents")


@pytest.mark.parametrize("dtype", [np.complex64, np.int32, bool, object, "U3"])
@pytest.mark.parametrize("shape", [(4, 2), (4, 9, 2), (4, 9, 9), (4, 9, 5, 3)])
def test_other_types_are_refused_with_the_kinds(dtype, shape):
    with pytest.raises(SampleError, match=r"images: uint8 or float .*points: .*trajectorys: .*motions: "):
        samples.of(np.zeros(shape, dtype))


@pytest.mark.parametrize("shape", [(4, 2), (4, 9, 2), (4, 8, 8, 3), (4, 9, 5, 3), (4, 9, 9)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_samples_that_are_not_finite_are_refused(shape, value):
    array = np.zeros(shape)
    array[2].flat[1] = value
    with pytest.raises(SampleError, match=r"sample 2 of .*must have finite numbers, got others \(in 1 samples\)"):
        samples.of(array)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_unicode_is_shown_escaped(tmp_path):
    for i, name in enumerate((b"caf\xe9.png", b"a.png", b"f\xe9/b.png", "\u00b21.png".encode())):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.fromarray(BYTES[i]).save(file, "PNG")
    found = samples.load(tmp_path)
    assert set(found.ids) == {"caf\\xe9.png", "a.png", "f\\xe9/b.png", "\u00b21.png"}
    assert "".join(found.ids).encode()
    assert len({found[i].tobytes() for i in range(4)}) == 4


def test_what_is_left_out_is_said(images, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.fromarray(BYTES[0]).save(other / "a.png")
    (images / "linked").symlink_to(other)
    (images / "sub" / "round").symlink_to(images)
    for name in ("a.gif", "b.TIFF", "sub/c.tiff", "labels.jsonl", "LICENSE"):
        (images / name).write_bytes(b"")
    os.rename(images / "img7.png", images / "img7.PNG")
    (images / "x.png").mkdir()
    os.rename(images / "img8.png", images / "x.png" / "y.png")
    found = samples.load(images)
    assert found.ids == ("img7.PNG", "img9.png", "sub/img3.png", "sub/img4.png", "x.png/y.png")
    assert found.left_out == "1 .gif, 2 .tiff, 1 .txt, 1 file without a suffix, 1 hidden, 2 linked folder"
    np.save(images / "samples.npy", UNIT)
    assert samples.load(images).left_out == "3 image files beside samples.npy"


def test_only_files_that_are_left_out_are_named(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(SampleError, match=r"got none of them \(left out: 1 \.gif\)"):
        samples.load(tmp_path)
