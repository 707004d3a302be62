"""Pages and plots: whatever a name holds is text, and numbers are where the axes say."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from cytosyn_aug.report.rendering import ENVIRONMENT, embed, flattened, render_page
from cytosyn_aug.report.svg import (
    Curve,
    Mark,
    Points,
    Range,
    plot_bars,
    plot_curves,
    plot_points,
    ticks,
)
from cytosyn_aug.report.throughput import measure_throughput

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>\n\u202egpj.\udcff&amp;'
_VOID = {"meta", "img", "br"}
PARTS = ENVIRONMENT.get_template("parts.html.j2").module


class Parsed(HTMLParser):
    """A page as a browser takes it: elements, attributes and text; tags must be balanced."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def whole_text(self):
        """The text as a reader sees it: line breaks of a template are spaces or nothing."""
        shown = (re.sub(r"\s*\n\s*", " ", text) for text in self.text if not text.isspace())
        return "".join(shown)


def check_page(page):
    """Check that a page needs nothing from elsewhere and runs nothing; return it parsed."""
    found = Parsed(page)
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(name, "#")
            assert target.startswith(("data:image/", "#")), (tag, name, target[:80])
    style = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    policies = [a.get("content", "") for t, a in found.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    page.encode("utf-8")
    return found


def test_whatever_a_name_holds_is_text():
    image = embed(np.zeros((8, 8, 3), np.uint8))
    parts = [
        PARTS.table([EVIL], [[EVIL], [EVIL * 3]]),
        PARTS.table([EVIL], [[EVIL], [EVIL * 3]], first_is_name=True),
        PARTS.settings([(EVIL, EVIL)]),
        PARTS.findings([(EVIL, "bad")]),
        PARTS.image(image, EVIL),
        PARTS.image(embed(None, EVIL), EVIL),
        PARTS.legend([(EVIL, "#000", "line")]),
        plot_curves([Curve(EVIL, [0, 1], [0, 1], "#000")], title=EVIL, x_label=EVIL),
        plot_points([Points(EVIL, [0], [1], "#000")], title=EVIL, x_label=EVIL, y_label=EVIL),
        plot_bars([[1.0]], Range(0, 1), title=EVIL, x_label=EVIL, marks=[Mark(0.5, EVIL)]),
    ]
    page = render_page(EVIL, [(EVIL, Markup().join(parts)), ("left out", Markup())])
    found = check_page(page)
    assert sum(tag == "img" for tag, _ in found.elements) == 1
    assert r"<script>alert(1)</script>" in found.whole_text
    assert r"\n\u202egpj.\udcff&amp;" in found.whole_text
    assert "left out" not in page


def test_pictures_are_in_the_page_with_their_colours():
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([x + 100, y + 50, 255 - x], -1).astype(np.uint8)
    shown = PARTS.image(embed(pixels, side_px=96), "a tile")
    content = base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])
    found = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert found.shape == pixels.shape
    assert np.abs(found - pixels).mean() < 2
    assert 'width="48" height="32"' in PARTS.image(embed(pixels, side_px=48), "a tile")


def test_columns_of_numbers_stand_right_and_nothing_is_a_dash():
    made = PARTS.table(["name", "value"], [["a", "1,234"], ["b", None]])
    assert made.count('class="number"') == 3
    assert ">-<" in made
    assert PARTS.table(["value"], [["1"], ["unknown"]]).count("number") == 0


def test_names_stand_left_and_show_whole_when_pointed_at():
    name = f"{'7' * 60}/tile.png"
    made = PARTS.table(["name", "value"], [[name, "1"], ["12", "2"]], first_is_name=True)
    assert made.count('class="number"') == 3
    assert f'<span title="{name}">77777777777777...' in made
    assert "<td>12</td>" in made


