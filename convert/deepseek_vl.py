"""The released DeepSeek-VL hybrid: two vision encoders that look at the same picture.

    picture (3, 1024, 1024) -> SAM-B ------------------------> (576, 1024) -+
            smaller (3, 384, 384) -> SigLIP-L/16 ------------> (576, 1024) -+-> projector -> LLM

Math-PUMA_DeepSeek-Math-VL-7B (model_type multi_modality) becomes a model folder with
`python convert/released.py puma-deepseek --out DIR`, which calls `split`.  model.py calls `load`
for such a folder: there vision/ holds both encoders.

Letters as in model.py: I pictures, S side of a picture, P image tokens, W width of each encoder,
H hidden width of the language model.
"""
import os
import re
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import DeepseekVLHybridConfig, DeepseekVLHybridModel
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import pretrained, read_json  # noqa: E402


# --------------------------------------------------------------------------------------------------
# The network

class HybridVision(DeepseekVLHybridModel):
    """transformers' two encoders, without the projector and the language model that come with them.

    config  DeepseekVLHybridConfig with two entries more: pixel_mean and pixel_std, what SAM's
            colors are normalised with
    """

    def __init__(self, config):
        super().__init__(config)
        del self.aligner  # ours is HybridProjector
        del self.language_model  # lies in llm/

        # model.py counts image tokens with these: the patches of the small picture
        config.image_size = config.vision_config.image_size
        config.patch_size = config.vision_config.patch_size

    def forward(self, pixel_values):  # (I, 3, S, S) in [-1, 1] -> (I, P, 2 W), SAM's half first
        mean = pixel_values.new_tensor(self.config.pixel_mean)[:, None, None]  # (3, 1, 1)
        std = pixel_values.new_tensor(self.config.pixel_std)[:, None, None]
        large = ((pixel_values + 1) / 2 - mean) / std
        large = large.to(self.high_res_vision_alpha.dtype)
        high = self.get_high_res_image_features(large).last_hidden_state  # (I, P, W)

        side = self.config.image_size
        small = F.interpolate(pixel_values, (side, side), mode="bilinear", antialias=True)
        low = self.get_low_res_image_features(small).last_hidden_state  # (I, P, W)
        return BaseModelOutput(last_hidden_state=torch.cat([high, low], dim=-1))


class HybridProjector(nn.Module):
    """One linear layer for each encoder gives half of the hidden width."""

    def __init__(self, width, hidden):
        super().__init__()
        self.high_up_proj = nn.Linear(width, hidden // 2)
        self.low_up_proj = nn.Linear(width, hidden // 2)
        self.down = nn.Linear(hidden, hidden)

    def forward(self, x):  # (I, P, 2 W) -> (I, P, H)
        high, low = x.chunk(2, dim=-1)  # (I, P, W) each
        x = torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1)  # (I, P, H)
        return self.down(F.gelu(x))


def load(folder, dtype, hidden_size):
    """The encoders in folder/vision and a projector that is still to be filled."""
    vision = pretrained(HybridVision, os.path.join(folder, "vision"), dtype)
    return vision, HybridProjector(vision.config.vision_config.hidden_size, hidden_size)


# --------------------------------------------------------------------------------------------------
# From the released layout.  read_released and sort_tensors serve the Qwen2 layout as well.

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)
TEMPLATE = (
    "{{ bos_token }}" + SYSTEM + "{% for m in messages %}"
    "{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PAD_COLOR = [122, 116, 104]  # 255 times CLIP's mean, as in DeepSeek-VL's image processor
SIZES = {  # the released config.json only names them
    "sam_b_downsample": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "siglip_large_patch16_384": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
    },
}

# Starts of names, without the tower's own "vision_model.vision_tower_low.vision_tower.".  N is the
# number of a layer.
SIGLIP_NAMES = {
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "blocks.N.norm1.": "vision_model.encoder.layers.N.layer_norm1.",
    "blocks.N.attn.qkv.": "vision_model.encoder.layers.N.self_attn.qkv.",  # cut in three, see split
    "blocks.N.attn.proj.": "vision_model.encoder.layers.N.self_attn.out_proj.",
    "blocks.N.norm2.": "vision_model.encoder.layers.N.layer_norm2.",
    "blocks.N.mlp.": "vision_model.encoder.layers.N.mlp.",
    "norm.": "vision_model.post_layernorm.",
}
SAM_NAMES = {
    "pos_embed": "high_res_vision_model.vision_encoder.pos_embed",
    "patch_embed.proj.": "high_res_vision_model.vision_encoder.patch_embed.projection.",
    "blocks.N.norm1.": "high_res_vision_model.vision_encoder.layers.N.layer_norm1.",
    "blocks.N.attn.": "high_res_vision_model.vision_encoder.layers.N.attn.",
    "blocks.N.norm2.": "high_res_vision_model.vision_encoder.layers.N.layer_norm2.",
    "blocks.N.mlp.": "high_res_vision_model.vision_encoder.layers.N.mlp.",
    # the neck after the last layer
    "neck.0.": "high_res_vision_model.vision_encoder.neck.conv1.",
    "neck.1.": "high_res_vision_model.vision_encoder.neck.layer_norm1.",
    "neck.2.": "high_res_vision_model.vision_encoder.neck.conv2.",
    "neck.3.": "high_res_vision_model.vision_encoder.neck.layer_norm2.",
    # another after the first layer with global attention, added with a learned weight
    "neck_hd.0.": "high_res_vision_neck.conv1.",
    "neck_hd.1.": "high_res_vision_neck.layer_norm1.",
    "neck_hd.2.": "high_res_vision_neck.conv2.",
    "neck_hd.3.": "high_res_vision_neck.layer_norm2.",
    "hd_alpha_downsamples": "high_res_vision_alpha",
    # from SAM's 64 x 64 places to SigLIP's 24 x 24
    "downsamples.0.": "high_res_vision_proj.conv1.",
    "downsamples.1.": "high_res_vision_proj.conv2.",
}
PROJECTOR_NAMES = {
    "high_up_proj.": "high_up_proj.",
    "low_up_proj.": "low_up_proj.",
    "layers.1.": "down.",
}
PARTS = [  # (start of a released name, part of ours, table for the rest of the name)
    ("vision_model.vision_tower_low.vision_tower.", "vision", SIGLIP_NAMES),
    ("vision_model.vision_tower_high.vision_tower.", "vision", SAM_NAMES),
    ("aligner.", "projector", PROJECTOR_NAMES),
    ("language_model.", "llm", {"": ""}),
]
NEVER_READ = (  # are in the files, but in no forward
    "vision_model.vision_tower_low.vision_tower.attn_pool.",
    "vision_model.low_layer_norm.",
    "vision_model.high_layer_norm.",
)


