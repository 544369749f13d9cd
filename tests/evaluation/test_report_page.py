"""The report as a document: every figure is there, its structure is sound, and no text of others steers it."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import math
import random
import re
from typing import Any

import pytest

from simctg_fast.evaluation.report import render
from simctg_fast.evaluation.report.markup import interval, listed, number

from ..repository import INSTALLED, repository
from . import evaluations
from .pages import Node, pixels, read

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script x",
    "<!--<script",
    "<!--",
    "-->",
    "]]>",
    "</style></title></textarea></svg></table>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp;amp; &#60;",
    "javascript:alert(1)",
    "\u2028\u2029",
    "\x1b[31m\x07\x00\x7f\x9b",
    "\u202eabc\u2066\u200f",
    "\ud800 \udfff",
    "\ufffe\uffff\ufdd0",
    "\r\n\t\f\v",
    "مرحبا שלום",
    "👩‍👩‍👧 e\u0301",
    "${x} {{x}} {x} %s \\u003c \\",
    "x" * 500,
]


def written_out(text: str) -> str:
    """What the page has to show of a text: control characters as escapes, no characters as U+FFFD."""
    shown = ""
    for letter in text:
        code = ord(letter)
        if (code < 32 and letter not in "\n\t") or 127 <= code < 160:
            shown += f"\\x{code:02x}"
        elif (
            code in (0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000
        ):
            shown += f"\\u{code:04x}"
        elif 0xFDD0 <= code <= 0xFDEF or code in (0xFFFE, 0xFFFF):
            shown += "\ufffd"
        else:
            shown += letter
    return shown


def figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return evaluations.example()


@pytest.fixture(scope="module")
def page(evaluation) -> str:
    return render(evaluation)


@pytest.fixture(scope="module")
def root(page) -> Node:
    return read(page)


def cells(root: Node) -> list[list[Node]]:
    """The table of figures: its rows of cells, the strategies' names first."""
    body = root.one("table", "figures").one("tbody")
    return [[node for node in row.inside if isinstance(node, Node)] for row in body.all("tr")]


