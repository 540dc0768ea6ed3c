"""The model, and the one place where text, pictures and labels become tensors. The stages and eval.py use it.

    picture (3, S, S) -> vision encoder -> (P, W) -> projector -> (P, H) -+
                                                                          | in the place of the P placeholders
    tokens (L) --------> token embeddings ---------> (L, H) --------------+-> LLM -> (L, H) -> lm_head -> (V)

Letters, used as they stand in every file:
    B  sequences in a batch        P  image tokens of a picture       H  hidden width of the LLM
    L  positions of a sequence,    W  width of the vision encoder     V  vocabulary: rows of lm_head
       image tokens included       S  picture side in pixels          N  answer rows: positions with a label
    I  pictures in a batch
"""
import hashlib
import json
import os
import re
import resource
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging as transformers_logging

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


class VLM(nn.Module):
    """Vision encoder, projector and language model.

    A plain nn.Module, not a PreTrainedModel: what happens between picture and logits is on this page, not
    in a base class.
    """

    def __init__(self, vision, projector, language_model, image_token_id):
        super().__init__()
        self.vision_model, self.projector, self.language_model = vision, projector, language_model
        self.image_token_id = image_token_id

    @property
    def image_tokens(self):
        """P, from the vision config: the only home of this number."""
        return (self.vision_model.config.image_size // self.vision_model.config.patch_size) ** 2

    @property
    def lm_head(self):
        """The (V, H) matrix that turns hidden rows into logits."""
        return self.language_model.lm_head.weight

    def embed(self, input_ids, pixel_values):
        """Token embeddings (B, L, H) with the features of the I pictures in the place of their placeholders.

        input_ids (B, L) int64; pixel_values (I, 3, S, S) float32 in [-1, 1], in order of appearance.
        Raises ValueError when the number of placeholders is not I * P.
        """
        x = self.language_model.get_input_embeddings()(input_ids)  # (B, L, H)
        here, images = input_ids == self.image_token_id, len(pixel_values)  # (B, L)
        if int(here.sum()) != images * self.image_tokens:
            raise ValueError(f"{int(here.sum())} image placeholders in the tokens, but {images} pictures of "
                             f"{self.image_tokens} image tokens each")
        if images == 0:
            if not (self.training and torch.is_grad_enabled() and self.projector.up.weight.requires_grad):
                return x
            # This process has no picture now, another one may: DDP waits on every process for a gradient of
            # every trainable parameter.  So a blank picture goes through, and none of its features is used.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        features = self.projector(self.vision_model(pixel_values=pixel_values).last_hidden_state)  # (I, P, H)
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

    def to(self, device):
        return Batch(*(getattr(self, field).to(device) for field in self.__dataclass_fields__))


def load_image(path, size):
    """A picture file as (3, size, size) float32 in [-1, 1]: SigLIP's normalisation, mean = std = .5.

    Resized without keeping the aspect, as in the released code.
    """
    with Image.open(path) as image:
        if image.mode == "I;16":  # Pillow clips 16 bits to 8; this keeps the upper ones
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode not in ("L", "RGB"):  # lay transparency on white: convert("RGB") alone turns it black
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def encode_example(tokenizer, row, suffix="", *, image_tokens, root="", max_length=1024, size=None,
                   answer=True):
    """One form of a data row as (input_ids, labels, picture or None).

    row       dict with image_url, instruction, output, each with suffix "" or "_2"; image_url "" = text only
    size      picture side S; root: the folder image_url starts from
    answer    False: the prompt only, for generation
    raises    ValueError when the prompt alone fills max_length; a long answer loses its tail

    The prompt is the tokenizer's chat template.  The picture comes before the words, where a text-only prompt
    has its conditions.  The P placeholders are put in HERE, before the model, so labels and logits count
    positions alike.  (The released Qwen code expands them inside forward; its alignment loss then picks other
    rows, see the README.)
    """
    text, picture, mark = row[f"instruction{suffix}"], row[f"image_url{suffix}"], "\x00"
    before, after = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False,
                                                  add_generation_prompt=True).split(mark)
    template = lambda words: tokenizer(words, add_special_tokens=False).input_ids
    # What a user or a data row says is data: "<|im_end|>" typed there must stay plain text.
    plain = lambda words: tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
    images = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * (image_tokens if picture else 0)
    prompt = template(before) + images + plain(text) + template(after)
    target = plain(row[f"output{suffix}"]) + [tokenizer.eos_token_id] if answer else []
    if len(prompt) + bool(target) > max_length:
        raise ValueError(f"row {row.get('id', '?')}: its prompt has {len(prompt)} tokens, "
                         f"--max_length is {max_length}")
    # The shift: position t predicts token t + 1.  So the last prompt position has the first answer token as
    # its label, and the last position, which would predict what follows <eos>, has none.
    labels = [IGNORE] * (len(prompt) - 1) + target + [IGNORE] if answer else [IGNORE] * len(prompt)
    pixels = load_image(os.path.join(root, picture), size) if picture else None
    return (prompt + target)[:max_length], labels[:max_length], pixels


