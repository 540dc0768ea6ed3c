"""data_gen.py: problems are right, the ladder loses nothing, pictures are readable, files can be trusted."""
import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw
import data_gen as dg

problems = cache(lambda n=240, split="train": [dg.make_problem(split, i) for i in range(n)])
drawn = lambda cells: ["".join(cells.get((c, w), " ") for c in range(dg.COLS))
                       for w in range(dg.ROWS)]  # lines
ints = lambda text: [int(n) for n in re.findall(r"\d+", text)]
FILES = dict(stage1=24, stage2_neighbours=72, stage2_top=72, stage3=48, test=36)  # rows of `data`
rows = lambda data, name: [json.loads(line) for line in data[f"{name}.jsonl"].decode().splitlines()]
read = lambda folder: {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

def make(folder, n=24, n_test=6, *flags):
    dg.main(["--out", str(folder), "--n", str(n), "--n_test", str(n_test), *flags])
    return read(folder)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "d")

def test_same_seed_same_bytes_in_another_process(data, tmp_path):
    """Runs compare only on the same pixels; hash() of a string differs between processes."""
    subprocess.run([sys.executable, dg.__file__, "--out", tmp_path / "d", "--n", "24", "--n_test", "6"],
                   check=True, capture_output=True)
    assert read(tmp_path / "d") == data
    assert make(tmp_path / "e", 24, 6, "--seed", "1")["test.jsonl"] != data["test.jsonl"]

def slow_start(job, build=dg.build):
    return time.sleep(.3 * (job[1] == 0)) or build(job)

def test_neither_workers_nor_n_matter(tmp_path, monkeypatch):
    """More cores must not give other data or another order, and a larger data set must extend a smaller."""
    few, more = make(tmp_path / "a", 70, 2), make(tmp_path / "b", 72, 3)
    monkeypatch.setattr(dg, "build", slow_start)  # now the first job comes back last
    assert few == make(tmp_path / "c", 70, 2, "--workers", "2") and few.pop("manifest.json")
    assert all(more[name].startswith(few[name]) for name in few)

def canonical(p):  # without the question, points renamed in order of appearance: the same for the same givens
    text, names = " ".join([p["descriptive"], p["implicit"], p["numeric"]]), {}
    swap = lambda m: "".join(names.setdefault(c, "ABCDE"[len(names)]) for c in m[0])
    return re.sub(r"\b[A-NP-Z]+\b", swap, text.rstrip("."))

def test_no_test_problem_is_trained_on():
    """Accuracy on trained problems would measure memory, not maths."""
    train, test = ({canonical(p) for p in problems(3600, split)} for split in ("train", "test"))
    assert len(train) > 500 and len(test) > 100 and not train & test

def test_enough_families():
    """Plane geometry, solid geometry and functions have to weigh the same."""
    families = [{p["family"] for p in problems() if p["subject"] == s}
                for s in ("plane", "solid", "functions")]
    assert min(map(len, families)) >= 4 and len(set(Counter(p["family"] for p in problems()).values())) == 1

def test_a_rung_only_loses_text():
    """The gap between the rungs measures seeing only if nothing else changes from rung to rung."""
    groups = ["descriptive", "implicit", "numeric", "question"]
    for p in problems():
        for version, start in zip(dg.LADDER, (0, 0, 1, 2, 3, 4)):
            left = [p[g] for g in groups[start:]] or [dg.VISION_ONLY_TEXT]
            assert dg.text_of(p, version) == " ".join(left) and all(left)
    assert [kind for _, kind in dg.LADDER.values()] == [None, *3 * ["figure"], "labelled", "question"]

def test_what_leaves_the_text_is_in_the_picture():
    """A number in neither cannot be solved; a number in the plain figure would make the text superfluous."""
    for p in problems():
        cells = dg.draw_problem(p)[1]
        for kind in ("labelled", "question"):
            assert Counter(ints(p["numeric"])) <= Counter(
                ints(" ".join(drawn(cells[kind])[dg.QUESTION_ROWS:])))
        assert not ints("".join(drawn(cells["figure"])))
        points = "".join(re.findall(r"\b[A-Z]+\b", p["descriptive"] + " " + p["implicit"]))
        assert set(points) <= set("".join(drawn(cells["figure"])))
        assert " ".join(" ".join(drawn(cells["question"])[:dg.QUESTION_ROWS]).split()) == p["question"]

