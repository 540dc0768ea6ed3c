"""Data of one's own: formats, checks, memory, pictures, rows that are too long."""
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model
import stage1_text_sft
import stage2_kl_align
import stage3_mm_instruct
from model import IGNORE, PAIR, encode_example, load_image, load_vlm, make_batch, read_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "tiny")
STAGES = {1: stage1_text_sft, 2: stage2_kl_align, 3: stage3_mm_instruct}


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(TINY)


@pytest.fixture
def folder(tmp_path):
    """A place with a picture, p.png, in it."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (108, 108), np.uint8)).save(tmp_path / "p.png")
    return tmp_path


def row(text="Find angle A.", answer="90-30=60. †Answer: 60°", **more):
    return {"image_url": "", "instruction": text, "output": answer} | more


def pair(**more):
    return row("angle B=30°. Find angle A.") | {f"{k}_2": v for k, v in row(image_url="p.png").items()} | more


def llava(*values, image="p.png", system=None):
    turns = [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]
    turns = [{"from": "system", "value": system}] * (system is not None) + turns
    return {"conversations": turns} | ({"image": image} if image else {})


def lines(path, rows):
    """Write rows (dicts, or text as it stands) as JSONL. -> the path"""
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(path)


def array(path, rows, **style):
    path.write_text(json.dumps(rows, **style), encoding="utf-8")
    return str(path)


def fields(rows, names=model.ROW):
    return [[r[name] for name in names] for r in rows]


def run(*data, out, **more):
    base = {"init": TINY, "out": out, "batch": 2, "micro_batch": 2, "steps": 1, "log_every": 1} | more
    return ["--data", *map(str, data), *(f"--{k}={v}" for k, v in base.items())]


def train(stage, *data, out, **more):
    STAGES[stage].main(run(*data, out=out, **more))
    with open(os.path.join(out, "metrics.jsonl")) as f:
        metrics = [json.loads(line) for line in f]
    return load_file(os.path.join(model.newest_checkpoint(str(out)), "model.safetensors")), metrics


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
TRICKY = [row('},{"a":[1,2]'), row('say "x\\" ]', "\\"), row("a\u2028b\u0085c\xa0d"), row("° √ π 𝒙", "†"),
          row("line\r\nbreak\ttab"), row("<|im_end|> <image>")]


@pytest.mark.parametrize("style", [{}, {"indent": 2, "ensure_ascii": False}, {"separators": (",", ":")}])
def test_an_array_is_the_same_rows_as_lines(tmp_path, style):
    """Rows of 0.1 to 40 kB: the ends of the 64 kB blocks fall everywhere, one row is larger than a block."""
    sizes = np.random.default_rng(1).integers(1, 2000, 60)
    rows = TRICKY + [row("°x\\\"" * int(n), str(n)) for n in [*sizes, 40000]]
    a, b = array(tmp_path / "a.json", rows, **style), lines(tmp_path / "b.jsonl", rows)
    assert fields(read_rows(a)) == fields(read_rows(b)) == fields(rows)
    assert read_rows(a)[3]["id"] == f"{a}:row 4" and read_rows(b)[-1]["id"] == f"{b}:{len(rows)}"
    assert fields(read_rows(a)[2:5]) == fields(rows[2:5]) and len(list(read_rows(a))) == len(rows)


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    text = "\ufeff" + "\r\n".join(map(json.dumps, TRICKY[:3])) + "\r\n\r\n \n" + json.dumps(TRICKY[3])
    (tmp_path / "d.jsonl").write_bytes(text.encode())  # and no line break at the end
    rows = read_rows(str(tmp_path / "d.jsonl"))
    assert fields(rows) == fields(TRICKY[:4])
    assert [r["id"].rsplit(":")[-1] for r in rows] == ["1", "2", "3", "6"]
    (tmp_path / "d.json").write_bytes(("\ufeff " + json.dumps(TRICKY)).encode())
    assert fields(read_rows(str(tmp_path / "d.json"))) == fields(TRICKY)


GOOD = json.dumps(row())


@pytest.mark.parametrize("text,message", [
    (f"[{GOOD}, {GOOD[:-9]}", "row 2: no array"), (f"[{GOOD} {GOOD}]", "row 2: "), (f"[{GOOD},]", "row 2: "),
    (f"[{GOOD}][{GOOD}]", "row 2: "), (f"[{GOOD}] x", "row 2: "), (f"[{GOOD}, []", "row 2: "),
    ("", "row 1: "),
    (f"{GOOD}\n{GOOD}\n", "row 1: .*one row a line is named .jsonl"), ("[]", " no rows"),
    ("[" + GOOD + ',{"a":' + "[" * 100000, "row 2: .*too deep"),
    (f"[{GOOD}, 7, {GOOD}]", "row 2: not a JSON object")])
def test_a_broken_array_names_the_row(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(SystemExit, match="d.json:" + message):
        read_rows(str(tmp_path / "d.json"))


BAD = [  # (line, what is said about it); file:2 comes before
    ('{"image_url": "", "instruction": "a', "Invalid control char"), ("[1]", "not a JSON object"),
    ("null", "not a JSON object"), ("{} {}", "Extra data"), ('{"a": "\udcff"}', "'utf-8' codec"),
    ('{"x":' + "[" * 100000 + "]" * 100000 + "}", "nested too deep"),
    *((json.dumps(r), message) for r, message in [
        (row(id=float("nan")), "NaN"), (row("\ud800"), "surrogates not allowed"),
        (row(answer=" "), "'output' is empty"), (row(answer=60), "'output' is missing or not a string"),
        ({"instruction": "a"}, "'output' is missing"), ({"output": "a"}, "'instruction' is missing"),
        (row(image_url=3), "'image_url' is missing or not"), (row(image="p.png"), "it is 'image_url'"),
        (row(image_url="no.png", id="q7"), "row q7: picture no.png is no file"),
        *((row(image_url=path), f"picture {path} is no file inside") for path in (
            "../out.png", "link.png", "http://x/p.png", ".", "sub", "/etc/passwd", "../data2/p.png")),
        (llava("<image>\nA?", "B", image=None), "<image> but no picture"),
        (llava("A <image> B?", "B"), "a picture but no <image>"),
        (llava("A?", "B", "C?", image=None), "texts of human, gpt"),
        (llava(image=None), "texts of human, gpt"),
        ({"conversations": [{"from": "user", "value": "A?"}]}, "texts of human, gpt"),
        (llava("A?", 7, image=None), "texts of human, gpt"),
        (llava("A?", "", image=None), "'output' is empty"),
        ({"conversations": "A?"}, "conversations is not a list"),
        (llava("<image>A?", "B", image=["p.png", "p.png"]), "'image_url' is missing or not a string")])]


@pytest.fixture
def outside(folder):
    """A data folder below `folder`, with pictures outside of it and a link to one of them."""
    (folder / "data").mkdir()
    Image.new("L", (9, 9)).save(folder / "out.png")
    Image.new("L", (9, 9)).save(folder / "data" / "p.png")
    os.symlink(folder / "out.png", folder / "data" / "link.png")
    (folder / "data" / "sub").mkdir()
    (folder / "data2").mkdir()  # its name begins as the root's does
    Image.new("L", (9, 9)).save(folder / "data2" / "p.png")
    return folder / "data"


@pytest.mark.parametrize("text,message", BAD, ids=range(len(BAD)))
def test_a_bad_line_stops_the_run_and_says_why(outside, text, message):
    path = lines(outside / "d.jsonl", [row(), text])
    with pytest.raises(SystemExit) as stopped:
        read_rows(path)
    assert str(stopped.value).startswith(f"{path}:2: ") and message in str(stopped.value)


@pytest.mark.parametrize("change,message", [
    ({"output_2": "7"}, "answers of a pair differ: '90"), ({"output_2": None}, "'output_2' is missing"),
    ({"instruction_2": None}, "'instruction_2' is missing"),
    ({"image_url_2": "q.png"}, "picture q.png is no file")])
def test_a_bad_pair(folder, change, message):
    with pytest.raises(SystemExit, match=f"d.jsonl:1: .*{message}"):
        read_rows(lines(folder / "d.jsonl", [pair(**change)]), PAIR)
    assert len(read_rows(lines(folder / "d.jsonl", [pair()]), PAIR)) == 1


def test_check_data_lists_every_bad_row_and_trains_nothing(outside, capsys):
    (outside / "text.png").write_text("not a picture")
    texts = [row(), *(text for text, _ in BAD), row(image_url="text.png")]
    path = lines(outside / "d.jsonl", texts)
    with pytest.raises(SystemExit) as stopped:
        stage1_text_sft.main([*run(path, out=outside / "o"), "--check_data"])
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(path)]
    assert stopped.value.code == 1 and not (outside / "o").exists()
    assert [line.split(":")[1] for line in listed] == [str(n) for n in range(2, len(texts) + 1)]
    assert all(message in line for line, (_, message) in zip(listed, BAD)) and "cannot be read" in listed[-1]


def test_check_data_of_good_rows_exits_0(folder, capsys):
    path = lines(folder / "d.jsonl", [pair()] * 3)
    with pytest.raises(SystemExit) as stopped:
        stage2_kl_align.main([*run(path, out=folder / "o"), "--check_data"])
    assert stopped.value.code == 0 and "3 rows are good, 0 are bad" in capsys.readouterr().out


def test_max_bad_leaves_rows_out_aloud(tmp_path, capsys):
    path = lines(tmp_path / "d.jsonl", [row("a"), "{", row("b"), "[]", row("c")])
    rows = read_rows(path, max_bad=2)
    out = capsys.readouterr().out
    assert [r["instruction"] for r in rows] == ["a", "b", "c"] and rows[2]["id"] == f"{path}:5"
    assert f"left out: {path}:2: " in out and f"left out: {path}:4: " in out and "2 are bad" in out
    with pytest.raises(SystemExit, match="d.jsonl:4: .*--max_bad"):
        read_rows(path, max_bad=1)
    assert rows.sha256() != model.sha256(path)  # which rows are used belongs to what a run was trained on


def test_null_and_absent_pictures_mean_text_only(tmp_path):
    absent = {"instruction": "a", "output": "b"}
    path = lines(tmp_path / "d.jsonl", [row(image_url=None), absent, llava("a", "b", image=None)])
    assert [r["image_url"] for r in read_rows(path)] == ["", "", ""]


def test_image_root(outside):
    """It replaces the folder of the file, and what lies below it is allowed."""
    path = lines(outside / "d.jsonl", [row(image_url=p) for p in ("out.png", "data/link.png", "data/../p.png",
                                                                  str(outside.parent / "out.png"))])
    rows = read_rows(path, image_root=str(outside.parent))
    assert len(rows) == 4 and all(os.path.isfile(os.path.join(r["root"], r["image_url"])) for r in rows)


@pytest.mark.parametrize("write", [lines, array])
def test_rows_stay_on_disk(tmp_path, write):
    """10,000 rows of 1 kB: 10 MB as text, more as objects; what is kept is 32 bytes a row."""
    path = write(tmp_path / ("d.jsonl" if write is lines else "d.json"), [row("x" * 900)] * 10000)
    tracemalloc.start()
    rows = read_rows(path)
    kept, peak = tracemalloc.get_traced_memory()
    assert rows[9999]["instruction"] == "x" * 900
    tracemalloc.stop()
    assert kept < 5e5 and peak < 1.5e6


def test_a_row_longer_than_memory_should_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "MAX_ROW", 2 ** 17)
    with pytest.raises(SystemExit, match="d.jsonl:2: a line of"):
        read_rows(lines(tmp_path / "d.jsonl", [row(), row("x" * 2 ** 17)]))
    with pytest.raises(SystemExit, match="d.json:row 2: .*too long"):
        read_rows(array(tmp_path / "d.json", [row(), row("x" * 2 ** 18)]))


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------
def test_two_files_train_as_one_and_in_this_order(folder, capsys):
    rows = [row(f"a={n}. Find a.", f"{n}", image_url="p.png" if n % 2 else "") for n in range(6)]
    (folder / "more").mkdir()
    os.link(folder / "p.png", folder / "more" / "p.png")  # default root: each file's own folder
    a, b = lines(folder / "a.jsonl", rows[:3]), array(folder / "more" / "b.json", rows[3:])
    both = lines(folder / "c.jsonl", rows)
    one, two = (train(3, *data, out=folder / f"o{len(data)}", batch=6, lr=1e-3) for data in ([both], [a, b]))
    assert all(torch.equal(v, two[0][k]) for k, v in one[0].items())
    assert one[1][0]["loss"] == two[1][0]["loss"]
    assert "accuracy" not in capsys.readouterr().out  # no table: its problems are data_gen.py's
    train(3, a, b, out=folder / "o2", batch=6, lr=1e-3)  # a finished run is left alone
    with pytest.raises(SystemExit, match="--data: "):
        train(3, b, a, out=folder / "o2", batch=6, lr=1e-3)


@pytest.mark.parametrize("data", [["data", "a.jsonl"], ["a", "b"]])
def test_folders_and_files_are_not_mixed(data, tmp_path):
    with pytest.raises(SystemExit, match="one folder"):
        train(1, *data, out=tmp_path / "o")
    with pytest.raises(SystemExit, match="no.jsonl does not exist"):
        train(1, tmp_path / "no.jsonl", out=tmp_path / "o")


LONG = "Find angle A. " * 40


def test_a_row_that_does_not_fit_is_dropped_and_counted(folder, tiny):
    """Loss and parameters are those of the batch without it, whoever shares a micro-batch with it."""
    rows = [row(), row(LONG, image_url="p.png"), row("7*8=", "56", image_url="p.png"), row(answer="12 " * 90)]
    path = lines(folder / "d.jsonl", rows)
    (a, log), (b, _) = (train(3, path, out=folder / f"o{m}", batch=4, micro_batch=m, max_length=150, lr=1e-4)
                        for m in (4, 1))
    assert max((a[k] - b[k]).abs().max() for k in a) < 2.1e-4  # an Adam step of rounding noise is up to lr
    assert log[0]["dropped"] == log[0]["cut"] == 1
    batch = make_batch(*tiny, [rows[k] for k in (0, 2, 3)], root=folder, max_length=150)
    with torch.no_grad():
        logits = tiny[0](batch) @ tiny[0].lm_head.T
    labels = batch.labels[batch.labels != IGNORE]
    assert log[0]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_batch_of_which_nothing_fits_changes_nothing(folder, stage, capsys):
    path = lines(folder / "d.jsonl", [pair(instruction_2=LONG), pair(instruction=LONG)])
    before = load_file(os.path.join(TINY, "model.safetensors"))
    after, log = train(stage, path, out=folder / "o", max_length=130, weight_decay=0)
    want = 2 if stage == 2 else 1  # of a pair either form is enough; the other stages read the first alone
    assert log[0]["dropped"] == want
    assert f"too long: {want} rows dropped, 0 answers cut" in "".join(capsys.readouterr())
    if stage == 2:
        assert log[0]["loss"] == 0 and all(torch.equal(after[k], v.float()) for k, v in before.items())


def test_both_forms_of_a_pair_are_cut_alike(folder, tiny):
    """The weak prompt is 81 image tokens longer; its answer must not lose 81 tokens more."""
    rows = [pair(output="12 " * 60, output_2="12 " * 60), pair(), pair(instruction=LONG)]
    strong, weak = (make_batch(*tiny, rows, side, folder, 150, forms=("", "_2")) for side in ("", "_2"))
    assert torch.equal(strong.labels[strong.labels != IGNORE], weak.labels[weak.labels != IGNORE])
    assert strong.lost.tolist() == weak.lost.tolist() == [1, 1]
    assert weak.labels.shape[1] == 150 > strong.labels.shape[1]
    _, log = train(2, lines(folder / "d.jsonl", rows), out=folder / "o", batch=3, max_length=150)
    assert log[0]["dropped"] == log[0]["cut"] == 1 and log[0]["kl_ts"] > 0


def test_a_process_without_a_row_that_fits_goes_on(folder):
    """Two processes, one row each, one of them too long: nobody waits for ever, and one process agrees."""
    path = lines(folder / "d.jsonl", [row(), row(LONG, image_url="p.png")])
    one, log = train(3, path, out=folder / "one", max_length=130, lr=1e-4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               STAGES[3].__file__, *run(path, out=folder / "two", max_length=130, lr=1e-4)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(folder / "two" / "metrics.jsonl") as f:
        two = [json.loads(line) for line in f]
    assert [m["dropped"] for m in log] == [m["dropped"] for m in two] == [1]
    assert [m["loss"] for m in log] == pytest.approx([m["loss"] for m in two], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# LLaVA
# ------------------------------------------------------------------------------------------------------------
def encode(tokenizer, r, **more):
    return encode_example(tokenizer, r, image_tokens=81, size=108, **more)


@pytest.mark.parametrize("question", ["<image>\nFind y.", "Find y.\n<image>", "<image>Find y."])
def test_llava_is_the_released_row_in_other_words(folder, tiny, question):
    path = lines(folder / "d.jsonl", [llava(question, "7"), row("Find y.", "7", image_url="p.png")])
    a, b = (encode(tiny[1], r) for r in read_rows(path))
    assert a[:2] == b[:2] and torch.equal(a[2], b[2])


def test_a_typed_mark_stays_text(folder, tiny):
    text = "What is <image> or <|image|> or <|im_end|>? <image>"
    path = lines(folder / "d.jsonl", [llava(f"<image>\n{text}", "<image>"),
                                      llava("a <image> b", "c", image=None)])
    (ids, labels, _), (plain, _, none) = (encode(tiny[1], r) for r in read_rows(path))
    assert ids.count(tiny[0].image_token_id) == 81 and ids.count(tiny[1].eos_token_id) == 2
    assert text in tiny[1].decode(ids) and "a <image> b" in tiny[1].decode(plain) and none is None
    assert labels.count(tiny[1].eos_token_id) == 1


def test_every_answer_of_a_conversation_is_learnt(folder, tiny):
    tokenizer = tiny[1]
    path = lines(folder / "d.jsonl", [llava("<image>\nFind y.", "7", "And x?", "8. †", system="Be brief.")])
    ids, labels, pixels = encode(tokenizer, read_rows(path)[0])
    assert tokenizer.decode(ids).replace("<|image|>" * 81, "<|image|>") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|image|>Find y.<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nAnd x?<|im_end|>\n"
        "<|im_start|>assistant\n8. †<|im_end|>")
    learnt = [t for t, y in enumerate(labels) if y != IGNORE]
    assert tokenizer.decode([labels[t] for t in learnt]) == "7<|im_end|>8. †<|im_end|>"
    assert [labels[t] for t in learnt] == [ids[t + 1] for t in learnt] and pixels is not None
    batch = make_batch(*tiny, read_rows(path), max_length=len(ids) - 3)
    assert batch.lost.tolist() == [0, 1]  # the second answer is cut


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
def png(width, height, pixels=b""):
    """The bytes of a grey PNG that claims this size, whatever it holds."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"IDAT", b"IEND"),
                                                (head, zlib.compress(pixels), b"")))


