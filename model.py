"""The model, and the one place where text, pictures and labels become tensors, for the stages and eval.py.

    python model.py out/stage3 --llm_to DIR         # its language model alone, for AutoModelForCausalLM
    python model.py out/stage3 --released_to DIR    # the layout of the released Qwen2 checkpoints

    picture (3, S, S) -> vision encoder -> (P, W) -> projector -> (P, H) -+
                                                                          | in the place of the P placeholders
    tokens (L) --------> token embeddings ---------> (L, H) --------------+-> LLM -> (L, H) -> lm_head -> (V)

Letters, used as they stand in every file:
    B  sequences in a batch        P  image tokens of a picture       H  hidden width of the LLM
    L  positions of a sequence,    W  width of the vision encoder     V  vocabulary: rows of lm_head
       image tokens included       S  picture side in pixels          N  answer rows: positions with a label
    I  pictures in a batch
"""
import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torch.distributed as dist
import torch.nn as nn
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (DeepseekVLHybridConfig, DeepseekVLHybridModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig,
                          SiglipVisionModel)

import data_gen

IMAGE_TOKEN = "<|image|>"  # the placeholder; the released Qwen checkpoints call it so
IGNORE = -100  # label of a position that is not trained on; torch's cross_entropy skips this value

# ------------------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------------------
class Projector(nn.Module):
    """From the width of a vision feature to that of a token: Linear, GELU, Linear (arXiv 2310.03744)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        return self.down(self.act(self.up(x)))

class GatedProjector(nn.Module):
    """The released Qwen2 systems' projector, without biases."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))

class HybridVision(nn.Module):
    """DeepSeek-VL's two encoders, SAM on the picture, SigLIP on a smaller one, in transformers' classes."""

    def __init__(self, config):  # {"low": SigLIP's, "high": SAM's, "pixels": (mean, std) for SAM}
        super().__init__()
        self.both = DeepseekVLHybridModel(DeepseekVLHybridConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | config["low"],
            high_res_vision_config={"model_type": "sam_vision_model"} | config["high"],
            text_config={"model_type": "llama", "hidden_size": 2, "num_attention_heads": 1,
                         "num_hidden_layers": 0}))
        del self.both.aligner, self.both.language_model  # ours are used
        self.config, self.pixels = self.both.config.vision_config, config["pixels"]

    def forward(self, pixel_values):  # (I, 3, S, S) -> last_hidden_state (I, P, 2 W), first SAM's half
        mean, std = (pixel_values.new_tensor(x)[:, None, None] for x in self.pixels)
        low = F.interpolate(pixel_values, self.config.image_size, mode="bilinear", antialias=True)
        high = ((pixel_values / 2 + 0.5 - mean) / std).to(self.both.high_res_vision_alpha.dtype)
        seen = self.both.get_high_res_image_features(high), self.both.get_low_res_image_features(low)
        return SimpleNamespace(last_hidden_state=torch.cat([half.last_hidden_state for half in seen], -1))

class HybridProjector(nn.Module):
    """The released DeepSeek system's: half of the hidden width for each encoder."""

    def __init__(self, width, hidden):
        super().__init__()
        self.high_up_proj, self.low_up_proj = (nn.Linear(width, hidden // 2) for _ in range(2))
        self.down = nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, 2 W) -> (I, P, H)
        high, low = x.chunk(2, -1)  # (I, P, W) each
        return self.down(F.gelu(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], -1)))

