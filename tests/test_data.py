"""data_gen.py: problems are right, the ladder loses nothing, pictures are readable, files can be
trusted, and a rung or a family is added in one place.
"""
import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data_gen as dg
from helpers import takes_ctrl_c

GROUPS = ["descriptive", "implicit", "numeric", "question"]
RELEASED = ["image_url", "instruction", "output"]  # fields that released training code reads
FILES = {"stage1": 24, "stage2_neighbours": 72, "stage2_top": 72, "stage3": 48, "test": 36}


@cache
def problems(n=240, split="train"):
    return [dg.make_problem(split, i) for i in range(n)]


def numbers_in(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def lines_of(cells):
    """What stands in a picture, {(col, row): character}, as lines of text."""
    lines = []
    for row in range(dg.ROWS):
        letters = [cells.get((col, row), " ") for col in range(dg.COLS)]
        lines.append("".join(letters))
    return lines


def read(folder):
    """{path: bytes} of all files below a folder."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def command(folder, n=24, n_test=6):
    return ["--out", str(folder), "--n", str(n), "--n_test", str(n_test)]


def make(folder, n=24, n_test=6, *flags):
    dg.main([*command(folder, n, n_test), *flags])
    return read(folder)


def rows_in(data, name):
    lines = data[f"{name}.jsonl"].decode().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "d")


# --------------------------------------------------------------------------------------------------
# The problems

def test_no_test_problem_is_trained_on():
    """Accuracy on trained problems would measure memory, not maths."""
    train = {canonical(problem) for problem in problems(3600, "train")}
    test = {canonical(problem) for problem in problems(3600, "test")}
    assert len(train) > 500
    assert len(test) > 100
    assert not train & test


def canonical(problem):
    """The givens, points renamed in order of appearance: the same text for the same givens."""
    text = " ".join(problem[group] for group in GROUPS[:3])
    new_names = {}

    def rename(match):
        for letter in match[0]:
            new_names.setdefault(letter, "ABCDE"[len(new_names)])
        return "".join(new_names[letter] for letter in match[0])

    return re.sub(r"\b[A-NP-Z]+\b", rename, text.rstrip("."))


def test_every_subject_has_four_families_drawn_equally_often():
    """Plane geometry, solid geometry and functions have to weigh the same."""
    counts = Counter((problem["subject"], problem["family"]) for problem in problems())
    assert set(counts.values()) == {len(problems()) / 12}
    subjects = Counter(subject for subject, _ in counts)
    assert subjects == {"plane": 4, "solid": 4, "functions": 4}


def right_answer(problem):
    """From the numbers in the givens alone."""
    n = numbers_in(problem["numeric"])
    family = problem["family"]
    wants_volume = "volume" in problem["question"]
    if family == "exterior_angle":
        return n[0] + n[1]
    if family == "isosceles_triangle":
        apex = problem["descriptive"][0]
        given_apex = apex in problem["numeric"]
        return (180 - n[0]) / 2 if given_apex else 180 - 2 * n[0]
    if family == "rectangle":
        wants_area = "area" in problem["question"]
        return n[0] * n[1] if wants_area else 2 * n[0] + 2 * n[1]
    if family == "circle_diameter":
        return 90 - n[0]
    if family == "box_volume":
        return n[0] * n[1] * n[2] if wants_volume else n[0] * n[1]
    if family == "cylinder":
        return n[0] ** 2 * n[1] if wants_volume else 2 * n[0] * n[1]
    if family in ("cone", "square_pyramid"):
        return n[0] ** 2 * n[1] / 3
    if family == "line_value":
        return n[0] * n[2] + n[1]
    if family == "slope":
        return (n[3] - n[1]) / (n[2] - n[0])
    if family == "parabola_value":  # y=(x-h)^2+k
        return (n[3] - n[0]) ** n[1] + n[2]
    if family == "x_intercept":
        return n[1] / n[0]
    raise NotImplementedError(f"say here how {family} is solved")


def test_answers_and_steps_are_right():
    """A wrong label, or a wrong sum on the way to it, would be learnt."""
    for problem in problems() + problems(120, "test"):
        value = f"{right_answer(problem):g}"
        unit = ""
        if "angle" in problem["question"]:
            unit = "°"
        if problem["family"] in ("cylinder", "cone"):
            unit = "pi"
        assert problem["answer"] == value + unit, problem
        assert problem["output"].endswith(f" †Answer: {value}{unit}"), problem

        sums = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem["output"])
        for left, sign, right, result in sums:
            assert calculate(int(left), sign, int(right)) == int(result), problem["output"]
        assert sums[-1][-1] == value


def calculate(left, sign, right):
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left / right


def test_multiple_choice():
    """One of four different values, in the order of the question; the answer is its text."""
    some = [problem for problem in problems() if problem["choices"]]
    assert .1 < len(some) / len(problems()) < .3
    places = {problem["choices"].index(problem["answer"]) for problem in some}
    assert places == {0, 1, 2, 3}
    for problem in some:
        a, b, c, d = problem["choices"]
        assert len({a, b, c, d}) == 4
        assert problem["question"].endswith(f"A.{a} B.{b} C.{c} D.{d}")


def test_kind_says_whether_there_are_choices():
    """eval.py grades by it; and a negative angle among them would be no question."""
    for problem in problems():
        if problem["kind"] == "free":
            assert problem["choices"] is None
            continue
        assert problem["kind"] == "choice_text"
        for choice in problem["choices"]:
            assert "-" not in choice
            assert numbers_in(choice)[0] > 0


# --------------------------------------------------------------------------------------------------
# The ladder

def test_a_rung_only_loses_text():
    """The gap between the rungs measures seeing only if nothing else changes between them."""
    groups_lost = {"text_only": 0, "text_dominant": 0, "text_lite": 1, "vision_intensive": 2,
                   "vision_dominant": 3, "vision_only": 4}
    assert list(dg.LADDER) == list(groups_lost)
    for problem in problems():
        for version, lost in groups_lost.items():
            left = [problem[group] for group in GROUPS[lost:]]
            assert all(left)
            words = " ".join(left) or dg.VISION_ONLY_TEXT
            assert dg.text_of(problem, version) == words

    pictures = [picture for _, picture in dg.LADDER.values()]
    assert pictures == [None, "figure", "figure", "figure", "labelled", "question"]


def test_what_leaves_the_text_is_in_the_picture():
    """A number in neither cannot be solved; one in the plain figure would make the text idle."""
    for problem in problems():
        _, cells = dg.draw_problem(problem)
        figure = "".join(lines_of(cells["figure"]))
        assert not numbers_in(figure)
        named = f"{problem['descriptive']} {problem['implicit']}"
        points = "".join(re.findall(r"\b[A-Z]+\b", named))
        assert set(points) <= set(figure)

        givens = Counter(numbers_in(problem["numeric"]))
        for kind in ("labelled", "question"):
            lower = lines_of(cells[kind])[dg.QUESTION_ROWS:]
            assert givens <= Counter(numbers_in(" ".join(lower)))

        upper = lines_of(cells["question"])[:dg.QUESTION_ROWS]
        assert " ".join(" ".join(upper).split()) == problem["question"]


def test_a_rung_is_added_in_one_place(tmp_path, monkeypatch, capsys):
    """With a line in LADDER it is in the test, in stage 3 and in --show."""
    monkeypatch.chdir(tmp_path)
    dg.main(["--show", "0"])
    width, height = Image.open("data_show_0.png").size
    tile = width // len(dg.LADDER)
    new = {"vision_numeric": ("numeric question", "labelled")}
    monkeypatch.setattr(dg, "LADDER", dg.LADDER | new)
    data = make(tmp_path / "d", 60, 2)

    assert [row["version"] for row in rows_in(data, "test")] == 2 * list(dg.LADDER)
    added = [row for row in rows_in(data, "test") if row["version"] == "vision_numeric"]
    for i, row in enumerate(added):
        problem = dg.make_problem("test", i)
        assert row["instruction"] == f"{problem['numeric']} {problem['question']}"
        assert row["image_url"] == f"images/test-{i:06d}-labelled.png"
    assert "vision_numeric" in [row["version"] for row in rows_in(data, "stage3")]

    capsys.readouterr()
    dg.main(["--show", "0"])
    assert "\nvision_numeric " in capsys.readouterr().out
    with Image.open("data_show_0.png") as sheet:
        assert sheet.size == (width + tile, height)
        last_tile = sheet.crop((width, 0, width + 324, 324))
    picture = dg.draw_problem(dg.make_problem("train", 0))[0]["labelled"]
    assert last_tile.tobytes() == picture.resize((324, 324), Image.NEAREST).tobytes()


def half_angle(r):
    """A family that is not in data_gen.py: the same figure, another question."""
    problem = dg.exterior_angle(r)
    a = problem["numbers"][0] * 2
    text = f"ABC is a triangle. | D is on the extension of BC. | angle A={a}°. | Halve angle A."
    number = (f"{a}°", 9 + 13j, "")
    labels = problem["labels"][:4] + [number]
    return problem | {"numbers": (a,), "text": text, "work": f"{a}/2={a // 2}.", "labels": labels}


def test_a_family_is_added_in_one_place(tmp_path, monkeypatch):
    """With its name in FAMILIES it is drawn as often as every other, for training and test."""
    monkeypatch.setattr(dg, "FAMILIES", [*dg.FAMILIES, half_angle])
    data = make(tmp_path / "d", 26, 13)
    for name, times in (("stage1", 2), ("test", 6)):
        families = Counter(row["family"] for row in rows_in(data, name))
        assert families["half_angle"] == times
        assert set(families.values()) == {times}
    for name in FILES:
        assert "half_angle" in [row["family"] for row in rows_in(data, name)]
    assert dg.make_problem("train", 12)["output"].endswith("°")


# --------------------------------------------------------------------------------------------------
# The pictures

@pytest.mark.parametrize("size, n", [(108, 120), (384, 24)])
def test_labels_are_readable(size, n):
    """A label on a stroke, on another label or off the canvas cannot be read."""
    for problem in problems()[:n]:
        pictures, cells = dg.draw_problem(problem, size)
        assert cells == dg.draw_problem(problem)[1]  # the same layout at any size
        bare = problem | {"labels": [], "question": ""}
        strokes = np.asarray(dg.draw_problem(bare, size)[0]["figure"])
        for kind, picture in pictures.items():
            # Two in one cell would lose a character.
            assert sorted(cells[kind].values()) == sorted(characters(problem, kind))
            has_label = np.asarray(picture) != strokes
            check_cells(cells[kind], strokes, has_label, kind)


def characters(problem, kind):
    """All characters that a picture has to show."""
    words = []
    for label, _, *plain in problem["labels"]:
        words += plain if plain and kind == "figure" else [label]
    if kind == "question":
        words.append(problem["question"])
    return "".join(words).replace(" ", "")


def check_cells(at, strokes, has_label, kind):
    size = len(strokes)
    cell = size / dg.COLS
    # Labels stand alike at any size; a cell of 21 x 43 pixels has room to spare.
    margin = 0 if size == dg.DEFAULT_SIZE else 3
    for col, row in at:
        top = round(2 * row * cell)
        bottom = round((2 * row + 2) * cell)
        left = round(col * cell)
        right = round((col + 1) * cell)
        inner = strokes[top + margin:bottom - margin, left + margin:right - margin]
        assert (inner == 255).all(), "on a stroke"
        # Smoothing and serifs may reach a pixel further.
        has_label[max(0, top - 1):bottom + 1, max(0, left - 1):right + 1] = False
    if kind == "question":  # its letters run on without regard to cells: outlines are narrower
        has_label[:round(2 * dg.QUESTION_ROWS * cell)] = False
    assert not has_label.any(), "outside its cells"


def test_pixels_spell_the_characters():
    """tiny/pretrain.py teaches reading from these characters: the pixels have to show them."""
    for problem in problems()[:36]:
        pictures, cells = dg.draw_problem(problem)
        for kind, picture in pictures.items():
            for (col, row), letter in cells[kind].items():
                # A cell is 6 wide, but the next letter's serif may reach into it.
                glyph = Image.new("L", (5, 12), 255)
                draw = ImageDraw.Draw(glyph)
                draw.text((0, 0), letter.encode("latin-1"), font=dg.bitmap_font(), fill=0)
                box = (6 * col, 12 * row, 6 * col + 5, 12 * row + 12)
                assert picture.crop(box).tobytes() == glyph.tobytes()


def test_large_figures_have_smooth_strokes():
    """A real encoder is used to them; at 108 pixels grey would only blur."""
    for problem in problems()[:12]:
        small = np.unique(dg.draw_strokes(problem, 108))
        large = np.unique(dg.draw_strokes(problem, 384))
        assert small.tolist() == [0, 255]
        assert len(large) > 2


@pytest.mark.parametrize("size", [108, 384])
def test_a_character_without_a_glyph_is_an_error(size):
    draw = ImageDraw.Draw(Image.new("L", (9, 9)))
    for letter in "∠×":
        with pytest.raises(ValueError, match="glyph"):
            dg.write(draw, letter, 0, 0, size)


def test_a_label_without_room_is_an_error():
    """And before that every label has cells of its own."""
    free = ["." * dg.COLS] * dg.ROWS
    seen = set()
    with pytest.raises(ValueError, match="no room"):
        for _ in range(dg.COLS * dg.ROWS + 1):
            spot = dg.place(free, "A", 9, 12)
            assert spot not in seen
            seen.add(spot)
    assert len(seen) == dg.COLS // 2 * (dg.ROWS - dg.QUESTION_ROWS)


def test_problem_0_is_the_one_in_the_docstring(tmp_path, monkeypatch, capsys):
    """What a reader sees first must be true."""
    monkeypatch.chdir(tmp_path)
    dg.main(["--show", "0"])
    shown = capsys.readouterr().out
    problem = dg.make_problem("train", 0)
    outside_the_frame = re.sub(r"\|.*\|", "", dg.__doc__)
    for words in (dg.text_of(problem, "text_only"), problem["output"]):
        assert words in shown
        assert words in " ".join(outside_the_frame.split())

    framed = re.findall(r"\|(.{18})\|", dg.__doc__)
    letters = [re.sub(r"[/\\-]", " ", line) for line in framed]
    _, cells = dg.draw_problem(problem)
    assert letters == lines_of(cells["question"])


def test_the_sheet_of_show_says_that_text_only_has_no_picture(tmp_path, monkeypatch, capsys):
    """An empty box looks like a picture that failed."""
    monkeypatch.chdir(tmp_path)
    dg.main(["--show", "5"])
    assert set(dg.LADDER) <= set(capsys.readouterr().out.split())
    with Image.open("data_show_5.png") as sheet:
        first_tile = np.asarray(sheet.crop((0, 0, 324, 324)))
    assert (first_tile < 100).any()  # letters
    assert not (first_tile == 255).any()  # no white canvas


# --------------------------------------------------------------------------------------------------
# The rows

def versions_of(row):
    """{suffix of its fields: version} of a row."""
    if "levels" in row:
        strong, weak = row["levels"]
        return {"": strong, "_2": weak}
    return {"": row.get("version", "text_only")}


@pytest.mark.parametrize("name", FILES)
def test_row_files(data, name):
    """Released training code must be able to read our rows, and each must find its picture."""
    fields = list(RELEASED)
    if name.startswith("stage2"):
        fields += [f"{field}_2" for field in RELEASED]
    ours = {"id", "family", "subject", "version", "levels"}
    if name == "test":
        ours |= {"answer", "kind", "choices"}

    for row in rows_in(data, name):
        assert list(row)[:len(fields)] == fields
        assert set(row) <= {*fields, *ours}
        split, number = row["id"].split("/")[0].split("-")
        problem = dg.make_problem(split, int(number))
        pictures, _ = dg.draw_problem(problem)
        for suffix, version in versions_of(row).items():
            assert row[f"instruction{suffix}"] == dg.text_of(problem, version)
            assert row[f"output{suffix}"] == problem["output"]
            url = row[f"image_url{suffix}"]
            kind = dg.LADDER[version][1]
            if kind is None:
                assert url == ""
                continue
            assert url == f"images/{problem['id']}-{kind}.png"
            with Image.open(BytesIO(data[url])) as picture:
                assert picture.tobytes() == pictures[kind].tobytes()


def test_what_the_manifest_says_is_true(data):
    manifest = json.loads(data["manifest.json"])
    counts = {name: len(rows_in(data, name)) for name in FILES}
    assert manifest["rows"] == counts == FILES
    assert {name: manifest[name] for name in ("seed", "n", "n_test", "size")} == {
        "seed": 0, "n": 24, "n_test": 6, "size": 108}
    for name, digest in manifest["sha256"].items():
        assert sha256(data[name]).hexdigest() == digest
    assert manifest["sha256"].keys() == {f"{name}.jsonl" for name in FILES}

    everything = sha256()
    for problem in problems(24) + problems(6, "test"):
        pixels = sha256()
        for kind in ("figure", "labelled", "question"):
            with Image.open(BytesIO(data[f"images/{problem['id']}-{kind}.png"])) as picture:
                pixels.update(picture.tobytes())
        everything.update(pixels.digest())
    assert manifest["pixels_sha256"] == everything.hexdigest()


def test_files_can_be_read_by_people(data):
    assert "angle E=74°" in data["stage1.jsonl"].decode()  # not \u00b0


def test_test_rows_have_each_problem_in_every_version(data):
    rows = rows_in(data, "test")
    assert [row["version"] for row in rows] == 6 * list(dg.LADDER)
    assert [row["id"].split("/")[1] for row in rows] == 6 * list(dg.LADDER)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name, arrows", [
    ("neighbours", [("text_only", "text_dominant"), ("text_dominant", "vision_dominant"),
                    ("vision_dominant", "vision_only")]),
    ("top", [("text_only", "text_dominant"), ("text_only", "vision_dominant"),
             ("text_only", "vision_only")]),
])
def test_pairs(data, name, arrows):
    """Teacher and student swapped, or a level skipped, would not be the paper's method."""
    found = Counter(tuple(row["levels"]) for row in rows_in(data, f"stage2_{name}"))
    assert found == dict.fromkeys(arrows, 24)


def test_stage_3_prefers_versions_without_numbers_in_the_text():
    counts = Counter()
    for i in range(2000):
        rows = dg.rows_for_training(problems()[0], i, 0)
        counts.update(row["version"] for name, row in rows if name == "stage3")
    assert counts.total() == 4000
    for version in dg.LADDER:
        share = 1 / 4 if version in ("vision_dominant", "vision_only") else 1 / 8
        assert counts[version] / 4000 == pytest.approx(share, abs=.02)


# --------------------------------------------------------------------------------------------------
# The files

def test_same_seed_same_bytes_in_another_process(data, tmp_path):
    """Runs compare only on the same pixels; hash() of a string differs between processes."""
    again = [sys.executable, dg.__file__, *command(tmp_path / "d")]
    subprocess.run(again, check=True, capture_output=True)
    assert read(tmp_path / "d") == data


def test_another_seed_makes_other_problems(data, tmp_path):
    other = make(tmp_path / "d", 24, 6, "--seed", "1")
    assert other["stage1.jsonl"] != data["stage1.jsonl"]
    assert other["test.jsonl"] != data["test.jsonl"]


def test_a_larger_data_set_extends_a_smaller(data, tmp_path):
    more = make(tmp_path / "d", 26, 7)
    for name, content in data.items():
        if name != "manifest.json":
            assert more[name].startswith(content)


def first_job_is_last(job, build=dg.build):
    _, i, *_ = job
    if i == 0:
        time.sleep(.3)
    return build(job)


def test_workers_do_not_matter(data, tmp_path, monkeypatch):
    """More cores must not give other data or another order."""
    monkeypatch.setattr(dg, "build", first_job_is_last)
    assert make(tmp_path / "d", 24, 6, "--workers", "2") == data


DYING = """
import os, sys
import data_gen
build = data_gen.build

def dying(job):
    _, i, *_ = job
    if i == 3:
        os._exit(9)  # as a process that the system kills
    return build(job)

data_gen.build = dying
data_gen.main(sys.argv[1:])
"""


def test_a_worker_that_dies_ends_the_run(tmp_path):
    """Waiting for its results for ever is worse than an error."""
    code = [sys.executable, "-c", DYING, *command(tmp_path / "d"), "--workers", "2"]
    root = Path(dg.__file__).parent
    done = subprocess.run(code, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"data_gen\.py: --out \S+ is not written: [^\n]+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line(tmp_path):
    code = DYING.replace("os._exit(9)", "os.kill(os.getpid(), 2)")
    line = [sys.executable, "-c", code, *command(tmp_path / "d")]
    root = Path(dg.__file__).parent
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=60,
                          preexec_fn=takes_ctrl_c)
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("stopped: nothing is written\n", "")
    assert list(tmp_path.iterdir()) == []


def fail_at_job_3(job, build=dg.build):
    _, i, *_ = job
    if i == 3:
        raise ZeroDivisionError
    return build(job)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_complete_or_absent(tmp_path, monkeypatch, workers):
    """A half-written data set that looks whole would be trained on."""
    monkeypatch.setattr(dg, "build", fail_at_job_3)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "d", 24, 6, "--workers", workers)
    assert list(tmp_path.iterdir()) == []


