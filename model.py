"""The model, and the one place where text, pictures and labels become tensors. All three stages and eval.py share it.

    picture (3, S, S) --> vision encoder --> (P, W) --> projector --> (P, H) --+
                                                                               | replaces the P image placeholders
    tokens (L) ---------> token embeddings ------------------> (L, H) ---------+--> LLM --> hidden (L, H) --> lm_head --> (V)

Letters, used as they stand in every file:
    B  sequences in a batch          P  image tokens a picture becomes       H  hidden width of the LLM
    L  positions of a sequence,      W  hidden width of the vision encoder   V  vocabulary (rows of lm_head)
       image tokens included         S  picture side in pixels               N  answer rows: positions with a label
"""
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging as transformers_logging

IMAGE_TOKEN = "<|image|>"  # the released Qwen checkpoints' name for the placeholder
IGNORE = -100  # label of a position that is not trained on; the value torch's cross_entropy skips


# ----------------------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------------------
class Projector(nn.Module):
    """Maps a vision feature to the width of a token embedding: Linear, GELU, Linear (LLaVA-1.5, arXiv 2310.03744)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        return self.down(self.act(self.up(x)))


class VLM(nn.Module):
    """Vision encoder, projector and language model.

    A plain nn.Module, not a PreTrainedModel: nothing here is hidden in a base class.
    """

    def __init__(self, vision, projector, language_model, image_token_id):
        super().__init__()
        self.vision_model, self.projector, self.language_model = vision, projector, language_model
        self.image_token_id = image_token_id

    @property
    def image_tokens(self):
        """P, from the vision config: the only place where this number comes from."""
        return (self.vision_model.config.image_size // self.vision_model.config.patch_size) ** 2

    @property
    def lm_head(self):
        """The (V, H) matrix that turns hidden rows into logits."""
        return self.language_model.lm_head.weight

    def embed(self, input_ids, pixel_values):
        """Token embeddings with the picture features in place of the placeholders. -> (B, L, H)"""
        x = self.language_model.get_input_embeddings()(input_ids)  # (B, L, H)
        here = input_ids == self.image_token_id  # (B, L)
        images = pixel_values.shape[0]
        if int(here.sum()) != images * self.image_tokens:
            raise ValueError(f"{int(here.sum())} image placeholders for {images} pictures of {self.image_tokens} tokens each")
        if images == 0:
            if not (self.training and torch.is_grad_enabled() and self.projector.up.weight.requires_grad):
                return x
            # This rank has no picture in this micro-batch, another rank may have: DDP waits for a gradient of every
            # trainable parameter on every rank, so a blank picture goes through and none of it is used.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        features = self.projector(self.vision_model(pixel_values=pixel_values).last_hidden_state)  # (I, P, H)
        return x.masked_scatter(here[..., None], features[:images].to(x.dtype))  # row-major: in order of appearance

    def forward(self, batch):
        """Hidden rows that predict an answer token, after the final norm. -> (N, H)

        Not the logits: lm_head on all B * L positions would be the largest tensor of the whole step, and only the N rows
        with a label are ever used.  No attention mask: batches are padded on the right and attention is causal, so no
        real position ever sees a pad, and the fast causal kernel can be used.
        """
        x = self.embed(batch.input_ids, batch.pixel_values)
        hidden = self.language_model.model(inputs_embeds=x, use_cache=False).last_hidden_state  # (B, L, H)
        return hidden[batch.labels != IGNORE]  # (N, H), row-major

    @torch.no_grad()
    def generate(self, batch, max_new_tokens, stop_id, pad_id):
        """Greedy decoding with a KV cache of a left-padded prompt batch. -> (B, <= max_new_tokens) token ids"""
        self.eval()
        return self.language_model.generate(
            inputs_embeds=self.embed(batch.input_ids, batch.pixel_values), attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_id, pad_token_id=pad_id)


# ----------------------------------------------------------------------------------------------------------------------
# From a data row to tensors: prompt, image placeholders, labels and the shift are made here and nowhere else
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64, 0 = pad; used by generate only
    pixel_values: torch.Tensor  # (I, 3, S, S) float32 in [-1, 1], I pictures in order of appearance
    labels: torch.Tensor  # (B, L) int64; labels[b, t] is the token that position t has to predict: ALREADY shifted

    def to(self, device):
        return Batch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


def load_image(path, size):
    """A picture file as (3, size, size) float32 in [-1, 1], SigLIP's normalisation (mean = std = .5).

    Transparency is laid on white (`convert("RGB")` alone would turn it black); the aspect is not kept, as in the released code.
    """
    with Image.open(path) as image:
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def encode_example(tokenizer, row, suffix="", *, image_tokens, root="", max_length=1024, size=None, answer=True):
    """One view of a data row as (input_ids, labels, picture or None).

    row: dict with image_url, instruction, output, all with the suffix "" or "_2"; an empty image_url means text only.
    The prompt is the tokenizer's own chat template; the picture stands before the words, where the conditions stand in a
    text-only prompt.  P placeholders are put in here, BEFORE the model, so labels and logits share coordinates (the
    released Qwen code expands them inside forward; its alignment loss then indexes the wrong rows, see the README).
    Raises ValueError when the prompt alone fills max_length.
    """
    text, picture = row[f"instruction{suffix}"], row[f"image_url{suffix}"]
    mark = "\x00"  # stands for the user's text while the template is rendered
    before, after = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False,
                                                  add_generation_prompt=True).split(mark)
    # The user's and the answer's words are data: a special token typed in them stays plain text.
    plain = lambda words: tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
    special = lambda words: tokenizer(words, add_special_tokens=False).input_ids
    images = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * (image_tokens if picture else 0)
    prompt = special(before) + images + plain(text) + special(after)
    target = plain(row[f"output{suffix}"]) + [tokenizer.eos_token_id] if answer else []
    if len(prompt) + bool(target) > max_length:
        raise ValueError(f"row {row.get('id', '?')}: its prompt has {len(prompt)} tokens, --max_length is {max_length}")
    ids = (prompt + target)[:max_length]
    # The shift: position t predicts token t + 1, so the last prompt position carries the first answer token and the last
    # position, which would predict what follows <eos>, carries nothing.
    labels = ([IGNORE] * (len(prompt) - 1) + target + [IGNORE])[:max_length] if answer else [IGNORE] * len(ids)
    return ids, labels, load_image(os.path.join(root, picture), size) if picture else None


def collate(examples, pad_id, size, left=False):
    """Stack the results of encode_example: padded on the right for training, on the left for generation. -> Batch"""
    L = max(len(ids) for ids, _, _ in examples)
    ids, mask, labels = np.full((len(examples), L), pad_id), np.zeros((len(examples), L), int), np.full((len(examples), L), IGNORE)
    for b, (i, l, _) in enumerate(examples):
        where = slice(L - len(i), L) if left else slice(0, len(i))
        ids[b, where], mask[b, where], labels[b, where] = i, 1, l
    pictures = [p for _, _, p in examples if p is not None]
    pixels = torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), pixels, torch.from_numpy(labels))


def make_batch(vlm, tokenizer, rows, suffix="", root="", max_length=1024, answer=True):
    """Rows -> Batch, with P and S read off the model's own vision config. answer=False: prompts only, padded left."""
    size = vlm.vision_model.config.image_size
    examples = [encode_example(tokenizer, row, suffix, image_tokens=vlm.image_tokens, root=root, max_length=max_length,
                               size=size, answer=answer) for row in rows]
    return collate(examples, tokenizer.pad_token_id, size, left=not answer)