class VLM(nn.Module):
    """Vision encoder, projector and language model.

    A plain nn.Module, not a PreTrainedModel: what happens between picture and logits is on this page, not
    in a base class.
    """

    def __init__(self, vision, projector, language_model, config):
        super().__init__()
        self.vision_model, self.projector, self.language_model = vision, projector, language_model
        self.config, self.image_token_id = config, config["image_token_id"]
        self.unused = {}  # tensors of a checkpoint that nothing reads, kept for save_vlm; see fill

    @property
    def image_tokens(self):
        """P, from the config: the only home of this number."""
        vision = self.vision_model.config
        return (vision.image_size // vision.patch_size) ** 2 - self.config["drop_first"]

    @property
    def lm_head(self):
        """The (V, H) matrix that turns hidden rows into logits."""
        return self.language_model.lm_head.weight  # tied: the embedding itself

    def embed(self, input_ids, pixel_values):
        """Token embeddings (B, L, H) with the features of the I pictures in the place of their placeholders.

        input_ids (B, L) int64; pixel_values (I, 3, S, S) float32 in [-1, 1], in order of appearance.
        Raises ValueError when the number of placeholders is not I * P.
        """
        x = self.language_model.get_input_embeddings()(input_ids)  # (B, L, H)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # and so the sums between layers, as if the weights were: the KL needs the digits
        here, images = input_ids == self.image_token_id, len(pixel_values)  # (B, L)
        if int(here.sum()) != images * self.image_tokens:
            raise ValueError(f"{int(here.sum())} image placeholders in the tokens, but {images} pictures of "
                             f"{self.image_tokens} image tokens each")
        if images == 0:
            learns = self.training and next(self.projector.parameters()).requires_grad
            if not (learns and torch.is_grad_enabled()):
                return x
            # This process has no picture now, another one may: DDP waits on every process for a gradient of
            # every trainable parameter.  So a blank picture goes through, and none of its features is used.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, self.config["drop_first"]:]
        features = self.projector(seen)  # (I, P, H)
        return x.masked_scatter(here[..., None], features[:images].to(x.dtype))  # row-major = as they appear

    def forward(self, batch):
        """Hidden rows (N, H), after the final norm, of the positions that have to predict an answer token.

        Not the logits of all positions: (B, L, V) would be the largest tensor of the step, and N rows of it
        are used.  Not with an attention mask: batches are padded on the right and attention is causal, so no
        real position sees a pad, and attention may take its fast causal path.
        """
        x = self.embed(batch.input_ids, batch.pixel_values)
        hidden = self.language_model.model(inputs_embeds=x, use_cache=False).last_hidden_state  # (B, L, H)
        return hidden[batch.labels != IGNORE]  # (N, H), row-major

    @torch.no_grad()
    def generate(self, batch, max_new_tokens, stop_id, pad_id):
        """Greedy decoding with a KV cache; prompts padded on the left. -> (B, <= max_new_tokens) token ids"""
        self.eval()
        return self.language_model.generate(
            inputs_embeds=self.embed(batch.input_ids, batch.pixel_values),
            attention_mask=batch.attention_mask, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=stop_id, pad_token_id=pad_id)

# ------------------------------------------------------------------------------------------------------------
# From a data row to tensors: prompt, image placeholders, labels and the shift are made here and nowhere else
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64, 0 = pad; only generate needs it
    pixel_values: torch.Tensor  # (I, 3, S, S) float32 in [-1, 1], in order of appearance
    labels: torch.Tensor  # (B, L) int64; labels[b, t] is the token position t has to predict: ALREADY shifted
    lost: torch.Tensor = torch.zeros(2, dtype=torch.int64)  # rows dropped, answers cut: --max_length

    def to(self, device):
        return Batch(*(getattr(self, field).to(device) for field in self.__dataclass_fields__))

FORMATS = "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"  # not all of Pillow's: for EPS it starts a program
MAX_PIXELS = 50_000_000  # ours: 200 MB decoded; a file of a few kB can claim far more

def load_image(path, size, pad_color=None):
    """A picture file as (3, size, size) float32 in [-1, 1]: SigLIP's normalisation, mean = std = .5.

    Resized without keeping the aspect, as in the released Qwen2 code; with a pad_color (R, G, B) keeping it,
    on a square of that color, as in the released DeepSeek code.  Of an animation the first frame.  Raises
    ValueError naming the file when it is broken or larger than MAX_PIXELS, which is known before decoding.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            image = ImageOps.exif_transpose(image)  # phones store the turn beside the pixels
            if image.mode.startswith("I"):  # Pillow clips 16 bits to 8; this keeps the upper ones
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode not in ("L", "RGB") or "transparency" in image.info:
                image = image.convert("RGBA")  # on white: convert("RGB") alone makes transparency black
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if pad_color:
                image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, tuple(pad_color))
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {path} cannot be read: {error}") from None

def chat_tokens(tokenizer, row, suffix, images, after_image=""):
    """One form of a row as (token ids, learn): learn[t] is True where token t is an answer's, <eos> included.

    The prompt is the tokenizer's chat template.  images: the placeholders; they come before the first words.
    """
    turns = [({"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"]), turn["value"])
             for turn in row.get("conversations", ())]  # LLaVA's; every answer in it is learnt
    turns = turns or [("user", row[f"instruction{suffix}"]), ("assistant", row.get(f"output{suffix}", ""))]
    mark, ids, learn = "\x00", [], []  # mark: where a text stands in the frame; texts never pass it
    frame = tokenizer.apply_chat_template([{"role": role, "content": mark} for role, _ in turns[:-1]],
                                          tokenize=False, add_generation_prompt=True).split(mark)
    for before, (role, text) in zip(frame, turns, strict=True):
        answer = role == "assistant"
        if learn[-1:] == [True]:  # after an answer, whose <eos> is there already
            before = before.removeprefix(tokenizer.eos_token)
        given = tokenizer(before, add_special_tokens=False).input_ids
        if images and role == "user":
            given, text, images = given + images, after_image + text, []
        # What a user or a data row says is data: "<|im_end|>" typed there must stay plain text.
        said = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += given + said + [tokenizer.eos_token_id] * answer
        learn += [False] * len(given) + [answer] * (len(said) + answer)
    return ids, learn

def encode_example(tokenizer, row, suffix="", *, image_tokens, root="", max_length=1024, size=None,
                   answer=True, forms=(), after_image="", pad_color=None):
    """One form of a data row as (input_ids, labels, picture or None); ([], [], None) if it does not fit.

    row       dict with image_url, instruction, output, each with suffix "" or "_2"; image_url "" = text only
    size      picture side S; root: the folder image_url starts from, when the row has no "root"
    answer    False: the prompt only, for generation
    after_image, pad_color  see build
    forms     the suffixes of a pair: both must keep the same answer tokens, though one prompt is longer
    raises    ValueError for a picture that cannot be read, or a prompt for generation above max_length

    A long answer loses its tail.  A prompt without room for one answer token teaches nothing, and one of a
    million must not end a run in its third hour: the row is dropped, and make_batch counts it.

    The picture comes before the words, where a text-only prompt has its conditions.  The P placeholders are
    put in HERE, before the model, so labels and logits count positions alike.  (The released Qwen code puts
    them in inside forward; its alignment loss then picks other rows, see the README.)
    """
    images = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * image_tokens
    encoded = {form: chat_tokens(tokenizer, row, form, images if row[f"image_url{form}"] else [],
                                 after_image)
               for form in {suffix, *forms}}
    (ids, learn), longest = encoded[suffix], max(learn.index(True) for _, learn in encoded.values())
    prompt, picture, name = learn.index(True), row[f"image_url{suffix}"], f"row {row.get('id', '?')}"
    if longest + answer > max_length:
        if answer:
            return [], [], None
        raise ValueError(f"{name}: its prompt has {longest} tokens, --max_length is {max_length}")
    # The shift: position t predicts token t + 1.  So the last prompt position has the first answer token as
    # its label, and the last position, which would predict what follows <eos>, has none.
    labels = [i if answer and known else IGNORE for i, known in zip(ids[1:], learn[1:])] + [IGNORE]
    end = max_length - (longest - prompt) if answer else prompt
    try:
        path = os.path.join(row.get("root", root), picture)
        pixels = load_image(path, size, pad_color) if picture else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return ids[:end], labels[:end], pixels

def collate(examples, pad_id, size, left=False):
    """Results of encode_example -> Batch, padded on the right for training or on the left for generation.

    A dropped row stays as a row of padding: shapes hold, and under DDP every process has its backward pass.
    """
    B, L = len(examples), max(1, *(len(ids) for ids, _, _ in examples))  # 1: all rows may have been dropped
    ids, mask, labels = (np.full((B, L), fill) for fill in (pad_id, 0, IGNORE))  # (B, L) each
    for b, (i, y, _) in enumerate(examples):
        where = slice(L - len(i), L) if left else slice(0, len(i))
        ids[b, where], mask[b, where], labels[b, where] = i, 1, y
    pictures = [pixels for _, _, pixels in examples if pixels is not None]  # (3, S, S) each, row by row
    pixels = torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), pixels, torch.from_numpy(labels))

def make_batch(vlm, tokenizer, rows, suffix="", root="", max_length=1024, answer=True, forms=()):
    """Rows -> Batch, P and S as in the vision config. answer=False: prompts only, padded on the left."""
    size = vlm.config["image_size"] or vlm.vision_model.config.image_size  # S
    try:
        examples = [encode_example(tokenizer, row, suffix, image_tokens=vlm.image_tokens, root=root,
                                   max_length=max_length, size=size, answer=answer, forms=forms,
                                   after_image=vlm.config["after_image"], pad_color=vlm.config["pad_color"])
                    for row in rows]
    except ValueError as error:  # it names row and file; a traceback would add nothing
        sys.exit(str(error))
    batch = collate(examples, tokenizer.pad_token_id, size, left=not answer)
    if answer:  # a whole answer ends with <eos>, a token that no text of a row can contain
        dropped = sum(not ids for ids, _, _ in examples)
        whole = sum(labels.count(tokenizer.eos_token_id) == max(1, len(row.get("conversations", ())) // 2)
                    for row, (_, labels, _) in zip(rows, examples))
        batch.lost = torch.tensor([dropped, len(rows) - dropped - whole])
    return batch

# ------------------------------------------------------------------------------------------------------------
# Data files: JSONL or JSON arrays, with the released fields or LLaVA's.  A million rows as objects take
# gigabytes: only the place of each row is kept, 32 bytes, and the row is parsed again when asked for.
# ------------------------------------------------------------------------------------------------------------
ROW = "image_url", "instruction", "output"
PAIR = (*ROW, *(f"{field}_2" for field in ROW))  # without suffix: text-rich, strong; _2: vision-rich, weak
PARSE = json.JSONDecoder(parse_constant=int).decode  # int("NaN") is an error, and so is NaN in JSON
MAX_ROW = 2 ** 24  # bytes; ours: what is longer is no row, and would fill the memory

def places(path):
    """Where rows lie: yields (line of a .jsonl file or row of a .json array, first byte, end).

    Exits at a row of MAX_ROW or where an array is broken: nobody can tell where the next row starts.
    """
    number, end, text, base, at = 0, 0, "", 0, 0
    with open(path, "rb") as f:  # bytes: text mode would also break lines at U+2028
        while not path.endswith(".json") and (line := f.readline(MAX_ROW)):
            number, start, end = number + 1, end, end + len(line)
            if len(line) == MAX_ROW:
                sys.exit(f"{path}:{number}: a line of {MAX_ROW} bytes or more; an array is named .json")
            if line.strip():
                yield number, start, end
        # Read as Latin-1 a byte is a character: places in the text are places in the file, and brackets and
        # quotes are where UTF-8 has them.  A row is parsed here only to find its end.
        scan, lead = json.JSONDecoder().raw_decode, re.compile(r"(\xef\xbb\xbf)?\s*\[\s*")
        while len(text) - at < MAX_ROW and (block := f.read(2 ** 16)):
            text, base, at = text[at:] + block.decode("latin-1"), base + at, 0
            try:
                while (m := lead.match(text, at)) and (end := scan(text, m.end())[1]) < len(text):
                    number, at, lead = number + 1, end, re.compile(r"\s*,\s*")
                    yield number, base + m.end(), base + end
            except (ValueError, RecursionError):
                pass  # the block ends inside a row; if the file is broken there, the last lines say so
        if path.endswith(".json") and "".join(text[at:].split()).lstrip("\xef\xbb\xbf") != "[]"[number > 0:]:
            sys.exit(f"{path}:row {number + 1}: no array of JSON objects from byte {base + at} on, or a row "
                     "too long or too deep; one row a line is named .jsonl")

def from_llava(row):
    """LLaVA's {"image", "conversations": [{"from", "value"}, ...]} with the released fields added.

    The <image> mark at the start or end of the first question is the picture and leaves the text.  Any other
    is text.
    """
    turns, picture, mark = row["conversations"], row.get("image") or "", "<image>"
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations is not a list of {\"from\": ..., \"value\": ...}")
    speakers, said = [turn.get("from") for turn in turns], [turn.get("value") for turn in turns]
    first, pairs = int(speakers[:1] == ["system"]), max(1, len(turns) // 2)
    if speakers[first:] != ["human", "gpt"] * pairs or not all(isinstance(text, str) for text in said):
        raise ValueError(f"conversations must be texts of human, gpt, human, gpt, ..., not of {speakers[:5]}")
    text = said[first].strip()
    if (text.startswith(mark) or text.endswith(mark)) != bool(picture):
        raise ValueError(f"{'a picture' if picture else mark} but no {mark if picture else 'picture'} "
                         "at the start or end of the first question")
    if picture:
        text = text.removeprefix(mark) if text.startswith(mark) else text.removesuffix(mark)
        said[first] = text.strip()
    return row | {"image_url": picture, "instruction": "\n".join(said[:-1]), "output": said[-1],
                  "conversations": [{"from": who, "value": text} for who, text in zip(speakers, said)]}

def checked(row, fields, root, decode):
    """The row with these fields as strings and its pictures in place, decode: and whole. Else ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if ("image" in row) > ("conversations" in row):
        raise ValueError("field 'image' is LLaVA's and goes with 'conversations'; here it is 'image_url'")
    row = from_llava(row) if "conversations" in row else row
    for field in fields:
        if field.startswith("image_url") and row.get(field) is None:
            row[field] = ""
        if not isinstance(row.get(field), str):
            raise ValueError(f"field {field!r} is missing or not a string")
        row[field].encode()  # "\\ud800", half a character, passes as JSON and stops a tokenizer
        if field.startswith("output") and not row[field].strip():
            raise ValueError(f"field {field!r} is empty: nothing to learn")
        if field.startswith("image_url") and row[field]:
            path = os.path.realpath(os.path.join(root, row[field]))
            if not path.startswith(os.path.join(root, "")) or not os.path.isfile(path):  # "..", a link, a URL
                raise ValueError(f"row {row.get('id', '?')}: picture {row[field]} is no file inside {root}, "
                                 "the image root")
            if decode:
                load_image(path, 1)
    if "output_2" in fields and row["output"] != row["output_2"]:
        raise ValueError(f"the answers of a pair differ: {row['output']!r} and {row['output_2']!r}")
    return row

class Rows(Sequence):
    """Rows of files as a list of dicts that stays on disk: len(rows), rows[i], slices, iteration.

    A row is what `checked` returns, with "root", the folder its pictures start from, and an "id".
    """

    def __init__(self, files, fields, image_root, decode):
        self.files, self.fields, self.decode, self.bad = files, fields, decode, 0
        self.roots = [os.path.realpath(image_root or os.path.dirname(path)) for path in files]
        self.open, self.places = [open(path, "rb") for path in files], np.zeros((0, 4), np.int64)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        place = self.places[i].tolist()
        return [self.row(*one) for one in place] if isinstance(i, slice) else self.row(*place)

    def row(self, k, number, start, end):
        """The row at this place of file k. ValueError: file:line and what is wrong."""
        path = self.files[k]
        where = f"{path}:{'row ' * path.endswith('.json')}{number}"
        self.open[k].seek(start)  # one handle a file; a forked worker would have to open its own
        try:
            row = PARSE(self.open[k].read(end - start).decode("utf-8-sig"))
            row = checked(row, self.fields, self.roots[k], self.decode)
            return row | {"root": self.roots[k], "id": where if row.get("id") is None else row["id"]}
        except RecursionError:
            raise ValueError(f"{where}: nested too deep") from None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{where}: {error}") from None

    def sha256(self):
        """Hash of what is trained on: a file's own, or of several files or bad rows and of the rows used."""
        parts = [sha256(path) for path in self.files]
        return parts[0] if len(parts) == 1 and not self.bad else hashlib.sha256(
            " ".join(parts).encode() + self.places.tobytes()).hexdigest()

def read_rows(files, fields=ROW, image_root=None, max_bad=0, check=False, quiet=False):
    """Rows of one or several files in the order given; each is parsed and checked once, now.

    Exits with file:line and what is wrong at the first row that cannot be used: a silent skip would change
    the data.  Up to max_bad such rows are left out, each with a line that says so (unless quiet).  With check
    all are listed, with the pictures that cannot be decoded, and it exits: 1 if there are any, else 0.
    """
    files = [files] if isinstance(files, str) else files
    for path in files:
        if not os.path.isfile(path):
            sys.exit(f"{path} does not exist: run `python data_gen.py` first, or name the right --data")
    rows, index = Rows(files, fields, image_root, check), array("q")  # 8 bytes a number, not 28
    say = (lambda *_: None) if quiet else print
    for k, path in enumerate(files):
        for place in places(path):
            try:
                rows.row(k, *place)
                index.extend((k, *place))
            except ValueError as error:
                rows.bad += 1
                if rows.bad > max_bad and not check:
                    sys.exit(f"{error} (--check_data lists all bad rows, --max_bad N leaves out up to N)")
                say(error if check else f"left out: {error}")
    rows.places = np.frombuffer(index, np.int64).reshape(-1, 4)
    if check or rows.bad:
        say(f"{len(rows):,} rows are good, {rows.bad:,} are bad: {', '.join(files)}")
    if check or not rows:
        sys.exit(int(rows.bad > 0) if check and rows else f"{', '.join(files)}: no rows")
    return rows

def open_data(args, rank, name, fields=ROW):
    """Rows of --data: of files, or of data_gen.py's folder, made when missing. -> (rows, folder or None)"""
    files = [path for path in args.data if path.endswith((".json", ".jsonl"))]
    if files != args.data and (files or len(args.data) > 1):
        sys.exit(f"--data {' '.join(args.data)}: give one folder of data_gen.py, or .json and .jsonl files")
    folder = None if files else args.data[0]
    if rank == 0 and folder and not os.path.exists(os.path.join(folder, "manifest.json")):
        print(f"{folder}/ is missing: running data_gen.py first, about 15 seconds", flush=True)
        data_gen.main(["--out", folder])
    if dist.is_initialized():
        dist.barrier()  # one process makes it, the others wait
    files = files or [os.path.join(folder, name)]
    return read_rows(files, fields, args.image_root, args.max_bad, args.check_data, quiet=rank > 0), folder

@torch.no_grad()
def caption_loss(vlm, tokenizer, folder, device):
    """Nats a token for reading the numbers off 64 test pictures; None when the data has no such pictures.

    The caption of a picture is what vision_intensive says and vision_dominant only shows (see data_gen.py).
    """
    path, rows = os.path.join(folder, "test.jsonl"), []
    said = {row.get("id"): row for row in (read_rows(path) if os.path.exists(path) else ())}
    for row in said.values():
        if row.get("version") == "vision_dominant":
            text = said[row["id"].replace("dominant", "intensive")]["instruction"]
            numbers = text.removesuffix(row["instruction"]).strip()
            rows.append(row | {"instruction": "Read the labels.", "output": numbers})  # as tiny/ learnt it
    if not rows:
        return None
    batch = make_batch(vlm, tokenizer, rows[:64], "", folder).to(device)
    logits = F.linear(vlm(batch), vlm.lm_head).float()  # (N, V)
    return F.cross_entropy(logits, batch.labels[batch.labels != IGNORE]).item()

# ------------------------------------------------------------------------------------------------------------
# Model folders: ours (config.json, model.safetensors, tokenizer files), the released ones, and the language
# models and vision towers of others.  No pickle: loading one runs code.  No weight stays random by accident.
# ------------------------------------------------------------------------------------------------------------
LLMS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
PROJECTORS = {"mlp": Projector, "gated": GatedProjector, "hybrid": HybridProjector}
TIED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"  # one matrix, two names
# Chat templates: of the released Qwen2 systems; in DeepSeek's style, also for tokenizers that have none.
QWEN2_PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}"
                "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEEPSEEK_PROMPT = ("{{ bos_token }}SYSTEM{% for m in messages %}{{ 'User: ' if m.role == 'user' else "
                   "'Assistant: ' }}{{ m.content }}\n\n{% endfor %}"
                   "{% if add_generation_prompt %}Assistant:{% endif %}")
DEEPSEEK_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual "
                   "content that the user provides, and assist the user with a variety of tasks using "
                   "natural language.\n\n")
