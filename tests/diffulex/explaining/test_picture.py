"""The page: complete, closed, free of what it did not write itself, and true to the report."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from diffulex.explaining.picture import groups, joined_names
from diffulex.explanation import LayerReport, Report
from lowering.errors import Reason, ReasonCode
from lowering.report import Cost, Decision

COST = Cost("H100", 512, 1e9, 1e9, floor_us=100.0, predicted_us=200.0)
EVIL = "</title></style></svg><script>alert('\"&\x00\x1b\ud800')</script>"


def layer(name="model.layers.0.mlp.experts", **changes):
    lowered = (
        Decision("lower", "moe_route", name, "triton moe_route 8 tokens a program"),
        Decision("lower", "moe_dispatch", name, "triton moe_dispatch 129 programs"),
        Decision("lower", "moe_expert_up", name, "triton moe_expert_up_2d785ee3 16x128x128 w4 s3", cost=COST),
        Decision("lower", "moe_expert_down", name, "triton down", Reason(ReasonCode.LAYOUT, "rows"), cost=COST),
        Decision("lower", "moe_combine", name, "Inductor IR, fused with its neighbours"),
    )
    fields = {"form": "E=128 bfloat16, T=64, then add", "activation": "folded silu(g) * u", "lowered": lowered}
    given = {"kernels": (), "router": "moe_route top 8", "backend": "generated Triton", **fields, **changes}
    return LayerReport(name=name, captured=True, **given)


REFUSED = LayerReport("lm.experts", False, "stock", "", (), "", "", reason="EAGER_EXPERTS: its own loop")
VOID = {"meta", "rect", "path"}


class Page(HTMLParser):
    """Elements with their attributes and text; complains about what is not closed in its order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append((self.open[-1] if self.open else "", data))

    def texts(self, tag):
        return [data for element, data in self.words if element == tag]

    def all(self, tag, kind=None):
        return [a for element, a in self.elements if element == tag and kind in (None, a.get("class"))]


def page_of(*layers, **changes):
    return Page(Report(layers, 1, 0, **changes).to_html())


def test_each_stage_is_a_row_with_what_it_replaces_and_what_runs():
    page = page_of(layer())
    assert page.texts("text") == [
        *("before: stock operations", "after: what runs"),
        *("routing", "scores, top-k, renormalisation", "moe_route", "triton moe_route 8 tokens a program"),
        *("slots by expert", "sort, histogram, cumulative sum", "moe_dispatch", "triton moe_dispatch 129 programs"),
        *("first GEMM", "gather of rows, grouped GEMM,", "activation"),
        *("moe_expert_up", "triton moe_expert_up_2d785ee3 16x128x128 w4 s3"),
        "predicted 200 us at 512 rows, floor 100 us (50%)",
        *("second GEMM", "grouped GEMM, scatter back to slot", "order"),
        *("moe_expert_down", "triton down", "LAYOUT: rows", "predicted 200 us at 512 rows, floor 100 us (50%)"),
        *("combination", "product with the weights, sum over", "K"),
        *("moe_combine", "Inductor IR, fused with its neighbours; read by add"),
    ]
    assert page.texts("h2") == ["model.layers.0.mlp.experts"]


