"""Heat maps: the colours of cosines, PNG and SVG files, and what is refused."""

from __future__ import annotations

import base64
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from simctg_fast.evaluation.heat_map import heat_map_png, heat_map_svg, heat_maps_svg, scale_of, ticks

from .evaluations import cosines
from .pages import pixels

SVG = "{http://www.w3.org/2000/svg}"
GREY = (0x99, 0x99, 0x99)


def parts(file: bytes) -> tuple[list[list], list[list]]:
    """The matrix's pixels, and those of the scale right of the white gap."""
    lines = pixels(file)
    gap = [x for x in range(len(lines[0])) if all(line[x] == (255, 255, 255) for line in lines)]
    assert gap == list(range(gap[0], gap[-1] + 1))
    return [line[: gap[0]] for line in lines], [line[gap[-1] + 1 :] for line in lines]


def ramp() -> list[tuple[int, int, int]]:
    """The colours from low to high, read off the scale of a picture with one row of pixels a level."""
    matrix = np.linspace(0, 1, 400)[None].repeat(400, 0)
    return [line[0] for line in reversed(parts(heat_map_png(matrix))[1])]


def lightness(color: tuple[float, ...]) -> float:
    """L* of CIE 1976."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_the_ramp_rises_evenly():
    levels = [lightness(color) for color in ramp()]
    assert levels[0] < 15
    assert levels[-1] > 90
    far = [b - a for a, b in zip(levels, levels[20:], strict=False)]
    assert min(far) > 0
    assert max(far) < 2.5 * min(far)


@pytest.mark.parametrize(
    "blindness",  # Viénot, Brettel and Mollon 1999, on linear light
    [
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    ],
)
def test_the_ramp_keeps_its_order_for_the_colour_blind(blindness):
    colors = np.array(ramp(), dtype=float) / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(blindness).T, 0, 1) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(seen[::8]) > 0).all()


def test_every_cell_has_the_colour_of_its_value_on_the_scale():
    matrix = [[1.0, 0.5, -0.2], [0.5, 1.0, 0.25], [-0.2, 0.25, 1.0]]
    picture, scale = parts(heat_map_png(matrix))
    zoom = len(picture) // 3
    assert len(picture[0]) == 3 * zoom
    height = len(scale)
    for i, j in itertools.product(range(3), repeat=2):
        cell = {picture[y][x] for y in range(i * zoom, (i + 1) * zoom) for x in range(j * zoom, (j + 1) * zoom)}
        assert len(cell) == 1
        place = round((1 - (matrix[i][j] + 0.2) / 1.2) * (height - 1))
        near = [lightness(scale[min(height - 1, max(0, place + by))][0]) for by in (2, -2)]
        assert near[0] <= lightness(*cell) <= near[1]
    assert picture[0][0] == scale[0][0]
    assert picture[0][-1] == scale[-1][0]


def test_rows_run_down_and_columns_across():
    picture, _ = parts(heat_map_png([[0.0, 1.0], [0.0, 0.0]]))
    assert picture[0][-1] != picture[0][0] == picture[-1][0] == picture[-1][-1]


@pytest.mark.parametrize("low", [0.99, 0.31, 0.3, 0.0, -0.001, -1.0])
def test_the_scale_begins_at_the_tenth_below_the_smallest_value(low):
    scale = scale_of([[[1.0, 0.995], [0.995, 1.0]], [[1.0, low], [low, 1.0]]])
    assert scale.high == 1
    assert scale.low == {0.99: 0.9, 0.31: 0.3, 0.3: 0.3, 0.0: 0.0, -0.001: -0.1, -1.0: -1.0}[low]


@pytest.mark.parametrize("size", [1, 2, 41, 300, 600])
def test_sizes(size):
    picture, _ = parts(heat_map_png(np.eye(size)))
    assert len(picture) == size * max(1, 480 // size)
    root = ET.fromstring(heat_map_svg(np.eye(size)))
    assert root.tag == f"{SVG}svg"


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda m: torch.tensor(m, dtype=torch.bfloat16), tuple])
def test_arrays_tensors_and_lists_are_the_same(make):
    matrix = [[1.0, 0.5], [0.5, 1.0]]
    assert heat_map_png(make(matrix)) == heat_map_png(matrix)


def test_what_is_no_number_is_grey():
    matrix = [[1.0, float("nan"), float("inf")], [None, 1.0, 0.0], [float("-inf"), 0.0, 1.0]]
    picture, _ = parts(heat_map_png(matrix))
    zoom = len(picture) // 3
    grey = [(i, j) for i in range(3) for j in range(3) if picture[i * zoom][j * zoom] == GREY]
    assert grey == [(0, 1), (0, 2), (1, 0), (2, 0)]
    heat_map_png([[float("nan")]])


def test_rounding_of_16_bits_is_no_error():
    assert heat_map_png([[1.0078]]) == heat_map_png([[1.0]])


@pytest.mark.parametrize(
    "wrong",
    [[], [[]], [[1.0, 0.5]], [[1.0], [0.5]], [1.0], 1.0, None, "ab", [["a"]], [[1.0, 0.5], [0.5]], np.ones((2, 2, 2))],
)
@pytest.mark.parametrize(
    "draw", [heat_map_png, heat_map_svg, lambda c: heat_maps_svg([("a", [[1]], None), ("b", c, None)])]
)
def test_no_square_matrix(wrong, draw):
    with pytest.raises(ValueError, match="cosines must be a square matrix of at least one row, got"):
        draw(wrong)


@pytest.mark.parametrize("value", [1.5, -1.02, 2])
def test_no_cosines(value):
    with pytest.raises(ValueError, match=rf"cosines must lie in \[-1, 1\], got {value}"):
        heat_map_png([[1.0, value], [0.0, 1.0]])


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="labels must be 2 texts, one a row of cosines, got 3"):
        heat_map_svg(np.eye(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="labels must be 3 texts"):
        heat_maps_svg([("a", np.eye(2), ["a", "b"]), ("b", np.eye(3), ["a", "b"])])
    for wrong in (-1, 3, 1.5, True, "1"):
        with pytest.raises(ValueError, match=f"prompt_tokens must be an integer from 0 to 2, got {wrong!r}"):
            heat_map_svg(np.eye(2), prompt_tokens=wrong)
    with pytest.raises(ValueError, match="maps must be at least one"):
        heat_maps_svg([])


def texts(root: ET.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def test_svg_stands_alone():
    words = [f" w{i}" for i in range(12)]
    text = heat_map_svg(cosines(12, 0.5), words, "before <b> & after", prompt_tokens=5)
    root = ET.fromstring(text)
    assert root.find(f"{SVG}title").text == "before <b> & after"
    assert root.attrib["role"] == "img"
    for image in root.iter(f"{SVG}image"):
        kind, _, data = image.attrib["href"].partition(",")
        assert kind == "data:image/png;base64"
        pixels(base64.b64decode(data))
    assert len(list(root.iter(f"{SVG}image"))) == 2  # the matrix, and the scale
    assert all(texts(root).count(word.strip()) == 2 for word in words)
    assert "0.4" in texts(root)  # of the scale
    assert not re.search(r"(?:https?:|url\(|<style|<script|style=)", text.replace("http://www.w3.org/2000/svg", "", 1))
    assert f"M{5 * 360 / 12:g} 0V360" in text


def test_many_tokens_get_numbers():
    root = ET.fromstring(heat_map_svg(cosines(50, 0.5), ["word"] * 50))
    assert "word" not in texts(root)
    assert texts(root).count("10") == 2


def test_no_line_where_there_is_no_prompt():
    assert "dasharray" not in heat_map_svg(np.eye(4))
    assert "dasharray" not in heat_map_svg(np.eye(4), prompt_tokens=0)
    assert "dasharray" not in heat_map_svg(np.eye(4), prompt_tokens=4)
    assert "dasharray" in heat_map_svg(np.eye(4), prompt_tokens=3)


def test_hostile_labels():
    words = [
        "</text><script>",
        "\x1b[0m",
        "\u202e",
        "\ud800",
        "\ufffe",
        "&amp;",
        "\n",
        "  ",
        "x" * 1000,
        "\0",
        "]]>",
        "é",
    ]
    text = heat_map_svg(np.eye(12), words, "\x00<!--\ud800")
    root = ET.fromstring(text.encode())
    labels = texts(root)
    assert {"⏎", "␣␣", "\\u202e", "&amp;", "é"} <= set(labels)
    assert not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e]", text)
    assert max(map(len, labels)) <= 16


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_side_by_side_on_one_scale(count, columns):
    maps = [(f"map {i}", [[1.0, 0.9 - 0.3 * i], [0.9 - 0.3 * i, 1.0]], None) for i in range(count)]
    root = ET.fromstring(heat_maps_svg(maps))
    places = [g.attrib["transform"] for g in root if g.tag == f"{SVG}g"]
    xs = {place.split("(")[1].split()[0] for place in places[:-1]}
    assert len(places) == count + 1
    assert len(set(places)) == count + 1
    assert len(xs) == columns
    assert [f"map {i}" for i in range(count)] == [text for text in texts(root) if text.startswith("map")]
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    corners = [tuple(map(float, re.findall(r"[\d.]+", place))) for place in places]
    assert all(x + 360 <= width and y + 360 <= height for x, y in corners[:-1])
    if count == 2:
        images = [base64.b64decode(i.attrib["href"].partition(",")[2]) for i in root.iter(f"{SVG}image")]
        assert pixels(images[0])[0][0] == pixels(images[1])[0][0]
        assert lightness(pixels(images[0])[0][-1]) > lightness(pixels(images[1])[0][-1])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.1, 1), (0.9, 1), (-1, 1), (0, 159), (3.2, 97), (-5.3, -4.9), (1e-7, 3e-7)]
)
def test_ticks_are_few_and_round(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert low <= found[0]
    assert found[-1] <= high + 1e-9
    assert np.diff(found) == pytest.approx(found[1] - found[0])
    assert re.fullmatch(r"[125](\.0*)?e.*", f"{found[1] - found[0]:.6e}")
