"""The model, and the one place where text, pictures and labels become tensors. The stages and eval.py use it.

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
import sys
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
from safetensors.torch import save_file
from transformers import (DeepseekVLHybridConfig, DeepseekVLHybridModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig,
                          SiglipVisionModel)

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
    """DeepSeek-VL's two encoders, SAM on the picture and SigLIP on a smaller copy, in transformers' classes."""

    def __init__(self, config):  # {"low": SigLIP's, "high": SAM's, "pixels": (mean, std) of high}
        super().__init__()
        unused = {"model_type": "llama", "hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 0}
        self.both = DeepseekVLHybridModel(DeepseekVLHybridConfig(
            vision_config=config["low"], high_res_vision_config=config["high"], text_config=unused))
        del self.both.aligner, self.both.language_model
        self.config, self.pixels = self.both.config.vision_config, config["pixels"]

    def forward(self, pixel_values):  # (I, 3, S, S) -> last_hidden_state (I, P, W): SAM's half, SigLIP's half
        mean, std = (pixel_values.new_tensor(x)[:, None, None] for x in self.pixels)
        low = F.interpolate(pixel_values, self.config.image_size, mode="bilinear", antialias=True)
        features = (self.both.get_high_res_image_features((pixel_values / 2 + 0.5 - mean) / std),
                    self.both.get_low_res_image_features(low))
        return SimpleNamespace(last_hidden_state=torch.cat([f.last_hidden_state for f in features], -1))


class HybridProjector(nn.Module):
    """The released DeepSeek system's projector: half of the hidden width for each encoder."""

    def __init__(self, width, hidden):
        super().__init__()
        self.high_up_proj, self.low_up_proj = (nn.Linear(width // 2, hidden // 2) for _ in range(2))
        self.down = nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, W) -> (I, P, H)
        high, low = x.chunk(2, -1)
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
        self.unused = {}  # tensors of a checkpoint that nothing reads (layers above feature_layer): for save_vlm

    @property
    def image_tokens(self):
        """P, from the config: the only home of this number."""
        vision = self.vision_model.config
        return (vision.image_size // vision.patch_size) ** 2 - self.config["drop_first"]

    @property
    def image_size(self):
        """S, from the config too."""
        return self.config["image_size"] or self.vision_model.config.image_size

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
            learns = self.training and next(self.projector.parameters()).requires_grad
            if not (learns and torch.is_grad_enabled()):
                return x
            # This process has no picture now, another one may: DDP waits on every process for a gradient of
            # every trainable parameter.  So a blank picture goes through, and none of its features is used.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, self.config["drop_first"]:]
        features = self.projector(seen)  # (I, P, W) -> (I, P, H)
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


def load_image(path, size, pad_color=None):
    """A picture file as (3, size, size) float32 in [-1, 1]: SigLIP's normalisation, mean = std = .5.

    Resized without keeping the aspect, as in the released Qwen2 code; with a pad_color (R, G, B) keeping it,
    on a square of that color, as in the released DeepSeek code.
    """
    with Image.open(path) as image:
        if image.mode == "I;16":  # Pillow clips 16 bits to 8; this keeps the upper ones
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode not in ("L", "RGB"):  # lay transparency on white: convert("RGB") alone turns it black
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if pad_color:
            image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, tuple(pad_color))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def encode_example(tokenizer, row, suffix="", *, image_tokens, root="", max_length=1024, size=None,
                   answer=True, after_image="", pad_color=None):
    """One form of a data row as (input_ids, labels, picture or None).

    row       dict with image_url, instruction, output, each with suffix "" or "_2"; image_url "" = text only
    size      picture side S; root: the folder image_url starts from
    answer    False: the prompt only, for generation
    after_image, pad_color  see build
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
    words = after_image + text if picture else text
    prompt = template(before) + images + plain(words) + template(after)
    target = plain(row[f"output{suffix}"]) + [tokenizer.eos_token_id] if answer else []
    if len(prompt) + bool(target) > max_length:
        raise ValueError(f"row {row.get('id', '?')}: its prompt has {len(prompt)} tokens, "
                         f"--max_length is {max_length}")
    # The shift: position t predicts token t + 1.  So the last prompt position has the first answer token as
    # its label, and the last position, which would predict what follows <eos>, has none.
    labels = [IGNORE] * (len(prompt) - 1) + target + [IGNORE] if answer else [IGNORE] * len(prompt)
    pixels = load_image(os.path.join(root, picture), size, pad_color) if picture else None
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
    """Rows -> Batch, P and S as in the config. answer=False: prompts only, padded on the left."""
    examples = [encode_example(
        tokenizer, row, suffix, image_tokens=vlm.image_tokens, root=root, max_length=max_length,
        size=vlm.image_size, answer=answer, after_image=vlm.config["after_image"],
        pad_color=vlm.config["pad_color"]) for row in rows]
    return collate(examples, tokenizer.pad_token_id, vlm.image_size, left=not answer)


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
# Model folders: ours (config.json, model.safetensors, tokenizer files), the released ones, and the language
# models and vision towers of others as Hugging Face lays them out.  No pickle is opened: loading one runs
# code.  No weight stays random but those of a new projector.
# ------------------------------------------------------------------------------------------------------------
LLMS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
PROJECTORS = {"mlp": Projector, "gated": GatedProjector, "hybrid": HybridProjector}
TIED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"  # one matrix, two names
QWEN_PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}"  # released
               "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEEPSEEK_PROMPT = ("{{ bos_token }}%s{%% for m in messages %%}{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}"
                   "{{ m.content }}\n\n{%% endfor %%}{%% if add_generation_prompt %%}Assistant:{%% endif %%}")
DEEPSEEK_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual "
                   "content that the user provides, and assist the user with a variety of tasks using natural "
                   "language.\n\n")  # released
HYBRID = {  # what the names in the released DeepSeek config.json stand for
    "sam_b_downsample": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "siglip_large_patch16_384": {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 16,
                                 "num_hidden_layers": 24, "num_attention_heads": 16}}
HYBRID_NAMES = [line.split() for line in r"""
    vision_tower_high.vision_tower.hd_alpha_downsamples   both.high_res_vision_alpha
    vision_tower_high.vision_tower.neck_hd                both.high_res_vision_neck
    vision_tower_high.vision_tower.downsamples.0          both.high_res_vision_proj.conv1
    vision_tower_high.vision_tower.downsamples.1          both.high_res_vision_proj.conv2
    vision_tower_high.vision_tower                        both.high_res_vision_model.vision_encoder
    vision_tower_low.vision_tower.pos_embed               both.vision_model.embeddings.position_embedding.weight
    vision_tower_low.vision_tower.patch_embed.proj        both.vision_model.embeddings.patch_embedding
    vision_tower_low.vision_tower.norm                    both.vision_model.post_layernorm
    vision_tower_low.vision_tower.blocks.(\d+).attn       both.vision_model.encoder.layers.\1.self_attn
    vision_tower_low.vision_tower.blocks                  both.vision_model.encoder.layers
    self_attn.proj      self_attn.out_proj
    patch_embed.proj    patch_embed.projection
    blocks              layers
    neck.0              neck.conv1
    neck.1              neck.layer_norm1
    neck.2              neck.conv2
    neck.3              neck.layer_norm2
    \.norm(\d)          .layer_norm\1
    aligner.layers.1    projector.down
    aligner             projector""".strip().split("\n")]  # the released DeepSeek tensors' names -> ours, in this order


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
            feature_layer  -1: the last one and the post-layernorm; else which of Hugging Face's hidden_states,
                           without that norm (released Qwen2 systems: -2).  Layers above it are not built
            drop_first     how many features to leave out at the start (released Qwen2 systems: 1)
            after_image    words between picture and question (released Qwen2 systems and new models: "\\n")
            image_size     side S of the pictures, where it is not the vision config's
            pad_color      see load_image
    """
    config = {"model_type": "math_puma_vlm", "projector": "mlp", "feature_layer": -1, "drop_first": 0,
              "after_image": "", "image_size": None, "pad_color": None} | config
    text, layer = config["text_config"], config["feature_layer"]
    config_class, llm_class = LLMS[text.get("model_type", "qwen2")]
    llm = llm_class(config_class(**text))
    if config["projector"] == "hybrid":
        vision = HybridVision(config["vision_config"])
    else:
        c = SiglipVisionConfig(**config["vision_config"] | {"vision_use_head": False})
        c.num_hidden_layers = c.num_hidden_layers if layer == -1 else layer % (c.num_hidden_layers + 1)
        vision = SiglipVisionModel(c)
        vision.post_layernorm = vision.post_layernorm if layer == -1 else nn.Identity()
    width = vision.config.hidden_size * (1 + (config["projector"] == "hybrid"))
    projector = PROJECTORS[config["projector"]](width, llm.config.hidden_size)
    return VLM(vision, projector, llm, config)


def save_vlm(folder, vlm, tokenizer, dtype=None, released=False):
    """Write config, weights (a tied lm_head once) and tokenizer into folder.

    dtype     of the written weights; None: as they are, a frozen bfloat16 part stays bfloat16
    released  in the layout of the released Qwen2 checkpoints, for which the model must have their parts
    """
    os.makedirs(folder, exist_ok=True)
    config, llm, rename = vlm.config, vlm.language_model.config, lambda name: name
    if released:
        if config["projector"] != "gated" or config["feature_layer"] == -1:
            sys.exit("the released layout has no place for this projector or feature layer: train a model "
                     "that began with --projector gated, or a released one")
        rename = lambda name: re.sub("^vision_model", "vision_model.vision_model",
                                     re.sub("^projector", "aligner", name))  # as transformers 4 has them
        head = any(name.startswith("vision_model.head") for name in vlm.unused)
        config = {"model_type": "qwen2vlm", "architectures": ["Qwen2vlmForConditionalGeneration"],
                  "image_token_index": vlm.image_token_id, "pad_token_id": tokenizer.pad_token_id,
                  "vision_feature_layer": config["feature_layer"], "projector_hidden_act": "gelu",
                  "vision_feature_select_strategy": "default" if config["drop_first"] else "full",
                  "vision_config": config["vision_config"] | {"vision_use_head": head},
                  "text_config": {"rope_theta": llm.rope_parameters["rope_theta"]} | config["text_config"]}
    write_json(config, folder, "config.json")
    skip = TIED[0] if llm.tie_word_embeddings else None
    tensors = {rename(name): t.to(dtype or t.dtype).contiguous()
               for name, t in (vlm.state_dict() | vlm.unused).items() if name != skip}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def tensors_in(folder):
    """{tensor name: file} of model.safetensors, or of the shards that its index names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, names[0])):
        if not os.path.exists(index):
            pickled = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))]
            sys.exit(f"{folder} has no model.safetensors" + (
                f", only {pickled[0]}: pickle is not opened here, it can run code; make safetensors of it "
                "with from_pretrained and save_pretrained, on a machine that may" if pickled else ""))
        names = sorted(set(read_json(index)["weight_map"].values()))
    found = {}
    for file in (os.path.join(folder, name) for name in names):
        try:
            with safe_open(file, "pt") as f:
                found |= dict.fromkeys(f.keys(), file)
        except (OSError, SafetensorError) as error:  # absent; cut short or not safetensors
            sys.exit(f"{file}: {error}: fetch this file again")
    return found


def locate(folder):
    """A model folder, ours or released, in our terms. -> (config, {name: (file, its name there, change)})

    change turns the tensor in the file into ours: a slice, a reshape, most often nothing.
    """
    config, files = read_json(folder, "config.json"), tensors_in(folder)
    kind, rename, same = config.get("model_type"), lambda name: name, lambda t: t
    if kind == "qwen2vlm":
        if config.get("projector_hidden_act", "gelu") != "gelu":
            sys.exit(f"{folder}: projector_hidden_act is {config['projector_hidden_act']}, not gelu")
        layer = config.get("vision_feature_layer", -2)
        config = {"projector": "gated", "drop_first": 1, "after_image": "\n", "prompt": QWEN_PROMPT,
                  "feature_layer": layer if layer != -1 else config["vision_config"]["num_hidden_layers"],
                  "image_token_id": config["image_token_index"], "vision_config": config["vision_config"],
                  "text_config": {"model_type": "llama"} | config["text_config"],  # llama: its default
                  } | ({"drop_first": 0} if config.get("vision_feature_select_strategy") == "full" else {})
        rename = lambda name: re.sub(r"^vision_model\.vision_model", "vision_model",
                                     re.sub("^aligner", "projector", name))
    elif kind == "multi_modality":
        high, low = (config["vision_config"]["params"][f"{side}_res_cfg"] for side in ("high", "low"))
        sam, siglip = ({"image_size": c["image_size"]} | HYBRID[c["model_name"]] for c in (high, low))
        siglip["num_hidden_layers"] += 1 + low.get("select_layer", -2)
        config = {"projector": "hybrid", "image_size": high["image_size"], "prompt": DEEPSEEK_PROMPT % DEEPSEEK_SYSTEM,
                  "pad_color": [122, 116, 104],  # 255 x CLIP's mean, the default of its image processor
                  "text_config": {"model_type": "llama"} | config["language_config"],
                  "vision_config": {"high": {"model_type": "sam_vision_model"} | sam,
                                    "low": {"model_type": "siglip_vision_model", "hidden_act": "gelu",
                                            "vision_use_head": False} | siglip,
                                    "pixels": [high.get(k) or [0.5] * 3 for k in ("pixel_mean", "pixel_std")]}}
        files = {name: file for name, file in files.items()  # in the state dict, in no forward
                 if not re.search("attn_pool|high_layer_norm|low_layer_norm", name)}

        def rename(name):
            for old, new in HYBRID_NAMES:
                name = re.sub(old, new, name)
            return name
    elif kind != "math_puma_vlm":
        sys.exit(f"{folder} holds a {kind} model, not one of ours or of the released ones (qwen2vlm, "
                 "multi_modality); a language model goes to --llm, a SigLIP tower to --vision")
    sources = {rename(name): (file, name, same) for name, file in files.items()}
    for name, (file, key, _) in list(sources.items()):
        if "self_attn.qkv" in name:  # one product in the released tower, three in transformers'
            del sources[name]
            for k, letter in enumerate("qkv"):
                sources[name.replace("qkv", f"{letter}_proj")] = file, key, lambda t, k=k: t.chunk(3)[k]
        elif kind == "multi_modality" and "position_embedding" in name:
            sources[name] = file, key, lambda t: t[0]
    return config, sources


@torch.no_grad()
def fill(vlm, sources, new="-"):
    """Copy every tensor of the model from its file, one at a time: there is no second model in memory.

    Exits when one is missing, left over or of another shape; those whose names begin with new are left alone.
    """
    own, above = vlm.state_dict(), r"vision_model\.(encoder\.layers\.\d+|post_layernorm|head)\."
    skip = {name for name in own if name.startswith(new)}
    skip |= {TIED[0]} if vlm.language_model.config.tie_word_embeddings else set()
    any_file = next(iter(sources.values()))[0]

    def misfit(name, file, there, here):
        sys.exit(f"{file}: {name} is {there} in the file, {here} in the model that config.json describes")
    for name in sorted(own.keys() - sources.keys() - skip):
        misfit(name, os.path.dirname(any_file), "absent", tuple(own[name].shape))
    for file in sorted({file for file, _, _ in sources.values()}):
        with safe_open(file, "pt") as f:
            for name, (_, key, change) in ((n, s) for n, s in sources.items() if s[0] == file and n not in skip):
                tensor = change(f.get_tensor(key))
                if name not in own and re.match(above, name):
                    vlm.unused[name] = tensor
                elif name not in own or tensor.shape != own[name].shape:
                    misfit(name, file, tuple(tensor.shape), tuple(own[name].shape) if name in own else "absent")
                else:
                    own[name].copy_(tensor)


def place(config, sources, tokenizer, device, trained, frozen, new="-"):
    """The VLM of locate's results on a device: made without memory, then filled. For trained see load_vlm."""
    highest = max(tokenizer.get_vocab().values())
    with torch.device("meta"):  # random numbers for 7 billion weights would take minutes and be overwritten
        vlm = build(config)
    rows = vlm.language_model.config.vocab_size
    if highest >= rows:
        sys.exit(f"the tokenizer has tokens up to {highest}, the embedding of the language model {rows} rows: "
                 "they do not belong together")
    device = torch.device(device)
    frozen = frozen or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name, child in vlm.named_children():
        child.to(torch.float32 if name in trained else frozen)
    vlm.to_empty(device=device)
    llm, known = vlm.language_model, {"inv_freq", "original_inv_freq", "position_ids"}
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.get_input_embeddings().weight  # to_empty has made two of it
    fill(vlm, sources, new)
    llm.model.rotary_emb = type(llm.model.rotary_emb)(llm.config).to(device)  # buffers are in no file
    for module in vlm.modules():
        assert module._non_persistent_buffers_set <= known, "a buffer that nobody fills"
        if "position_ids" in module._non_persistent_buffers_set:
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    digests = map(sha256, sorted({file for file, _, _ in sources.values()}))
    vlm.source_sha256 = hashlib.sha256("".join(digests).encode()).hexdigest()  # a run notes what it began with
    return vlm


def load_tokenizer(folder, prompt=None):
    """The tokenizer of a model folder with IMAGE_TOKEN, a pad and a chat template (prompt, when given)."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        sys.exit(f"{folder} has no tokenizer.json; AutoTokenizer's save_pretrained writes one")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # not AutoTokenizer: it rebuilds some classes
    if tokenizer.eos_token is None:
        sys.exit(f"{folder}: its tokenizer has no eos_token; name one in tokenizer_config.json")
    if tokenizer.pad_token is None:  # pad == eos does no harm: labels and masks go by position, not by token
        tokenizer.pad_token = tokenizer.eos_token
    if prompt is None and not tokenizer.chat_template:
        print(f"{folder}: no chat template, so prompts are 'User: ...\\n\\nAssistant:'", file=sys.stderr)
        prompt = DEEPSEEK_PROMPT % ""
    if prompt:
        tokenizer.chat_template = prompt
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def load_vlm(folder, device="cpu", trained=(), frozen=None):
    """Read a model folder, ours or a released one, or the newest complete checkpoint in it. -> (VLM, tokenizer)

    trained  which of vision_model, projector and language_model are going to learn: they become float32
    frozen   dtype of the others; default bfloat16 on a GPU, float32 on a CPU
    Exits when a tensor is missing, left over or of another shape: nothing stays at a random value.
    """
    folder = resolve(folder)
    config, sources = locate(folder)
    tokenizer = load_tokenizer(folder, config.pop("prompt", None))
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if config.setdefault("image_token_id", image) != image:
        sys.exit(f"{folder}: {IMAGE_TOKEN} is {image} in the tokenizer, {config['image_token_id']} in config.json")
    return place(config, sources, tokenizer, device, trained, frozen), tokenizer


def local(name, flag):
    """The model folder of that name, or of that Hugging Face id, which is downloaded when it looks like one."""
    if not os.path.isdir(name):
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            sys.exit(f"{flag} {name}: no such folder")
        try:
            name = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"], etag_timeout=5)
        except OSError as error:  # all of huggingface_hub's: no network, no such model, no permission
            sys.exit(f"{flag} {name}: no such folder, and not downloaded either ({type(error).__name__}). Without "
                     f"a network: `hf download {name} --local-dir DIR` elsewhere, then {flag} DIR")
    if not os.path.exists(os.path.join(name, "config.json")):
        sys.exit(f"{flag} {name} has no config.json: not a model in Hugging Face's layout")
    return name


def join(llm, vision, projector="mlp", device="cpu", trained=(), frozen=None):
    """A VLM of a causal LM (Qwen2 or Llama), a SigLIP tower and a new projector. -> (VLM, tokenizer)

    llm, vision  folders in Hugging Face's layout or ids; a SiglipModel or its vision tower alone
    projector    "gated" also takes the features as the released Qwen2 systems do
    """
    llm, vision = local(llm, "--llm"), local(vision, "--vision")
    text, sight = read_json(llm, "config.json"), read_json(vision, "config.json")
    if text.get("model_type") not in LLMS:
        sys.exit(f"--llm {llm}: a {text.get('model_type')} model; can be used: {', '.join(LLMS)}")
    if sight.get("model_type") not in ("siglip", "siglip_vision_model"):
        sys.exit(f"--vision {vision}: a {sight.get('model_type')} model; can be used: siglip, siglip_vision_model")
    tokenizer, same = load_tokenizer(llm), lambda t: t
    sources = {f"language_model.{name}": (file, name, same) for name, file in tensors_in(llm).items()
               if not name.endswith("rotary_emb.inv_freq")}
    for name, file in tensors_in(vision).items():  # with or without a prefix, with or without a text tower
        if inner := re.fullmatch(r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm)\..*)", name):
            sources[f"vision_model.{inner[1]}"] = file, name, same
    image, rows = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), text["vocab_size"]
    if image == rows:  # no padded row is left for it: one more, the mean of the others
        text["vocab_size"] += 1
        for name in sources.keys() & set(TIED):
            sources[name] = *sources[name][:2], lambda t: torch.cat([t, t.float().mean(0, True).to(t.dtype)])
    config = {"vision_config": sight.get("vision_config", sight), "text_config": text, "image_token_id": image,
              "projector": projector, "after_image": "\n"}
    config |= {"feature_layer": -2, "drop_first": 1} if projector == "gated" else {}
    vlm = place(config, sources, tokenizer, device, trained, frozen, "projector.")
    width = next(p.shape[1] for p in vlm.projector.parameters())
    vlm.projector.load_state_dict(PROJECTORS[projector](width, len(vlm.lm_head[0])).state_dict())
    return vlm, tokenizer


def backbone_flags(add):
    """The flags by which a stage starts from other backbones; add: a parser's add_argument."""
    add("--llm", help="Qwen2 or Llama causal LM, a folder or Hugging Face id; with --vision, instead of --init")
    add("--vision", help="SigLIP model or its vision tower, a folder or Hugging Face id")
    add("--projector", default="mlp", choices=["mlp", "gated"], help="new one between them (gated: released)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile every layer")


def start_vlm(args, device, trained):
    """The model a stage trains: --init, or --llm and --vision with a new projector. -> (VLM, tokenizer)"""
    if args.llm:
        torch.manual_seed(args.seed)  # of the projector
        vlm, tokenizer = join(args.llm, args.vision, args.projector, device, trained)
    else:
        vlm, tokenizer = load_vlm(args.init, device, trained)
    if args.compile:  # layer by layer: a whole model takes minutes, and in place: no name changes
        for name, module in vlm.named_modules():
            if re.search(r"layers\.\d+$", name):
                module.compile()
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
    shutil.rmtree(part, ignore_errors=True)
    save_vlm(part, vlm, tokenizer)
    names = {id(p): name for name, p in vlm.named_parameters()}
    tensors = {f"{names[id(p)]}/{k}": v for p, moments in optimizer.state.items() for k, v in moments.items()}
    tensors["rng"] = torch.get_rng_state()  # nothing here draws at random; for a fork that adds dropout
    save_file(tensors, os.path.join(part, "optimizer.safetensors"))
    write_json({"step": step, "torch": torch.__version__, **state}, part, "trainer_state.json")
    files = {name: os.path.join(part, name) for name in sorted(os.listdir(part))}
    manifest = {name: {"size": os.path.getsize(path), "sha256": sha256(path)} for name, path in files.items()}
    write_json(manifest, part, "manifest.json")
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
    state = read_json(folder, "trainer_state.json")
    fill(vlm, locate(folder)[1])
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
    free = ("out", "resume", "log_every", "save_every", "micro_batch", "evaluate", "show", "compile")  # may differ
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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a model in a layout that others can load.")
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
