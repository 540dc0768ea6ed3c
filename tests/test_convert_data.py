"""convert/data.py: formats give the same rows, bad rows are listed, the file is whole or absent."""
import functools
import io
import json
import multiprocessing
import os
import runpy
import signal
import struct
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

import stage3_mm_instruct
from convert import data
from model import PAIR, ROW, JsonLines, check_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with pictures/p.png in it."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (108, 108), np.uint8)
    Image.fromarray(noise).save("pictures/p.png")
    return tmp_path


def row(question="Find y.", answer="7", picture="", **more):
    return {"image_url": picture, "instruction": question, "output": answer} | more


def pair(**changes):
    weak = {"image_url_2": "p.png", "instruction_2": "Find y.", "output_2": "7"}
    return row("x = 3. Find y.") | weak | changes


def llava(*texts, picture="p.png", speakers=("human", "gpt", "human", "gpt")):
    turns = []
    for speaker, text in zip(speakers, texts):
        turns.append({"from": speaker, "value": text})
    return {"image": picture, "conversations": turns}


def write_lines(path, rows):
    """rows: objects, or lines as bytes."""
    with open(path, "wb") as f:
        for row in rows:
            f.write(row if isinstance(row, bytes) else json.dumps(row).encode())
            f.write(b"\n")


def write_array(path, rows, **style):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(rows, f, **style)


def convert(*files, out="mine.jsonl", images="pictures", workers=1, more=()):
    data.main([*files, "--images", images, "--out", out, "--workers", str(workers), *more])
    return read(out)


def read(path):
    """The rows, which pass the check of the stages, as they stand in the file."""
    with open(path, "rb") as f:
        rows = [json.loads(line) for line in f]
    fields = PAIR if "output_2" in rows[0] else ROW
    check_rows(JsonLines([str(path)]), fields)
    return rows


def refused(*files, **options):
    """The message with which it exits, and leaves nothing behind."""
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stopped:
        convert(*files, **options)
    assert sorted(os.listdir()) == before
    assert "\n" not in stopped.value.code
    return stopped.value.code


# --------------------------------------------------------------------------------------------------
# Formats

GIVEN = row("Given x.\nFind y.", "8", id="a")  # the second row; the first is row() with a picture


@pytest.mark.parametrize("first,second", [
    (row(picture="p.png"), GIVEN),
    (row(picture="p.png", id=None, conversations=None, image=None, input=None), GIVEN),
    (row(picture="p.png", input="", instruction_2=None, output_2=""), GIVEN | {"image_url": None}),
    (llava("<image>\nFind y.", "7"), llava("Given x.\nFind y.", "8", picture=None) | {"id": "a"}),
    (llava("Find y.\n<image>", "7"), llava("Given x.\nFind y.", "8", picture="") | {"id": "a"}),
    (llava(" <image>Find y. ", "7"),
     {"id": "a", "instruction": "Given x.", "input": "Find y.", "output": "8"})])
def test_all_formats_give_the_same_rows(folder, capsys, first, second):
    write_array("a.json", [first, second])
    rows = convert("a.json")
    assert rows == [row(picture="pictures/p.png"), GIVEN]
    assert list(rows[1]) == ["id", "image_url", "instruction", "output"]
    assert capsys.readouterr().out == "mine.jsonl: 2 rows, 0 left out\n"


TRICKY = [row('},{"a":[1,2]'), row('say "x\\" ]', "\\"), row("a\u2028b\u0085c\xa0d", "†"),
          row("° √ π 𝒙"), row("line\r\nbreak\ttab"), row('"output_2": "7"')]


