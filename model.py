"""The model, and the one place where text, pictures and labels become tensors.

    picture (3, S, S) -> vision encoder -> (P, W) -> projector -> (P, H) -+
                                                                          | replace P placeholders
    tokens (L) ----------> token embeddings --------> (L, H) -------------+-> LLM -> (L, H)
                                                                     (L, H) -> lm_head -> (L, V)

Letters, used as they stand in every file:
    B  sequences in a batch       P  image tokens of a picture      H  hidden width of the LLM
    L  positions of a sequence,   W  width of the vision encoder    V  vocabulary: rows of lm_head
       image tokens included      S  picture side in pixels         N  answer rows: positions that
    I  pictures in a batch                                             have a label

In this order:
    the network      two projectors; VLM, all that happens between a batch and its hidden rows
    memory           --recompute and --shard: what a large model needs to fit
    batches          a data row -> token ids, labels, pixels -> a batch
    data files       JSONL rows that stay on disk
    model folders    Hugging Face folders with a projector between them: load, join, save
    checkpoints      complete or absent; resume
"""
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from array import array
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoModelForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig,
                          SiglipVisionModel)
from transformers.utils import logging as transformers_logging

import data_gen

IMAGE_TOKEN = "<|image|>"  # the placeholder; the released Qwen checkpoints call it so
IGNORE = -100  # label of a position that is not trained on; torch's cross_entropy skips this value


# --------------------------------------------------------------------------------------------------
# The network

class Projector(nn.Module):
    """From the width of a vision feature to that of a token, as in LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        return self.down(F.gelu(self.up(x)))


class GatedProjector(nn.Module):
    """The released Qwen2 systems' projector, without biases."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


PROJECTORS = {"mlp": Projector, "gated": GatedProjector}


class NotApplied(nn.Module):
    """Keeps the weights of a layer for whoever loads the folder next, and lets its input pass."""

    def __init__(self, layer):
        super().__init__()
        for name, weight in layer.named_parameters():
            self.register_buffer(name, weight.detach())

    def forward(self, x):
        return x


class VLM(nn.Module):
    """Vision encoder, projector and language model.

    A plain nn.Module, not a PreTrainedModel: what happens between picture and logits is on this
    page, not in a base class.
    """

    def __init__(self, vision_model, projector, language_model, config):
        super().__init__()
        self.vision_model = vision_model
        self.projector = projector
        self.language_model = language_model
        self.config = config  # see assemble

    @property
    def lm_head(self):
        """The (V, H) matrix that turns hidden rows into logits."""
        return self.language_model.lm_head.weight  # tied: the token embeddings themselves

    def embed(self, input_ids, pixel_values):
        """Token embeddings with the features of the pictures in the place of their placeholders.

        input_ids     (B, L) int64
        pixel_values  (I, 3, S, S) float32 in [-1, 1], in order of appearance
        returns       (B, L, H)
        """
        x = self.language_model.get_input_embeddings()(input_ids)  # (B, L, H)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # then sums between layers stay float32 too: the KL needs the digits

        n_pictures = len(pixel_values)
        is_image = input_ids == self.config["image_token_id"]  # (B, L)
        assert is_image.sum() == n_pictures * self.config["image_tokens"], "I * P placeholders"

        # A process whose rows have no picture still sends a blank one through and uses none of its
        # features: DDP waits on every process for a gradient of every trainable parameter.
        if n_pictures == 0:
            parameters = [*self.vision_model.parameters(), *self.projector.parameters()]
            learns = any(parameter.requires_grad for parameter in parameters)
            if not (learns and torch.is_grad_enabled()):
                return x
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])

        features = self.vision_model(pixel_values=pixel_values).last_hidden_state  # (I, patches, W)
        features = self.projector(features[:, self.config["drop_first"]:])  # (I, P, H)
        features = features[:n_pictures].to(x.dtype)
        return x.masked_scatter(is_image[..., None], features)  # row by row: as they appear

    def forward(self, batch):
        """Hidden rows (N, H), after the final norm, of the positions that predict an answer token.

        Not the logits of all positions: (B, L, V) would be the largest tensor of the step, and only
        N rows of it are used.  Not with an attention mask: batches are padded on the right and
        attention is causal, so no real position sees a pad, and attention may take its fast path.
        """
        x = self.embed(batch.input_ids, batch.pixel_values)
        output = self.language_model.model(inputs_embeds=x, use_cache=False)
        return output.last_hidden_state[batch.is_answer]  # (B, L, H) -> (N, H)

    @torch.no_grad()
    def generate(self, batch, max_new_tokens, stop_id, pad_id):
        """Greedy decoding; prompts are padded on the left. -> (B, <= max_new_tokens) token ids"""
        return self.language_model.generate(
            inputs_embeds=self.embed(batch.input_ids, batch.pixel_values),
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_id,
            pad_token_id=pad_id,
        )