HYBRID = {  # what the released DeepSeek config only names; and its tensors' names -> ours, in this order
    "sam_b_downsample": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "siglip_large_patch16_384": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                 "num_attention_heads": 16, "patch_size": 16}}
HYBRID_NAMES = [line.split() for line in r"""(high|low)\.vision_tower  \1
    tower_high.hd_alpha_downsamples    tower_high.alpha
    vision_tower_high.(neck_hd|alpha)  both.high_res_vision_\1
    vision_neck_hd                     vision_neck
    vision_tower_high.downsamples.0    both.high_res_vision_proj.conv1
    vision_tower_high.downsamples.1    both.high_res_vision_proj.conv2
    vision_tower_high                  both.high_res_vision_model.vision_encoder
    vision_tower_low.pos_embed         both.vision_model.embeddings.position_embedding.weight
    vision_tower_low.patch_embed.proj  both.vision_model.embeddings.patch_embedding
    vision_tower_low.norm              both.vision_model.post_layernorm
    tower_low.blocks.(\d+).attn        tower_low.blocks.\1.self_attn
    vision_tower_low.blocks            both.vision_model.encoder.layers
    self_attn.proj  self_attn.out_proj
    patch_embed.proj  patch_embed.projection
    blocks  layers
    neck.0  neck.conv1
    neck.1  neck.layer_norm1
    neck.2  neck.conv2
    neck.3  neck.layer_norm2
    \.norm(\d)  .layer_norm\1
    aligner.layers.1  aligner.down
    aligner  projector""".split("\n")]