class TestContent:
    """What the dict holds is on the page."""

    def test_about_the_run(self, root, evaluation):
        header = root.one("header").text
        for key in ("model", "machine", "dtype"):
            assert evaluation[key] in header
        assert "29 November 2026, 20:40 UTC" in header
        assert "100" in header
        assert "128 at most" in header
        for name, version in evaluation["versions"].items():
            assert f"{name} {version}" in header
        assert root.one("head").one("title").text == "How bundled writes"

    def test_conclusion(self, root, evaluation):
        assert [item.text for item in root.one(id="conclusion").all("li")] == evaluation["conclusion"]

    def test_every_figure(self, root, evaluation):
        heads = [node.text for node in root.one("table", "figures").one("thead").all("th")]
        assert [
            head.split(metric["name"])[0]
            for head, metric in zip(heads[1:], evaluation["metrics"].values(), strict=True)
        ]
        for row, line in zip(evaluation["rows"], cells(root), strict=True):
            assert line[0].text.startswith(row["label"])
            assert row["note"] in line[0].text
            for (key, metric), cell in zip(evaluation["metrics"].items(), line[1:], strict=True):
                found = row["figures"].get(key)
                if found is None:
                    assert cell.text == "–"
                    continue
                assert cell.one(kind="mean").text == figure(found["mean"], metric["digits"])
                if found["low"] is None:
                    assert not cell.all(kind="interval")
                else:
                    ends = [figure(found[name], metric["digits"]) for name in ("low", "high")]
                    assert re.split("–| to ", cell.one(kind="interval").text) == ends

    def test_texts(self, root, evaluation):
        articles = root.all("article", "prompt")
        assert len(articles) == len(evaluation["texts"])
        for article, text in zip(articles, evaluation["texts"], strict=True):
            assert article.one("blockquote").text == text["prompt"]
            assert text["id"] in article.one("h3").text
            assert [one["data-strategy"] for one in article.all(kind="written")] == list(text["written"])
            for strategy, one in text["written"].items():
                column = article.one(kind="written", data_strategy=strategy)
                assert column.one("div", "text").text == "".join(one["pieces"])
                again = "".join(p for p, is_repeated in zip(one["pieces"], one["repeated"], strict=True) if is_repeated)
                assert "".join(mark.text for mark in column.all("mark")) == again
                facts = column.one(kind="facts").text
                assert f"{one['tokens']} tokens" in facts
                assert f"diversity {figure(one['diversity'], 1)} %" in facts

    def test_similarity(self, root, evaluation):
        found = json.loads(root.one("script", id="similarity-data").text)
        step = (found["high"] - found["low"]) / 253
        for one, values, drawn in zip(evaluation["similarity"], found["maps"], root.all("figure"), strict=True):
            size = len(one["pieces"])
            levels = base64.b64decode(values["levels"])
            assert len(levels) == size * (size + 1) // 2
            place = 0
            for i in range(size):
                for j in range(i + 1):
                    assert found["low"] + levels[place] * step == pytest.approx(one["cosines"][i][j], abs=0.51 * step)
                    place += 1
            assert values["pieces"] == one["pieces"]
            assert values["prompt"] == one["prompt_tokens"]
            assert f"isotropy {figure(one['isotropy'], 2)}" in drawn.one("figcaption").text
            assert f"12 + {size - 12} tokens" in drawn.one("figcaption").text
            url = drawn.all("image")[0]["href"]
            picture = pixels(base64.b64decode(url.partition(",")[2]))
            assert len(picture) == size * (len(picture) // size)
            assert picture[0][0] == picture[-1][-1] != picture[0][-1]

    def test_isotropy(self, root, evaluation):
        section = root.one("section", id="isotropy")
        values = [row.one("td").text for row in section.one("tbody").all("tr")]
        assert values == [figure(value, 3) for value in evaluation["isotropy"]["layers"]]
        assert evaluation["isotropy"]["of"] in section.text
        assert len(section.one("svg", "chart").all("circle")) == len(values)
        heights = [float(circle["cy"]) for circle in section.all("circle")]
        assert heights == sorted(heights)  # the values fall, so the points go down

    def test_grid(self, root, evaluation):
        section, grid = root.one("section", id="grid"), evaluation["grid"]
        lines = section.one("tbody").all("tr")
        chosen = []
        for i, line in enumerate(lines):
            assert line.one("th").text == f"α = {grid['penalty_alpha'][i]}"
            for j, cell in enumerate(line.all("td")):
                assert cell.text.split()[:2] == [figure(grid["diversity"][i][j], 1), figure(grid["coherence"][i][j], 2)]
                chosen += [(i, j)] if "chosen" in cell.text else []
        assert chosen == [(2, 1)]
        assert grid["reason"] in section.text
        assert "Recommended: α = 0.6, k = 4" in section.text
        chart = section.one("svg", "chart")
        assert len(chart.all("polyline")) == len(grid["top_k"])
        assert len(chart.all("circle", "ring")) == 1
        places = {}
        for point in chart.all("g"):
            if point.all("title"):
                alpha, k = map(float, re.findall(r"= ([\d.]+)", point.one("title").text))
                places[alpha, k] = tuple(map(float, re.findall(r"[\d.]+", point["transform"])))
        pairs = [(i, j) for i in range(4) for j in range(4)]
        for key, axis, sign in (("coherence", 0, 1), ("diversity", 1, -1)):
            found = sorted(
                pairs, key=lambda at: sign * places[grid["penalty_alpha"][at[0]], grid["top_k"][at[1]]][axis]
            )
            assert [grid[key][i][j] for i, j in found] == sorted(itertools.chain(*grid[key]))

    def test_settings(self, root, evaluation):
        found = root.all("section", "setting")
        rows = [row for row in evaluation["rows"] if row["strategy"] != "human"]
        for section, row in zip(found, rows, strict=True):
            assert section.one("h3").text == row["label"]
            assert [code.text for code in section.all("code")] == [row["command"], row["python"]]
            pairs = dict(zip((d.text for d in section.all("dt")), (d.text for d in section.all("dd")), strict=True))
            assert pairs == {name: str(value) for name, value in row["settings"].items()}
        assert root.one("section", id="rerun").one("code").text == evaluation["command"]

    def test_definitions(self, root, evaluation):
        found = root.one("section", id="definitions").one("dl")
        for term, text, metric in zip(found.all("dt"), found.all("dd"), evaluation["metrics"].values(), strict=True):
            assert term.text.split()[0] == metric["name"].split()[0]
            assert text.text.startswith(metric["about"])

    def test_a_page_is_a_function_of_its_dict(self, evaluation, page):
        before = copy.deepcopy(evaluation)
        assert render(evaluation) == page == render(json.loads(json.dumps(evaluation)))
        assert evaluation == before


class TestStructure:
    def test_headings_in_order(self, root):
        levels = [int(node.tag[1]) for node in root.walk() if re.fullmatch("h[1-6]", node.tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))

    def test_landmarks_and_names(self, root):
        for tag in ("header", "nav", "main", "footer", "h1"):
            assert len(root.all(tag)) == 1
        assert root.one("nav")["aria-label"]
        assert root.one("html")["lang"] == "en"
        assert root.one("a", "skip")["href"] == f"#{root.one('main')['id']}"

    def test_references_lead_somewhere(self, root):
        ids = [node["id"] for node in root.walk() if "id" in node.attributes]
        assert len(ids) == len(set(ids))
        assert all(re.fullmatch("[a-z0-9-]+", name) for name in ids)
        for node in root.walk():
            for name in ("aria-labelledby", "aria-describedby", "for"):
                assert set((node.attributes.get(name) or "").split()) <= set(ids)
            if node.tag == "a":
                assert node["href"][0] == "#"
                assert node["href"][1:] in ids

    def test_tables(self, root):
        for table in root.all("table"):
            assert table.one("caption").text
            assert all(head["scope"] in ("col", "row") for head in table.all("th"))
            widths = {sum(part.tag in ("td", "th") for part in line.walk()) for line in table.all("tr")}
            assert len(widths) == 1
        for box in root.all(kind="wide"):
            assert box["tabindex"] == "0"
            assert box["role"] == "region"
            assert "aria-labelledby" in box.attributes

    def test_pictures_have_a_text_or_are_decoration(self, root):
        for picture in root.all("svg"):
            if picture.attributes.get("aria-hidden") == "true":
                continue
            assert picture["role"] == "img"
            names = picture.attributes.get("aria-labelledby", "").split()
            texts = [root.one(id=name).text for name in names] or [picture["aria-label"]]
            assert all(texts)

    def test_asks_for_nothing(self, root, page):
        assert not re.search(r"https?:|url\(|@import|@font-face|fetch\(|XMLHttp|WebSocket|sendBeacon|eval\(", page)
        for node in root.walk():
            assert node.tag not in ("iframe", "object", "embed", "base", "form", "img", "audio", "video", "source")
            for name, value in node.attributes.items():
                assert name not in ("src", "srcset", "style", "action", "xlink:href", "ping"), (node.tag, name)
                assert not name.startswith("on")
                if name == "href" and node.tag != "a":
                    assert value.startswith("data:image/png;base64,")

    def test_policy_names_the_style_and_the_script(self, root):
        policy = root.one("meta", http_equiv="Content-Security-Policy")["content"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["img-src"] == "data:"
        for kind, tag in (("style-src", root.one("style")), ("script-src", root.all("script")[-1])):
            digest = base64.b64encode(hashlib.sha256(tag.text.encode()).digest()).decode()
            assert rules[kind] == f"'sha256-{digest}'"
        order = [node.tag for node in root.one("head").walk()]
        assert order.index("meta") < order.index("link") < order.index("style")

    def test_size(self):
        """A heat map of 160 tokens: a byte a value, and a picture of a byte a pixel, which noise does not shrink."""
        one = evaluations.example(prompts=12, size=160)
        large = len(render(one))
        one["similarity"] = one["similarity"][:1]
        small = len(render(one))
        assert (large - small) / 2 < 65_000
        assert large < 600_000


def test_style_and_script_are_installed():
    """Whatever lies beside the modules is named in pyproject.toml, for wheels, and in MANIFEST.in, for sources."""
    folder = INSTALLED / "simctg_fast" / "evaluation" / "report"
    others = sorted(path.name for path in folder.iterdir() if path.suffix not in (".py", ".pyc") and path.is_file())
    assert others == ["script.js", "style.css"]
    declared = repository("pyproject.toml").read_text().partition("package-data]")[2].partition("\n[")[0]
    assert all(f'"{name}"' in declared for name in others)
    manifest = repository("MANIFEST.in").read_text()
    assert all(f"simctg_fast/evaluation/report/{name}" in manifest for name in others)


class TestParts:
    """Whatever may be absent."""

    def test_nothing(self):
        root = read(render({"model": "m", "metrics": {}, "rows": []}))
        assert root.one("h1").text == "How m writes"
        assert root.one("nav").all("a") == []

    @pytest.mark.parametrize(
        "key",
        ["texts", "similarity", "isotropy", "grid", "conclusion", "command", "created", "versions", "prompts", "seed"],
    )
    @pytest.mark.parametrize("how", ["absent", "none", "empty"])
    def test_without_one_part(self, evaluation, key, how):
        less = dict(evaluation)
        if how == "absent":
            del less[key]
        else:
            less[key] = None if how == "none" else type(less[key])()
        root = read(render(less))
        links = [link["href"][1:] for link in root.one("nav").all("a")]
        assert links == [section["id"] for section in root.one("main").inside if section["id"] != "conclusion"]
        assert (key in links) == (key not in ("texts", "similarity", "isotropy", "grid")) or key not in links

    def test_numbers_that_are_none(self, evaluation):
        changed = copy.deepcopy(evaluation)
        for row in changed["rows"]:
            row["figures"]["diversity"] = {"mean": None, "low": None, "high": None}
            row["figures"]["coherence"] = {"mean": math.nan, "low": -math.inf, "high": 1.0}
        changed["isotropy"]["layers"][2] = None
        changed["grid"]["coherence"][0] = [None] * 4
        changed["similarity"][0]["cosines"][3][2] = math.nan
        changed["texts"][0]["written"]["greedy"] = {"pieces": [], "repeated": [], "tokens": 0, "diversity": None}
        page = render(changed)
        root = read(page)
        assert all(line[2].text == line[5].text == "–" for line in cells(root))
        assert not re.search(r"\bnan\b|\binf\b|\bNone\b", root.one("main").text)
        assert "nothing was written" in root.all("article")[0].text

    @pytest.mark.parametrize("wrong", [None, [], "text", 3])
    def test_no_dict(self, wrong):
        with pytest.raises(ValueError, match="evaluation must be a dict, got"):
            render(wrong)

    def test_missing_keys(self):
        with pytest.raises(ValueError, match="lacks metrics and rows"):
            render({"model": "m"})
        with pytest.raises(ValueError, match="lacks model, metrics and rows"):
            render({})

    def test_parts_that_do_not_fit_one_another(self, evaluation):
        wrong = copy.deepcopy(evaluation)
        wrong["texts"][1]["written"]["greedy"]["repeated"].pop()
        with pytest.raises(ValueError, match=r"repeated of 'greedy' must be as long as its pieces, \d+, got \d+"):
            render(wrong)
        wrong = copy.deepcopy(evaluation)
        wrong["similarity"][2]["pieces"].pop()
        with pytest.raises(ValueError, match="pieces of 'fsd' must be that of rows of its cosines, 40, got 39"):
            render(wrong)
        for key in ("diversity", "coherence"):
            for cut in (lambda lines: lines.pop(), lambda lines: lines[1].pop()):
                wrong = copy.deepcopy(evaluation)
                cut(wrong["grid"][key])
                with pytest.raises(ValueError, match=f"{key} of the grid must be 4 × 4 numbers"):
                    render(wrong)

    @pytest.mark.parametrize(
        "created", ["yesterday", "2026-13-40", "2026-11-29", "2026-11-29T20:40:00+05:30", 3, "<b>", "\u202e"]
    )
    def test_dates(self, evaluation, created):
        header = read(render(evaluation | {"created": created})).one("header").text
        assert {"2026-11-29": "29 November 2026", "yesterday": "yesterday", "<b>": "<b>"}.get(created, "") in header


class TestBest:
    """Which figures of a column are marked, by word and weight."""

    @staticmethod
    def marked(better: str | None, means: dict[str, float], digits: int = 1) -> set[str]:
        rows = [
            {
                "strategy": name,
                "label": name,
                "settings": {},
                "figures": {"m": {"mean": mean, "low": None, "high": None}},
            }
            for name, mean in means.items()
        ]
        metric = {"name": "m", "unit": "%", "digits": digits, "better": better, "about": "about"}
        table = cells(read(render({"model": "m", "metrics": {"m": metric}, "rows": rows})))
        words = {
            line[0].text: cell.one(kind="best").text for line in table for cell in line[1:] if cell.all(kind="best")
        }
        assert all(cell.all("strong") for line in table for cell in line[1:] if cell.all(kind="best"))
        assert set(words.values()) <= {"nearest" if better == "human" else "best"}
        return set(words)

    def test_directions(self):
        means = {"a": 1.0, "b": 3.0, "c": 2.0}
        assert self.marked("higher", means) == {"b"}
        assert self.marked("lower", means) == {"a"}
        assert self.marked(None, means) == set()
        assert self.marked("human", means) == {"b"}, "nearest to 100"
        assert self.marked("human", {"human": 1.8, **means}) == {"c"}
        assert self.marked("human", {"human": 100.0, "a": 90.0, "b": 111.0}) == {"a"}

    def test_people_are_no_strategy(self):
        assert self.marked("higher", {"human": 9.0, "a": 1.0, "b": 2.0}) == {"b"}
        assert self.marked("higher", {"human": 9.0, "a": 1.0}) == set(), "one alone is not the best"

    def test_what_looks_the_same_is_as_good(self):
        assert self.marked("higher", {"a": 1.04, "b": 1.01, "c": 0.9}) == {"a", "b"}
        assert self.marked("higher", {"a": 1.04, "b": 1.01, "c": 0.9}, digits=2) == {"a"}

    def test_no_numbers(self):
        assert self.marked("higher", {"a": math.nan, "b": 1.0, "c": 0.5}) == {"b"}
        assert self.marked("lower", {"a": math.nan, "b": math.inf, "c": 0.5}) == set()


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "digits", "text"),
        [
            (1.25, 1, "1.2"),
            (-0.04, 1, "0.0"),
            (-0.06, 1, "−0.1"),
            (0, 0, "0"),
            (9999.4, 0, "9999"),
            (9999.5, 0, "10\u202f000"),
            (-1234567.891, 2, "−1\u202f234\u202f567.89"),
            (True, 0, "–"),
            ("3", 0, "–"),
            (None, 0, "–"),
            (math.nan, 0, "–"),
            (-math.inf, 0, "–"),
        ],
    )
    def test_number(self, value, digits, text):
        assert number(value, digits) == text

    def test_interval(self):
        assert interval(1, 2, 1) == "1.0–2.0"
        assert interval(-1, 2, 1) == "−1.0 to 2.0"
        assert interval(None, 2, 1) == interval(1, math.nan, 1) == ""

    def test_listed(self):
        assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def replaced(value: Any, put, path: tuple = ()) -> Any:
    """``value`` with every text in it, keys of ``written`` and ``settings`` among them, handed to ``put``."""
    if isinstance(value, str):
        return put(value, path)
    if isinstance(value, list):
        return [replaced(one, put, (*path, "[]")) for one in value]
    if isinstance(value, dict):
        named = path[-1:] in (("written",), ("settings",), ("versions",))
        return {(put(k, (*path, "key")) if named else k): replaced(v, put, (*path, k)) for k, v in value.items()}
    return value