# --------------------------------------------------------------------------------------------------
# Memory: what a large model needs to fit

def recompute(vlm):
    """--recompute: an LLM layer keeps its input only, and is computed again in the backward pass.

    Costs a forward pass of the LLM.  Bit-equal, since nothing in a layer is drawn at random.
    """
    for layer in vlm.language_model.model.layers:
        layer.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)


def shard(vlm):
    """--shard: splits what learns over the processes, in place (torch's FSDP2).

    A process holds 1/world of each weight that learns, as a DTensor, and so of its gradient and of
    AdamW's moments.  The weights of a layer come together when its forward or backward begins and
    are dropped after it.  Those in no layer (embedding, lm_head, projector) are whole from
    VLM.forward until its backward ends: the loss reads vlm.lm_head in between.  Call it after
    freezing, what is frozen stays whole everywhere; and before the optimizer, which has to see the
    parts.  All processes must then run as many micro-batches, and save together.
    """
    for name, module in vlm.named_modules():
        # layers of an encoder or of the LLM
        if re.search(r"\.layers\.\d+$", name) and next(module.parameters()).requires_grad:
            fully_shard(module)
    frozen = {parameter for parameter in vlm.parameters() if not parameter.requires_grad}
    fully_shard(vlm, ignored_params=frozen)


def whole(tensors):
    """Named tensors, on the main process with their parts put together; {} on the others."""
    result = {}
    for name, tensor in tensors.items():  # one at a time: a GPU has room for one, not for all
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu()  # every process has to come here, in this order
        if is_main_process():
            result[name] = tensor
    return result


# --------------------------------------------------------------------------------------------------
# Batches: prompt, image placeholders, labels and the shift are made here and nowhere else

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # of Pillow's: for EPS it starts a program
MAX_PIXELS = 50_000_000  # ours: 200 MB decoded; a file of a few kB can claim far more


class BadFile(ValueError):
    """A file that cannot be used; the message names it."""


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64, 0 = pad; only generate needs it
    pixel_values: torch.Tensor  # (I, 3, S, S) float32 in [-1, 1], in order of appearance
    labels: torch.Tensor  # (B, L) int64; labels[b, t] is what t has to predict: ALREADY shifted
    is_answer: torch.Tensor  # (B, L) bool: predicts an answer token, whether or not it has a label

    def to(self, device):
        return Batch(*[tensor.to(device) for tensor in self])


