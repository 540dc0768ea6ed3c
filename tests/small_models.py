"""Small random models in the formats that real ones are published in, for the tests.

Weights come from fixed seeds: tests/golden.json holds numbers computed with them.
"""
import json
import os
import re

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration,
                          LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig,
                          SiglipVisionModel)

from model import make_batches

QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
P = 9  # image tokens: (48 / 16) ** 2

SAM = {
    "model_type": "sam_vision_model",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 96,
    "patch_size": 16,
    "output_channels": 8,
    "window_size": 4,
}
SIGLIP_OF_HYBRID = VISION | {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu",
    "vision_use_head": False,
}
PIXEL_MEAN = [0.48, 0.46, 0.41]
PIXEL_STD = [0.27, 0.26, 0.28]


def tokenizer(kind, **special):
    """Byte-level BPE. "qwen": with template and pad; "llama": with bos, without those two."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [
        "Find angle A. †Answer: 60°",
        "user assistant system You are a helpful assistant.",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))

    if kind == "qwen":
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        names = ["<|begin_of_text|>", "<|end_of_text|>"]
        roles = {"bos_token": names[0], "eos_token": names[1]}
    core.add_special_tokens(names)  # after the words, as in Qwen2
    result = PreTrainedTokenizerFast(tokenizer_object=core, **(roles | special))
    if kind == "qwen":
        result.chat_template = QWEN_TEMPLATE
    return result


LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ day }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama3_tokenizer():
    """Byte-level like Qwen2's, with a begin mark and a template that trims and writes the date."""
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    result = tokenizer("llama", eos_token="<|eot_id|>")
    result.add_tokens(names, special_tokens=True)
    result.chat_template = LLAMA3_TEMPLATE
    return result


def llama2_tokenizer():
    """SentencePiece's: a space is "▁", and one is put before each piece of text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    texts = ["[INST] Find angle A. [/INST] †Answer: 60° What is <|image|> <s> </s>?\n0123456789"]
    special = ["<unk>", "<s>", "</s>"]
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no token has two words
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    core.pre_tokenizer = None
    result = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    result.chat_template = LLAMA2_TEMPLATE
    return result


def randomize(module):
    """Weights of a size at which a mistake shows; also where initialisation is 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter) / max(4, parameter.shape[-1]) ** 0.5
            is_vector = parameter.ndim == 1
            parameter.copy_(noise + 1 if is_vector else noise)
    return module.eval()


def write_json(data, *path):
    with open(os.path.join(*path), "w", encoding="utf-8") as f:
        json.dump(data, f)


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def write_shards(folder, tensors, config, shards=2):
    """config.json, `shards` files of weights and their index."""
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    file_of = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        shard = {}
        for name in names[k::shards]:
            shard[name] = tensors[name].clone().contiguous()
            file_of[name] = file
        save_file(shard, os.path.join(folder, file))
    write_json({"metadata": {}, "weight_map": file_of}, folder, "model.safetensors.index.json")
    write_json(config, folder, "config.json")


def llm_folder(folder, kind="qwen", tied=True, rows=320, tok=None):
    """A language model as published: shards, old-style rope_theta, torch_dtype. -> folder, model

    kind  "qwen" or "llama";  tied  lm_head is the embedding;  rows  of the embedding
    """
    config = TEXT | {
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "rope_theta": 1e5,
        "torch_dtype": "bfloat16",
    }
    if kind == "qwen":
        config["model_type"] = "qwen2"
        llm = Qwen2ForCausalLM(Qwen2Config(**config))
    else:
        config["model_type"] = "llama"
        llm = LlamaForCausalLM(LlamaConfig(**config))
    llm = randomize(llm.float())

    tensors = llm.state_dict()
    if tied:
        del tensors["lm_head.weight"]
    if kind == "llama":  # old checkpoints have it
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    write_shards(folder, tensors, config)

    tok = tok or tokenizer(kind)
    tok.save_pretrained(folder)
    if kind == "llama":
        settings = read_json(folder, "tokenizer_config.json")
        settings["tokenizer_class"] = "LlamaTokenizerFast"
        write_json(settings, folder, "tokenizer_config.json")
    return str(folder), llm


