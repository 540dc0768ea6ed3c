"""Tokens, labels and pictures meet at the right positions; bad rows and pictures are refused."""
import json
import os
import struct
import tracemalloc
import zlib

import pytest
import torch
from PIL import Image

import stage1_text_sft
from helpers import TINY, batch_of, labels_of, pair, row, save_picture, write_rows
from model import IGNORE, PAIR, ROW, JsonLines, check_rows, encode_example, load_image, load_vlm


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(TINY)


@pytest.fixture
def folder(tmp_path):
    """A place with a picture, p.png, in it."""
    save_picture(tmp_path / "p.png")
    return tmp_path


def encode(vlm, tokenizer, one, folder=".", **options):
    complete = one | {"folder": str(folder), "where": "row 0"}
    return encode_example(tokenizer, vlm.config, complete, **options)


# --------------------------------------------------------------------------------------------------
# Tokens, labels, positions

def test_labels_are_the_next_token(tiny, folder):
    vlm, tokenizer = tiny
    ids, labels, _ = encode(vlm, tokenizer, row(image_url="p.png"), folder)
    answer = tokenizer("90-30=60. †Answer: 60°").input_ids + [tokenizer.eos_token_id]
    image_token_id = vlm.config["image_token_id"]
    assert len(ids) == len(labels)
    assert ids.count(image_token_id) == vlm.config["image_tokens"] == 81

    learnt = [t for t, label in enumerate(labels) if label != IGNORE]
    assert [labels[t] for t in learnt] == answer
    assert [ids[t + 1] for t in learnt] == answer  # position t predicts token t + 1
    assert ids[learnt[0] + 1:] == answer and labels[-1] == IGNORE
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n<|image|>")


def test_both_forms_of_a_pair_have_the_same_labels_in_the_same_order(tiny, folder):
    rows = [pair(), pair()]
    strong, weak = batch_of(*tiny, rows, folder, ("", "_2"))
    assert torch.equal(labels_of(strong), labels_of(weak))
    assert strong.pixel_values.shape == (0, 3, 108, 108)
    assert weak.pixel_values.shape == (2, 3, 108, 108)


def test_special_tokens_typed_by_a_user_stay_text(tiny, folder):
    vlm, tokenizer = tiny
    text = "What is <|image|> or <|im_end|> or <image>?"
    typed = row(text, "It is <|im_end|>.", image_url="p.png")
    ids, _, _ = encode(vlm, tokenizer, typed, folder)
    assert ids.count(vlm.config["image_token_id"]) == 81
    assert ids.count(tokenizer.eos_token_id) == 2  # end of the user's turn, end of the answer
    assert text in tokenizer.decode(ids)


def test_a_prompt_for_generation_ends_where_the_answer_begins(tiny, folder):
    vlm, tokenizer = tiny
    ids, labels, _ = encode(vlm, tokenizer, row(), answer=False)
    whole, _, _ = encode(vlm, tokenizer, row())
    assert ids == whole[:len(ids)] and set(labels) == {IGNORE}
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_padding_is_on_the_right_for_training_and_on_the_left_for_generation(tiny):
    rows = [row("7*8="), row("Find the area. " * 5)]
    [batch] = batch_of(*tiny, rows)
    mask = batch.attention_mask[0].tolist()
    assert mask == sorted(mask, reverse=True) and mask[-1] == 0
    [batch] = batch_of(*tiny, rows, answer=False)
    mask = batch.attention_mask[0].tolist()
    assert mask == sorted(mask) and mask[0] == 0
    assert batch.attention_mask[1].all()


def test_right_padding_changes_nothing(tiny, folder):
    vlm, _ = tiny
    short = row(image_url="p.png")
    long = row("Find the area. " * 12, image_url="p.png")
    with torch.no_grad():
        alone = vlm(batch_of(*tiny, [short], folder)[0])
        padded = vlm(batch_of(*tiny, [short, long], folder)[0])
    assert torch.allclose(alone, padded[:len(alone)], atol=1e-5)