def test_it_appears_only_when_complete(tmp_path, monkeypatch):
    """So a run that is killed leaves no folder of that name."""
    write_data = dg.write_data

    def look_then_go_on(*inputs):
        rows = write_data(*inputs)
        assert not (tmp_path / "d").exists()
        assert len(list(tmp_path.glob("d.part-*"))) == 1
        return rows

    monkeypatch.setattr(dg, "write_data", look_then_go_on)
    make(tmp_path / "d", 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_two_processes_on_one_folder_leave_one_whole_data_set(data, tmp_path, monkeypatch):
    """The second starts while the first is in the middle, and is done before it."""
    out = tmp_path / "d"
    build = dg.build

    def start_the_second_at_job_3(job):
        _, i, seed, *_ = job
        if i == 3 and not out.exists():
            second = [sys.executable, dg.__file__, *command(out)]
            subprocess.run(second, check=True, capture_output=True)
        return build(job)

    monkeypatch.setattr(dg, "build", start_the_second_at_job_3)
    with pytest.raises(SystemExit, match="--out .* is not written"):
        make(out, 24, 6, "--seed", "1")
    assert read(out) == data
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("flags", [
    "--n -1", "--n_test -1", "--size 107", "--workers 0", "--show -1", "--show 0 --n 2",
    "--show 0 --workers 2", "--out file", "--out folder", "--out file/below"])
def test_refused(flags, tmp_path, monkeypatch):
    """Before anything runs, in a line that names the flag; what is there may be the only copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(dg, "draw_problem")  # so whoever starts to draw gets a NameError
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".note").write_text("mine")
    flag = flags.split()[0]
    with pytest.raises(SystemExit, match=rf"\Adata_gen.py: [^\n]*{flag}[^\n]*\Z"):
        dg.main(flags.split())
    assert read(tmp_path) == {"file": b"mine", "folder/.note": b"mine"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_may_be_there_if_it_is_empty_and_its_parents_need_not(data, tmp_path):
    (tmp_path / "d").mkdir()
    assert make(tmp_path / "d") == data
    assert make(tmp_path / "some" / "where") == data
