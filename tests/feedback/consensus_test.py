"""Merging and agreement against numbers worked out by hand and published ones."""

import math

import numpy as np
import pytest

from gendiff.feedback import consensus, labels, samples
from gendiff.feedback.labels import LabelError

POINTS = samples.of(np.arange(12, dtype=np.float32).reshape(6, 2))


def said(rater, *values):
    """Marks of the first samples: m, u, b, or - for none."""
    names = {"m": "malign", "u": "undecided", "b": "benign"}
    return [
        labels.mark(POINTS.ids[i], POINTS.hashes[i], names[value], rater, seconds=6.0)
        for i, value in enumerate("".join(values))
        if value in names
    ]


def test_most_raters_decide_and_ties_are_undecided():
    marks = said("a", "mmbmu-") + said("b", "mbbbu-") + said("c", "bu-m--")
    assert consensus.aligned(POINTS, marks) == ["malign", "undecided", "benign", "malign", "undecided", None]
    # 2 malign, 1 benign, 1 undecided: most is not half.
    assert consensus.merge([*marks, *said("d", "u")])[POINTS.hashes[0]] == "malign"


def test_a_mark_taken_back_is_no_vote():
    marks = said("a", "mb")
    back = marks[0]._replace(label=None, id="back")
    assert consensus.aligned(POINTS, [*marks, back])[:2] == [None, "benign"]
    assert consensus.aligned(POINTS, [*marks, back, marks[0]._replace(id="again")])[:2] == ["malign", "benign"]


def test_classes_are_indices_and_too_few_is_one_clear_error():
    marks = said("a", "mbbu-m")
    found = consensus.classes(POINTS, marks, malign=2, benign=2)
    assert found.malign.tolist() == [0, 5]
    assert found.benign.tolist() == [1, 2]
    assert found.malign.dtype.kind == "i"
    message = r"must be at least 3 malign and 1 benign, got 2 malign and 2 benign \(1 undecided, 1 unmarked\)"
    with pytest.raises(LabelError, match=message):
        consensus.classes(POINTS, marks, malign=3)
    with pytest.raises(LabelError, match="got 0 malign and 0 benign"):
        consensus.classes(POINTS, [])


def test_labels_of_other_samples_are_refused():
    others = samples.of(np.ones((3, 2), np.float32) * np.arange(3, dtype=np.float32)[:, None] - 7)
    marks = said("a", "mb")
    with pytest.raises(LabelError, match=r"label of sample 0 must have the content hash .* got .*name another file"):
        consensus.classes(others, marks)
    with pytest.raises(LabelError, match="label of sample x must have the hash of a sample in"):
        consensus.check(POINTS, [marks[0]._replace(sample="x", hash="0" * 64)])


def test_renamed_and_reordered_samples_keep_their_labels():
    turned = samples.of(POINTS.source[::-1])
    assert consensus.classes(turned, said("a", "mb")).malign.tolist() == [5]


def test_cohen_against_his_formula():
    # Two raters, 50 samples: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert consensus.cohen(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert consensus.cohen(np.diag([3, 4, 5])) == pytest.approx(1.0)
    assert consensus.cohen(np.outer([1, 2, 3], [3, 2, 1])) == pytest.approx(0.0)
    assert math.isnan(consensus.cohen(np.diag([7, 0, 0])))


def test_fleiss_against_a_worked_table():
    # The table of 14 raters, 10 subjects and 5 categories that textbooks work out: P = 0.378, P_e = 0.213.
    rows = "0 0 0 0 14,0 2 6 4 2,0 0 3 5 6,0 3 9 2 0,2 2 8 1 1,7 7 0 0 0,3 2 6 3 0,2 5 3 2 2,6 5 2 1 0,0 2 2 3 7"
    table = np.array([[int(cell) for cell in row.split()] for row in rows.split(",")])
    assert consensus.fleiss(table) == pytest.approx(0.210, abs=5e-4)
    assert consensus.fleiss(np.array([[3, 0], [0, 3]])) == pytest.approx(1.0)
    assert math.isnan(consensus.fleiss(np.array([[1, 0], [0, 1]])))
    assert math.isnan(consensus.fleiss(np.zeros((0, 3))))


def test_agreement_of_marks():
    marks = said("b", "mmbb--") + said("a", "mbbbm-") + said("c", "----m-")
    found = consensus.agreement(marks)
    assert list(found.pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    # Four common samples, three equal; p_e = (1/4)(2/4) + (3/4)(2/4) = 1/2.
    assert found.pairs["a", "b"] == consensus.Pair(4, 0.75, pytest.approx(0.5))
    assert found.pairs["a", "c"].share == 1.0
    assert found.pairs["b", "c"].n == 0
    assert math.isnan(found.pairs["b", "c"].share)
    assert found.n == 0
    assert math.isnan(found.kappa)
    assert consensus.agreement(marks[:9]).n == 4
    # Fleiss' chance is of the pooled labels, m 3 of 8 and b 5 of 8: (3/4 - 34/64) / (1 - 34/64).
    assert consensus.agreement(marks[:9]).kappa == pytest.approx((0.75 - 34 / 64) / (1 - 34 / 64))
    assert consensus.agreement([]).pairs == {}


def test_the_report_counts_times_and_agrees():
    text = consensus.report(POINTS, said("anna", "mmbb--") + said("béla", "mbbbm-"))
    assert "5 of 6 points marked: 2 malign, 1 undecided, 2 benign" in text
    assert "anna: 2 malign, 0 undecided, 2 benign; 0.4 minutes" in text
    assert "anna and béla: 75 % equal on 4, Cohen's kappa 0.50" in text
    assert "0 of 6 points marked" in consensus.report(POINTS, [])