def test_pictures_replace_their_own_placeholders(tiny, folder):
    """Row 1 of a batch must get row 1's picture: swap the rows and the hidden rows must follow."""
    vlm, _ = tiny
    Image.new("L", (108, 108), 255).save(folder / "white.png")
    rows = [row(image_url="p.png"), row("Find y."), row(image_url="white.png")]
    [batch] = batch_of(*tiny, rows, folder)
    [swapped] = batch_of(*tiny, rows[::-1], folder)
    x = vlm.embed(batch.input_ids, batch.pixel_values)
    y = vlm.embed(swapped.input_ids, swapped.pixel_values)
    assert torch.allclose(x.flip(0), y, atol=1e-6)
    assert not torch.allclose(x[0], x[2], atol=1e-2)
    with pytest.raises(AssertionError, match="I \\* P placeholders"):
        vlm.embed(batch.input_ids, batch.pixel_values[:1])


def test_batched_greedy_decoding_equals_one_by_one(tiny, folder):
    vlm, tokenizer = tiny

    def replies(rows):
        [batch] = batch_of(vlm, tokenizer, rows, folder, answer=False)
        ids = vlm.generate(batch, 24, tokenizer.eos_token_id, tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(ids)
        return [text.split("<|im_end|>")[0] for text in texts]

    rows = [row(image_url="p.png"), row("a=3, b=4. Multiply a and b."),
            row("Read the labels.", image_url="p.png"), row("7*8=")]
    assert replies(rows) == [replies([one])[0] for one in rows]


def test_a_batch_without_pictures_still_reaches_the_encoder():
    """Under DDP a rank without pictures must make (zero) gradients, or the others wait for ever."""
    vlm, tokenizer = load_vlm(TINY)
    vlm.projector.requires_grad_(False)
    vlm.language_model.requires_grad_(False)  # a fork in which the encoder alone learns
    [batch] = batch_of(vlm, tokenizer, [row()])
    vlm(batch).sum().backward()
    for parameter in vlm.vision_model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_frozen_encoder_is_not_run_without_pictures(monkeypatch):
    """Stage 1 has no picture at all: a blank one would be most of its arithmetic."""
    vlm, tokenizer = load_vlm(TINY)
    vlm.projector.requires_grad_(False)
    vlm.vision_model.requires_grad_(False)
    monkeypatch.setattr(vlm.vision_model, "forward", lambda **_: pytest.fail("it was run"))
    [batch] = batch_of(vlm, tokenizer, [row()])
    assert vlm(batch).requires_grad


def test_autocast_keeps_float32_between_layers(tiny, folder):
    vlm, _ = tiny
    [batch] = batch_of(*tiny, [row(image_url="p.png")], folder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert vlm(batch).dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Pictures

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "CMYK"])
def test_every_picture_mode_loads_and_transparent_means_white(tmp_path, mode):
    image = Image.new("RGB", (20, 10), "white")
    if mode in ("RGBA", "LA", "P"):
        image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    path = tmp_path / ("p.tiff" if mode == "CMYK" else "p.png")
    image.convert(mode).save(path)
    pixels = load_image(path, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    if mode != "P":
        assert pixels.min() > 0.98


def test_white_is_1_black_is_minus_1_and_grey_is_0(tmp_path):
    wanted = {255: 1.0, 0: -1.0, 128: 128 / 127.5 - 1}
    for grey, want in wanted.items():
        Image.new("L", (9, 9), grey).save(tmp_path / "p.png")
        values = load_image(tmp_path / "p.png", 8).unique().tolist()
        assert values == pytest.approx([want], abs=1e-6)


@pytest.mark.parametrize("name,options", [
    ("palette.png", {"mode": "P", "transparency": 0}),
    ("grey.png", {"mode": "L", "transparency": 0}),
    ("alpha.webp", {"mode": "RGBA", "lossless": True})])
def test_transparency_of_every_kind_is_white(tmp_path, name, options):
    image = Image.new(options.pop("mode"), (9, 9))
    image.save(tmp_path / name, **options)
    assert load_image(tmp_path / name, 8).min() == 1


def test_of_an_animation_the_first_frame(tmp_path):
    white = Image.new("L", (20, 10), 255)
    black = Image.new("L", (20, 10))
    white.save(tmp_path / "g.gif", save_all=True, append_images=[black])
    assert load_image(tmp_path / "g.gif", 8).min() == 1


@pytest.mark.parametrize("width", [1, 5000])
@pytest.mark.parametrize("height", [1, 5])
def test_odd_sizes(tmp_path, width, height):
    Image.new("RGB", (width, height), "white").save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png", 8).shape == (3, 8, 8)


def test_a_turned_photo_is_turned_back(tmp_path):
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 16, 8))  # white above
    turn = Image.Exif()
    turn[0x0112] = 6  # to be shown turned a quarter to the right
    image.save(tmp_path / "p.png", exif=turn)
    pixels = load_image(tmp_path / "p.png", 8)
    left, right = pixels[:, :, 0], pixels[:, :, -1]
    assert right.min() == 1
    assert left.max() == -1