SOLVE = {  # family: answer of problem p from the numbers n in its givens
    "exterior_angle": lambda n, p: n[0] + n[1], "circle_diameter": lambda n, p: 90 - n[0],
    "isosceles_triangle":
        lambda n, p: (180 - n[0]) / 2 if p["descriptive"][0] in p["numeric"] else 180 - 2 * n[0],
    "rectangle": lambda n, p: n[0] * n[1] if "area" in p["question"] else 2 * n[0] + 2 * n[1],
    "box_volume": lambda n, p: n[0] * n[1] * (n[2] if "volume" in p["question"] else 1),
    "cylinder": lambda n, p: n[0] * n[1] * (n[0] if "volume" in p["question"] else 2),
    "cone": lambda n, p: n[0] ** 2 * n[1] / 3, "square_pyramid": lambda n, p: n[0] ** 2 * n[1] / 3,
    "line_value": lambda n, p: n[0] * n[2] + n[1], "slope": lambda n, p: (n[3] - n[1]) / (n[2] - n[0]),
    "parabola_value": lambda n, p: (n[3] - n[0]) ** n[1] + n[2], "x_intercept": lambda n, p: n[1] / n[0]}

def test_answers_and_steps_are_right():
    """A wrong label, or a wrong sum on the way to it, would be learnt."""
    for p in problems() + problems(120, "test"):
        value = f"{SOLVE[p['family']](ints(p['numeric']), p):g}"
        unit = "°" if "angle" in p["question"] else "pi" if p["family"] in ("cylinder", "cone") else ""
        assert p["answer"] == value + unit and p["output"].endswith(f" †Answer: {p['answer']}"), p
        sums = re.findall(r"(\d+[-+*/]\d+)=(\d+)", p["output"])
        assert sums[-1][1] == value and all(eval(left) == int(right) for left, right in sums), p["output"]

def test_multiple_choice():
    """One of four different values, in the order of the question; the answer is its text, as in MathVista."""
    some = [p for p in problems() if p["choices"]]
    assert .1 < len(some) / len(problems()) < .3 and len({p["choices"].index(p["answer"]) for p in some}) == 4
    for p in some:
        assert p["kind"] == "choice_text" and len(set(p["choices"])) == 4
        assert p["question"].endswith(" ".join(f"{c}.{o}" for c, o in zip("ABCD", p["choices"])))

@pytest.mark.parametrize("size, n", [(108, 120), (384, 24)])
def test_labels_are_readable(size, n):
    """A label on a stroke, on another label or off the canvas cannot be read."""
    u, top = size / dg.COLS, round(2 * dg.QUESTION_ROWS * size / dg.COLS)
    for p in problems()[:n]:
        pictures, cells = dg.draw_problem(p, size)
        assert cells == dg.draw_problem(p)[1]  # the same layout at any size
        strokes = np.asarray(dg.draw_problem({**p, "labels": [], "question": ""}, size)[0]["figure"])
        for kind, at in cells.items():
            words = [bare[0] if bare and kind == "figure" else w for w, _, _, *bare in p["labels"]]
            words += p["question"].split() if kind == "question" else []
            # two in one cell would lose a character
            assert sorted("".join(words).replace(" ", "")) == sorted(at.values())
            outside = np.asarray(pictures[kind]) != strokes
            outside[:top] &= kind != "question"  # outlines are narrower than cells
            for col, row in at:
                y0, y1, x0, x1 = (round(v * u) for v in (2 * row, 2 * row + 2, col, col + 1))
                edge = 3 * (size > 108)  # labels stand alike at any size; a cell of 21 x 43 has room to spare
                assert (strokes[y0 + edge:y1 - edge, x0 + edge:x1 - edge] == 255).all(), "on a stroke"
                outside[max(0, y0 - 1):y1 + 1, max(0, x0 - 1):x1 + 1] = False  # smoothing, serifs: a pixel
            assert not outside.any(), f"{p['id']} {kind}: outside its cells"

def test_pixels_spell_the_characters():
    """tiny/pretrain.py teaches reading from these characters: the pixels have to show them."""
    for pictures, cells in map(dg.draw_problem, problems()[:36]):
        for kind, (col, row) in ((kind, cell) for kind, at in cells.items() for cell in at):
            glyph = Image.new("L", (5, 12), 255)  # a cell is 6 wide, but the next letter's serif may reach in
            ImageDraw.Draw(glyph).text((0, 0), cells[kind][col, row].encode("latin-1"),
                                       font=dg.bitmap_font(), fill=0)
            assert pictures[kind].crop(
                (6 * col, 12 * row, 6 * col + 5, 12 * row + 12)).tobytes() == glyph.tobytes()