def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)

def write_json(data, *path):
    with open(os.path.join(*path), "w", encoding="utf-8") as f:
        json.dump(data, f, indent=1)

def build(config):
    """A VLM of random weights.

    config  vision_config, text_config (as in Hugging Face's config.json), image_token_id, and optionally
        projector      "mlp"; "gated" and "hybrid" are those of the released Qwen2 and DeepSeek systems
        feature_layer  -1: the last, through the post-layernorm; else which of Hugging Face's hidden_states,
                       without that norm (released Qwen2: -2); layers above it are not built
        drop_first     features left out at the start (released Qwen2: 1)
        after_image    words between picture and question (released Qwen2, new models: "\\n"; tiny/: "")
        image_size     side S of a picture, where it is not SigLIP's;  pad_color  see load_image
    """
    config = {"model_type": "math_puma_vlm", "projector": "mlp", "feature_layer": -1, "drop_first": 0,
              "after_image": "", "image_size": None, "pad_color": None} | config
    text, layer = config["text_config"], config["feature_layer"]
    config_class, llm_class = LLMS[text.get("model_type", "qwen2")]
    llm = llm_class(config_class(**text))
    projector = PROJECTORS[config["projector"]]
    if projector is HybridProjector:
        vision = HybridVision(config["vision_config"])
        return VLM(vision, projector(vision.config.hidden_size, llm.config.hidden_size), llm, config)
    c = SiglipVisionConfig(**config["vision_config"] | {"vision_use_head": False})
    c.num_hidden_layers = c.num_hidden_layers if layer == -1 else layer % (c.num_hidden_layers + 1)
    vision = SiglipVisionModel(c)
    vision.post_layernorm = vision.post_layernorm if layer == -1 else nn.Identity()
    return VLM(vision, projector(c.hidden_size, llm.config.hidden_size), llm, config)