def load_image(path, size, pad_color=None, name="picture"):
    """A picture file as (3, size, size) float32 in [-1, 1]: SigLIP's normalisation, mean, std = .5.

    Resized without keeping the aspect, as in the released Qwen2 code; with a pad_color (R, G, B)
    keeping it, on a square of that color, as in the released DeepSeek code.  Of an animation the
    first frame.  Raises BadFile, with name and path, if it is broken or larger than MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known before anything is decoded
                raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
            image = ImageOps.exif_transpose(image)  # phones store the turn beside the pixels
            image = image.convert("RGBA")
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, struct.error,
            Image.DecompressionBombError) as error:  # each was seen with a damaged file
        raise BadFile(f"{name} {path} cannot be read: {error}") from None

    white = Image.new("RGBA", image.size, "white")  # convert("RGB") makes transparency black
    image = Image.alpha_composite(white, image).convert("RGB")

    if pad_color:
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, tuple(pad_color))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1  # (S, S, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def encode_example(tokenizer, config, row, form="", answer=True):
    """One form of a problem -> (input_ids, labels, pixels or None); the first two are lists.

    config  of the VLM, see assemble
    row     a data row; its fields are read with the suffix `form`, "" or "_2"
    answer  False: the prompt only, for generation
    raises  BadFile, naming row and file

    The picture's placeholders stand before the question, so that every word can attend to the
    picture.  They are put in HERE, before the model, so that labels and logits count positions
    alike.  (The released Qwen code expands them inside forward; its alignment loss then picks other
    rows, see the README.)
    """
    def render(words):  # what stands before and after a user's words says the chat template
        conversation = [{"role": "user", "content": words}]
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True)

    def encode(text, **options):
        return tokenizer(text, add_special_tokens=False, **options).input_ids

    instruction = row[f"instruction{form}"]
    placeholders = ""
    pixels = None
    if row[f"image_url{form}"]:
        path = os.path.join(row["folder"], row[f"image_url{form}"])
        pixels = load_image(
            path, config["image_size"], config["pad_color"], f"{row['where']}: picture")
        placeholders = IMAGE_TOKEN * config["image_tokens"]
        instruction = config["after_image"] + instruction

    # In one piece: Llama-2's tokenizer would begin each piece with a space.  But what a row says is
    # data: a "<|im_end|>" typed there is plain text, encoded apart.
    if any(token in instruction for token in tokenizer.get_added_vocab()):
        before, after = render(placeholders + "\x00").split("\x00")
        prompt = encode(before) + encode(instruction, split_special_tokens=True) + encode(after)
    else:
        prompt = encode(render(placeholders + instruction))
    if not answer:
        return prompt, [IGNORE] * len(prompt), pixels

    target = encode(row[f"output{form}"], split_special_tokens=True) + [tokenizer.eos_token_id]
    # The shift: position t predicts token t + 1.  So the LAST prompt position has the first answer
    # token as its label, and the last position, which would predict what follows <eos>, has none.
    labels = [IGNORE] * (len(prompt) - 1) + target + [IGNORE]
    return prompt + target, labels, pixels


def collate(examples, pad_id, size, side="right"):
    """Results of encode_example -> Batch, padded on the right, or on the left for generation."""
    ids, labels, pixels = zip(*examples)

    def pad(lists, value):  # -> (B, L)
        tensors = [torch.tensor(numbers) for numbers in lists]
        return pad_sequence(tensors, True, value, side)

    pictures = [torch.zeros(0, 3, size, size)]  # for a batch without any
    pictures += [one[None] for one in pixels if one is not None]
    labels = pad(labels, IGNORE)
    return Batch(
        input_ids=pad(ids, pad_id),
        attention_mask=pad([[1] * len(one) for one in ids], 0),
        pixel_values=torch.cat(pictures),
        labels=labels,
        is_answer=labels != IGNORE,
    )


def make_batches(tokenizer, config, rows, forms=("",), max_length=None, answer=True):
    """Rows -> ([one Batch for each form], number of rows dropped).

    forms       ("",) for single rows, ("", "_2") for the two forms of a pair
    max_length  A row with a form of more tokens is dropped, all forms of it: one of a million must
                not end a run in its third hour.  It is not cut: an answer without its end would
                teach not to end.  A row of padding stands for it, so that under DDP every process
                has its backward pass.
    answer      False: prompts only, padded on the left, for generation
    """
    padding = ([tokenizer.pad_token_id], [IGNORE], None)
    examples = []  # of each row all forms
    n_dropped = 0
    for row in rows:
        encoded = [encode_example(tokenizer, config, row, form, answer) for form in forms]
        longest = max(len(ids) for ids, _, _ in encoded)
        if max_length and longest > max_length:
            encoded = [padding] * len(forms)
            n_dropped += 1
        examples.append(encoded)

    batches = []
    for same_form in zip(*examples):
        side = "right" if answer else "left"
        batches.append(collate(same_form, tokenizer.pad_token_id, config["image_size"], side))
    return batches, n_dropped


# --------------------------------------------------------------------------------------------------
# Data files: JSONL, a row a line, pictures beside it.  Other formats (JSON arrays, LLaVA's,
# Alpaca's) are turned into this one, once, by convert/data.py.

ROW = ("image_url", "instruction", "output")
PAIR = ROW + ("image_url_2", "instruction_2", "output_2")  # none: text-rich, strong; _2: weak


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main_process(function, *inputs):
    """What function(*inputs) returns on rank 0, on every process. If rank 0 exits there, all do.

    And all do when another was started otherwise: it would wait for ever, or learn something else.
    """
    if not dist.is_initialized():
        return function(*inputs)
    result = None
    problem = None
    if is_main_process():
        try:
            result = function(*inputs)
        except SystemExit as stopped:
            problem = stopped.code
    call = f"{function.__name__}{inputs}"
    calls = [None] * dist.get_world_size()
    dist.all_gather_object(calls, (call, result, problem))  # the others wait here
    if any(other[0] != call for other in calls):
        sys.exit("the processes differ in flags or data: start all of them with the same")
    _, result, problem = calls[0]
    if problem:
        sys.exit(problem if is_main_process() else 1)  # said once, not once a process
    return result


def says_it_in_one_line(main):
    """For what a user can mend: a file, a full disk. All other errors keep their traceback."""
    def run(argv=None):
        try:
            return main(argv)
        except (OSError, SafetensorError, BadFile) as error:
            # one of a DataLoader's workers ends with its message, after a traceback
            last_line = str(error).strip().split("\n")[-1]
            sys.exit(f"{last_line} (when that is mended, the same command goes on)")
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)  # as a shell counts it
    return run


class JsonLines:
    """The rows of JSONL files, in the order given: len(rows), rows[i] -> dict.

    Only where each line starts stays in memory, 24 bytes a row.  As dicts a million rows would take
    gigabytes, and every process of a run, and every worker, has its own.
    """

    def __init__(self, paths):
        self.paths = paths
        places = array("q")  # for each row: number of its file, line, first byte
        digest = hashlib.sha256()
        for file, path in enumerate(paths):
            start = 0
            with open(path, "rb") as f:  # bytes: text mode would also break lines at U+2028
                for line_number, line in enumerate(f, 1):
                    digest.update(line)
                    if line.strip():
                        places.extend((file, line_number, start))
                    start += len(line)
        self.places = np.array(places).reshape(-1, 3)
        self.sha256 = digest.hexdigest()

    def __len__(self):
        return len(self.places)

    def __repr__(self):
        return self.sha256  # equal on all processes that read the same

    def where(self, i):
        file, line_number, _ = self.places[i]
        return f"{self.paths[file]}:{line_number}"

    def __getitem__(self, i):
        """The row, with "where", its file:line, and "folder", where its pictures are.

        The file is opened anew each time.  Kept open, it would be shared by DataLoader workers
        after a fork: one moves the position while another reads, and rows come out wrong.
        """
        file, _, start = self.places[i]
        path = self.paths[file]
        with open(path, "rb") as f:
            f.seek(start)
            row = json.loads(f.readline())  # of bytes: with or without a byte order mark
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for field in ("image_url", "image_url_2"):
            row[field] = row.get(field) or ""  # null means text only, too
        where = self.where(i)
        return {"id": where} | row | {"where": where, "folder": os.path.dirname(path)}


def check_rows(rows, fields):
    """Exits with file:line and what is wrong at the first row that cannot be used."""
    if not len(rows):
        sys.exit(f"{', '.join(rows.paths)}: no rows")
    for i in range(len(rows)):
        try:
            check_row(rows[i], fields)
        except (ValueError, RecursionError) as error:  # a skip would silently change the data
            sys.exit(f"{rows.where(i)}: {error}")


def check_row(row, fields):
    """Raises ValueError if a field or a picture is missing, or a pair has two answers."""
    if "conversations" in row or row.get("input"):
        raise ValueError("LLaVA's and Alpaca's rows go through convert/data.py first")
    for field in fields:
        text = row.get(field)
        if not isinstance(text, str):
            raise ValueError(f"field {field!r} is missing or not a string")
        if re.search("[\x00\ud800-\udfff]", text):  # JSON lets them pass, no tokenizer or file does
            raise ValueError(f"field {field!r} holds a zero or half a character")
        if field.startswith("output") and not text.strip():
            raise ValueError(f"field {field!r} is empty: nothing to learn")
        if field.startswith("image_url") and text:
            folder = os.path.realpath(row["folder"])
            path = os.path.realpath(f"{folder}/{text}")
            inside = path.startswith(os.path.join(folder, ""))  # not with "..", a link, a URL
            if not (inside and os.path.isfile(path)):
                raise ValueError(f"picture {text} is no file inside {folder}")
    if "output_2" in fields and row["output"] != row["output_2"]:
        raise ValueError("the answers of a pair differ")


def open_data(data, name, fields):
    """--data -> (rows, data_gen.py's folder or None).

    data    one folder of data_gen.py, made when missing, whose file `name` is read; or .jsonl files
    fields  ROW or PAIR: what each row must have
    """
    folder = None
    if len(data) == 1 and not data[0].endswith((".jsonl", ".json")):
        folder = data[0]
        on_main_process(make_data, folder)
        data = [f"{folder}/{name}"]
    for path in data:
        if not path.endswith(".jsonl") or not os.path.isfile(path):
            sys.exit(f"--data: {path} is no .jsonl file; give one folder of data_gen.py or .jsonl "
                     "files (convert/data.py makes them from other formats)")
    rows = JsonLines(data)
    on_main_process(check_rows, rows, fields)  # once, and never again at each access
    return rows, folder


def make_data(folder):
    if not os.path.exists(folder):
        print(f"{folder}/ is missing: running data_gen.py first, about 15 seconds", flush=True)
        data_gen.main(["--out", folder])


# --------------------------------------------------------------------------------------------------
# Model folders.  The two backbones are ordinary Hugging Face folders; ours is what is between them:
#
#     vlm.json                 how they are put together, see assemble
#     projector.safetensors
#     llm/                     AutoModelForCausalLM.from_pretrained loads this folder as it is
#     vision/                  SiglipVisionModel.from_pretrained loads this one
#     tokenizer.json, ...
#
# Safetensors only: pickled weights can run code.  No weight stays random by accident.

MODEL_TYPES = ("qwen2", "llama", "siglip", "siglip_vision_model")  # those that were tried
FALLBACK_TEMPLATE = (  # for a tokenizer without one: in DeepSeek's style
    "{{ bos_token }}{% for m in messages %}"
    "{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def read_json(*path):
    """The object in a JSON file. Raises BadFile if there is none, OSError if there is no file."""
    path = Path(*path)
    data = None
    with suppress(ValueError):
        data = json.loads(path.read_text("utf-8"))
    if not isinstance(data, dict) or not data:
        raise BadFile(f"{path} holds no JSON object: fetch it again")
    return data


def write_json(data, *path):
    Path(*path).write_text(json.dumps(data, indent=1), "utf-8")


def start_vlm(args, checkpoint, device, trained):
    """What a stage trains: the checkpoint it resumes, or --llm and --vision joined, or --init."""
    if args.llm and not checkpoint:
        vlm, tokenizer = new_vlm(
            args.llm, args.vision, args.projector or "mlp", args.seed, device, trained)
    else:
        vlm, tokenizer = load_vlm(checkpoint or args.init, device, trained)
    if args.recompute:
        recompute(vlm)
    return vlm, tokenizer


def load_vlm(folder, device="cpu", trained=(), frozen_dtype=None):
    """The model in a folder as above, or in a run folder's newest checkpoint. -> VLM, tokenizer

    trained       children of VLM that are going to learn: kept in float32, since in bfloat16 small
                  steps would be rounded away
    frozen_dtype  of the others; default bfloat16 on a GPU, float32 on a CPU
    """
    folder = on_main_process(find_model, folder)
    config = read_json(folder, "vlm.json")
    dtypes = dtypes_of_parts(device, trained, frozen_dtype)
    tokenizer = load_tokenizer(folder)
    llm = pretrained(AutoModelForCausalLM, f"{folder}/llm", dtypes["language_model"])

    if config["vision"] == "hybrid":  # DeepSeek-VL's two encoders and the projector that joins them
        from convert import deepseek_vl
        vision, projector = deepseek_vl.load(folder, dtypes["vision_model"], llm.config.hidden_size)
    else:
        vision = pretrained(
            SiglipVisionModel, f"{folder}/vision", dtypes["vision_model"])
        projector = PROJECTORS[config["projector"]](
            vision.config.hidden_size, llm.config.hidden_size)

    path = f"{folder}/projector.safetensors"
    try:
        projector.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        sys.exit(f"{path}: {' '.join(str(error).split())}")
    projector.to(dtypes["projector"])
    return assemble(vision, projector, llm, tokenizer, config).to(device), tokenizer


def new_vlm(llm, vision, projector, seed=0, device="cpu", trained=()):
    """A causal LM and a SigLIP tower with a NEW projector between them. -> VLM, tokenizer

    llm, vision  their folders; the tower alone or in a SiglipModel
    projector    "mlp" or "gated";  seed: of its weights;  the rest as in load_vlm
    """
    for folder in (llm, vision):
        model_type = read_json(folder, "config.json").get("model_type")
        if model_type not in MODEL_TYPES:
            sys.exit(f"{folder}: a {model_type} model; can be used: {', '.join(MODEL_TYPES)}")
    dtypes = dtypes_of_parts(device, trained)
    tokenizer = load_tokenizer(llm)
    language_model = pretrained(AutoModelForCausalLM, llm, dtypes["language_model"])

    # The released systems take features before the last layer and without the first one.  A layer
    # that nothing reads would get no gradient, and DDP would wait for it: it is not built.
    skipped = 1 if projector == "gated" else 0
    vision_config = SiglipVisionConfig.from_pretrained(vision)
    vision_config.num_hidden_layers -= skipped
    vision_config.vision_use_head = False
    not_built = r"text_model|logit_|(vision_model\.)?(head|encoder\.layers)\."
    vision_model = pretrained(
        SiglipVisionModel, vision, dtypes["vision_model"], not_built, vision_config)
    config = {
        "vision": "siglip",
        "projector": projector,
        "post_layernorm": False,
        "drop_first": skipped,
        "after_image": "\n",
        "image_size": vision_config.image_size,
        "pad_color": None,
    }
    torch.manual_seed(seed)
    new = PROJECTORS[projector](
        vision_config.hidden_size, language_model.config.hidden_size)
    new.to(dtypes["projector"])  # drawn on the CPU: the same numbers on every device
    return assemble(vision_model, new, language_model, tokenizer, config).to(device), tokenizer


def assemble(vision_model, projector, language_model, tokenizer, config):
    """The three parts as a VLM.

    config  vision            "siglip" or "hybrid" (DeepSeek-VL's, see convert/deepseek_vl.py)
            projector         "mlp" or "gated"; a hybrid has its own
            post_layernorm    whether the encoder's last norm is applied (released Qwen2: no)
            drop_first        features left out at the start (released Qwen2: 1)
            after_image       words between picture and question
            image_size        S, side of a picture in pixels
            pad_color         see load_image
            image_token_id    of the placeholder;  image_tokens: P.  Both are set here.
    """
    n_rows = language_model.config.vocab_size
    highest = max(tokenizer.get_vocab().values())
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if highest == n_rows == image_token_id:  # no row is left for it: one more, the others' mean
        language_model.resize_token_embeddings(n_rows + 1, mean_resizing=False)
        for layer in (language_model.get_input_embeddings(), language_model.lm_head):
            layer.weight.data[-1] = layer.weight.data[:-1].float().mean(0)
    elif highest >= n_rows:
        sys.exit(f"the tokenizer has tokens up to {highest}, the embedding of the language model "
                 f"{n_rows} rows: they are of different models")

    if not config["post_layernorm"]:
        vision_model.post_layernorm = NotApplied(vision_model.post_layernorm)
    patches_a_side = vision_model.config.image_size // vision_model.config.patch_size
    config["image_tokens"] = patches_a_side ** 2 - config["drop_first"]
    config["image_token_id"] = image_token_id
    # It stays in eval mode when it is trained: nothing here wants another one, and a dropout that a
    # config.json asks for would blur the teacher and make each run another.
    return VLM(vision_model, projector, language_model, config).eval()


def dtypes_of_parts(device, trained, frozen_dtype=None):
    if not frozen_dtype:
        frozen_dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    parts = ("vision_model", "projector", "language_model")
    return {part: torch.float32 if part in trained else frozen_dtype for part in parts}


def pretrained(model_class, folder, dtype, not_built="$", config=None):
    """model_class.from_pretrained, but exits when the files do not hold the model's weights.

    not_built  regular expression: names that may be in the files and not in the model
    config     in the place of that in the folder
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report is read here, and said in one line
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, config=config)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:  # each was seen
        first_line = str(error).split("\n")[0]
        sys.exit(f"{folder}: {first_line} (only safetensors are read: fetch the files again, or "
                 "write them with save_pretrained)")

    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    wrong += [name for name in report["unexpected_keys"] if not re.match(not_built, name)]
    if wrong:
        sys.exit(f"{folder} is not what its config.json describes: missing, left over or of "
                 f"another shape are {wrong[:3]}")
    if getattr(model.config, "tie_word_embeddings", False):
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            sys.exit(f"{folder}: config.json says tied, but lm_head.weight is another matrix: set "
                     "tie_word_embeddings there to false")
    return model


def load_tokenizer(folder):
    """The tokenizer of a model folder, with IMAGE_TOKEN, a pad token and a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):  # of AutoTokenizer's save_pretrained
        read_json(folder, name)  # says in one line what is wrong
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # AutoTokenizer rebuilds some
    if not tokenizer.eos_token:
        sys.exit(f"{folder}: the tokenizer has no eos_token: name one in tokenizer_config.json")
    if not tokenizer.pad_token:  # pad == eos does no harm: labels and masks go by position
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    template = tokenizer.get_chat_template()  # where there are several, "default"
    # Llama 3's writes today's date: a prompt of tomorrow would be another one.
    tokenizer.chat_template = re.sub(r"strftime_now\(.*?\)", "'26 Jul 2024'", template)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)  # nothing happens where it is known
    return tokenizer


def save_vlm(folder, vlm, tokenizer):
    """Write a model folder. Each part keeps its dtype.

    All processes come here, since weights may have to be put together; the main one writes.
    """
    llm = whole(vlm.language_model.state_dict())
    vision = whole(vlm.vision_model.state_dict())
    projector = whole(vlm.projector.state_dict())
    if not is_main_process():
        return
    if vlm.language_model.config.tie_word_embeddings:
        del llm["lm_head.weight"]  # the token embeddings themselves
    tokenizer.save_pretrained(folder)
    write_json(vlm.config, folder, "vlm.json")
    save_file(projector, f"{folder}/projector.safetensors")
    vlm.language_model.save_pretrained(f"{folder}/llm", state_dict=llm)
    vlm.vision_model.save_pretrained(f"{folder}/vision", state_dict=vision)
    for path in Path(folder).rglob("*.safetensors"):  # safetensors lets nobody else read them
        shutil.copymode(f"{folder}/vlm.json", path)


# --------------------------------------------------------------------------------------------------
# Checkpoints: out/step-N is complete or absent.  Everything is written into out/part-N, which gets
# its name at the end; a rename cannot happen by half.  After a power cut the name may be there and
# the contents not: hashes.json shows it.  No pickle anywhere: loading one runs code.

# Flags that may change when a run goes on: none decides what is learnt.
MAY_DIFFER = ("out", "resume", "save_every", "micro_batch", "workers", "evaluate", "show",
              "shard", "recompute")
RUN_FILES = r"(step|part)-\d+|metrics\.jsonl|eval\.json|replies\.jsonl"  # --no-resume deletes them
WEIGHTS = r"(model|projector).*\.safetensors"  # of a parent: with others it is another run


def file_hashes(folder, names=".*"):
    """{file below the folder, whose name matches: its SHA-256}

    safetensors has no checksum of its own: a flipped bit loads silently.
    """
    hashes = {}
    for path in Path(folder).rglob("*"):
        if re.fullmatch(names, path.name) and path.is_file():
            with open(path, "rb") as f:
                digest = hashlib.file_digest(f, "sha256")
            hashes[str(path.relative_to(folder))] = digest.hexdigest()
    return hashes


def is_intact(folder):
    """True when the folder holds the files that hashes.json names, as written; maybe others too."""
    try:
        expected = read_json(folder, "hashes.json")
    except (OSError, ValueError):  # absent or unreadable
        return False
    return expected.items() <= file_hashes(folder).items()


def steps_in(out):
    """Numbers N of all out/step-N, the newest first."""
    numbers = [path.name.removeprefix("step-") for path in Path(out).glob("step-*")]
    steps = [int(number) for number in numbers if number.isdecimal()]
    return sorted(steps, reverse=True)


def newest_checkpoint(out):
    """Path of the newest undamaged out/step-N, or None. Says when it passes over a damaged one."""
    for step in steps_in(out):
        folder = f"{out}/step-{step}"
        if is_intact(folder):
            return folder
        print(f"warning: {folder} is damaged (its hashes do not hold); trying an older one",
              file=sys.stderr)
    return None


def find_model(folder):
    """The model folder of this name, or the newest checkpoint in a run folder. Else it exits."""
    if not os.path.exists(f"{folder}/vlm.json"):
        newest = newest_checkpoint(folder)
        if not newest:
            sys.exit(f"{folder} holds no model: neither vlm.json nor a complete step-N checkpoint "
                     "(other layouts: see convert/; a language model alone goes to --llm)")
        is_last(newest)
        return newest
    is_checkpoint = {"hashes.json", "trainer_state.json"} & set(os.listdir(folder))
    if is_checkpoint and not is_intact(folder):
        sys.exit(f"{folder} is damaged: its files do not match hashes.json; name another step or "
                 "train again")
    return folder


def is_last(checkpoint):
    """Whether its run ended with this checkpoint; if not, it says so."""
    state = read_json(checkpoint, "trainer_state.json")
    step = state["step"]
    steps = state["run"]["steps"]
    if step < steps:
        print(f"{checkpoint}: step {step} of {steps}, unfinished")
    return step == steps


def is_finished(out):
    """True when the newest checkpoint is its run's last: a half-trained model is no parent."""
    newest = newest_checkpoint(out)
    is_done = newest and is_last(newest)
    if not is_done:
        print(f"{out} is missing or unfinished: it is made first", flush=True)
    return is_done


@functools.cache  # keeps what it returns: the lock is held as long as this process lives
def lock(out):
    """Exits when another process writes there."""
    try:
        # ten seconds: the workers of a run that was killed end within five
        return FileLock(f"{out}/lock").acquire(timeout=10)
    except Timeout:
        sys.exit(f"--out {out}: another process writes there; wait for it, or give another --out")


def start_run(args, rows, script):
    """-> (what a checkpoint remembers of this run, the checkpoint in args.out to resume or None)

    Exits when that one comes from other flags, another model, other data or an edited script: going
    on would give what no one command can reproduce.  --no-resume first deletes what a run wrote.
    """
    parents = [args.llm, args.vision] if args.llm else [find_model(args.init)]
    out = Path(args.out).resolve()
    for parent in parents:
        if Path(parent).resolve().is_relative_to(out):
            sys.exit(f"--out {args.out} holds the model to start from, {parent}: name another")
    os.makedirs(out, exist_ok=True)
    lock(out)

    weights = [file_hashes(folder, WEIGHTS) for folder in parents]
    run = vars(args) | {"weights": weights, "rows": rows.sha256}
    for path in (Path(script), Path(__file__)):
        run[path.name] = path.read_text("utf-8")

    if not args.resume:
        for path in out.iterdir():
            if re.fullmatch(RUN_FILES, path.name):  # nothing else that lies there
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = newest_checkpoint(args.out)
    if not newest:
        return run, None

    saved = read_json(newest, "trainer_state.json")["run"]
    differences = []
    for key, value in run.items():
        if key not in MAY_DIFFER and saved.get(key) != value:
            was = f"--{key} was {saved.get(key)}"
            differences.append(was if hasattr(args, key) else f"other {key}")
    if differences:
        sys.exit(f"{newest} is from another run ({', '.join(differences)}): give "
                 f"{Path(script).name} its flags, another --out or --no-resume")
    print(f"resuming {newest}", flush=True)
    return run, newest


def try_to_save(out, vlm, tokenizer):
    """What can fail at the first save fails before the first step: settings, templates, space."""
    with TemporaryDirectory(dir=out) as folder:
        tokenizer.save_pretrained(folder)
        vlm.language_model.save_pretrained(folder, state_dict={})

    learns = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    if shutil.disk_usage(out).free < 12 * learns:  # bytes: the weight and AdamW's two moments
        sys.exit(f"--out {out}: a checkpoint takes {12 * learns:,} bytes; make room for it")


def save_checkpoint(out, step, vlm, tokenizer, optimizer, run):
    """Write out/step-N with all that a run needs to go on, and delete all but the newest two.

    All processes come here; the main one writes.
    """
    part = f"{out}/part-{step}"
    final = f"{out}/step-{step}"
    moments = whole(optimizer_tensors(vlm, optimizer))
    try:
        if is_main_process():
            shutil.rmtree(part, ignore_errors=True)  # of a run killed while it wrote
            os.makedirs(part)
            save_file(moments, f"{part}/optimizer.safetensors")
        save_vlm(part, vlm, tokenizer)
        if not is_main_process():
            return
        write_json({"step": step, "run": run}, part, "trainer_state.json")
        write_json(file_hashes(part), part, "hashes.json")
    except (OSError, SafetensorError) as error:
        sys.exit(f"{part}: {error}; free space, then the same command goes on")

    shutil.rmtree(final, ignore_errors=True)  # a damaged one; this run has passed it over
    os.rename(part, final)  # now the checkpoint exists
    steps = [other for other in steps_in(out) if other <= step]  # later ones are damaged, too
    for other in set(steps_in(out)) - set(steps[:2]):
        shutil.rmtree(f"{out}/step-{other}")


def optimizer_tensors(vlm, optimizer):
    """AdamW's state, two moments and a step count for each parameter, by the parameter's name."""
    tensors = {}
    for name, parameter in vlm.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer(checkpoint, vlm, optimizer):
    """Put a checkpoint's optimizer state into the optimizer. -> the step to go on from"""
    tensors = load_file(f"{checkpoint}/optimizer.safetensors")  # only mapped: read when they move
    for key, value in sorted(tensors.items()):  # in this order all processes will save them
        name, field = key.rsplit("/", 1)
        parameter = vlm.get_parameter(name)
        if field != "step":  # AdamW counts steps on the CPU
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):  # keep our part
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        optimizer.state[parameter][field] = value
    return read_json(checkpoint, "trainer_state.json")["step"]