def test_arrays_and_lines_in_any_dress(folder, capsys):
    texts = [json.dumps(row) for row in TRICKY]
    dressed = "\ufeff" + "\r\n".join(texts[:3]) + "\r\n\r\n \n" + "\n".join(texts[3:])
    files = {
        "a.json": json.dumps(TRICKY),
        "b.json": "\ufeff" + json.dumps(TRICKY),
        "c.json": json.dumps(TRICKY, indent=2, ensure_ascii=False),
        "d.jsonl": dressed,  # and no line break at the end
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
        assert convert(name, out=f"{name}.jsonl") == TRICKY
    together = convert(*files, out="together.jsonl")
    assert together == TRICKY * len(files)
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith(" rows, 0 left out")
    text = (folder / "together.jsonl").read_text(encoding="utf-8")
    assert "° √ π 𝒙" in text  # not \u00b0


def test_pairs(folder):
    pairs = [pair(id=3), pair(image_url="p.png", image_url_2=None, more=1)]
    write_lines("a.jsonl", pairs)
    rows = convert("a.jsonl")
    assert rows[0] == pair(id=3, image_url_2="pictures/p.png")
    assert rows[1] == pair(image_url="pictures/p.png", image_url_2="")
    assert list(rows[1]) == list(PAIR)


@pytest.mark.parametrize("rows", [[pair(), row(), pair()], [row(), pair(), row()]])
def test_pairs_and_single_rows_do_not_mix(folder, rows):
    write_lines("a.jsonl", rows[:1])
    write_array("b.json", rows[1:])
    message = refused("a.jsonl", "b.json")
    if rows[0] == row():
        assert "b.json:row 1 is a pair, a.jsonl:1 a single row" in message
    else:
        assert "a.jsonl:1 is a pair, b.json:row 1 a single row" in message


# --------------------------------------------------------------------------------------------------
# Bad rows

HUMAN_AND_GPT = "'conversations' must begin with texts of human and gpt"
TOGETHER = "<image> at the start or end of the question and a picture go together"
BAD = [  # (line or row, what is said about it)
    (b'{"image_url": "", "instruction": "a', "Invalid control char"),
    (b'{"image_url": "", "instruction": "a"', "Expecting"),  # a torn line
    (b"[1]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"{} {}", "Extra data"),
    (b'{"a": "\xff"}', "'utf-8' codec"),
    (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    (row(id=float("nan")), "not JSON compliant"),
    (row("\ud800"), "half a character"),
    (row(id="\ud800"), "surrogates not allowed"),
    (row(input="\ud800"), "surrogates not allowed"),
    (row(picture="\udcff.png"), "\\udcff.png cannot be read"),
    (row(answer=" "), "field 'output' is empty"),
    (row(answer=60), "field 'output' is missing or not a string"),
    ({"instruction": "a"}, "field 'output' is missing"),
    ({"output": "a"}, "field 'instruction' is missing"),
    ({"input": "a", "output": "a"}, "field 'instruction' is missing"),
    (row(image="p.png"), "'image' is not read: name a picture in 'image_url'"),
    (row(images=["p.png"]), "'images' is not read"),
    (row(video="v.mp4"), "'video' is not read"),
    (llava("<video>\nA?", "B", picture=None) | {"videos": ["v.mp4"]}, "'videos' is not read"),
    (row(picture=3), "pictures/3 cannot be read"),
    (row(picture=["p.png"]), "cannot be read"),
    (row(picture="no.png"), "no.png cannot be read"),
    (row(picture="http://x/p.png"), "cannot be read"),
    (row(picture="\0.png"), "null byte"),
    (row(picture="sub"), "cannot be read"),
    (row(picture="x" * 300), "cannot be read"),
    (row(picture="circle.png"), "circle.png"),
    (row(picture="."), "cannot be read"),
    (row(picture="link.png"), "picture 'link.png' is not inside"),
    (row(picture="../out.png"), "picture '../out.png' is not inside"),
    (row(picture="../pictures2/p.png"), "is not inside"),
    (row(picture="/etc/passwd"), "picture '/etc/passwd' is not inside"),
    (llava("A?", "B"), TOGETHER),
    (llava("A <image> B?", "B"), TOGETHER),
    (llava("<image>\nA?", "B", picture=None), TOGETHER),
    (llava("A?<image>", "B", picture=""), TOGETHER),
    (llava("<image>A?", "B", picture=["p.png", "p.png"]), "cannot be read"),
    (llava("A?", picture=None), HUMAN_AND_GPT),
    (llava("A?", "B", picture=None, speakers=("user", "gpt")), HUMAN_AND_GPT),
    (llava("A?", "B", picture=None, speakers=("human", "assistant")), HUMAN_AND_GPT),
    (llava("S", "A?", "B", picture=None, speakers=("system", "human", "gpt")), HUMAN_AND_GPT),
    (llava(7, "B", picture=None), HUMAN_AND_GPT),
    (llava("A?", 7, picture=None), "field 'output' is missing or not a string"),
    (llava("A?", "", picture=None), "field 'output' is empty"),
    ({"conversations": "A?"}, HUMAN_AND_GPT),
    ({"conversations": [1, 2]}, HUMAN_AND_GPT),
    ({"conversations": []}, "field 'instruction' is missing"),
]


@pytest.fixture
def outside(folder):
    """Pictures that lie outside of the folder pictures, and a link to one of them inside."""
    os.mkdir("pictures/sub")
    os.mkdir("pictures2")  # its name begins as the other's does
    picture = Image.new("L", (9, 9))
    picture.save("out.png")
    picture.save("pictures2/p.png")
    os.symlink(folder / "out.png", "pictures/link.png")
    os.symlink("circle.png", "pictures/circle.png")


def test_bad_lines_are_listed_and_left_out(outside, capsys):
    rows = [row(id="first")]
    for bad, _ in BAD:
        rows.append(bad)
    write_lines("a.jsonl", [*rows, row(id="last")])

    assert convert("a.jsonl") == [row(id="first"), row(id="last")]
    *listed, total = capsys.readouterr().out.splitlines()
    assert total == f"mine.jsonl: 2 rows, {len(BAD)} left out"
    assert len(listed) == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(listed, BAD), 2):
        assert line.startswith(f"a.jsonl:{number}: ")
        assert message in line


def test_bad_rows_of_an_array(outside, capsys):
    objects = [bad for bad in BAD if not isinstance(bad[0], bytes)]
    rows = [7, row(), None]
    for bad, _ in objects:
        rows.append(bad)
    write_array("a.json", rows)

    assert convert("a.json") == [row()]
    first, second, *listed, _ = capsys.readouterr().out.splitlines()
    assert first == "a.json:row 1: not a JSON object"
    assert second == "a.json:row 3: not a JSON object"
    for number, (line, (_, message)) in enumerate(zip(listed, objects), 4):
        assert line.startswith(f"a.json:row {number}: ")
        assert message in line


@pytest.mark.parametrize("changes,message", [
    ({"output_2": "8"}, "the answers of a pair differ"),
    ({"output_2": None}, "field 'output_2' is missing"),
    ({"instruction_2": None}, "field 'instruction_2' is missing"),
    ({"instruction_2": None, "output_2": None}, "field 'instruction_2' is missing"),
    ({"image_url_2": "no.png"}, "no.png cannot be read")])
def test_a_bad_pair(folder, capsys, changes, message):
    write_lines("a.jsonl", [pair(), pair(**changes)])
    assert len(convert("a.jsonl")) == 1
    assert message in capsys.readouterr().out.splitlines()[0]


GOOD = json.dumps(row()).encode()


@pytest.mark.parametrize("content", [
    b"[" + GOOD + b", " + GOOD[:-9],
    b"[" + GOOD + b" " + GOOD + b"]",
    b"[" + GOOD + b",]",
    b"[" + GOOD + b"] x",
    b"[" + GOOD + b'{"a": "\xff"}]',
    b"[" + GOOD + b',{"a":' + b"[" * 100_000,
    GOOD + b"\n" + GOOD,
    b'{"rows": [' + GOOD + b"]}",
    b""])
def test_a_file_that_is_no_array(folder, content):
    (folder / "a.json").write_bytes(content)
    message = refused("a.json")
    assert message.startswith("a.json is no JSON array: ")
    assert message.endswith("(a row a line is named .jsonl)")


@pytest.mark.parametrize("name,content", [
    ("a.json", b"[]"), ("a.jsonl", b"\n"), ("a.jsonl", b"{}")])
def test_a_file_without_a_good_row(folder, name, content):
    (folder / name).write_bytes(content)
    assert refused(name) == "mine.jsonl is not written: no row can be used"


# --------------------------------------------------------------------------------------------------
# LLaVA's turns and marks

def test_rows_of_several_turns(folder, capsys):
    long = llava("<image>\nFind y.", "7", "And z?", "8")
    with_system = llava("Be brief.", "Find y.", "7", picture="",
                        speakers=("system", "human", "gpt"))
    write_lines("a.jsonl", [row(), long, with_system])
    count = "1 rows have more than two turns: left out, or cut to the first two by --first_turn\n"

    assert convert("a.jsonl") == [row()]
    out = capsys.readouterr().out
    assert "a.jsonl:2: more than two turns\n" in out
    assert f"{count}mine.jsonl: 1 rows, 2 left out\n" in out

    rows = convert("a.jsonl", out="b.jsonl", more=["--first_turn"])
    assert rows == [row(), row(picture="pictures/p.png")]
    out = capsys.readouterr().out
    assert f"a.jsonl:3: {HUMAN_AND_GPT}" in out  # a system turn is refused either way
    assert f"{count}b.jsonl: 2 rows, 1 left out\n" in out


def test_a_typed_mark_stays_text_and_is_counted(folder, capsys):
    rows = [llava("<image>\nIs <image> or <image1> it? <image>", "<image>"),
            llava("Is <image> it? <image>", "7"),
            llava("a <image> b", "c", picture=None),
            row("See <image1>", picture="p.png"),
            row("See <img>")]
    write_array("a.json", rows)
    questions = [row["instruction"] for row in convert("a.json")]
    assert questions == ["Is <image> or <image1> it? <image>", "Is <image> it?", "a <image> b",
                         "See <image1>", "See <img>"]
    assert "4 rows have a mark such as <image> left in their text\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Pictures

def png(width, height):
    """The bytes of a grey PNG of this size, without its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + kind + chunk
        content += struct.pack(">I", zlib.crc32(kind + chunk))
    return content


def test_broken_pictures_are_listed(folder, capsys):
    whole = (folder / "pictures/p.png").read_bytes()
    broken = {
        "empty.png": (b"", "cannot identify"),
        "half.png": (whole[:len(whole) // 2], "truncated"),
        "text.png": (b"Find y.", "cannot identify"),
        "bomb.png": (png(60_000, 60_000), "pixels"),
        "large.png": (png(8_000, 8_000), "more than 50,000,000 pixels"),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    }
    rows = [row(picture="p.png")]
    for name, (content, _) in broken.items():
        (folder / "pictures" / name).write_bytes(content)
        rows.append(row(picture=name))
    write_lines("a.jsonl", rows)

    assert len(convert("a.jsonl")) == 1
    listed = capsys.readouterr().out.splitlines()
    for number, (name, (_, message)) in enumerate(broken.items(), 2):
        path = folder / "pictures" / name
        assert listed[number - 2].startswith(f"a.jsonl:{number}: picture {path} cannot be read: ")
        assert message in listed[number - 2]


def test_names_of_pictures_start_from_images_and_end_at_out(folder):
    os.makedirs("pictures/sub/deep")
    os.link("pictures/p.png", "pictures/sub/deep/q.png")
    os.symlink("deep/q.png", "pictures/sub/inside.png")
    names = ["deep/q.png", "deep/../inside.png", str(folder / "pictures/sub/deep/q.png")]
    write_lines("a.jsonl", [row(picture=name) for name in names])

    for out, expected in [("mine.jsonl", "pictures/sub/deep/q.png"),
                          ("pictures/mine.jsonl", "sub/deep/q.png"),
                          ("pictures/sub/mine.jsonl", "deep/q.png")]:
        rows = convert("a.jsonl", out=out, images="pictures/sub")
        assert [row["image_url"] for row in rows] == [expected] * 3

    # A link to the folder of --out is no reason to lose the pictures.
    os.symlink("sub", "pictures/linked")
    assert convert("a.jsonl", out="pictures/linked/new.jsonl", images="pictures/sub") == rows

    # Without --images names start from the folder of --out, not from that of the rows.
    data.main(["a.jsonl", "--out", "pictures/sub/again.jsonl"])
    assert read("pictures/sub/again.jsonl") == rows


def test_pictures_that_no_stage_would_find(folder):
    os.mkdir("data")
    write_lines("a.jsonl", [row()])
    message = refused("a.jsonl", out="data/mine.jsonl")
    assert f"--images {folder}/pictures is no folder inside that of --out, {folder}/data" in message
    assert f"give --out {folder}/NAME.jsonl" in message
    assert f"{folder}/no is no folder" in refused("a.jsonl", images="no")
    assert f"{folder}/no is no folder" in refused("a.jsonl", out="no/mine.jsonl", images="")


def test_a_picture_of_many_rows_is_decoded_once(folder, monkeypatch):
    def log(path, size):
        with open("decoded", "a") as f:
            f.write(f"{path}\n")

    use_fork(monkeypatch)
    monkeypatch.setattr(data, "load_image", log)
    write_lines("a.jsonl", [row(picture="p.png")] * 50)
    assert len(convert("a.jsonl")) == 50
    assert (folder / "decoded").read_text() == f"{folder}/pictures/p.png\n"


# --------------------------------------------------------------------------------------------------
# Processes and files

def use_fork(monkeypatch):
    """Worker processes see what a test has replaced, whatever Python's default is."""
    fork = multiprocessing.get_context("fork")
    pool = functools.partial(ProcessPoolExecutor, mp_context=fork)
    monkeypatch.setattr(data, "ProcessPoolExecutor", pool)


def test_one_worker_and_two_write_the_same(outside, capsys, monkeypatch):
    pools = []

    def pool(workers):
        pools.append(workers)
        return ProcessPoolExecutor(workers)

    monkeypatch.setattr(data, "ProcessPoolExecutor", pool)
    rows = []
    for number in range(200):
        bad, _ = BAD[number % len(BAD)]
        rows.append(bad if number % 3 == 0 else row(str(number), picture="p.png"))
    write_lines("a.jsonl", rows)
    written = []
    for workers in (1, 2):
        convert("a.jsonl", out=f"{workers}.jsonl", workers=workers)
        with open(f"{workers}.jsonl", "rb") as f:
            written.append((f.read(), capsys.readouterr().out.splitlines()[:-1]))
    assert pools == [1, 2]
    assert written[0] == written[1]
    assert len(written[0][0].splitlines()) == 133


def test_a_worker_that_dies_ends_the_run(folder, monkeypatch):
    def die(path, size):
        os.kill(os.getpid(), signal.SIGKILL)

    use_fork(monkeypatch)
    monkeypatch.setattr(data, "load_image", die)
    write_lines("a.jsonl", [row(), row(picture="p.png")] * 40)
    assert "a process died" in refused("a.jsonl", workers=2)


def test_a_mix_is_told_before_all_pictures_are_decoded(folder, monkeypatch):
    def log(path, size):
        with open("pictures/decoded", "a") as f:
            f.write("x")

    use_fork(monkeypatch)
    monkeypatch.setattr(data, "load_image", log)
    names = [f"{number}.png" for number in range(3000)]
    for name in names:
        os.link("pictures/p.png", f"pictures/{name}")
    write_lines("a.jsonl", [row(), pair(), *(row(picture=name) for name in names)])
    assert "a.jsonl:2 is a pair, a.jsonl:1 a single row" in refused("a.jsonl")
    assert os.path.getsize("pictures/decoded") < 2500


def test_the_file_is_complete_when_it_gets_its_name(folder, monkeypatch):
    write_lines("a.jsonl", [row()] * 9)
    seen = []

    def fail(part, out):
        seen.append((read(part), os.path.exists(out)))
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        convert("a.jsonl")
    assert seen == [([row()] * 9, False)]
    assert not os.path.exists("mine.jsonl")
    [part] = [name for name in os.listdir() if name.startswith("mine")]
    assert str(os.getpid()) in part and not part.endswith(".jsonl")

    monkeypatch.undo()  # what is left of it is in nobody's way
    os.chdir(folder)
    assert len(convert("a.jsonl")) == 9


def test_what_is_there_is_not_overwritten(folder):
    write_lines("a.jsonl", [row()])
    (folder / "old.jsonl").write_text("precious")
    os.symlink("nowhere", "link.jsonl")
    for out in ("a.jsonl", "old.jsonl", "link.jsonl"):
        assert f"--out {out}: give the name of a new .jsonl file" in refused("a.jsonl", out=out)
    assert (folder / "old.jsonl").read_text() == "precious"


def test_flags_are_checked_first(folder):
    write_lines("a.jsonl", [row()])
    assert "a new .jsonl file" in refused("a.jsonl", out="mine.json")
    assert "give 1 or more" in refused("a.jsonl", workers=0)
    assert refused("a.jsonl", "no.jsonl") == "no.jsonl: no such file"
    assert refused("pictures") == "pictures: no such file"


def test_as_a_command_on_a_terminal_that_knows_only_ascii(folder, monkeypatch):
    write_lines("a.jsonl", [row(), row(picture="°.png")])
    command = "data.py a.jsonl --images pictures --out mine.jsonl --workers 1"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ROOT])

    runpy.run_path(os.path.join(ROOT, "convert", "data.py"), run_name="__main__")
    terminal.seek(0)
    assert "\\xb0.png cannot be read" in terminal.read()
    assert read("mine.jsonl") == [row()]
    assert sys.path[0] == ROOT  # model.py is there, and the script's own folder is convert/


def test_the_result_trains(folder):
    rows = [llava("<image>\nFind y.", "7"), llava("Find z.", "8", picture=None)]
    write_array("a.json", rows)
    convert("a.json")
    stage3_mm_instruct.main([
        "--data", "mine.jsonl", "--init", os.path.join(ROOT, "tiny"), "--out", "out",
        "--steps", "1", "--batch", "2", "--no-evaluate"])
    assert os.path.isdir("out/step-1")