def test_settings_are_named_by_their_path():
    nested = {"recipe": {"strength": [0.5, 1.0]}, "references": [{"name": "a"}], "mpp": None}
    assert list(flattened(nested)) == [
        ("recipe.strength", "[0.5, 1.0]"),
        ("references[0].name", "a"),
        ("mpp", "null"),
    ]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (Range(0, 10), [0, 2, 4, 6, 8, 10]),
        (Range(-0.13, 0.11), [-0.1, -0.05, 0, 0.05, 0.1]),
        (Range(0.981, 1.0), [0.985, 0.99, 0.995, 1.0]),
        (Range(3, 3), [3]),
    ],
)
def test_ticks_are_round_numbers_inside(ends, expected):
    assert ticks(ends) == pytest.approx(expected)


def svg(text):
    return ET.fromstring(text)


def test_a_line_goes_from_corner_to_corner():
    plot = svg(plot_curves([Curve("c", [2.0, 4.0], [0.0, 1.0], "#000")], title="t", x_label="x"))
    line = next(e for e in plot.iter() if e.tag.endswith("polyline"))
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in line.get("points").split())
    frame = next(e for e in plot.iter() if e.get("fill") == "none" and e.tag.endswith("path"))
    left, top, bottom, right = map(float, re.findall(r"\d+", frame.get("d")))
    assert (x0, y0, x1) == pytest.approx((left, bottom, right))
    assert y1 == pytest.approx(bottom - (bottom - top) / 1.05, abs=0.1)


def test_bars_have_the_height_of_their_counts_and_stack():
    counts = [[0.0, 4.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]]
    ends = Range(0.0, 4.0)
    plot = svg(plot_bars(counts, ends, title="t", x_label="x", shown=ends))
    bars = [e for e in plot.iter() if e.tag.endswith("rect")]
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[0] / heights[1] == pytest.approx(2.0, abs=0.01)
    assert heights[0] / heights[2] == pytest.approx(4.0, abs=0.03)
    lower, _, upper = (float(bar.get("y")) for bar in bars)
    assert upper + heights[2] == pytest.approx(lower, abs=0.11)


def test_many_bins_are_joined_without_losing_any():
    counts = np.ones(400)
    plot = svg(plot_bars([counts.tolist()], Range(-1, 1), title="t", x_label="x"))
    bars = [e for e in plot.iter() if e.tag.endswith("rect")]
    assert len(bars) == 50
    assert len({bar.get("height") for bar in bars}) == 1


def test_a_mark_is_drawn_where_it_is_although_nothing_was_counted_there():
    counts = np.zeros(100)
    counts[90:] = 1
    text = plot_bars(
        [counts.tolist()], Range(0, 1), title="t", x_label="x", marks=[Mark(0.25, "min 0.25")]
    )
    line = re.search(r'<path d="M([\d.]+) 14V\d+" stroke="#b91c1c"', text)
    label = re.search(r'<text x="([\d.]+)" y="22.0" text-anchor="start">min 0.25<', text)
    assert float(label[1]) == pytest.approx(float(line[1]) + 4)
    assert 52 < float(line[1]) < 100


def test_pace_is_results_over_time_at_work():
    even = measure_throughput(0.0, range(1, 101), 100)
    assert (even.results_per_s, even.num_pauses) == (1.0, 0)
    sampled = measure_throughput(0.0, range(10, 101, 10), 100)
    assert sampled.results_per_s == pytest.approx(1.0)
    stopped = measure_throughput(0.0, [*range(1, 51), *range(3651, 3701)], 100)
    assert (stopped.num_pauses, stopped.paused_s) == (1, 3601.0)
    assert stopped.results_per_s == pytest.approx(100 / 99)
    assert stopped.seconds == sorted(stopped.seconds)
    shuffled = measure_throughput(0.0, [3.0, 1.0, 2.0], 3)
    assert shuffled.seconds == [1.0, 2.0, 3.0]


def test_pace_is_not_told_from_times_that_say_nothing():
    assert measure_throughput(0.0, [], 5) is None
    assert measure_throughput(0.0, [7.0, 7.0], 2) is None
