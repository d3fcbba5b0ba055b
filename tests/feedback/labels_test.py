"""The file of labels keeps every mark: under many writers, under a kill, and it says what is wrong with it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gendiff.feedback import labels
from gendiff.feedback.labels import LabelError, Mark, Meaning

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from pathlib import Path
from gendiff.feedback import labels
path, rater, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(count):
    marks = [labels.mark(f"{i}-{k}" + "x" * 500, f"{k:064x}", "malign", rater) for k in range(3)]
    labels.append(path, marks)
    print(*(mark.id for mark in marks), flush=True)
"""


def hashed(number: int) -> str:
    return f"{number:064x}"


def marks(count: int, rater: str = "anna") -> list[Mark]:
    return [labels.mark(f"{i}.png", hashed(i), "benign", rater, seconds=0.5, session="s") for i in range(count)]


def writer(path: Path, rater: str, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), rater, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "labels.jsonl"
    first, second = marks(2)
    undone = labels.mark("0.png", hashed(0), None, "anna", 0.25)._replace(undoes=first.id, group="g")
    labels.append(path, [first, Meaning("a stroke", "anna"), second])
    labels.append(path, [undone, Meaning("a stroke, also a short one", "béla", "s", "2026-01-01T00:00:00Z")])
    assert labels.read(path) == [first, second, undone]
    assert labels.meaning(path) == "a stroke, also a short one"
    assert labels.latest(labels.read(path)) == {(hashed(1), "anna"): second}
    assert labels.seconds(labels.read(path)) == {"anna": 1.25}
    assert len(path.read_text().splitlines()) == 5
    assert all(json.loads(line)["type"] in ("mark", "meaning") for line in path.read_text().splitlines())


def test_the_last_mark_of_a_rater_counts_and_repeated_lines_count_once(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    early, late = labels.mark("0", hashed(0), "malign", "anna", 1.0), labels.mark("0", hashed(0), "benign", "anna", 2.0)
    labels.append(path, [early, late, early])  # a page that heard no answer sends again
    labels.append(other, [late, labels.mark("0", hashed(0), "malign", "béla", 4.0)])
    assert labels.latest(labels.read(path))[hashed(0), "anna"].label == "benign"
    both = labels.read(path, other)
    assert len(both) == 3
    assert labels.seconds(both) == {"anna": 3.0, "béla": 4.0}


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "labels.jsonl"
    writers = [writer(path, f"rater-{k}", 60) for k in range(4)]
    said = [set(each.communicate(timeout=600)[0].split()) for each in writers]
    assert all(each.returncode == 0 for each in writers)
    found = labels.read(path)
    assert len(found) == 4 * 60 * 3
    assert {mark.id for mark in found} == set().union(*said)
    for k in range(4):  # each writer's own order is kept
        names = [mark.sample.split("x")[0] for mark in found if mark.rater == f"rater-{k}"]
        assert names == [f"{i}-{j}" for i in range(60) for j in range(3)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_kill_loses_no_mark_that_was_acknowledged(tmp_path):
    path, said = tmp_path / "labels.jsonl", set()
    for k in range(4):
        killed = writer(path, f"rater-{k}", 1_000_000)
        lines = [killed.stdout.readline() for _ in range(5 + 3 * k)]
        time.sleep(0.003 * k)
        killed.kill()
        rest = killed.communicate()[0]
        said |= {
            word for line in [*lines, *rest.splitlines(keepends=True)] if line[-1:] == "\n" for word in line.split()
        }
    labels.append(path, marks(1))
    assert said <= {mark.id for mark in labels.read(path)}


def test_a_line_torn_at_any_byte_is_mended(tmp_path):
    path = tmp_path / "labels.jsonl"
    kept, torn, after = marks(3)
    labels.append(path, [kept])
    whole = path.read_bytes()
    labels.append(path, [torn])
    line = path.read_bytes()[len(whole) :]
    for cut in range(1, len(line)):
        path.write_bytes(whole + line[:cut])
        complete = [torn] if cut == len(line) - 1 else []  # only its newline is missing
        assert labels.read(path) == [kept, *complete]
        labels.append(path, [after])
        assert labels.read(path) == [kept, *complete, after]
        assert path.read_bytes().startswith(whole + line[:cut]), "nothing that was written is changed"


def test_opening_for_nothing_changes_nothing(tmp_path):
    path = tmp_path / "labels.jsonl"
    labels.append(path, [])
    assert path.read_bytes() == b""
    path.write_bytes(b'{"type": "ma')
    labels.append(path, [])
    assert path.read_bytes() == b'{"type": "ma'


GOOD = {"type": "mark", "sample": "0", "hash": hashed(0), "label": "malign", "seconds": 1, "rater": "anna"}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"type": "other"}',
        *(
            json.dumps(GOOD | change).encode()
            for change in (
                {"label": "bad"},
                {"seconds": -1},
                {"seconds": "1"},
                {"seconds": True},
                {"seconds": float("nan")},
                {"hash": "12"},
                {"rater": " "},
                {"rater": "a\nb"},
                {"sample": None},
                {"id": 7},
            )
        ),
    ],
)
def test_damage_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    labels.append(path, marks(1))
    before = path.read_bytes()
    path.write_bytes(before + line + b"\n" + before)
    with pytest.raises(LabelError, match=r"labels\.jsonl, line 2 must be a JSON line .* got"):
        labels.read(path)
    assert path.read_bytes() == before + line + b"\n" + before


