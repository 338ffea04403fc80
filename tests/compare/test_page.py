"""The HTML page: self-contained, accessible, safe, small; and looked at in a headless Chromium where there is one."""

import itertools
import re
from html.parser import HTMLParser

import pytest
from fakes.browser import MEASURE, Browser, look, programs
from fakes.pages import EVIL, alone, collected, edited, empty, many, sparse, with_levers

from nanogpt_mac.compare import contents
from nanogpt_mac.compare import page as compare_page
from nanogpt_mac.compare.leaderboard import Board, Entry
from nanogpt_mac.report import page, show
from nanogpt_mac.report.table import Report

pytestmark = pytest.mark.xdist_group("page")  # what its fixtures make is expensive: one worker makes it

SECTIONS = ["variants", "problems", "times", "loss", "utilisation", "phases", "memory", "energy", "levers", "parity",
            "fallbacks", "compile", "published", "environment"]  # fmt: skip
VOID = ("meta", "link", "br")
LARGEST = 1_000_000


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def pages(comparison):
    """Name -> HTML of comparisons of every kind."""
    made = {
        "evil": with_levers(comparison),
        "one run": alone(comparison),
        "twelve variants": many(comparison),
        "sparse": sparse(comparison),
        "nothing": empty(),
    }
    return {name: compare_page.html(document) for name, document in made.items()} | {
        "leaderboard": board(comparison).html()
    }


def board(comparison):
    from pathlib import Path

    long = comparison.machine.model_copy(update={"name": f"Apple M4 Max {EVIL} {'long' * 60}"})
    return Board(
        [
            Entry(variant, comparison.work, machine, comparison.environment, Path("runs/a"), None)
            for machine in (comparison.machine, long)
            for variant in comparison.variants
        ]
    )


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.text = tag, dict(attributes), parent, [], ""

    def all(self, *tags):
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)

    def words(self):
        return self.text + "".join(child.words() for child in self.children)


class Tree(HTMLParser):
    """The page as nodes; a tag that is not closed, or closed out of order, is an error."""

    def __init__(self, html):
        super().__init__()
        self.root = self.now = Node("", {}, None)
        self.feed(html)
        assert self.now is self.root, f"<{self.now.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs, self.now)
        self.now.children.append(node)
        if tag not in VOID:
            self.now = node

    def handle_startendtag(self, tag, attrs):
        self.now.children.append(Node(tag, attrs, self.now))

    def handle_endtag(self, tag):
        assert self.now.tag == tag, f"</{tag}> closes <{self.now.tag}>"
        self.now = self.now.parent

    def handle_data(self, data):
        self.now.text += data


@pytest.fixture(scope="module")
def trees(pages):
    return {name: Tree(html).root for name, html in pages.items()}


def test_small_and_always_the_same(pages, comparison):
    assert {name: len(html.encode()) for name, html in pages.items() if len(html.encode()) >= LARGEST} == {}
    assert len(pages["twelve variants"].encode()) < LARGEST / 2
    assert compare_page.html(alone(comparison)) == pages["one run"]


def test_every_section_is_present_or_says_why_not(trees):
    for name, tree in trees.items():
        if name == "leaderboard":
            continue
        found = [node.attributes["id"] for node in tree.all("section")]
        assert found == SECTIONS
        linked = [node.attributes["href"][1:] for node in next(tree.all("nav")).all("a")]
        assert linked == SECTIONS
        for section in tree.all("section"):
            assert list(section.all("table", "ul", "p")), section.attributes
    sentences = {s.attributes["id"]: s.words() for s in trees["nothing"].all("section")}
    assert "No energy figures" in sentences["energy"]
    assert "parity gate was not run" in sentences["parity"]
    charts = {node.attributes["id"] for node in trees["evil"].all("figure")}
    names = "ratio series loss-time roofline levers"
    assert charts == {f"chart-{name}" for name in names.split()}