def read_rows(path, fields=("image_url", "instruction", "output")):
    """A JSONL file as a list of dicts. Exits with file:line and what is wrong when a row cannot be used."""
    if not os.path.exists(path):
        sys.exit(f"{path} does not exist: run `python data_gen.py` first or name the right --data folder")
    rows, root = [], os.path.dirname(path)
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                for field in fields:
                    if not isinstance(row.get(field), str):
                        raise ValueError(f"field {field!r} is missing or not a string")
                    if field.startswith("image_url") and row[field] and not os.path.isfile(os.path.join(root, row[field])):
                        raise ValueError(f"row {row.get('id', '?')}: picture {os.path.join(root, row[field])} does not exist")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                sys.exit(f"{path}:{number}: {error}")
            rows.append(row)
    if not rows:
        sys.exit(f"{path} has no rows")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Folders: config.json, model.safetensors and tokenizer files, as Hugging Face lays them out
# ----------------------------------------------------------------------------------------------------------------------
def build(config):
    """A VLM with random weights from a config dict: {"vision_config", "text_config", "image_token_id"}."""
    vision = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"]))
    llm = Qwen2ForCausalLM(Qwen2Config(**config["text_config"]))
    return VLM(vision, Projector(vision.config.hidden_size, llm.config.hidden_size), llm, config["image_token_id"])