def test_missing_and_unwritable_files_are_named(tmp_path):
    with pytest.raises(LabelError, match=r"none\.jsonl must be a file of labels, got none"):
        labels.read(tmp_path / "none.jsonl")
    with pytest.raises(OSError, match=r"labels .*folder.labels\.jsonl: could not be written"):
        labels.append(tmp_path / "folder" / "labels.jsonl", marks(1))
    with pytest.raises(LabelError, match="got none to read"):
        labels.read(tmp_path)


@pytest.mark.parametrize(
    "change", [{"rater": ""}, {"rater": "a\nb"}, {"sample": "\ud83d"}, {"hash": "1"}, {"seconds": float("nan")}]
)
def test_what_could_not_be_read_is_not_written(tmp_path, change):
    path = tmp_path / "labels.jsonl"
    kept, wrong = marks(2)
    labels.append(path, [kept])
    with pytest.raises(ValueError, match=next(iter(change))):
        labels.append(path, [wrong, wrong._replace(**change)])
    with pytest.raises(ValueError, match="text must be Unicode text of at most 4000 characters"):
        labels.append(path, [Meaning("half an emoji \ud83d", "anna")])
    assert labels.read(path) == [kept]


def test_stored_text_that_is_no_unicode_is_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    for line in (
        b'{"type": "meaning", "text": "\\ud83d", "rater": "anna"}\n',
        b'{"type": "meaning", "text": "\xff"}\n',
    ):
        path.write_bytes(line)
        with pytest.raises(LabelError, match=r"line 1 must be a JSON line .*(Unicode text|not UTF-8)"):
            labels.read(path)


def parsed(monkeypatch):
    """The lines that are parsed from here on."""
    lines = []
    monkeypatch.setattr(labels, "parse", lambda record, parse=labels.parse: lines.append(record) or parse(record))
    return lines


def test_a_follower_reads_new_lines_only(tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    every = marks(40)
    labels.append(path, every[:30])
    follower = labels.Follower(path)
    assert follower.read() == every[:30]
    assert not follower.changed()
    labels.append(path, every[30:32])
    assert follower.changed()
    lines = parsed(monkeypatch)
    assert follower.read() == every[:32]
    assert len(lines) == 2
    labels.append(path, [every[3], every[32]])
    assert follower.read() == every[:33], "a line that comes twice counts once"


def test_a_follower_sees_what_a_reader_sees(tmp_path):
    path = tmp_path / "labels.jsonl"
    first, second, third = marks(3)
    labels.append(path, [first])
    follower = labels.Follower(path)
    follower.read()
    line = json.dumps(labels.as_json(second)).encode()
    for rest in (line[:30], line):  # torn, and without its newline only
        before = path.read_bytes()
        path.write_bytes(before + rest)
        assert follower.read() == labels.records(path)
        labels.append(path, [third])
        assert follower.read() == labels.records(path)
    for text in (b"damage\n" + path.read_bytes(), path.read_bytes() + b"damage\n"):
        before = path.read_bytes()
        path.write_bytes(text)
        with pytest.raises(LabelError) as plain:
            labels.read(path)
        with pytest.raises(LabelError) as followed:
            follower.read()
        assert str(followed.value) == str(plain.value)
        path.write_bytes(before)
        assert follower.read() == labels.records(path)
    path.write_bytes(path.read_bytes().replace(b"anna", b"bela"))
    assert {mark.rater for mark in follower.read() if isinstance(mark, Mark)} == {"bela"}, (
        "as long as before, but another"
    )