def test_a_pad_color_keeps_the_aspect(tmp_path):
    Image.new("RGB", (96, 48), "white").save(tmp_path / "p.png")
    pixels = load_image(tmp_path / "p.png", 96, pad_color=[122, 116, 104])
    margin = (pixels[:, 0, 0] + 1) * 127.5
    assert margin.tolist() == pytest.approx([122, 116, 104])
    assert pixels[:, 48, 48].min() > 0.99


def png_that_claims(width, height):
    """The bytes of a grey PNG without pixels."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        length = struct.pack(">I", len(content))
        return length + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(b""))
    return content + chunk(b"IEND", b"")


@pytest.mark.parametrize("content,message", [
    (b"", "cannot identify"),
    (b"Find angle A.", "cannot identify"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    (png_that_claims(8000, 8000), "more than 50,000,000 pixels"),
    (png_that_claims(60000, 60000), "pixels"),
    ("half", "trunc"),
    ("zeros inside", ""),
    ("vanished", "No such file")])
def test_a_broken_picture_names_row_and_file(folder, tiny, content, message):
    vlm, tokenizer = tiny
    path = write_rows(folder / "d.jsonl", [row(image_url="p.png")])
    [one] = JsonLines([path])
    whole = (folder / "p.png").read_bytes()
    if content == "half":
        content = whole[:len(whole) // 2]
    elif content == "zeros inside":
        content = whole[:60] + b"\0" * 90 + whole[150:]
    if content == "vanished":
        (folder / "p.png").unlink()
    else:
        (folder / "p.png").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        encode_example(tokenizer, vlm.config, one)
    said = str(raised.value)
    assert said.startswith(f"{folder}/d.jsonl:1: picture {folder}/p.png cannot be read: ")
    assert message in said


# --------------------------------------------------------------------------------------------------
# Data files

TRICKY = [row('},{"a":[1,2]'), row('say "x\\" ]', "\\"), row("a\u2028b\u0085c\xa0d"),
          row("° √ π 𝒙", "†"), row("line\r\nbreak\ttab"), row("<|im_end|> <image>")]


def texts(rows):
    return [[one[field] for field in ROW] for one in rows]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", TRICKY)
    rows = JsonLines([path])
    check_rows(rows, ROW)
    assert len(rows) == 6 and texts(rows) == texts(TRICKY)
    assert rows[-1]["id"] == rows[-1]["where"] == f"{path}:6"
    assert rows[0]["folder"] == str(tmp_path)


def test_byte_order_mark_crlf_blank_lines_and_no_line_break_at_the_end(tmp_path):
    lines = [json.dumps(one) for one in TRICKY[:4]]
    text = "\ufeff" + "\r\n".join(lines[:3]) + "\r\n\r\n \n" + lines[3]
    (tmp_path / "d.jsonl").write_bytes(text.encode())
    rows = JsonLines([str(tmp_path / "d.jsonl")])
    check_rows(rows, ROW)
    assert texts(rows) == texts(TRICKY[:4])
    numbers = [one["where"].split(":")[-1] for one in rows]
    assert numbers == ["1", "2", "3", "6"]


def test_null_and_absent_pictures_mean_text_only(tmp_path):
    absent = {"instruction": "a", "output": "b"}
    path = write_rows(tmp_path / "d.jsonl", [row(image_url=None), absent])
    rows = JsonLines([path])
    check_rows(rows, ROW)
    assert [one["image_url"] for one in rows] == ["", ""]


def test_several_files_are_one_in_the_order_given(tmp_path):
    (tmp_path / "more").mkdir()
    first = write_rows(tmp_path / "a.jsonl", TRICKY[:2])
    second = write_rows(tmp_path / "more" / "b.jsonl", TRICKY[2:])
    rows = JsonLines([first, second])
    assert texts(rows) == texts(TRICKY)
    assert rows[3]["where"] == f"{second}:2"
    assert rows[3]["folder"] == str(tmp_path / "more")
    assert rows.sha256 != JsonLines([second, first]).sha256


def test_rows_stay_on_disk(tmp_path):
    """10,000 rows of 1 kB: 10 MB as text, more as objects; what is kept is 24 bytes a row."""
    path = write_rows(tmp_path / "d.jsonl", [row("x" * 900)] * 10000)
    tracemalloc.start()
    rows = JsonLines([path])
    kept, peak = tracemalloc.get_traced_memory()
    assert rows[9999]["instruction"] == "x" * 900
    tracemalloc.stop()
    assert kept < 3e5 and peak < 1.5e6


BAD = [  # a line, and what is said about it behind file:2
    ('{"image_url": "", "instruction": "a', "Invalid control character"),
    ("[1]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("{} {}", "Extra data"),
    ('{"a": "\udcff"}', "'utf-8' codec"),
    ('{"x":' + "[" * 100000 + "]" * 100000 + "}", "recursion"),
    (row("a\x00"), "'instruction' holds a zero"),
    (row("\ud800"), "'instruction' holds a zero or half a character"),
    (row(output=" "), "'output' is empty"),
    (row(output=60), "'output' is missing or not a string"),
    ({"instruction": "a"}, "'output' is missing"),
    ({"output": "a"}, "'instruction' is missing"),
    (row(image_url=3), "'image_url' is missing or not"),
    (row(image_url="no.png"), "picture no.png is no file inside"),
    (row(image_url="../out.png"), "picture ../out.png is no file inside"),
    (row(image_url="link.png"), "picture link.png is no file inside"),
    (row(image_url="http://x/p.png"), "picture http://x/p.png is no file inside"),
    (row(image_url="."), "picture . is no file inside"),
    (row(image_url="sub"), "picture sub is no file inside"),
    (row(image_url="/etc/passwd"), "picture /etc/passwd is no file inside"),
    (row(image_url="../data2/p.png"), "picture ../data2/p.png is no file inside"),
    ({"conversations": []}, "convert/data.py"),
    (row(input="a=3"), "convert/data.py"),
]


@pytest.fixture
def outside(folder):
    """A data folder below `folder`, with pictures outside of it and a link to one of them."""
    for name in ("data", "data2"):  # the name of the second begins as the first's does
        (folder / name).mkdir()
        save_picture(folder / name / "p.png")
    save_picture(folder / "out.png")
    os.symlink(folder / "out.png", folder / "data" / "link.png")
    (folder / "data" / "sub").mkdir()
    return folder / "data"


@pytest.mark.parametrize("line,message", BAD, ids=range(len(BAD)))
def test_a_bad_line_stops_the_run_and_says_why(outside, line, message):
    if isinstance(line, dict):
        line = json.dumps(line)
    path = write_rows(outside / "d.jsonl", [row(image_url="p.png"), line])
    with pytest.raises(SystemExit) as stopped:
        check_rows(JsonLines([path]), ROW)
    said = stopped.value.code
    assert said.startswith(f"{path}:2: ") and message in said and "\n" not in said


@pytest.mark.parametrize("change,message", [
    ({"output_2": "7"}, "the answers of a pair differ"),
    ({"output_2": None}, "'output_2' is missing"),
    ({"instruction_2": None}, "'instruction_2' is missing"),
    ({"image_url_2": "q.png"}, "picture q.png is no file")])
def test_a_bad_pair(folder, change, message):
    bad = write_rows(folder / "d.jsonl", [pair(**change)])
    with pytest.raises(SystemExit, match=f"d.jsonl:1: .*{message}"):
        check_rows(JsonLines([bad]), PAIR)
    good = write_rows(folder / "d.jsonl", [pair()])
    check_rows(JsonLines([good]), PAIR)


@pytest.mark.parametrize("data,message", [
    (["data", "a.jsonl"], "--data: data is no .jsonl file"),
    (["a", "b"], "--data: a is no .jsonl file"),
    (["no.jsonl"], "--data: no.jsonl is no .jsonl file"),
    (["rows.json"], "--data: rows.json is no .jsonl file.*convert/data.py"),
    (["empty.jsonl"], "empty.jsonl: no rows")])
def test_what_is_no_data(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match=message):
        stage1_text_sft.main(["--init", TINY, "--data", *data])


def test_weights_of_tiny_fit_the_repository():
    total = 0
    for path, _, names in os.walk(TINY):
        for name in names:
            total += os.path.getsize(os.path.join(path, name))
    assert total <= 8e6