def test_nothing_is_fetched_and_nothing_is_run(pages, trees):
    for name, html in pages.items():
        html = re.sub(r'<a href="(https://[^"]+)" rel="noreferrer">\1</a>', "", html)  # to follow, by who wants to
        assert not re.search(r"https?://|url\((?!#)|@import|//cdn|<script|javascript:", html), name
        for node in trees[name].all():
            assert not any(key.startswith("on") for key in node.attributes)
            for key in ("src", "srcset", "action", "xlink:href", *(["href"] if node.tag != "a" else [])):
                assert node.attributes.get(key, "#").startswith(("#", "data:,")), node.attributes
        policy = next(n for n in trees[name].all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy")
        assert policy.attributes["content"].startswith("default-src 'none'")


def test_published_figures_lead_to_their_source(trees, comparison):
    section = next(node for node in trees["evil"].all("section") if node.attributes["id"] == "published")
    links = [node.attributes["href"] for node in section.all("a")]
    assert links == [row.url for row in comparison.published]
    assert f"| <{links[0]}> |" in show.markdown(contents.report(comparison))
    for url in ("javascript:alert(1)", 'https://x"><script>|`'):
        odd = edited(comparison, lambda document, _, url=url: document["published"][0].update({"url": url}))
        html = compare_page.html(odd)
        assert "<script" not in html + show.markdown(contents.report(odd))
        assert 'href="javascript' not in html


def test_what_users_wrote_is_text(pages, trees):
    assert "<script" not in pages["evil"]
    escaped = EVIL.replace("<", "&lt;").replace(">", "&gt;")
    assert pages["evil"].count("&lt;script&gt;") > 10
    assert escaped.replace("'", "&#39;") in pages["evil"]
    assert any(node.words() == EVIL for node in trees["evil"].all("th"))
    drawn = "".join(node.words() for node in trees["evil"].all("text"))
    assert "<script>alert" in drawn  # as text in a chart, and the dollar signs as they are


def test_tables_say_what_they_hold(trees):
    for tree in trees.values():
        for table in tree.all("table"):
            assert table.children[0].tag == "caption"
            assert table.children[0].words().strip()
            columns = list(next(table.all("thead")).all("th"))
            assert all(cell.attributes["scope"] == "col" and cell.words() for cell in columns)
            for row in next(table.all("tbody")).all("tr"):
                cells = list(row.all("th", "td"))
                assert len(cells) == len(columns)
                assert cells[0].attributes["scope"] == "row"
                assert all(cell.words().strip() for cell in cells)
            assert table.parent.attributes["class"] == "scroll"  # it scrolls by itself, by keyboard too
            assert table.parent.attributes["tabindex"] == "0"


def test_charts_speak_and_have_their_figures_as_a_table(trees):
    for tree in trees.values():
        for figure in tree.all("figure"):
            drawn = next(node for node in figure.all("svg") if node.attributes.get("role"))
            names = drawn.attributes["aria-labelledby"].split()
            spoken = {
                node.attributes.get("id"): node.words() for node in drawn.children if node.tag in ("title", "desc")
            }
            assert list(spoken) == names
            assert all(len(words) > 5 for words in spoken.values())
            assert list(figure.all("details"))
            assert list(figure.all("table"))
            for other in figure.all("svg"):
                assert other is drawn or other.attributes["aria-hidden"] == "true"


def test_ids_are_unique_and_exist(pages, trees):
    for name, tree in trees.items():
        ids = [node.attributes["id"] for node in tree.all() if "id" in node.attributes]
        assert len(ids) == len(set(ids)), name
        used = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([\w -]+)', pages[name])
        assert {part for group in used for part in group.split()} <= set(ids)


def test_headings_step_down_one_at_a_time(trees):
    for tree in trees.values():
        levels = [int(node.tag[1]) for node in tree.all("h1", "h2", "h3", "h4")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    colour = {name: pair[theme] for name, pair in page.PALETTE.items()}
    assert contrast("#ffffff", "#000000") == pytest.approx(21)  # as WCAG has it
    for ground in ("page", "card", "tint"):
        for name in ("ink", "muted", "accent", "wrong", "caution"):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    for name in ("bar", *(f"s{i}" for i in range(1, 8))):
        assert contrast(colour[name], colour["card"]) >= 3, name


def test_charts_use_the_pages_colours_alone(pages, trees):
    """Any other would look wrong in one of the two themes."""
    known = set(page.PALETTE)
    for html in pages.values():
        assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= known
    for tree in trees.values():
        for node in (child for drawn in tree.all("svg") for child in drawn.all()):
            painted = " ".join(node.attributes.get(key, "") for key in ("style", "fill", "stroke", "color"))
            assert not re.search(r"#[0-9a-f]{3,6}|rgb", painted), painted


def test_lines_differ_by_more_than_their_colour(trees):
    """Each legend entry has a dash and marker of its own."""
    legend = next(node for node in trees["twelve variants"].all("figure") if node.attributes["id"] == "chart-loss-time")
    shapes = []
    for entry in next(legend.all("ul")).all("li"):
        parts = [sorted(n.attributes.items()) for n in next(entry.all("svg")).all() if n.tag in ("path", "circle")]
        shapes.append(str(parts))
    assert len(shapes) == len(set(shapes)) == 12


def test_a_long_verdict_is_a_short_heading():
    verdict = "A is fastest: 1.5 x as fast as B. C is WRONG. D did not run."
    tree = Tree(page.html(Report("", "", verdict, []))).root
    assert next(tree.all("h1")).words() == "A is fastest: 1.5 x as fast as B."
    assert [n.words() for n in tree.all("p") if n.attributes.get("class") == "more"] == ["C is WRONG. D did not run."]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs()
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser, pages, tmp_path, width):
    for name, html in pages.items():
        found = look(browser, html, tmp_path / "report.html", width, name)
        if name != "leaderboard":
            assert found["sections"] == len(SECTIONS)


def test_dark_is_dark(browser, pages, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(pages["evil"], encoding="utf-8")
    grounds = []
    for dark in (False, True):
        browser.open(file, 1280, dark)
        grounds.append(browser.run(MEASURE)["ground"])
    expected = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in page.PALETTE["page"]]
    assert grounds == [f"rgb({r}, {g}, {b})" for r, g, b in expected]


def test_the_browser_tests_can_fail(browser, tmp_path):
    """A page that does all that ours must not."""
    file = tmp_path / "bad.html"
    file.write_text('<body style="width:3000px">x<script>console.error("bad")</script><img src="http://127.0.0.1:9/x">')
    browser.open(file, 390)
    assert browser.run(MEASURE)["wide"] > 0
    assert any("bad" in entry["message"] for entry in browser.logs("browser"))
    assert "http://127.0.0.1:9/x" in browser.requests()