def read_released(folder):
    """-> what config.json says, {name: tensor} of all .safetensors files"""
    is_folder = os.path.isdir(folder)
    files = sorted(os.listdir(folder)) if is_folder else []
    shards = [file for file in files if file.endswith(".safetensors")]
    if not shards or "config.json" not in files:
        sys.exit(f"{folder} is no released checkpoint: config.json and .safetensors files are read")
    tensors = {}
    for file in shards:
        path = os.path.join(folder, file)
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            sys.exit(f"{path}: {error}; fetch this file again")
    return read_json(folder, "config.json"), tensors


def our_name(name, parts):
    """(part, name in it) of a released name; None, None where no table has it. parts: as PARTS"""
    for start, part, table in parts:
        if name.startswith(start):
            rest = name.removeprefix(start)
            layer = re.search(r"blocks\.(\d+)\.", rest)
            if layer:
                rest = rest.replace(layer[0], "blocks.N.")
            for old, new in table.items():
                if rest.startswith(old):
                    renamed = new + rest.removeprefix(old)
                    if layer:
                        renamed = renamed.replace(".N.", f".{layer[1]}.")
                    return part, renamed
    return None, None


def sort_tensors(folder, tensors, parts, never_read):
    """{part: {our name: tensor}}. parts: as PARTS; folder: for the message."""
    found = {"vision": {}, "projector": {}, "llm": {}}
    for name, tensor in tensors.items():
        if name.startswith(never_read):
            continue
        part, renamed = our_name(name, parts)
        if part is None:
            sys.exit(f"{folder}: left over {name}: no part of the model has it")
        found[part][renamed] = tensor
    return found


def split(folder, config, tensors):
    """-> entries of vlm.json, chat template, configs of vision and llm, {part: {name: tensor}}

    folder, config, tensors  of the released checkpoint
    """
    params = config["vision_config"]["params"]
    high = params.get("high_res_cfg", {})  # the 1.3B of DeepSeek-VL has one encoder
    low = params.get("low_res_cfg", {})
    for encoder in (high, low):
        name = encoder.get("model_name")
        if name not in SIZES:
            sys.exit(f"{folder}: vision encoder {name}; known: {' and '.join(SIZES)}")

    parts = sort_tensors(folder, tensors, PARTS, NEVER_READ)
    vision = parts["vision"]
    for name in list(vision):
        if "self_attn.qkv" in name:  # one product there, three here
            thirds = vision.pop(name).chunk(3)
            for letter, third in zip("qkv", thirds):
                vision[name.replace("qkv", f"{letter}_proj")] = third.clone()
        if "position_embedding" in name:
            vision[name] = vision[name][0]  # (1, P, W) there, (P, W) here

    sam = SIZES[high["model_name"]] | {"image_size": high["image_size"]}
    sam["model_type"] = "sam_vision_model"
    siglip = SIZES[low["model_name"]] | {"image_size": low["image_size"]}
    siglip["model_type"] = "siglip_vision_model"
    siglip["hidden_act"] = "gelu"
    siglip["vision_use_head"] = False
    siglip["num_hidden_layers"] += 1 + low.get("select_layer", -2)  # -1: all

    vision_config = DeepseekVLHybridConfig(
        vision_config=siglip,
        high_res_vision_config=sam,
        text_config={  # of the part that HybridVision deletes, so made small
            "model_type": "llama",
            "hidden_size": 2,
            "num_attention_heads": 1,
            "num_hidden_layers": 0,
        },
        tie_word_embeddings=False,
        pixel_mean=high.get("pixel_mean") or [0.5, 0.5, 0.5],
        pixel_std=high.get("pixel_std") or [0.5, 0.5, 0.5],
    )
    configs = {"vision": vision_config.to_dict(), "llm": config["language_config"]}
    ours = {
        "vision": "hybrid",
        "projector": "hybrid",
        "post_layernorm": True,
        "drop_first": 0,
        "after_image": "",
        "image_size": high["image_size"],
        "pad_color": PAD_COLOR,
    }
    return ours, TEMPLATE, configs, parts
