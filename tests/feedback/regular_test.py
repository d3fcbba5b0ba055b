"""Only regular files are opened, and at once; every name can be shown."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from gendiff.feedback import labels, regular, samples
from gendiff.feedback.labels import LabelError
from gendiff.feedback.samples import SampleError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="special files")


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nothing")


def device(path):
    path.symlink_to("/dev/zero")


def bound(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # addresses are short
        made.bind(path.name)
        os.chdir(here)


SPECIAL = {"a named pipe": pipe, "symbolic links": loop, "No such file": dangling, "outside": device, "a socket": bound}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("name", ["a.png", "samples.npy", "sub/b.JPG"])
def test_special_samples_are_errors_in_good_time(tmp_path, what, name):
    (tmp_path / "sub").mkdir()
    SPECIAL[what](tmp_path / name)
    words = {"outside": "a link to /dev/zero"}.get(what, what)
    with pytest.raises(SampleError, match=rf"{name.replace('.', '[.]')} must be .*{words}"):
        samples.load(tmp_path)


def test_a_special_place_is_an_error_in_good_time(tmp_path):
    pipe(tmp_path / "pipe.npy")
    loop(tmp_path / "loop")
    for name, words in (("pipe.npy", "a named pipe"), ("loop", "symbolic links")):
        with pytest.raises(SampleError, match=words):
            samples.load(tmp_path / name)


SECRET = "root:x:0:0"


@pytest.mark.parametrize("what", ["link", "dangling", *SPECIAL])
def test_labels_are_a_regular_file(tmp_path, what):
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text(SECRET + "\n")
    path = folder / "labels.jsonl"
    kinds = {
        "link": lambda place: place.symlink_to(secret),
        "dangling": lambda place: place.symlink_to(tmp_path / "new"),
    }
    (kinds | SPECIAL)[what](path)
    with pytest.raises(
        OSError, match=r"labels\.jsonl: could not be written \(it must be a regular file, got"
    ) as writing:
        labels.append(path, [labels.mark("0", "0" * 64, "malign", "anna")])
    with pytest.raises(
        LabelError, match=r"labels\.jsonl must be a file of labels, .* must be a regular file"
    ) as reading:
        labels.read(path)
    assert SECRET not in f"{writing.value}{reading.value}"
    assert secret.read_text() == SECRET + "\n"
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_none_of_labels_is_not_quoted(tmp_path):
    (tmp_path / "secret").write_text(SECRET + "\nmore\n")
    (tmp_path / "labels.jsonl").hardlink_to(tmp_path / "secret")
    with pytest.raises(LabelError, match=r"labels\.jsonl, line 1 must be a JSON line") as error:
        labels.read(tmp_path / "labels.jsonl")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [(b"caf\xe9.png", "caf\\xe9.png"), ("café.png".encode(), "café.png"), (b"\xed\xa0\xbd", "\\xed\\xa0\\xbd")],
)
def test_names_are_shown_as_unicode(name, text):
    assert regular.shown(os.fsdecode(name)) == text
    assert regular.shown(Path(os.fsdecode(name))) == text