def test_what_cannot_be_drawn_is_an_error():
    """A character without a glyph, or a label without room of its own, would be missing unnoticed."""
    for size in (108, 384):
        pytest.raises(ValueError, dg.write, ImageDraw.Draw(Image.new("L", (9, 9))),
                      "∠A", 0, 0, size).match("glyph")
    free, seen = ["." * dg.COLS] * dg.ROWS, set()
    with pytest.raises(ValueError, match="no room"):  # and no cell twice before that
        while (spot := dg.place(free, "A", 9, 12)) not in seen:
            seen.add(spot)

def test_row_files(data):
    """Released training code must be able to read our rows, and every row must find its picture."""
    released, counts = ["image_url", "instruction", "output"], {name: len(rows(data, name)) for name in FILES}
    ours = {"id", "family", "subject", "version", "levels", "answer", "kind", "choices"}
    assert json.loads(data["manifest.json"])["rows"] == counts == FILES
    for name, row in ((name, row) for name in FILES for row in rows(data, name)):
        fields = released + [f"{f}_2" for f in released] * ("stage2" in name)
        assert list(row)[:len(fields)] == fields and set(row) - set(fields) <= ours
        p = dg.make_problem(row["id"].split("-")[0], ints(row["id"])[0])
        for suffix, version in zip(("", "_2"), row.get("levels", [row.get("version", "text_only")])):
            url = f"images/{p['id']}-{(kind := dg.LADDER[version][1])}.png" if version != "text_only" else ""
            assert [row[f + suffix] for f in released] == [url, dg.text_of(p, version), p["output"]]
            assert (not url or
                    Image.open(BytesIO(data[url])).tobytes() == dg.draw_problem(p)[0][kind].tobytes())
    assert [row["version"] for row in rows(data, "test")[:6]] == list(dg.LADDER)

def test_pairs(data):
    """Teacher and student swapped, or a level skipped, would teach something else than the paper."""
    steps = list(zip(dg.PYRAMID, dg.PYRAMID[1:]))
    for name, arrows in ("neighbours", steps), ("top", [("text_only", weak) for _, weak in steps]):
        assert Counter(tuple(row["levels"]) for row in
                       rows(data, f"stage2_{name}")) == dict.fromkeys(arrows, 24)
    assert [v for v in dg.LADDER if v in dg.PYRAMID] == list(dg.PYRAMID) and len(steps) == 3

def test_complete_or_absent(tmp_path, monkeypatch):
    """A half-written data set that looks whole would be trained on."""
    build, calls = dg.build, iter(range(99))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dg, "build", lambda job: build(job) if next(calls) < 5 else 1 / 0)
        make(tmp_path / "d")
    assert [f.name for f in tmp_path.iterdir()] == ["d.part"]
    (tmp_path / "d.part" / "old").touch()
    assert "old" not in make(tmp_path / "d", 2, 1) and [f.name for f in tmp_path.iterdir()] == ["d"]

@pytest.mark.parametrize("flags", ["--n -1", "--n_test -1", "--size 107", "--workers 0", "--show -1",
                                   "--show 0 --n 2", "--out file", "--out folder"])
def test_refused(flags, tmp_path, monkeypatch):
    """An error names the flag in one line before anything is written; what is there may be the only copy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert all((tmp_path / name).write_text("mine") for name in ("file", "folder/note"))
    with pytest.raises(SystemExit, match=f"\\Adata_gen.py: [^\n]*{flags.split()[0]}[^\n]*\\Z"):
        dg.main(flags.split())
    assert read(tmp_path) == {"file": b"mine", "folder/note": b"mine"} and len(list(tmp_path.iterdir())) == 2

def test_problem_0_is_the_one_in_the_docstring(tmp_path, monkeypatch, capsys):
    """What a reader sees first must be true."""
    monkeypatch.chdir(tmp_path)
    dg.main(["--show", "0"])
    p, shown, doc = dg.make_problem("train", 0), capsys.readouterr().out, dg.__doc__
    for words in (dg.text_of(p, "text_only"), p["output"]):
        assert words in shown and words in " ".join(re.sub(r"\|.*\|", "", doc).split())
    picture = [re.sub(r"[/\\-]", " ", line) for line in re.findall(r"\|(.{18})\|", doc)]
    assert picture == drawn(dg.draw_problem(p)[1]["question"])
    assert set(dg.LADDER) <= set(shown.split()) and Image.open("data_show_0.png").width > 900