def vision_folder(folder, layout):
    """A SigLIP tower in one of three layouts. -> folder, the tower

    layout  "full": inside a SiglipModel; "flat", "prefixed": alone, without or with "vision_model."
    """
    tower = randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    if layout == "full":
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 20,
        }
        full = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        full.vision_model.load_state_dict(tower.state_dict())
        full.save_pretrained(folder)
        return str(folder), tower

    prefix = "vision_model." if layout == "prefixed" else ""
    tensors = {}
    for name, tensor in tower.state_dict().items():
        tensors[prefix + name] = tensor
    config = VISION | {"model_type": "siglip_vision_model"}
    write_shards(folder, tensors, config, shards=1)
    return str(folder), tower


def released_folder(folder, tied=True, rows=320, template=True):
    """A qwen2vlm checkpoint: 2 shards, inner vision_model prefix, all layers, pooling head.

    template  False: its tokenizer has another chat template than the released prompt
    -> folder, SigLIP tower, language model, aligner's tensors, all tensors
    """
    tok = tokenizer("qwen")
    tok.add_tokens(["<|image|>"], special_tokens=True)
    if not template:
        tok.chat_template = "another one: {{ messages[0].content }}"

    tower = randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    text = TEXT | {
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "model_type": "qwen2",
    }
    llm = randomize(Qwen2ForCausalLM(Qwen2Config(**text)))
    generator = torch.manual_seed(5)
    aligner = {}
    for name in ("gate", "up", "down"):
        weight = torch.randn(32, 32, generator=generator) / 4
        aligner[f"aligner.{name}_proj.weight"] = weight

    tensors = dict(aligner)
    for name, tensor in tower.state_dict().items():
        tensors[f"vision_model.vision_model.{name}"] = tensor
    for name, tensor in llm.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors[f"language_model.{name}"] = tensor

    config = {
        "model_type": "qwen2vlm",
        "architectures": ["Qwen2vlmForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": len(tok) - 1,
        "vision_feature_layer": -2,
        "torch_dtype": "float32",
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "text_config": text,
    }
    write_shards(folder, tensors, config)
    tok.save_pretrained(folder)
    return str(folder), tower, llm, aligner, tensors


RELEASED_LOW = "vision_model.vision_tower_low.vision_tower."
RELEASED_HIGH = "vision_model.vision_tower_high.vision_tower."
RELEASED_NAMES = [  # of transformers' hybrid -> of the released one; patterns, the first that fits
    # SigLIP; the three projections of its attention are joined in released_hybrid_tensors
    (r"vision_model\.embeddings\.position_embedding\.weight", RELEASED_LOW + "pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.(.*)", RELEASED_LOW + r"patch_embed.proj.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(.*)", RELEASED_LOW + r"blocks.\1.norm\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)",
     RELEASED_LOW + r"blocks.\1.attn.proj.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(.*)",
     RELEASED_LOW + r"blocks.\1.attn.qkv.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(.*)", RELEASED_LOW + r"blocks.\1.mlp.\2"),
    (r"vision_model\.post_layernorm\.(.*)", RELEASED_LOW + r"norm.\1"),

    # SAM
    (r"high_res_vision_model\.vision_encoder\.pos_embed", RELEASED_HIGH + "pos_embed"),
    (r"high_res_vision_model\.vision_encoder\.patch_embed\.projection\.(.*)",
     RELEASED_HIGH + r"patch_embed.proj.\1"),
    (r"high_res_vision_model\.vision_encoder\.layers\.(\d+)\.layer_norm(.*)",
     RELEASED_HIGH + r"blocks.\1.norm\2"),
    (r"high_res_vision_model\.vision_encoder\.layers\.(.*)", RELEASED_HIGH + r"blocks.\1"),
    (r"high_res_vision_model\.vision_encoder\.neck\.conv1\.(.*)", RELEASED_HIGH + r"neck.0.\1"),
    (r"high_res_vision_model\.vision_encoder\.neck\.layer_norm1\.(.*)",
     RELEASED_HIGH + r"neck.1.\1"),
    (r"high_res_vision_model\.vision_encoder\.neck\.conv2\.(.*)", RELEASED_HIGH + r"neck.2.\1"),
    (r"high_res_vision_model\.vision_encoder\.neck\.layer_norm2\.(.*)",
     RELEASED_HIGH + r"neck.3.\1"),
    (r"high_res_vision_neck\.conv1\.(.*)", RELEASED_HIGH + r"neck_hd.0.\1"),
    (r"high_res_vision_neck\.layer_norm1\.(.*)", RELEASED_HIGH + r"neck_hd.1.\1"),
    (r"high_res_vision_neck\.conv2\.(.*)", RELEASED_HIGH + r"neck_hd.2.\1"),
    (r"high_res_vision_neck\.layer_norm2\.(.*)", RELEASED_HIGH + r"neck_hd.3.\1"),
    (r"high_res_vision_proj\.conv1\.(.*)", RELEASED_HIGH + r"downsamples.0.\1"),
    (r"high_res_vision_proj\.conv2\.(.*)", RELEASED_HIGH + r"downsamples.1.\1"),
    (r"high_res_vision_alpha", RELEASED_HIGH + "hd_alpha_downsamples"),

    # the rest
    (r"aligner\.proj\.(.*)", r"aligner.layers.1.\1"),
    (r"aligner\.vision_proj\.(.*)", r"aligner.low_up_proj.\1"),
    (r"aligner\.high_res_vision_proj\.(.*)", r"aligner.high_up_proj.\1"),
    (r"language_model\.(.*)", r"language_model.model.\1"),
    (r"lm_head\.weight", "language_model.lm_head.weight"),
]


def released_hybrid_tensors(whole):
    """The tensors of transformers' hybrid model under their released names."""
    ours = {}
    for name, tensor in whole.state_dict().items():
        ours[name.removeprefix("model.")] = tensor

    # One product for query, key and value there, three here; and a leading 1 in pos_embed.
    for name in list(ours):
        if name.startswith("vision_model") and ".q_proj." in name:
            parts = [ours.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            ours[name.replace("q_proj", "qkv")] = torch.cat(parts)
    positions = "vision_model.embeddings.position_embedding.weight"
    ours[positions] = ours[positions][None]

    released = {}
    for name, tensor in ours.items():
        for pattern, replacement in RELEASED_NAMES:
            if re.fullmatch(pattern, name):
                released[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            raise KeyError(name)

    # These are in the released files and in no forward.
    for tower in ("high", "low"):
        for kind in ("weight", "bias"):
            released[f"vision_model.{tower}_layer_norm.{kind}"] = torch.ones(32)
    released[RELEASED_LOW + "attn_pool.latent"] = torch.ones(1, 1, 32)
    return released


def hybrid_folder(folder):
    """A multi_modality checkpoint, DeepSeek-VL's hybrid. -> folder, transformers' model, tensors

    The sizes of the towers do not stand in its config.json: a test puts SAM and SIGLIP_OF_HYBRID
    into convert.deepseek_vl.SIZES.
    """
    text = TEXT | {"model_type": "llama", "vocab_size": 320}
    config = DeepseekVLHybridConfig(
        vision_config=SIGLIP_OF_HYBRID,
        high_res_vision_config=SAM,
        text_config=text,
        tie_word_embeddings=False,
    )
    whole = randomize(DeepseekVLHybridForConditionalGeneration(config))
    tensors = released_hybrid_tensors(whole)

    high = {
        "model_name": "sam_b_downsample",
        "image_size": 96,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "select_layer": -1,
    }
    low = {
        "model_name": "siglip_large_patch16_384",
        "image_size": 48,
        "pixel_mean": [0.5, 0.5, 0.5],
        "pixel_std": [0.5, 0.5, 0.5],
        "select_layer": -1,
    }
    params = {"high_res_cfg": high, "low_res_cfg": low}
    released_config = {
        "model_type": "multi_modality",
        "language_config": text,
        "vision_config": {"cls": "HybridVisionTower", "params": params},
    }
    write_shards(folder, tensors, released_config)
    tokenizer("llama").save_pretrained(folder)
    return str(folder), whole, tensors


def write_picture(folder):
    """p.png, 48 x 48 random pixels, in the folder. -> the same as (1, 3, 48, 48) in [-1, 1]"""
    generator = torch.manual_seed(3)
    pixels = torch.randint(0, 255, (48, 48, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(os.path.join(folder, "p.png"))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def data_row(folder, text="Find angle A.", image="p.png"):
    """A row as model.JsonLines gives it."""
    return {
        "image_url": image,
        "instruction": text,
        "output": "60. †Answer: 60°",
        "id": "x",
        "folder": str(folder),
        "where": "rows.jsonl:1",
    }


def batch_of(vlm, tok, rows, answer=True):
    [batch], _ = make_batches(tok, vlm.config, rows, answer=answer)
    return batch


@torch.no_grad()
def answer_logits(vlm, tok, rows):
    """(N, V): the logits of the answer rows of these data rows."""
    return vlm(batch_of(vlm, tok, rows)) @ vlm.lm_head.T
