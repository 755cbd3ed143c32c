"""The roofline: well-formed, complete, loads nothing, and marks stand where their numbers say."""

import itertools
import re
from xml.etree import ElementTree as ET

import pytest

from diffulex.benching.ceilings import Ceilings
from diffulex.benching.picture import Mark, roofline

NAME = "{http://www.w3.org/2000/svg}"
CEILINGS = Ceilings(matrix_rate=1e14, read_rate=1e12)


def mark(panel="qwen3", peer="diffulex", tokens=1, intensity=1.0, rate=1e12, words="10 us"):
    return Mark(panel, peer, tokens, intensity, rate, words)


def drawn(*marks, title="a device"):
    return ET.fromstring(roofline(marks, CEILINGS, title=title))


def of_kind(tree, tag, kind):
    return [one for one in tree.iter(NAME + tag) if kind in one.get("class", "").split()]


def place(element):
    """Where a glyph's path begins: the middle of the mark."""
    x, y = re.match(r"M(-?[\d.]+) (-?[\d.]+)m", element.find(NAME + "path").get("d")).groups()
    return float(x), float(y)


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_a_mark_for_each_time_and_a_panel_for_each_layer():
    marks = [mark(panel, peer, tokens) for panel in ("a", "b", "c") for peer in ("x", "y") for tokens in (1, 8)]
    tree = drawn(*marks)
    assert len(of_kind(tree, "g", "mark")) == 12 and len(of_kind(tree, "path", "ceiling")) == 3
    titles = [one.text for one in of_kind(tree, "text", "title")]
    assert titles == ["a device", "a", "b", "c"]
    assert "a, 8 tokens, y: 10 us" in [one.find(NAME + "title").text for one in of_kind(tree, "g", "mark")]


def test_marks_stand_on_the_ceilings_where_they_reach_them():
    tree = drawn(mark(intensity=10, rate=1e13), mark(intensity=100, rate=1e14), mark(intensity=10, rate=1e12))
    (slope, corner) = points(of_kind(tree, "path", "ceiling")[0].get("d"))
    on_slope, at_ridge, below = map(place, of_kind(tree, "g", "mark"))
    assert at_ridge == pytest.approx(corner, abs=0.11)
    share = (on_slope[0] - slope[0]) / (corner[0] - slope[0])
    assert on_slope[1] == pytest.approx(slope[1] + share * (corner[1] - slope[1]), abs=0.2)
    assert below[0] == on_slope[0] and below[1] > on_slope[1]


def test_a_decade_is_the_same_length_everywhere():
    tree = drawn(*(mark(intensity=10.0**i, rate=10.0 ** (10 + i)) for i in range(4)))
    places = [place(one) for one in of_kind(tree, "g", "mark")]
    steps = {(round(b[0] - a[0]), round(a[1] - b[1])) for a, b in itertools.pairwise(places)}
    assert len(steps) == 1


@pytest.mark.parametrize(("intensity", "rate"), [(1e-3, 1e3), (1e6, 3e14), (1.0, 1e12)])
def test_everything_lies_inside(intensity, rate):
    tree = drawn(mark(intensity=intensity, rate=rate))
    width, height = float(tree.get("width")), float(tree.get("height"))
    places = [place(one) for one in of_kind(tree, "g", "mark")]
    places += points(of_kind(tree, "path", "ceiling")[0].get("d"))
    assert all(0 < x < width and 0 < y < height for x, y in places)


def test_peers_have_a_colour_and_a_shape_of_their_own():
    tree = drawn(*(mark(peer=peer) for peer in "abcd"))
    marks = of_kind(tree, "g", "mark")
    assert len({one.get("class") for one in marks}) == 4
    outlines = [one.find(NAME + "path").get("d").split("m", 1)[1] for one in marks]
    assert len(set(outlines)) == 4


def test_cells_that_stand_together_share_a_label():
    labels = [one.text for one in drawn(mark(tokens=1), mark(tokens=8, intensity=1.05)).iter(NAME + "text")]
    assert "1, 8" in labels
    labels = [one.text for one in drawn(mark(tokens=1), mark(tokens=64, intensity=20)).iter(NAME + "text")]
    assert "64" in labels and "1, 64" not in labels


def test_light_and_dark_and_nothing_loaded():
    svg = roofline([mark()], CEILINGS, title="x")
    assert "prefers-color-scheme:dark" in svg and svg.count("--page:") == 2
    assert set(re.findall(r"\b\w+://[^\s\"']+", svg)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|image|use)\b|@import|url\(|\son\w+=", svg)
    used, defined = set(re.findall(r"var\((--\w+)\)", svg)), set(re.findall(r"(--\w+):#", svg))
    assert used <= defined


def test_foreign_text_stays_text():
    evil = "</svg><script>alert('\"&\x00')</script>"
    tree = drawn(mark(panel=evil, peer=evil, words=evil), title=evil)
    assert not list(tree.iter(NAME + "script")) and "alert(" in of_kind(tree, "text", "title")[1].text


def test_a_picture_without_marks():
    assert not of_kind(drawn(), "g", "mark")
