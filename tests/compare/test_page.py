"""The page of a comparison: whole by itself, escaped, with all that the table has."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from torchlinop.compare import Answer, compare
from torchlinop.compare.charts import Series, chart, styles
from torchlinop.testing import RotatedOperator, spectra

EVIL = "<script>alert('&')</script>"


class Outline(HTMLParser):
    """Tags that are open, tags seen, and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for name, value in attributes if name in {"src", "href"}]
        if tag not in {"meta", "link", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    def fails(A, request):
        raise ValueError(EVIL)

    def lies(A, request):
        pairs = A.operator.eigenvalues[1:4], A.operator.eigenvectors(torch.arange(1, 4))
        return Answer(*pairs, converged=torch.ones(3, dtype=torch.bool))

    fails.__name__ = EVIL
    found = compare(
        {EVIL: RotatedOperator(spectra.neural(60)), "two": RotatedOperator(spectra.flat(60))},
        3,
        solvers=["torchlinop lanczos", "scipy eigsh", fails, lies],
        seeds=2,
        memory=False,
    )
    return found.to_html(tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.addresses == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", page)


def test_what_is_printed_is_escaped(page):
    assert EVIL not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page


def test_both_pictures_of_both_costs_are_there_for_every_problem(page):
    assert page.count('<svg viewBox="0 0 610 400"') == 2 * 2 * 2
    assert page.count("against products with the matrix") == 4
    assert page.count("against seconds") == 4


def test_failures_and_false_claims_are_marked(page):
    assert page.count('class="badge failed"') == 2
    assert page.count('class="badge wrong"') == 2
    assert "1 of the eigenvalues wanted are missing" in page
    assert "ValueError: &lt;script&gt;" in page


def test_a_name_with_half_a_surrogate_pair_is_written(tmp_path):
    A = RotatedOperator(spectra.neural(60))
    found = compare(
        {"file \udcff": A}, 3, solvers=["scipy eigsh"], seeds=1, memory=False, histories=False
    )
    text = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>file ?</h2>" in text
    found.save(tmp_path / "rows.json")
    saved = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert saved["rows"][0]["problem"] == "file \udcff"


def test_points_are_where_their_logarithms_are():
    picture = chart([Series("a", [1, 10, 100], [1e-2, 1e-4, 1e-6])], styles(["a"]),
                    across="x", up="y")  # fmt: skip
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)
    (x0, y0), (x1, y1), (x2, y2) = [(float(a), float(b)) for a, b in marks]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_drawn(value):
    picture = chart([Series("a", [1.0], [value])], styles(["a"]), across="x", up="y")
    assert "No points of y" in picture


def test_zero_is_drawn_at_the_bottom_and_garbage_at_the_top():
    series = [Series("a", [1, 2, 3], [0.0, 1e30, 1.0])]
    picture = chart(series, styles(["a"]), across="x", up="y")
    heights = [float(b) for b in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', picture)]
    assert heights[1] < heights[2] < heights[0]


def test_a_library_has_one_colour_and_its_solvers_differ():
    looks = styles(["scipy eigsh", "scipy lobpcg", "mine"])
    first, second, other = looks.values()
    assert first.colour == second.colour != other.colour
    assert (first.dash, first.mark) != (second.dash, second.mark)
    assert [look.number for look in looks.values()] == [1, 2, 3]