def save_vlm(folder, vlm, tokenizer, dtype=torch.float32):
    """Write config, weights (a tied lm_head once) and tokenizer."""
    os.makedirs(folder, exist_ok=True)
    config = {"model_type": "math_puma_vlm", "image_token_id": vlm.image_token_id,
              "vision_config": vlm.vision_model.config.to_diff_dict(), "text_config": vlm.language_model.config.to_diff_dict()}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    tied = vlm.language_model.config.tie_word_embeddings
    tensors = {k: v.to(dtype).contiguous() for k, v in vlm.state_dict().items() if not (tied and k == "language_model.lm_head.weight")}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def load_vlm(folder, device="cpu"):
    """Read a folder written by save_vlm, or the newest complete checkpoint inside it. -> (VLM in float32, tokenizer)

    Exits, and never falls back to random weights, when a tensor is missing, left over or of another shape.
    """
    folder = resolve(folder)
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    transformers_logging.disable_progress_bar()  # one bar per rank otherwise
    vlm, tensors = build(config), load_file(os.path.join(folder, "model.safetensors"))
    if vlm.language_model.config.tie_word_embeddings:
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    own = vlm.state_dict()
    for name in own.keys() | tensors.keys():
        have, want = (tuple(d[name].shape) if name in d else "nothing" for d in (tensors, own))
        if have != want:
            sys.exit(f"{folder}/model.safetensors: {name} is {have} in the file and {want} in config.json's model")
    vlm.load_state_dict(tensors)
    vlm.source_sha256 = sha256(os.path.join(folder, "model.safetensors"))  # a run writes down what it started from
    return vlm.float().to(device), AutoTokenizer.from_pretrained(folder, config=vlm.language_model.config)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: out/step-N/ is complete or absent.  Everything is written into a temporary folder, manifest.json (sizes and
# SHA-256; safetensors itself has no checksum) last, then the folder is renamed.  No manifest, no checkpoint.
# ----------------------------------------------------------------------------------------------------------------------
def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def intact(folder):
    """True when the folder has a manifest and every file in it has the size and hash written there."""
    try:
        with open(os.path.join(folder, "manifest.json")) as f:
            manifest = json.load(f)
        return all(os.path.getsize(os.path.join(folder, name)) == entry["size"] and
                   sha256(os.path.join(folder, name)) == entry["sha256"] for name, entry in manifest.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def newest_checkpoint(out):
    """The newest intact out/step-N, or None. Says so when a damaged one is passed over."""
    steps = [int(m[1]) for m in map(re.compile(r"step-(\d+)").fullmatch, os.listdir(out)) if m] if os.path.isdir(out) else []
    for step in sorted(steps, reverse=True):
        folder = os.path.join(out, f"step-{step}")
        if intact(folder):
            return folder
        print(f"warning: {folder} is damaged (its manifest does not hold), trying an older one", file=sys.stderr)
    return None


def resolve(folder):
    """A model folder, given that or a run folder with step-N checkpoints in it."""
    if os.path.exists(os.path.join(folder, "config.json")):
        if os.path.exists(os.path.join(folder, "manifest.json")) and not intact(folder):
            sys.exit(f"{folder} is damaged: its files do not match manifest.json; use another step or train again")
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        sys.exit(f"{folder} holds no model: no config.json and no complete step-N checkpoint in it")
    return newest


def save_checkpoint(out, step, vlm, tokenizer, optimizer, state, keep=2):
    """Write out/step-N. state: a dict for trainer_state.json. AdamW's tensors go through safetensors bit for bit."""
    final, part = os.path.join(out, f"step-{step}"), os.path.join(out, f"part-{step}")
    shutil.rmtree(part, ignore_errors=True)
    save_vlm(part, vlm, tokenizer)
    names = {id(p): n for n, p in vlm.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    moments["rng"] = torch.get_rng_state()  # the loops draw nothing at random; kept for forks that add dropout
    save_file(moments, os.path.join(part, "optimizer.safetensors"))
    with open(os.path.join(part, "trainer_state.json"), "w") as f:
        json.dump({"step": step, "torch": torch.__version__, **state}, f, indent=1)
    manifest = {n: {"size": os.path.getsize(os.path.join(part, n)), "sha256": sha256(os.path.join(part, n))}
                for n in sorted(os.listdir(part))}
    with open(os.path.join(part, "manifest.json"), "w") as f:
        json.dump(manifest, f, indent=1)
    for name in [*manifest, "manifest.json", "."]:  # on disk before the rename makes it visible
        fd = os.open(os.path.join(part, name), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there: an intact one would have been resumed
    os.rename(part, final)
    for old in sorted((int(n[5:]) for n in os.listdir(out) if re.fullmatch(r"step-\d+", n)), reverse=True)[keep:]:
        shutil.rmtree(os.path.join(out, f"step-{old}"))


def load_checkpoint(folder, vlm, optimizer):
    """Put a checkpoint's weights and optimizer state into objects of the same shape. -> trainer_state.json as a dict"""
    with open(os.path.join(folder, "trainer_state.json")) as f:
        state = json.load(f)
    saved, _ = load_vlm(folder)
    vlm.load_state_dict(saved.state_dict())
    parameters = dict(vlm.named_parameters())
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as f:
        torch.set_rng_state(f.get_tensor("rng"))
        for key in f.keys():
            if key != "rng":
                name, field = key.rsplit("/", 1)
                p, value = parameters[name], f.get_tensor(key)
                optimizer.state[p][field] = value if field == "step" else value.to(p.device)
    return state