def shape(root: Node) -> list[str]:
    """Elements and their attributes' names, but for spans: those around words depend on the words."""
    return [f"{n.tag} {sorted(n.attributes)}" for n in root.walk() if n.tag not in ("span", "mark")]


def all_hostile(evaluation: dict[str, Any], hostile: str) -> dict[str, Any]:
    """``human``, directions, the date and our name mean something and stay; strategies stay different."""
    names = {row["strategy"]: f"{i}{hostile}" for i, row in enumerate(evaluation["rows"])} | {"human": "human"}

    def put(text: str, path: tuple) -> str:
        if path[-1] in ("better", "created") or text == "simctg_fast":
            return text
        if path[-1] == "strategy" or path[-2:] == ("written", "key"):
            return names[text]
        if path[-1] == "key":
            return text + hostile
        return hostile

    return replaced(evaluation, put)


class TestHostileTexts:
    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_in_every_field(self, evaluation, root, hostile):
        page = render(all_hostile(evaluation, hostile))
        page.encode("utf-8")
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", page)
        found = read(page)
        assert shape(found) == shape(root)
        # Browsers end a script at more than this parser does.
        assert not re.search("[<>&]", found.one("script", id="similarity-data").text)
        assert found.all("script")[-1].text == root.all("script")[-1].text
        assert found.one("style").text == root.one("style").text
        text = written_out(hostile)
        assert found.one("head").one("title").text == f"How {text} writes"
        assert found.all("blockquote")[0].text == text
        assert found.all(kind="setting")[0].all("code")[0].text == text
        assert found.all("figcaption")[0].one("strong").text == text
        assert found.all(kind="written")[0].one("div", "text").text == text * len(
            evaluation["texts"][0]["written"]["human"]["pieces"]
        )
        assert json.loads(found.one("script", id="similarity-data").text)["maps"][0]["pieces"][0] == text.replace(
            "\n", "⏎"
        ).replace("\t", "⇥")

    def test_pieces_that_only_together_are_markup(self, evaluation):
        pieces = ["<", "/", "scr", "ipt", ">", "<!", "--", "&", "lt", ";", "&#", "60;", "\ud83d", "\ude00"]
        changed = copy.deepcopy(evaluation)
        repeated = [i % 3 == 0 for i in range(len(pieces))]
        changed["texts"][0]["written"]["human"] |= {"pieces": pieces, "repeated": repeated}
        changed["similarity"][0] |= {"pieces": pieces, "cosines": evaluations.cosines(len(pieces), 0.5)}
        found = read(render(changed))
        assert found.all(kind="written")[0].one("div", "text").text == written_out("".join(pieces))

    def test_fuzz(self):
        """Texts of fragments in random order, in a small page."""
        draw = random.Random(0)
        small = evaluations.example(prompts=1, size=3)
        small["rows"], small["similarity"] = small["rows"][:2], small["similarity"][:1]
        small["texts"][0]["written"] = {
            name: {"pieces": ["a"] * 3, "repeated": [True, False, True], "tokens": 3, "diversity": 1.0}
            for name in ("human", "greedy")
        }
        fragments = [
            *"<>&\"'=/!-;#`\\{} \n",
            "script",
            "style",
            "</",
            "</script x",
            "<!--<script",
            "<!--",
            "&#",
            "x3c;",
            "\0",
            "\u2028",
            "\ud800",
            "é",
        ]
        expected = shape(read(render(small)))
        for _ in range(150):
            hostile = "x" + "".join(draw.choices(fragments, k=draw.randint(1, 12)))
            found = read(render(all_hostile(small, hostile)))
            assert shape(found) == expected, hostile
            assert found.all("blockquote")[0].text == written_out(hostile), hostile


class TestStyle:
    """Contrast as WCAG 2.2 computes it, of the colours in both schemes."""

    @staticmethod
    def luminance(color: str) -> float:
        values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    @pytest.mark.parametrize("scheme", [0, 1])
    @pytest.mark.parametrize("front", ["ink", "soft", "accent"])
    @pytest.mark.parametrize("back", ["paper", "tint", "wash"])
    def test_contrast(self, root, scheme, front, back):
        blocks = re.findall(r":root \{(.*?)\}", root.one("style").text, re.S)
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme]))
        low, high = sorted(self.luminance(colors[name]) for name in (front, back))
        assert (high + 0.05) / (low + 0.05) >= 4.5

    def test_motion_only_where_it_is_wanted(self, root):
        style = root.one("style").text
        assert not re.search(r"\b(animation|transition)\b", style)
        assert style.count("smooth") == 1
        assert "(prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }" in style
