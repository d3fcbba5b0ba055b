"""Paths of the commands that make data."""

import sys
from pathlib import Path

import pytest

from gendiff.data import files, maze2d, traffic
from gendiff.feedback import __main__ as feedback


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://bucket", "gs:/bucket", "file:///x", "hf:"])
def test_addresses_are_no_paths(path):
    with pytest.raises(ValueError, match="--data must be a path of a file system, got "):
        files.local("--data", Path(path))


@pytest.mark.parametrize("path", ["x", "/x", "a:b", "x/gs:/x", "C:/x"])
def test_paths_are_paths(path):
    assert files.local("--data", Path(path)) == files.argument(path) == Path(path)


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (maze2d.main, ["gs://bucket/x"], "argument folder: it must be a path of a file system, got gs:/bucket/x"),
        (maze2d.main, [""], "argument folder: must be a path, got an empty one"),
        (traffic.main, ["s3://bucket/x"], "argument folder: it must be a path of a file system, got s3:/bucket/x"),
        (traffic.main, ["x", "--embed", "gs://b/x"], "argument --embed: it must be a path of a file system"),
        (
            feedback.main,
            ["gs://bucket/x", "--report"],
            "error: samples must be a path of a file system, got gs:/bucket",
        ),
        (feedback.main, ["x", "--report", "--labels", "gs://b"], "error: --labels must be a path of a file system"),
        (feedback.main, ["x", "--report", "--also", "gs://b"], "error: --also must be a path of a file system"),
    ],
)
def test_data_commands_refuse_addresses(main, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