def save_vlm(folder, vlm, tokenizer, dtype=None, released=False):
    """Write config, weights (a tied lm_head once) and tokenizer into folder.

    dtype     of the written weights; None: as they are, a frozen bfloat16 part stays bfloat16
    released  in the layout of the released Qwen2 checkpoints; exits when the model has other parts
    """
    config, llm, prefixes = vlm.config, vlm.language_model.config, {}
    if released:
        if config["projector"] != "gated" or config["feature_layer"] == -1:
            sys.exit("the released layout has no other parts than those that --projector gated starts with")
        prefixes = {"projector": "aligner", "vision_model": "vision_model.vision_model"}
        config = {"model_type": "qwen2vlm", "architectures": ["Qwen2vlmForConditionalGeneration"],
                  "image_token_index": vlm.image_token_id, "pad_token_id": tokenizer.pad_token_id,
                  "vision_feature_layer": config["feature_layer"], "projector_hidden_act": "gelu",
                  "vision_feature_select_strategy": "default" if config["drop_first"] else "full",
                  "vision_config": config["vision_config"] | {  # the pooling head, when it came with one
                      "vision_use_head": "vision_model.head.probe" in vlm.unused},
                  "text_config": {"rope_theta": llm.rope_parameters["rope_theta"]} | config["text_config"]}
    os.makedirs(folder, exist_ok=True)
    write_json(config, folder, "config.json")
    tensors = {}
    for name, tensor in (vlm.state_dict() | vlm.unused).items():
        part, rest = name.split(".", 1)
        tensors[f"{prefixes.get(part, part)}.{rest}"] = tensor.to(dtype or tensor.dtype).contiguous()
    if llm.tie_word_embeddings:
        del tensors[TIED[0]]
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)