def test_nothing_is_loaded_and_nothing_runs():
    html = Report((layer(), REFUSED), 1, 1, ("a break",)).to_html()
    assert set(re.findall(r"\b\w+://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\(|\son\w+=", html)
    assert "prefers-color-scheme:dark" in html


@pytest.mark.parametrize("what", ["name", "form", "router", "activation", "shared_expert", "reason", "break"])
def test_foreign_text_stays_text(what):
    refused = dataclasses.replace(REFUSED, reason=EVIL) if what == "reason" else REFUSED
    changes = {} if what in ("reason", "break") else {what: EVIL}
    report = Report((layer(**changes), refused), 1, 1, (EVIL,) if what == "break" else ())
    html = report.to_html()
    html.encode("utf-8")
    page = Page(html)
    assert not page.all("script") and len(page.all("svg")) == 2
    assert "alert(" in "".join(data for _, data in page.words) + str(page.all("svg"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)


def test_boxes_do_not_overlap_and_lie_inside():
    long = Decision("lower", "moe_expert_up", "", "x" * 300 + " word" * 60, cost=COST)
    many = layer(lowered=(*layer().lowered, long, dataclasses.replace(long, outcome="again")))
    page = page_of(many)
    width, height = (float(page.all("svg")[0][name]) for name in ("width", "height"))
    boxes = [tuple(float(a[k]) for k in ("x", "y", "width", "height")) for a in page.all("rect", "box")]
    assert len(boxes) == 5 + 7
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for i, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[i + 1 :]:
            beside = x + w < other_x or other_x + other_w < x
            assert beside or y + h < other_y or other_y + other_h < y
    bottoms = [y + h for x, y, w, h in boxes if x > 300]
    assert all(float(a["y"]) < max(bottoms) for a in page.all("text", "line"))


def test_bars_are_to_one_scale():
    cost = dataclasses.replace(COST, predicted_us=320.0, floor_us=160.0)
    half = dataclasses.replace(COST, predicted_us=160.0, floor_us=40.0)
    stages = tuple(dataclasses.replace(layer().lowered[2], cost=one) for one in (cost, half))
    page = page_of(layer(lowered=stages))
    box = max(float(a["width"]) for a in page.all("rect", "box"))
    whole = [float(a["width"]) for a in page.all("rect", "whole")]
    floor = [float(a["width"]) for a in page.all("rect", "floor")]
    assert box / 2 < whole[0] < box and whole[1] == pytest.approx(whole[0] / 2)
    assert (floor[0], floor[1]) == (pytest.approx(whole[0] / 2), pytest.approx(whole[0] / 8))


def test_measured_times_are_means_over_the_layers_of_a_picture():
    def measured(name, time):
        return layer(name, lowered=(dataclasses.replace(layer(name).lowered[2], measured_us=time),))

    page = page_of(measured("a.0", 300.0), measured("a.1", 500.0))
    assert "measured 400 us, 25% of it is the floor" in page.texts("text")
    assert page.texts("h2") == ["a.0-1 (2 layers)"]
    assert any("means over the 2 layers" in words for words in page.texts("p"))


def test_layers_that_are_alike_are_one_picture():
    layers = [layer(f"model.layers.{i}.mlp.experts") for i in range(48)]
    other = layer("model.layers.48.mlp.experts", form="E=8, then -")
    assert [len(group) for group in groups([*layers, other, REFUSED])] == [48, 1, 1]
    page = page_of(*layers, other, REFUSED)
    assert page.texts("h2") == [
        "model.layers.0-47.mlp.experts (48 layers)",
        "model.layers.48.mlp.experts",
        "lm.experts",
    ]
    assert len(page.all("svg")) == 3


def test_names_of_kernels_are_told_and_do_not_make_layers_differ():
    name = "triton_tem_fused_moe_expert_up_{}"
    stages = [dataclasses.replace(layer().lowered[2], kernels=(name.format(i),)) for i in (0, 1)]
    page = page_of(*(layer(f"a.{i}", lowered=(stage,)) for i, stage in enumerate(stages)))
    assert page.texts("h2") == ["a.0-1 (2 layers)"]
    assert "triton_tem_fused_moe_expert_up_0" in page.texts("text")
    assert any("the first of these layers" in words for words in page.texts("p"))


def test_a_layer_that_was_not_captured_says_why():
    page = page_of(REFUSED)
    assert page.texts("p")[1] == "not captured: EAGER_EXPERTS: its own loop"
    assert page.texts("text")[2:] == ["the layer's own operations", "the same", "EAGER_EXPERTS: its own loop"]


def test_what_was_not_taken_into_a_stage_is_a_row_of_its_own():
    kept = layer(
        lowered=layer().lowered[1:],
        router="stays aten (STRUCTURE: no top-k)",
        activation="stays aten (SHARED_USE: x)",
        shared_expert="beside the experts",
    )
    texts = page_of(kept).texts("text")
    for words in ("stays aten (STRUCTURE: no top-k)", "stays aten (SHARED_USE: x)", "beside the experts"):
        assert words in texts
    assert "gather of rows, grouped GEMM" in texts


def test_breaks_and_stages_of_no_layer_are_listed():
    page = page_of(break_reasons=("graph_break()",), unattributed=("moe_expert_up triton",))
    assert page.texts("li") == ["graph_break()", "moe_expert_up triton"]
    assert not page.all("svg")


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.0.b", "a.1.b", "a.3.b"], "a.{0-1,3}.b"),
        (["a.2"], "a.2"),
        (["a07.1", "a07.2"], "a07.1-2"),
        (["9" * 5000, "8" * 5000], "9" * 5000 + ", " + "8" * 5000),
        (["h.0", "h.1", "h.2"], "h.0-2"),
        (["a.0.b1", "a.1.b2"], "a.0.b1, a.1.b2"),
        (["a.0", "b.0", "c.0", "d.0", "e.0"], "a.0, b.0, c.0 and 2 more"),
    ],
)
def test_names_of_layers_that_are_alike(names, joined):
    assert joined_names(names) == joined
