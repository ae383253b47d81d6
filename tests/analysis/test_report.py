import re
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from hqlt.analysis.report import Section, figure_svg, plot_curves, plot_gates, render

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
NASTY = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a page would load, what it says, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.said: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                self.loads.append(value or "")
            if name == "style":
                self.loads += re.findall(r"url\(['\"]?([^)'\"]*)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.said.setdefault(self.open[-1], []).append(data)


def curves() -> dict[str, list[tuple[float, float]]]:
    return {"HQLT": [(0, 3.0), (10, 2.0), (20, 1.5)], "DeltaNet": [(0, 3.1), (20, 1.9)]}


def example() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = [
            plot_curves(curves(), "tokens", "bits per byte", marker=5.0, marker_label="here", chance=2.5),
            plot_gates(torch.rand(3, 6), list(b"a \n\x00\xc3$")),
        ]
        figures = [figure_svg(plot) for plot in plots]
    table = [{"model": "HQLT", "bits": "1.500"}, {"model": "DeltaNet", "bits": "1.900"}]
    sections = [
        Section("First", "A note.", table=table, figure=figures[0]),
        Section("Second", "Another.", figure=figures[1], code="def f():\n    return 1"),
    ]
    return render("A report", sections, "The end.")


def drawn_paths(text: str, colour: str) -> list[str]:
    """The drawn lines of a colour."""
    root = ElementTree.fromstring(text)
    return [p.get("d", "") for p in root.iter(f"{SVG}path") if f"stroke: {colour}" in p.get("style", "")]


# The page


def test_the_page_loads_nothing():
    text = example()
    page = Page(text)
    assert page.loads  # markers of the plots refer to their definitions
    for target in page.loads:
        assert target.startswith(("#", "data:")), f"the page would load {target}"
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))


def test_the_page_says_everything():
    page = Page(example())
    assert page.open == []
    assert page.said["h1"] == page.said["title"][:1] == ["A report"]
    assert page.said["h2"] == ["First", "Second"]
    assert page.said["p"] == ["A note.", "Another."]
    assert page.said["th"] == ["model", "bits"]
    assert page.said["td"] == ["HQLT", "1.500", "DeltaNet", "1.900"]
    assert page.said["pre"] == ["def f():\n    return 1"]
    assert page.said["footer"] == ["The end."]
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == page.tags.count("pre") == 1


def test_text_is_escaped_everywhere():
    row = {NASTY: NASTY}
    text = render(NASTY, [Section(NASTY, NASTY, table=[row], code=NASTY)], NASTY)
    page = Page(text)
    assert "script" not in page.tags
    for tag in ("title", "h1", "h2", "p", "th", "td", "pre", "footer"):
        assert "".join(page.said[tag]) == NASTY


def test_a_page_is_the_same_for_the_same_content():
    sections = [Section("One", "Note", table=[{"a": "1"}])]
    assert render("t", sections, "f") == render("t", sections, "f")
    assert render("t", [], "f").count("<section>") == 0


# Figures


def test_a_figure_is_one_svg_element():
    text = figure_svg(plot_curves(curves(), "x", "y"))
    assert ElementTree.fromstring(text).tag == f"{SVG}svg"
    assert "<?xml" not in text
    assert "DOCTYPE" not in text


@pytest.mark.parametrize("make", [lambda: plot_curves(curves(), "x", "y"), lambda: plot_gates(torch.eye(4), [97] * 4)])
def test_a_figure_has_the_same_bytes_each_time(make):
    first = figure_svg(make())
    assert figure_svg(make()) == first
    assert "<dc:date>" not in first


def test_curves_carry_their_names_and_values():
    text = figure_svg(plot_curves(curves(), "tokens", "bits <per> byte", marker=5.0, marker_label="here", chance=2.5))
    for name in ("HQLT", "DeltaNet", "here", "chance", "tokens", "bits &lt;per&gt; byte"):
        assert f"<!-- {name} -->" in text
    for colour in ("#0072b2", "#d55e00"):
        assert drawn_paths(text, colour)
    bare = figure_svg(plot_curves(curves(), "x", "y"))
    assert "<!-- chance -->" not in bare


def test_a_curve_is_where_its_values_are():
    axes = plot_curves(curves(), "x", "y", marker=5.0, chance=2.5).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn["HQLT"] == [[0, 3.0], [10, 2.0], [20, 1.5]]
    assert drawn["DeltaNet"] == [[0, 3.1], [20, 1.9]]
    assert drawn["chance"] == [[0, 2.5], [1, 2.5]]
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines()[-2:]}
    assert len(styles) == 2


def test_gates_are_drawn_on_a_fixed_scale_over_their_bytes():
    gates = torch.tensor([[0.4, 0.5, 0.6, 0.45], [0.5, 0.5, 0.5, 0.5]])
    axes = plot_gates(gates, [104, 10, 32, 200]).axes[0]
    image = axes.get_images()[0]
    assert image.get_array().tolist() == gates.tolist()
    assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["h", "⏎", " ", "·"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 1", "layer 2"]


def test_drawing_leaves_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_svg(plot_curves(curves(), "x", "y"))
    assert dict(matplotlib.rcParams) == before