def read_tensors(folder):
    """All tensors of model.safetensors or its shards, mapped, not copied, and a hash of the files."""
    names, index = ["model.safetensors"], os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, names[0])):
        names = sorted(set(read_json(index)["weight_map"].values()))
    tensors, digests = {}, ""
    for file in (os.path.join(folder, name) for name in names):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:  # absent; cut short; something else under this name
            pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in os.listdir(folder))
            sys.exit(f"{file}: {error}; " + (
                "pickled weights are not opened, they can run code: make safetensors of them elsewhere, with "
                "from_pretrained and save_pretrained" if pickled else "fetch this file again"))
        digests += sha256(file)  # of all shards, in order
    return tensors, hashlib.sha256(digests.encode()).hexdigest()

def from_released(folder, config, tensors):
    """Config, tensors and prompt of a released checkpoint in our terms. Exits when it is something else."""
    if config.get("model_type") == "multi_modality":
        return from_released_deepseek(config, tensors)
    if config.get("model_type") != "qwen2vlm" or config.get("projector_hidden_act", "gelu") != "gelu":
        sys.exit(f"{folder}: a {config.get('model_type')} model, neither ours (math_puma_vlm) nor a released "
                 "one (qwen2vlm with gelu, multi_modality); a language model goes to --llm, a SigLIP tower "
                 "to --vision")
    layer, vision = config.get("vision_feature_layer", -2), config["vision_config"]
    ours = {"projector": "gated", "after_image": "\n", "image_token_id": config["image_token_index"],
            "feature_layer": vision["num_hidden_layers"] if layer == -1 else layer, "vision_config": vision,
            "drop_first": int(config.get("vision_feature_select_strategy") != "full"),
            "text_config": {"model_type": "llama"} | config["text_config"]}  # its default
    for old, new in (("aligner.", "projector."), ("vision_model.vision_model.", "vision_model.")):
        tensors = {new + k.removeprefix(old) if k.startswith(old) else k: t for k, t in tensors.items()}
    return ours, tensors, QWEN2_PROMPT

def from_released_deepseek(config, tensors):
    """The same for the layout of DeepSeek-VL's own code."""
    high, low = (config["vision_config"]["params"][k] for k in ("high_res_cfg", "low_res_cfg"))
    sam, siglip = ({"image_size": c["image_size"]} | HYBRID[c["model_name"]] for c in (high, low))
    siglip["num_hidden_layers"] += 1 + low.get("select_layer", -2)
    ours = {"projector": "hybrid", "text_config": {"model_type": "llama"} | config["language_config"],
            "image_size": high["image_size"], "pad_color": [122, 116, 104],  # 255 x CLIP's mean, its default
            "vision_config": {"high": sam, "low": siglip | {"hidden_act": "gelu"}, "pixels": [
                high.get(k) or [0.5] * 3 for k in ("pixel_mean", "pixel_std")]}}
    renamed = {}
    for name, t in tensors.items():
        for old, new in HYBRID_NAMES:
            name = re.sub(old, new, name)
        if "self_attn.qkv" in name:  # one product there, three in transformers
            renamed |= {name.replace("qkv", f"{k}_proj"): part for k, part in zip("qkv", t.chunk(3))}
        elif not re.search("attn_pool|(high|low)_layer_norm", name):  # those are in no forward
            renamed[name] = t[0] if "position_embedding" in name else t
    return ours, renamed, DEEPSEEK_PROMPT.replace("SYSTEM", DEEPSEEK_SYSTEM)

@torch.no_grad()
def fill(vlm, tensors, folder, new="-"):
    """Copy tensors, under our names, into the model. Exits when one is missing, left over or misshapen.

    Layers above feature_layer go to vlm.unused.  What is named new... is in no file and left alone.
    """
    own, above = vlm.state_dict(), r"vision_model\.(encoder\.layers\.\d+|post_layernorm|head)\."
    vlm.unused = {name: t.clone() for name, t in tensors.items() if name not in own and re.match(above, name)}
    done = vlm.unused.keys() | ({TIED[0]} if vlm.language_model.config.tie_word_embeddings else set())
    for name in sorted(name for name in (own.keys() | tensors.keys()) - done if not name.startswith(new)):
        there, here = (tuple(d[name].shape) if name in d else "absent" for d in (tensors, own))
        if there != here:
            sys.exit(f"{folder}: {name} is {there} in the file, {here} in the model that "
                     "config.json describes")
        own[name].copy_(tensors[name])

def place(config, tensors, tokenizer, folder, device, trained, frozen, new="-"):
    """The VLM of a config on a device, made without memory and then filled; see load_vlm and fill."""
    device, highest = torch.device(device), max(tokenizer.get_vocab().values())
    frozen = frozen or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):  # random numbers for 7 billion weights would take minutes and be overwritten
        vlm = build(config)
    llm = vlm.language_model
    if highest >= llm.config.vocab_size:
        sys.exit(f"{folder}: the tokenizer has tokens up to {highest}, the embedding {llm.config.vocab_size} "
                 "rows: they are of different models")
    for name, child in vlm.named_children():
        child.to(torch.float32 if name in trained else frozen)
    vlm.to_empty(device=device)  # memory, still without values
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.get_input_embeddings().weight  # to_empty has made two of it
    fill(vlm, tensors, folder, new)
    llm.model.rotary_emb = type(llm.model.rotary_emb)(llm.config).to(device)  # buffers that are in no file
    for module in vlm.modules():
        assert module._non_persistent_buffers_set <= {"inv_freq", "original_inv_freq", "position_ids"}
        if "position_ids" in module._non_persistent_buffers_set:
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return vlm