def collate(examples, pad_id, size, left=False):
    """Results of encode_example -> Batch, padded on the right for training or on the left for generation."""
    B, L = len(examples), max(len(ids) for ids, _, _ in examples)
    ids, mask, labels = (np.full((B, L), fill) for fill in (pad_id, 0, IGNORE))
    for b, (i, y, _) in enumerate(examples):
        where = slice(L - len(i), L) if left else slice(0, len(i))
        ids[b, where], mask[b, where], labels[b, where] = i, 1, y
    pictures = [pixels for _, _, pixels in examples if pixels is not None]
    pixels = torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), pixels, torch.from_numpy(labels))


def make_batch(vlm, tokenizer, rows, suffix="", root="", max_length=1024, answer=True):
    """Rows -> Batch, P and S as in the vision config. answer=False: prompts only, padded on the left."""
    size = vlm.vision_model.config.image_size
    examples = [encode_example(tokenizer, row, suffix, image_tokens=vlm.image_tokens, root=root,
                               max_length=max_length, size=size, answer=answer) for row in rows]
    return collate(examples, tokenizer.pad_token_id, size, left=not answer)


def read_rows(path, fields=("image_url", "instruction", "output")):
    """A JSONL file as a list of dicts that all have these fields, as strings, and whose pictures exist.

    Exits with file:line and what is wrong at the first row that cannot be used: a silent skip would change
    the data.  Asked for output_2 as well, it also refuses a pair with two different answers.
    """
    if not os.path.exists(path):
        sys.exit(f"{path} does not exist: run `python data_gen.py` first, or name the right --data folder")
    rows, root = [], os.path.dirname(path)
    with open(path, "rb") as f:  # bytes: text mode would also break lines at U+2028
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                for field in fields:
                    if not isinstance(row.get(field), str):
                        raise ValueError(f"field {field!r} is missing or not a string")
                    picture = os.path.join(root, row[field])
                    if field.startswith("image_url") and row[field] and not os.path.isfile(picture):
                        raise ValueError(f"row {row.get('id', '?')}: picture {picture} does not exist")
                if "output_2" in fields and row["output"] != row["output_2"]:
                    raise ValueError(f"the answers of a pair differ: {row['output']!r} and "
                                     f"{row['output_2']!r}")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                sys.exit(f"{path}:{number}: {error}")
            rows.append({"id": f"{path}:{number}"} | row)
    if not rows:
        sys.exit(f"{path} has no rows")
    return rows


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
# Model folders: config.json, model.safetensors and tokenizer files, as Hugging Face lays them out
# ------------------------------------------------------------------------------------------------------------
def build(config):
    """A VLM of random weights from {"vision_config": {...}, "text_config": {...}, "image_token_id": int}."""
    vision = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"]))
    llm = Qwen2ForCausalLM(Qwen2Config(**config["text_config"]))
    projector = Projector(vision.config.hidden_size, llm.config.hidden_size)
    return VLM(vision, projector, llm, config["image_token_id"])


TIED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"  # one matrix, two names