def whole(folder):
    return (folder / "p.png").read_bytes()


@pytest.mark.parametrize("content,message", [
    (lambda f: b"", "cannot identify"), (lambda f: whole(f)[:len(whole(f)) // 2], "trunc"),
    (lambda f: b"Find angle A.", "cannot identify"), (lambda f: png(8000, 8000), "8000 x 8000 pixels"),
    (lambda f: png(60000, 60000), "pixels"),
    (lambda f: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    (lambda f: whole(f)[:60] + b"\0" * 90 + whole(f)[150:], "")])
def test_a_broken_picture_names_row_and_file(folder, tiny, content, message):
    (folder / "bad.png").write_bytes(content(folder))
    rows = read_rows(lines(folder / "d.jsonl", [row(image_url="bad.png", id="q7")]))
    with pytest.raises(SystemExit, match=f"row q7: picture .*bad.png cannot be read: .*({message})"):
        make_batch(*tiny, rows)


def test_a_picture_that_vanished(folder, tiny):
    rows = read_rows(lines(folder / "d.jsonl", [row(image_url="p.png", id="q7")]))
    kept = rows[0]
    os.remove(folder / "p.png")
    with pytest.raises(SystemExit, match="row q7: picture .*p.png cannot be read: .*No such file"):
        make_batch(*tiny, [kept])
    with pytest.raises(ValueError, match="d.jsonl:1: row q7: picture p.png is no file"):
        rows[0]


def test_pictures_of_every_kind(tmp_path):
    white, grey = Image.new("L", (20, 10), 255), Image.new("L", (20, 10), 128)
    save = lambda image, name, **more: image.save(tmp_path / name, **more) or load_image(tmp_path / name, 8)
    assert save(white.convert("CMYK"), "c.jpg").min() > .9
    assert save(Image.new("P", (9, 9)), "t.png", transparency=0).min() == 1  # transparent palette entry
    assert save(Image.new("L", (9, 9)), "l.png", transparency=0).min() == 1  # transparent grey level
    assert save(Image.new("RGBA", (9, 9)), "a.webp", lossless=True).min() == 1
    deep = save(Image.fromarray(np.full((9, 9), 0x8000, np.uint16)), "d.png")
    assert abs(deep.mean() - (128 / 127.5 - 1)) < 1e-5 and save(grey, "g.bmp").mean() == deep.mean()
    assert save(white, "g.gif", save_all=True, append_images=[Image.new("L", (20, 10))]).min() == 1  # frame 1
    for size in ((1, 1), (1, 5000)):
        assert save(Image.new("RGB", size, "white"), "s.png").shape == (3, 8, 8)
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 16, 8))  # white above; orientation 6 is shown turned a quarter to the right
    turn = Image.Exif()
    turn[0x0112] = 6
    turned = save(half, "e.png", exif=turn)
    assert turned[:, :, -1].min() == 1 and turned[:, :, 0].max() == -1


# ------------------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------------------
def test_the_commands_of_the_readme(folder, monkeypatch, capsys):
    """The rows of the section "Your own data" go through its commands."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    rows, commands = (text.split(f"<!-- {mark} -->")[1].split("```")[1] for mark in ("own rows", "own data"))
    monkeypatch.chdir(folder)
    os.mkdir("pictures")
    os.rename("p.png", "pictures/p.png")
    for line in rows.strip().splitlines():
        name, content = line.split(maxsplit=1)
        (folder / name).write_text(content, encoding="utf-8")
    commands = [line.split() for line in commands.splitlines() if line.startswith("python")]
    assert len(commands) == 4
    for _, script, *flags in commands:
        stage = next(module for module in STAGES.values() if module.__file__.endswith(script))
        small = ["--init", TINY, "--steps", "1", "--batch", "2"]
        if "--check_data" in flags:
            with pytest.raises(SystemExit) as stopped:
                stage.main([*flags, *small])
            assert stopped.value.code == 0
        else:
            stage.main([*flags, *small])
    assert "1 rows are good, 0 are bad" in capsys.readouterr().out
    assert all(os.path.exists(f"out/stage{k}/step-1/manifest.json") for k in STAGES)