def load_tokenizer(folder, prompt=None):
    """The tokenizer of a model folder with IMAGE_TOKEN, a pad and a chat template (prompt, if given)."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        sys.exit(f"{folder} has no tokenizer.json: AutoTokenizer's save_pretrained writes one")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # AutoTokenizer rebuilds some, by other rules
    if tokenizer.eos_token is None:
        sys.exit(f"{folder}: the tokenizer has no eos_token: name one in tokenizer_config.json")
    if tokenizer.pad_token is None:  # pad == eos does no harm: labels and masks go by position, not by token
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = prompt or tokenizer.chat_template or DEEPSEEK_PROMPT.replace("SYSTEM", "")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer

def load_vlm(folder, device="cpu", trained=(), frozen=None):
    """Read a model folder, ours or a released one, or the newest complete checkpoint in it. -> VLM, tokenizer

    trained  children of VLM that are going to learn: float32, in bfloat16 small steps would be rounded away
    frozen   dtype of the others; default bfloat16 on a GPU, float32 on a CPU
    Exits when a tensor is missing, left over or of another shape.
    """
    folder, prompt = resolve(folder), None
    config, (tensors, digest) = read_json(folder, "config.json"), read_tensors(folder)
    if config.get("model_type") != "math_puma_vlm":
        config, tensors, prompt = from_released(folder, config, tensors)
    tokenizer = load_tokenizer(folder, prompt)
    config.setdefault("image_token_id", tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # DeepSeek's is another
    vlm = place(config, tensors, tokenizer, folder, device, trained, frozen)
    vlm.source_sha256 = digest  # a run writes down what it started from
    return vlm, tokenizer

def local(name, flag):
    """The folder of this name, or a download of the Hugging Face model of this id."""
    if not os.path.isdir(name):
        try:
            if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
                raise FileNotFoundError(name)
            name = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        except OSError as error:  # huggingface_hub's errors are: no network, no such model, no permission
            sys.exit(f"{flag} {name}: no such folder, nor was it downloaded ({type(error).__name__}); "
                     f"without a network: `hf download {name} --local-dir DIR` elsewhere, then {flag} DIR")
    if not os.path.exists(os.path.join(name, "config.json")):
        sys.exit(f"{flag} {name} has no config.json: not a model in Hugging Face's layout")
    return name

def join(llm, vision, projector="mlp", device="cpu", trained=(), frozen=None):
    """A VLM of a causal LM, a SigLIP tower (alone or in a SiglipModel) and a new projector. -> VLM, tokenizer

    llm, vision  folders or Hugging Face ids;  trained, frozen  as in load_vlm
    projector    "gated" takes the features as the released Qwen2 systems do, from layer -2 without the first
    """
    llm, vision = local(llm, "--llm"), local(vision, "--vision")
    text, sight = read_json(llm, "config.json"), read_json(vision, "config.json")
    for flag, c, known in (("--llm", text, LLMS), ("--vision", sight, ("siglip", "siglip_vision_model"))):
        if c.get("model_type") not in known:
            sys.exit(f"{flag}: a {c.get('model_type')} model; can be used: {', '.join(known)}")
    tokenizer = load_tokenizer(llm)
    (tensors, digest), (seen, digest_2) = read_tensors(llm), read_tensors(vision)
    tensors = {f"language_model.{name}": t for name, t in tensors.items() if "rotary_emb" not in name}
    inner = re.compile(r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm)\..*)")  # prefix or none
    tensors |= {f"vision_model.{m[1]}": t for name, t in seen.items() if (m := inner.fullmatch(name))}
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image == text["vocab_size"]:  # no row is left for it: one more, the mean of the others
        text["vocab_size"] += 1
        for name in tensors.keys() & set(TIED):
            mean = tensors[name].float().mean(0, keepdim=True)
            tensors[name] = torch.cat([tensors[name], mean.to(tensors[name].dtype)])
    config = {"vision_config": sight.get("vision_config", sight), "text_config": text,
              "image_token_id": image, "projector": projector, "after_image": "\n"}
    config |= {"feature_layer": -2, "drop_first": 1} if projector == "gated" else {}
    vlm = place(config, tensors, tokenizer, f"{llm}, {vision}", device, trained, frozen, "projector.")
    new = PROJECTORS[projector](vlm.vision_model.config.hidden_size, vlm.language_model.config.hidden_size)
    vlm.projector.load_state_dict(new.state_dict())  # drawn on the CPU: the same numbers on every device
    vlm.source_sha256 = digest + digest_2
    return vlm, tokenizer

def backbone_flags(add):
    """The flags for other backbones than tiny/, the same in every stage. add: a parser's add_argument"""
    add("--llm", help="instead of --init: Qwen2 or Llama causal LM, a folder or Hugging Face id")
    add("--vision", help="and with it: SigLIP model or vision tower, a folder or Hugging Face id")
    add("--projector", default="mlp", choices=["mlp", "gated"], help="new one between them (released: gated)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile each layer")

def start_vlm(args, device, trained):
    """What a stage trains: the model of --init, or --llm and --vision joined. -> VLM, tokenizer"""
    torch.manual_seed(args.seed)  # for a new projector
    vlm, tokenizer = (join(args.llm, args.vision, args.projector, device, trained) if args.llm else
                      load_vlm(args.init, device, trained))
    for name, module in vlm.named_modules():
        if args.compile and re.search(r"layers\.\d+$", name):
            module.compile()  # in place: no name changes; by layer: they are alike, one is compiled
    return vlm, tokenizer

