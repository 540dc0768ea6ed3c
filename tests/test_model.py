"""Tokens, labels and pictures meet at the right positions; folders load whole or not at all."""
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model
from model import IGNORE, encode_example, load_image, load_vlm, make_batch, read_rows, save_vlm

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tiny")


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(TINY)


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (108, 108), np.uint8)).save(tmp_path / "p.png")
    return tmp_path


def row(text="Find angle A.", answer="90-30=60. †Answer: 60°", image="p.png"):
    return {"image_url": image, "instruction": text, "output": answer, "id": "x"}


def test_labels_are_the_next_token(tiny, picture):
    vlm, tokenizer = tiny
    ids, labels, pixels = encode_example(tokenizer, row(), image_tokens=vlm.image_tokens, root=picture,
                                         size=108)
    answer = tokenizer("90-30=60. †Answer: 60°").input_ids + [tokenizer.eos_token_id]
    assert len(ids) == len(labels) and ids.count(vlm.image_token_id) == vlm.image_tokens == 81
    kept = [t for t, y in enumerate(labels) if y != IGNORE]
    assert [labels[t] for t in kept] == answer == [ids[t + 1] for t in kept]  # t predicts token t + 1
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n<|image|>")
    assert ids[kept[0] + 1:] == answer and labels[-1] == IGNORE


def test_both_forms_of_a_pair_have_the_same_labels_in_the_same_order(tiny, picture):
    vlm, tokenizer = tiny
    pair = row(image="", text="ABC is a triangle. Find angle A.") | {k + "_2": v for k, v in row().items()}
    strong, weak = (make_batch(vlm, tokenizer, [pair, pair], s, picture) for s in ("", "_2"))
    assert torch.equal(strong.labels[strong.labels != IGNORE], weak.labels[weak.labels != IGNORE])
    assert strong.pixel_values.shape[0] == 0 and weak.pixel_values.shape == (2, 3, 108, 108)


def test_special_tokens_typed_by_a_user_stay_text(tiny, picture):
    vlm, tokenizer = tiny
    text = "What is <|image|> or <|im_end|>?"
    ids, _, _ = encode_example(tokenizer, row(text, "It is <|im_end|>."), image_tokens=81, root=picture,
                               size=108)
    assert ids.count(vlm.image_token_id) == 81
    assert ids.count(tokenizer.eos_token_id) == 2  # end of the user's turn, end of the answer
    assert text in tokenizer.decode(ids)


def test_a_prompt_that_does_not_fit_is_dropped_and_a_long_answer_loses_its_tail(tiny):
    tokenizer = tiny[1]
    ids, labels, _ = encode_example(tokenizer, row(image="", answer="12 " * 100), image_tokens=81,
                                    max_length=40)
    assert len(ids) == len(labels) == 40 and labels[-1] != IGNORE
    assert encode_example(tokenizer, row(image=""), image_tokens=81, max_length=5) == ([], [], None)
    with pytest.raises(ValueError, match="row x.*--max_length is 5"):  # to be answered: no reply would fit it
        encode_example(tokenizer, row(image=""), image_tokens=81, max_length=5, answer=False)


def test_pictures_replace_their_own_placeholders(tiny, picture):
    """Row 1 of a batch must get row 1's picture: swap the rows and the hidden states must follow."""
    vlm, tokenizer = tiny
    Image.new("L", (108, 108), 255).save(picture / "white.png")
    rows = [row(), row(image="", text="Find y."), row(image="white.png")]
    a, b = (make_batch(vlm, tokenizer, r, root=picture) for r in (rows, rows[::-1]))
    x, y = vlm.embed(a.input_ids, a.pixel_values), vlm.embed(b.input_ids, b.pixel_values)
    assert torch.allclose(x.flip(0), y, atol=1e-6) and not torch.allclose(x[0], x[2], atol=1e-2)
    with pytest.raises(ValueError, match="image placeholders"):
        vlm.embed(a.input_ids, a.pixel_values[:1])


def test_right_padding_changes_nothing(tiny, picture):
    vlm, tokenizer = tiny
    short, long = row(), row(text="Find the area. " * 12)
    with torch.no_grad():
        alone = vlm(make_batch(vlm, tokenizer, [short], root=picture))
        padded = vlm(make_batch(vlm, tokenizer, [short, long], root=picture))[:len(alone)]
    assert torch.allclose(alone, padded, atol=1e-5)


def test_batched_greedy_decoding_equals_one_by_one(tiny, picture):
    vlm, tokenizer = tiny
    rows = [row(), row(image="", text="a=3, b=4. Multiply a and b."), row(text="Read the labels."),
            row(image="", text="7*8=")]
    decode = lambda some: vlm.generate(make_batch(vlm, tokenizer, some, root=picture, answer=False), 24,
                                       tokenizer.eos_token_id, 0)
    trim = lambda ids: ids[:ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    assert [trim(i) for i in decode(rows).tolist()] == [trim(decode([r]).tolist()[0]) for r in rows]


def test_a_batch_without_pictures_still_reaches_the_encoder(tiny):
    """Under DDP a rank without pictures must make (zero) encoder gradients, or the others wait for ever."""
    vlm, tokenizer = load_vlm(TINY)
    vlm.train()
    vlm(make_batch(vlm, tokenizer, [row(image="")])).sum().backward()
    grads = [p.grad for p in [*vlm.vision_model.parameters(), *vlm.projector.parameters()]]
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16", "CMYK"])
def test_every_picture_mode_loads_and_transparent_means_white(tmp_path, mode):
    image = (Image.new("RGBA", (20, 10), (0, 0, 0, 0)) if mode in ("RGBA", "LA", "P") else
             Image.new("RGB", (20, 10), "white"))
    if mode == "I;16":
        Image.fromarray(np.full((10, 20), 65535, np.uint16)).save(tmp_path / "p.png")
    else:
        image.convert(mode).save(tmp_path / "p.png" if mode != "CMYK" else tmp_path / "p.tiff")
    pixels = load_image(next(tmp_path.iterdir()), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    if mode != "P":
        assert pixels.min() > .98


def test_a_saved_folder_loads_bit_for_bit_and_generates_the_same(tiny, tmp_path):
    vlm, tokenizer = tiny
    save_vlm(tmp_path, vlm, tokenizer)
    again, tokenizer_again = load_vlm(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vlm.state_dict().items())
    assert again.lm_head is again.language_model.get_input_embeddings().weight  # still tied
    assert tokenizer_again("Find angle A. †").input_ids == tokenizer("Find angle A. †").input_ids
    assert tokenizer_again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(tiny, tmp_path, damage):
    save_vlm(tmp_path, *tiny)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "projector.up.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["projector.more"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(2, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=r"projector\.\w+.* in the file"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("line,message", [
    ("{", ":2: "), ("[1]", ":2: not a JSON object"), ('{"image_url": ""}', ":2: field 'instruction'"),
    ('{"image_url": "no.png", "instruction": "", "output": "", "id": "q7"}', ":2: row q7: picture .*no.png"),
    ("\udcff", ":2: ")])
def test_a_bad_row_names_file_and_line(tmp_path, line, message):
    good = '{"image_url": "", "instruction": "a\u2028b", "output": "c"}'
    (tmp_path / "d.jsonl").write_bytes((good + "\n" + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match="d.jsonl" + message):
        read_rows(str(tmp_path / "d.jsonl"))


def test_tiny_fits_the_repository():
    paths = [os.path.join(TINY, f) for f in os.listdir(TINY)]
    assert sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) <= 8e6
    assert model.IMAGE_TOKEN == "<|image|>"