def save_vlm(folder, vlm, tokenizer, dtype=torch.float32):
    """Write config, weights (a tied lm_head once) and tokenizer into folder."""
    os.makedirs(folder, exist_ok=True)
    vision, llm = vlm.vision_model.config, vlm.language_model.config
    config = {"model_type": "math_puma_vlm", "image_token_id": vlm.image_token_id,
              "vision_config": vision.to_diff_dict(), "text_config": llm.to_diff_dict()}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    skip = TIED[0] if llm.tie_word_embeddings else None
    tensors = {name: t.to(dtype).contiguous() for name, t in vlm.state_dict().items() if name != skip}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def load_vlm(folder, device="cpu"):
    """Read a folder of save_vlm, or the newest complete checkpoint in it. -> (VLM in float32, tokenizer)

    Exits when a tensor is missing, left over or of another shape: nothing stays at its random initial value.
    """
    folder = resolve(folder)
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    transformers_logging.disable_progress_bar()  # every process would show one
    weights = os.path.join(folder, "model.safetensors")
    vlm, tensors = build(config), load_file(weights)
    if vlm.language_model.config.tie_word_embeddings and TIED[1] in tensors:
        tensors[TIED[0]] = tensors[TIED[1]]
    own = vlm.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        there, here = (tuple(d[name].shape) if name in d else "absent" for d in (tensors, own))
        if there != here:
            sys.exit(f"{weights}: {name} is {there} in the file, {here} in the model that "
                     "config.json describes")
    vlm.load_state_dict(tensors)
    vlm.source_sha256 = sha256(weights)  # a run writes down what it started from
    tokenizer = AutoTokenizer.from_pretrained(folder, config=vlm.language_model.config)
    return vlm.float().to(device), tokenizer


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
        with open(os.path.join(folder, "manifest.json")) as f:
            entries = [(os.path.join(folder, name), e["size"], e["sha256"])
                       for name, e in json.load(f).items()]
        return all(os.path.getsize(path) == size and sha256(path) == digest for path, size, digest in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, unreadable, no manifest
        return False


def steps_in(out):
    """Numbers N of all out/step-N, the newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
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
    with open(os.path.join(newest, "trainer_state.json")) as f:
        state = json.load(f)
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
    shutil.rmtree(part, ignore_errors=True)
    save_vlm(part, vlm, tokenizer)
    names = {id(p): name for name, p in vlm.named_parameters()}
    tensors = {f"{names[id(p)]}/{k}": v for p, moments in optimizer.state.items() for k, v in moments.items()}
    tensors["rng"] = torch.get_rng_state()  # nothing here draws at random; for a fork that adds dropout
    save_file(tensors, os.path.join(part, "optimizer.safetensors"))
    with open(os.path.join(part, "trainer_state.json"), "w") as f:
        json.dump({"step": step, "torch": torch.__version__, **state}, f, indent=1)
    files = {name: os.path.join(part, name) for name in sorted(os.listdir(part))}
    manifest = {name: {"size": os.path.getsize(path), "sha256": sha256(path)} for name, path in files.items()}
    with open(os.path.join(part, "manifest.json"), "w") as f:
        json.dump(manifest, f, indent=1)
    for path in [*files.values(), os.path.join(part, "manifest.json"), part]:  # on disk before it is visible
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there, an intact one is resumed
    os.rename(part, final)
    for old in steps_in(out)[keep:]:
        shutil.rmtree(os.path.join(out, f"step-{old}"))


def load_checkpoint(folder, vlm, optimizer):
    """Put a checkpoint's weights and optimizer state into objects of that shape. -> its trainer_state.json"""
    with open(os.path.join(folder, "trainer_state.json")) as f:
        state = json.load(f)
    vlm.load_state_dict(load_vlm(folder)[0].state_dict())
    parameters = dict(vlm.named_parameters())
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as f:
        torch.set_rng_state(f.get_tensor("rng"))
        for key in set(f.keys()) - {"rng"}:
            name, field = key.rsplit("/", 1)
            device = "cpu" if field == "step" else parameters[name].device  # AdamW counts steps on the CPU
            optimizer.state[parameters[name]][field] = f.get_tensor(key).to(device)
    return state


def start_or_resume(args, vlm, optimizer, run, rank):
    """Step to begin at: 0, or that of the newest complete checkpoint in args.out, put into vlm and optimizer.

    run: {"flags", "init_sha256", "data_sha256", ...}.  Exits when the checkpoint comes from other flags,
    another model or other data: going on would give a result that no one command can reproduce.
    """
    if rank == 0 and not args.resume and os.path.isdir(args.out):
        shutil.rmtree(args.out)  # --no-resume is how a user asks for that
    if dist.is_initialized():
        dist.barrier()
    found = newest_checkpoint(args.out)
    if dist.is_initialized():
        dist.barrier()  # all have looked before rank 0 changes anything
    metrics = os.path.join(args.out, "metrics.jsonl")
    if found is None:
        if rank == 0:
            os.makedirs(args.out, exist_ok=True)
            open(metrics, "w").close()
        return 0
    state = load_checkpoint(found, vlm, optimizer)
    free = ("out", "resume", "log_every", "save_every", "micro_batch", "evaluate", "show")  # these may differ
    there, here = ({k: v for k, v in r["flags"].items() if k not in free}
                   | {k: r[f"{k}_sha256"] for k in ("init", "data")} for r in (state["run"], run))
    differ = [f"--{k}: {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v]
    if differ:
        sys.exit(f"{found} is from another run ({'; '.join(differ)}): "
                 "give its flags, another --out or --no-resume")
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