# ------------------------------------------------------------------------------------------------------------
# Checkpoints: out/step-N is complete or absent.  All files go into a temporary folder, the last one is
# manifest.json with sizes and SHA-256 (safetensors has no checksum of its own: a flipped bit loads silently),
# then the folder gets its name.  Without a manifest that holds there is no checkpoint.
# ------------------------------------------------------------------------------------------------------------
def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def intact(folder):
    """True when the folder has a manifest and every file in it has the size and the hash that stand there."""
    try:
        entries = [(os.path.join(folder, name), e["size"], e["sha256"])
                   for name, e in read_json(folder, "manifest.json").items()]
        return all(os.path.getsize(path) == size and sha256(path) == digest for path, size, digest in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, unreadable, no manifest
        return False

def steps_in(out):
    """Numbers N of all out/step-N, the newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []  # part-N of a killed run is not among them
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)

def newest_checkpoint(out):
    """Path of the newest intact out/step-N, or None. Says so when it passes over a damaged one."""
    for step in steps_in(out):
        folder = os.path.join(out, f"step-{step}")
        if intact(folder):
            return folder
        print(f"warning: {folder} is damaged (its manifest does not hold); trying an older one",
              file=sys.stderr)
    return None

def finished(out):
    """True when the newest checkpoint is at the last step of its run: a half-trained model is no parent."""
    newest = newest_checkpoint(out)
    if newest is None:
        return False
    state = read_json(newest, "trainer_state.json")
    return state["step"] == state["run"]["flags"]["steps"]

def resolve(folder):
    """The model folder of this name, or the newest checkpoint in a run folder. Exits when there is none."""
    if os.path.exists(os.path.join(folder, "config.json")):
        if os.path.exists(os.path.join(folder, "manifest.json")) and not intact(folder):
            sys.exit(f"{folder} is damaged: its files do not match manifest.json; "
                     "name another step or train again")
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        sys.exit(f"{folder} holds no model: neither config.json nor a complete step-N checkpoint")
    return newest

def save_checkpoint(out, step, vlm, tokenizer, optimizer, state, keep=2):
    """Write out/step-N and delete all but the newest `keep`. state: a dict for trainer_state.json.

    AdamW's three tensors a parameter go through safetensors bit for bit.  No pickle: loading one runs code.
    """
    final, part = os.path.join(out, f"step-{step}"), os.path.join(out, f"part-{step}")
    shutil.rmtree(part, ignore_errors=True)  # of a run killed while it wrote
    save_vlm(part, vlm, tokenizer)
    names = {id(p): name for name, p in vlm.named_parameters()}  # AdamW knows parameters, not their names
    tensors = {f"{names[id(p)]}/{k}": v for p, moments in optimizer.state.items() for k, v in moments.items()}
    tensors["rng"] = torch.get_rng_state()  # nothing here draws at random; for a fork that adds dropout
    save_file(tensors, os.path.join(part, "optimizer.safetensors"))  # float32 moments, and the step
    write_json({"step": step, "torch": torch.__version__, **state}, part, "trainer_state.json")
    files = {name: os.path.join(part, name) for name in sorted(os.listdir(part))}
    manifest = {name: {"size": os.path.getsize(path), "sha256": sha256(path)} for name, path in files.items()}
    write_json(manifest, part, "manifest.json")
    for path in [*files.values(), os.path.join(part, "manifest.json"), part]:  # on disk before it is visible
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there, an intact one is resumed
    os.rename(part, final)  # atomic: now the checkpoint exists
    for old in steps_in(out)[keep:]:
        shutil.rmtree(os.path.join(out, f"step-{old}"))

def load_checkpoint(folder, vlm, optimizer):
    """Put a checkpoint's weights and optimizer state into objects of that shape."""
    fill(vlm, read_tensors(folder)[0], folder)  # exits when a tensor does not fit
    parameters = dict(vlm.named_parameters())  # a tied lm_head is not among them twice
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as f:
        torch.set_rng_state(f.get_tensor("rng"))
        for key in set(f.keys()) - {"rng"}:
            name, field = key.rsplit("/", 1)
            device = "cpu" if field == "step" else parameters[name].device  # AdamW counts steps on the CPU
            optimizer.state[parameters[name]][field] = f.get_tensor(key).to(device)

def start_or_resume(args, vlm, optimizer, run, rank):
    """Step to begin at: 0, or that of the newest complete checkpoint in args.out, put into vlm and optimizer.

    run: {"flags", "init_sha256", "data_sha256", "script"}.  Exits when the checkpoint comes from other flags,
    another model, other data or an edited script: going on would give what no one command can reproduce.
    """
    if rank == 0 and not args.resume and os.path.isdir(args.out):
        shutil.rmtree(args.out)  # --no-resume is how a user asks for that
    if dist.is_initialized():
        dist.barrier()
    found = newest_checkpoint(args.out)
    if dist.is_initialized():
        dist.barrier()  # all have looked before rank 0 changes anything
    metrics = os.path.join(args.out, "metrics.jsonl")  # a line for every log line
    if found is None:
        if rank == 0:
            os.makedirs(args.out, exist_ok=True)
            open(metrics, "w").close()
        return 0
    state = read_json(found, "trainer_state.json")
    free = ("out", "resume", "log_every", "save_every", "micro_batch", "evaluate", "show",
            "image_root", "check_data", "max_bad", "compile")  # these may differ
    there, here = ({k: v for k, v in r["flags"].items() if k not in free}
                   | {k: r[f"{k}_sha256"] for k in ("init", "data")} for r in (state["run"], run))
    differ = [f"--{k}: {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v]
    differ += ["the script was edited"] if state["run"]["script"] != run["script"] else []
    if differ:
        sys.exit(f"{found} is from another run ({'; '.join(differ)}): "
                 "give its flags, another --out or --no-resume")
    load_checkpoint(found, vlm, optimizer)
    if rank == 0:
        print(f"resuming {found}", flush=True)
        with open(metrics) as f:  # steps after the checkpoint are done again and must not stand in it twice
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        with open(metrics, "w") as f:
            f.writelines(kept)
    return state["step"]

def peak_gigabytes(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a model in a layout that others load.")
    parser.add_argument("model", help="model folder, ours or a released one, or a run folder")
    parser.add_argument("--llm_to", help="folder for its language model alone, for AutoModelForCausalLM")
    parser.add_argument("--released_to", help="folder for the layout of the released Qwen2 checkpoints")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    args = parser.parse_args(argv)
    vlm, tokenizer = load_vlm(args.model, frozen=getattr(torch, args.dtype))
    if args.llm_to:
        vlm.language_model.save_pretrained(args.llm_to)
        tokenizer.save_pretrained(args.llm_to)
    if args.released_to:
        save_vlm(args.released_to, vlm, tokenizer, released=True)

if __name__ == "__main__":
    main()
