"""Other backbones, released checkpoints, what is written for others: small random folders in real formats.

Expected logits come from transformers' own classes and a few lines of torch, not from model.py.
"""
import json
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, DeepseekVLHybridConfig,
                          DeepseekVLHybridForConditionalGeneration, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel,
                          SiglipVisionConfig, SiglipVisionModel)

import data_gen
import eval as evaluation
import model
import stage1_text_sft
import stage2_kl_align
import stage3_mm_instruct
from model import IGNORE, build, encode_example, join, load_vlm, make_batch, save_vlm

QWEN = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=48,
              patch_size=16)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6)
P = 9


def tokenizer(kind, **special):
    """Byte-level BPE; qwen: chat template, pad; llama: bos, no pad, no template, its class named Llama."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = (["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if kind == "qwen" else
             ["<|begin_of_text|>", "<|end_of_text|>"])
    core.train_from_iterator(
        ["Find angle A. †Answer: 60°", "user assistant system You are a helpful assistant."],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.add_special_tokens(names)  # after the words, as in Qwen2
    if kind == "qwen":
        tok = PreTrainedTokenizerFast(tokenizer_object=core, **{
            "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | special)
        tok.chat_template = QWEN
    else:
        tok = PreTrainedTokenizerFast(tokenizer_object=core, **{
            "bos_token": names[0], "eos_token": names[1]} | special)
    return tok


def randomize(module):
    """Weights of a size at which a mistake shows; also where initialisation is 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / max(4, p.shape[-1]) ** .5 + (p.ndim == 1))
    return module.eval()


def write_shards(folder, tensors, config, shards=2):
    os.makedirs(folder, exist_ok=True)
    names, place = sorted(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n].clone().contiguous() for n in names[k::shards]}, os.path.join(folder, file))
        place |= dict.fromkeys(names[k::shards], file)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": place}, f)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    return str(folder)


def llm_folder(folder, kind="qwen", tied=True, rows=320, tok=None):
    """The language model as published: shards, old-style rope_theta and torch_dtype. -> (folder, model)"""
    tok = tok or tokenizer(kind)
    config = TEXT | dict(vocab_size=rows, tie_word_embeddings=tied, rope_theta=1e5, torch_dtype="bfloat16",
                         model_type={"qwen": "qwen2", "llama": "llama"}[kind])
    classes = (Qwen2Config, Qwen2ForCausalLM) if kind == "qwen" else (LlamaConfig, LlamaForCausalLM)
    llm = randomize(classes[1](classes[0](**config)).float())
    tensors = {k: t for k, t in llm.state_dict().items() if not (tied and k == "lm_head.weight")}
    if kind == "llama":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints have it
    write_shards(folder, tensors, config)
    tok.save_pretrained(folder)
    if kind == "llama":
        path = os.path.join(folder, "tokenizer_config.json")
        write(path, json.dumps(json.load(open(path)) | {"tokenizer_class": "LlamaTokenizerFast"}))
    return str(folder), llm


def write(path, text):
    with open(path, "w") as f:
        f.write(text)


def vision_folder(folder, layout):
    """full: SiglipModel; flat, prefixed: the tower alone in both key layouts. -> (folder, the tower)"""
    tower = randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    if layout == "full":
        small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     vocab_size=20)
        full = SiglipModel(SiglipConfig(text_config=small, vision_config=VISION))
        full.vision_model.load_state_dict(tower.state_dict())
        full.save_pretrained(folder)
    else:
        prefix = "vision_model." if layout == "prefixed" else ""
        write_shards(folder, {prefix + k: t for k, t in tower.state_dict().items()},
                     VISION | {"model_type": "siglip_vision_model"}, shards=1)
    return str(folder), tower


def row(text="Find angle A.", image="p.png"):
    return {"image_url": image, "instruction": text, "output": "60. †Answer: 60°", "id": "x"}


@pytest.fixture
def picture(tmp_path):
    pixels = torch.randint(0, 255, (48, 48, 3), generator=torch.manual_seed(3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "p.png")
    return str(tmp_path), (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)


def rows_of(vlm, tok, root, some=None):
    with torch.no_grad():
        return vlm(make_batch(vlm, tok, some or [row()], root=root)) @ vlm.lm_head.T


def splice(llm, ids, image, features):
    """(1, L, H): token embeddings with the features in the place of the image tokens."""
    x = llm.get_input_embeddings()(torch.tensor([ids])).clone()
    x[0, [k for k, t in enumerate(ids) if t == image]] = features
    return x


@pytest.mark.parametrize("kind,tied,layout,projector", [
    ("qwen", True, "full", "mlp"), ("qwen", False, "prefixed", "gated"), ("llama", False, "flat", "mlp")])
def test_any_llm_and_tower_join_and_give_the_logits_of_transformers(
        tmp_path, picture, kind, tied, layout, projector):
    (a, llm), (b, tower) = llm_folder(tmp_path / "a", kind, tied), vision_folder(tmp_path / "b", layout)
    vlm, tok = join(a, b, projector)
    root, pixels = picture
    ids, labels, _ = encode_example(tok, row(), image_tokens=vlm.image_tokens, root=root, size=48,
                                    after_image="\n")
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True)
        seen = out.hidden_states[-2][0, 1:] if projector == "gated" else out.last_hidden_state[0]
        hidden = llm.model(
            inputs_embeds=splice(llm, ids, vlm.image_token_id, vlm.projector(seen))).last_hidden_state
    want = (hidden[0] @ llm.lm_head.weight.T)[[y != IGNORE for y in labels]]
    assert vlm.image_tokens == len(seen) == (P - 1 if projector == "gated" else P)
    assert torch.allclose(rows_of(vlm, tok, root), want, atol=1e-4) and want.std() > .3
    assert (vlm.lm_head is vlm.language_model.get_input_embeddings().weight) == tied
    assert vlm.projector.state_dict()[next(iter(vlm.projector.state_dict()))].abs().max() < 1  # a fresh one
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in vlm.parameters())
    again = join(a, b, projector)[0].projector.state_dict()
    assert again.keys() == vlm.projector.state_dict().keys()


def test_prompts_of_the_chat_template_and_of_a_tokenizer_without_one(tmp_path):
    vision, _ = vision_folder(tmp_path / "v", "flat")
    for kind, want in (("qwen", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                        "<|im_start|>user\n{}\nFind angle A.<|im_end|>\n"
                        "<|im_start|>assistant\n60. †Answer: 60°<|im_end|>"),
                       ("llama", "<|begin_of_text|>User: {}\nFind angle A.\n\nAssistant:60. †Answer: 60°"
                        "<|end_of_text|>")):
        vlm, tok = join(llm_folder(tmp_path / kind, kind)[0], vision)
        Image.new("RGB", (10, 20)).save(tmp_path / "p.png")
        ids = make_batch(vlm, tok, [row()], root=str(tmp_path)).input_ids[0]
        assert tok.decode(ids) == want.format("<|image|>" * P)
        assert ids.tolist().count(tok.convert_tokens_to_ids("<|image|>")) == P


def test_the_image_token_goes_into_a_padded_row_or_the_matrix_grows_by_one(tmp_path, picture):
    vision, _ = vision_folder(tmp_path / "v", "flat")
    n = len(tokenizer("qwen"))
    for rows, tied, want in ((320, True, 320), (n + 1, True, n + 1), (n, True, n + 1), (n, False, n + 1)):
        folder, llm = llm_folder(tmp_path / f"{rows}{tied}", "qwen", tied, rows)
        vlm, tok = join(folder, vision)
        old, new = llm.lm_head.weight, vlm.lm_head
        assert vlm.image_token_id == n and len(new) == want == vlm.language_model.config.vocab_size
        assert torch.equal(new[:rows], old) and len(vlm.language_model.get_input_embeddings().weight) == want
        if want > rows:
            assert torch.allclose(new[rows], old.mean(0), atol=1e-6)
        save_vlm(str(tmp_path / "o"), vlm, tok)
        assert torch.equal(load_vlm(str(tmp_path / "o"))[0].lm_head, new)


def test_pad_is_eos_where_there_is_no_pad(tmp_path, picture):
    """Rows of different length: nothing may depend on pads being a token of their own."""
    vision, _ = vision_folder(tmp_path / "v", "flat")
    vlm, tok = join(llm_folder(tmp_path / "l", "llama")[0], vision)
    assert tok.pad_token_id == tok.eos_token_id
    root, some = picture[0], [row(), row("Find angle A. " * 5)]
    batch = make_batch(vlm, tok, some, root=root)
    assert (batch.labels == tok.eos_token_id).sum() == 2
    alone = torch.cat([rows_of(vlm, tok, root, [r]) for r in some])
    assert torch.allclose(rows_of(vlm, tok, root, some), alone, atol=1e-4)
    reply = vlm.generate(make_batch(vlm, tok, some, root=root, answer=False), 4,
                         tok.eos_token_id, tok.pad_token_id)
    one = vlm.generate(make_batch(vlm, tok, some[:1], root=root, answer=False), 4,
                       tok.eos_token_id, tok.pad_token_id)
    assert reply[0, :one.shape[1]].tolist() == one[0].tolist()


# ------------------------------------------------------------------------------------------------------------
# The released layouts
# ------------------------------------------------------------------------------------------------------------
def released_folder(folder, tied=True, rows=320, template=True):
    """A qwen2vlm checkpoint: 2 shards, inner vision_model prefix, pooling head. -> (folder, parts)"""
    tok = tokenizer("qwen")
    tok.add_tokens(["<|image|>"], special_tokens=True)
    if not template:
        tok.chat_template = "another one: {{ messages[0].content }}"
    tower = randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)))  # with head and all layers
    text = TEXT | dict(vocab_size=rows, tie_word_embeddings=tied, rope_theta=1e6, model_type="qwen2")
    llm = randomize(Qwen2ForCausalLM(Qwen2Config(**text)))
    gen = torch.manual_seed(5)
    aligner = {f"aligner.{k}_proj.weight": torch.randn(32, 32, generator=gen) / 4
               for k in ("gate", "up", "down")}
    tensors = {f"vision_model.vision_model.{k}": t for k, t in tower.state_dict().items()} | aligner | {
        f"language_model.{k}": t for k, t in llm.state_dict().items() if not (tied and k == "lm_head.weight")}
    config = {"model_type": "qwen2vlm", "architectures": ["Qwen2vlmForConditionalGeneration"],
              "ignore_index": -100,
              "image_token_index": len(tok) - 1, "vision_feature_layer": -2, "torch_dtype": "float32",
              "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
              "vision_config": VISION | {"model_type": "siglip_vision_model"}, "text_config": text}
    write_shards(folder, tensors, config)
    tok.save_pretrained(folder)
    return str(folder), tower, llm, aligner, tensors


@pytest.mark.parametrize("tied", [True, False])
def test_a_released_checkpoint_gives_the_logits_of_the_released_code(tmp_path, picture, tied):
    """By hand: one <|image|> expands to the features of hidden layer -2 without the first; positions count
    from the first real token, pads on either side are masked."""
    folder, tower, llm, w, _ = released_folder(tmp_path / "r", tied, template=False)
    vlm, tok = load_vlm(folder)
    root, pixels = picture
    prompt = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "<|im_start|>user\n<|image|>\nFind angle A.<|im_end|>\n<|im_start|>assistant\n")
    ids = tok(prompt).input_ids
    answer = tok("60. †Answer: 60°").input_ids + [tok.convert_tokens_to_ids("<|im_end|>")]
    at = ids.index(tok.convert_tokens_to_ids("<|image|>"))
    with torch.no_grad():
        seen = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        gate, up, down = (w[f"aligner.{k}_proj.weight"] for k in ("gate", "up", "down"))
        features = F.linear(F.gelu(F.linear(seen, gate)) * F.linear(seen, up), down)
        x = llm.get_input_embeddings()(torch.tensor([ids + answer]))
        x = torch.cat([x[:, :at], features[None], x[:, at + 1:]], 1)
        for left in (0, 3):  # pads
            for right in (0, 2):
                x_padded = F.pad(x, (0, 0, left, right))
                mask = F.pad(torch.ones(1, x.shape[1]).long(), (left, right))
                logits = llm(inputs_embeds=x_padded, attention_mask=mask,
                             position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[0]
                end = logits.shape[0] - right
                assert torch.allclose(rows_of(vlm, tok, root), logits[end - len(answer) - 1:end - 1],
                                      atol=1e-4)
    assert vlm.image_tokens == P - 1 and len(vlm.unused) == 16 + 2 + 11  # a layer, a norm, the head


def test_a_released_checkpoint_is_written_back_tensor_for_tensor(tmp_path, picture):
    folder, _, _, _, tensors = released_folder(tmp_path / "r")
    model.main([folder, "--released_to", str(tmp_path / "back"), "--dtype", "float32"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    old, new = (json.load(open(os.path.join(f, "config.json"))) for f in (folder, tmp_path / "back"))
    for key in ("model_type", "architectures", "image_token_index", "vision_feature_layer", "text_config",
                "vision_feature_select_strategy", "projector_hidden_act"):
        assert old[key] == new[key], key
    assert old["vision_config"] == {k: v for k, v in new["vision_config"].items() if k != "vision_use_head"}
    a, b = (rows_of(*load_vlm(f), picture[0]) for f in (folder, str(tmp_path / "back")))
    assert torch.equal(a, b)


def test_our_own_layout_cannot_be_written_as_a_released_one(tmp_path):
    vision, _ = vision_folder(tmp_path / "v", "flat")
    save_vlm(str(tmp_path / "o"), *join(llm_folder(tmp_path / "l")[0], vision))
    with pytest.raises(SystemExit, match="--projector gated"):
        model.main([str(tmp_path / "o"), "--released_to", str(tmp_path / "x")])


def test_the_language_model_alone_loads_with_transformers(tmp_path):
    vision, _ = vision_folder(tmp_path / "v", "flat")
    for kind in ("qwen", "llama"):
        folder, llm = llm_folder(tmp_path / kind, kind)
        save_vlm(str(tmp_path / "o"), *join(folder, vision))
        out = str(tmp_path / f"{kind}-llm")
        model.main([str(tmp_path / "o"), "--llm_to", out, "--dtype", "float32"])
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        ids = torch.arange(12)[None]
        assert torch.allclose(again(ids).logits, llm(ids).logits, atol=1e-5)
        assert PreTrainedTokenizerFast.from_pretrained(out).eos_token
        model.main([str(tmp_path / "o"), "--llm_to", out])
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def hybrid():
    """A small DeepSeek-VL hybrid model of transformers, and its state dict in the released names."""
    low = VISION | dict(model_type="siglip_vision_model", hidden_act="gelu", vision_use_head=False,
                        hidden_size=32)
    high = dict(model_type="sam_vision_model", hidden_size=24, num_hidden_layers=12, num_attention_heads=2,
                image_size=96, patch_size=16, output_channels=8, window_size=4)
    text = TEXT | dict(model_type="llama", vocab_size=320)
    whole = randomize(DeepseekVLHybridForConditionalGeneration(DeepseekVLHybridConfig(
        vision_config=low, high_res_vision_config=high, text_config=text, tie_word_embeddings=False)))
    ours, out = whole.state_dict(), {}
    H, S = "vision_model.vision_tower_high.vision_tower.", "vision_model.vision_tower_low.vision_tower."
    parts = {"conv1": "0", "layer_norm1": "1", "conv2": "2", "layer_norm2": "3"}
    for name, t in ours.items():
        name = name.removeprefix("model.")
        if m := re.fullmatch(r"high_res_vision_(neck|model\.vision_encoder\.neck)\.(\w+)(\..*)", name):
            out[f"{H}{'neck_hd' if m[1] == 'neck' else 'neck'}.{parts[m[2]]}{m[3]}"] = t
        elif m := re.fullmatch(r"high_res_vision_proj\.conv(\d)(\..*)", name):
            out[f"{H}downsamples.{int(m[1]) - 1}{m[2]}"] = t
        elif name == "high_res_vision_alpha":
            out[H + "hd_alpha_downsamples"] = t
        elif m := re.fullmatch(r"high_res_vision_model\.vision_encoder\.(.*)", name):
            out[H + m[1].replace("layers.", "blocks.").replace("layer_norm", "norm")
                .replace("projection", "proj")] = t
        elif m := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.*)", name):
            if m[2].startswith("self_attn.q_proj"):
                qkv = torch.cat([ours["model." + name.replace("q_proj", f"{k}_proj")] for k in "qkv"])
                out[f"{S}blocks.{m[1]}.attn.qkv.{m[2].split('.')[-1]}"] = qkv
            elif m[2].startswith("self_attn.out_proj"):
                out[f"{S}blocks.{m[1]}.attn.proj.{m[2].split('.')[-1]}"] = t
            elif not m[2].startswith("self_attn"):
                out[f"{S}blocks.{m[1]}.{m[2].replace('layer_norm', 'norm')}"] = t
        elif name == "vision_model.embeddings.position_embedding.weight":
            out[S + "pos_embed"] = t[None]
        elif m := re.fullmatch(r"vision_model\.embeddings\.patch_embedding\.(\w+)", name):
            out[f"{S}patch_embed.proj.{m[1]}"] = t
        elif m := re.fullmatch(r"vision_model\.post_layernorm\.(\w+)", name):
            out[f"{S}norm.{m[1]}"] = t
        elif m := re.fullmatch(r"aligner\.(\w+)\.(\w+)", name):
            where = {"proj": "layers.1", "vision_proj": "low_up_proj",
                     "high_res_vision_proj": "high_up_proj"}[m[1]]
            out[f"aligner.{where}.{m[2]}"] = t
        elif m := re.fullmatch(r"language_model\.(.*)", name):
            out[f"language_model.model.{m[1]}"] = t
        else:
            assert name == "lm_head.weight"
            out["language_model.lm_head.weight"] = t
    for k in ("high", "low"):  # in the released state dict, in no forward
        out |= {f"vision_model.{k}_layer_norm.{part}": torch.ones(32) for part in ("weight", "bias")}
    return whole, out | {f"{S}attn_pool.latent": torch.ones(1, 1, 32)}, low, high, text


def test_the_released_deepseek_layout_gives_the_logits_of_transformers(tmp_path, monkeypatch):
    whole, tensors, low, high, text = hybrid()
    monkeypatch.setattr(model, "HYBRID", {"sam_b_downsample": high, "siglip_large_patch16_384": low})
    mean, std = [.48, .46, .41], [.27, .26, .28]
    write_shards(tmp_path / "r", tensors, {
        "model_type": "multi_modality", "language_config": text,
        "vision_config": {"cls": "HybridVisionTower", "params": {
            "high_res_cfg": {"model_name": "sam_b_downsample", "image_size": 96,
                             "pixel_mean": mean, "pixel_std": std, "select_layer": -1},
            "low_res_cfg": {"model_name": "siglip_large_patch16_384", "image_size": 48,
                            "pixel_mean": [.5] * 3, "pixel_std": [.5] * 3, "select_layer": -1}}}})
    tokenizer("llama").save_pretrained(tmp_path / "r")
    vlm, tok = load_vlm(str(tmp_path / "r"))
    pixels = torch.rand(1, 3, 96, 96, generator=torch.manual_seed(0)) * 2 - 1
    Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()).save(
        tmp_path / "p.png")
    pixels = model.load_image(tmp_path / "p.png", 96)[None]
    batch = make_batch(vlm, tok, [row()], root=str(tmp_path))
    with torch.no_grad():
        high_pixels = (((pixels + 1) / 2 - torch.tensor(mean)[:, None, None])
                       / torch.tensor(std)[:, None, None])
        low_pixels = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
        whole.config.image_token_id = whole.model.config.image_token_id = vlm.image_token_id
        want = whole(input_ids=batch.input_ids, pixel_values=low_pixels, high_res_pixel_values=high_pixels,
                     attention_mask=batch.attention_mask).logits[batch.labels != IGNORE]
        assert torch.allclose(vlm(batch) @ vlm.lm_head.T, want, atol=1e-4) and want.std() > .3
    assert vlm.image_tokens == 9 and vlm.config["image_size"] == 96 and not vlm.unused
    prompt = tok.decode(batch.input_ids[0])
    assert prompt.startswith("<|begin_of_text|>You are a helpful language and vision assistant.")
    assert "natural language.\n\nUser: " + "<|image|>" * 9 + "Find angle A.\n\nAssistant:60" in prompt
    Image.new("RGB", (96, 48), "white").save(tmp_path / "wide.png")  # the aspect is kept, on a grey square
    square = make_batch(vlm, tok, [row(image="wide.png")], root=str(tmp_path)).pixel_values[0]
    margin = torch.tensor([122., 116, 104])
    assert square[:, 48, 48].min() > .99 and torch.allclose((square[:, 0, 0] + 1) * 127.5, margin)
    save_vlm(str(tmp_path / "o"), vlm, tok)
    with torch.no_grad():
        assert torch.equal(load_vlm(str(tmp_path / "o"))[0](batch), vlm(batch))
        rows = load_vlm(str(tmp_path / "o"), frozen=torch.bfloat16)[0](batch)
        assert rows.dtype == torch.bfloat16 and torch.isfinite(rows).all()


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("set") / "data")
    data_gen.main(["--out", folder, "--n", "12", "--n_test", "2"])
    return folder


def flags(data, out, **more):
    base = {"data": data, "out": str(out), "batch": 2, "micro_batch": 2, "steps": 1, "log_every": 1,
            "lr": 1e-3}
    return [f"--{k}={v}" for k, v in (base | more).items()]


def test_from_a_qwen_and_a_siglip_folder_through_stages_2_and_3_to_the_table(
        tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (llm, language), (vision, _) = llm_folder(tmp_path / "Qwen2"), vision_folder(tmp_path / "siglip", "full")
    two = flags(data, "out/stage2", steps=2, llm=llm, vision=vision, projector="gated")
    stage2_kl_align.main([*two, "--no-evaluate"])
    after = load_vlm("out/stage2")[0]
    assert torch.equal(after.lm_head, language.lm_head.weight)
    assert not torch.equal(after.projector.up_proj.weight,
                           join(llm, vision, "gated")[0].projector.up_proj.weight)
    assert os.path.exists("out/stage2/step-2/model.safetensors")
    assert "projector: 3,072 parameters, trained" in capsys.readouterr().out
    stage3_mm_instruct.main([*flags(data, "out/stage3", init="out/stage2"), "--no-evaluate"])
    evaluation.main(["out/stage3", "--data", data, "--max_new_tokens", "4"])
    assert "relative gap" in capsys.readouterr().out
    model.main(["out/stage3", "--released_to", "released", "--dtype", "float32"])
    a, b = (load_vlm(f)[0].state_dict() for f in ("out/stage3", "released"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_released_checkpoint_is_evaluated_and_trained_on(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = released_folder(tmp_path / "r")[0]
    evaluation.main([folder, "--data", data, "--max_new_tokens", "2"])
    stage2_kl_align.main([*flags(data, "out/two", init=folder), "--no-evaluate"])
    stage1_text_sft.main(flags(data, "out/one", init="out/two"))
    vlm = load_vlm("out/one")[0]
    assert len(vlm.unused) == 29  # carried along, for those who write it back


def test_resuming_a_joined_model_is_exact(tmp_path, data):
    llm, vision = llm_folder(tmp_path / "l")[0], vision_folder(tmp_path / "v", "flat")[0]
    run = lambda out: stage2_kl_align.main(
        [*flags(data, tmp_path / out, steps=2, save_every=1, llm=llm, vision=vision), "--no-evaluate"])
    run("a")
    shutil.copytree(tmp_path / "a" / "step-1", tmp_path / "b" / "step-1")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    run("b")
    a, b = (load_file(tmp_path / k / "step-2" / "model.safetensors") for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_frozen_parts_are_bfloat16_where_asked_and_stay_so_on_disk(tmp_path, picture):
    llm, vision = llm_folder(tmp_path / "l")[0], vision_folder(tmp_path / "v", "flat")[0]
    vlm, tok = join(llm, vision, trained=("vision_model", "projector"), frozen=torch.bfloat16)
    kinds = {name: {p.dtype for p in child.parameters()} for name, child in vlm.named_children()}
    assert kinds == {"vision_model": {torch.float32}, "projector": {torch.float32},
                     "language_model": {torch.bfloat16}}
    assert vlm.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    save_vlm(str(tmp_path / "o"), vlm, tok)
    sizes = {name: t.dtype for name, t in load_file(tmp_path / "o" / "model.safetensors").items()}
    assert sizes["language_model.model.embed_tokens.weight"] == torch.bfloat16
    assert sizes["projector.up.weight"] == torch.float32 and "language_model.lm_head.weight" not in sizes
    plain = join(llm, vision)
    exact = rows_of(*plain, picture[0])
    vlm.projector.load_state_dict(plain[0].projector.state_dict())
    with torch.no_grad():
        rows = vlm(make_batch(vlm, tok, [row()], root=picture[0])) @ vlm.lm_head.T
        assert rows.dtype == torch.bfloat16 and (rows - exact).norm() < .1 * exact.norm()
        with torch.autocast("cpu", torch.bfloat16):  # as on a GPU: the sums between layers stay float32
            hidden = vlm(make_batch(vlm, tok, [row()], root=picture[0]))
    assert hidden.dtype == torch.float32
    assert (hidden @ vlm.lm_head.float().T - exact).norm() < .1 * exact.norm()


def test_compile_changes_no_name_and_no_result(tmp_path, picture, monkeypatch):
    """Through dynamo, without code generation: with it, it passes too, in a minute, given a C++ compiler."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
    llm, vision = llm_folder(tmp_path / "l")[0], vision_folder(tmp_path / "v", "flat")[0]
    args = stage1_text_sft.parse_args(["--llm", llm, "--vision", vision, "--compile"])
    vlm, tok = model.start_vlm(args, "cpu", ())
    torch.manual_seed(args.seed)
    plain = join(llm, vision)[0]
    compiled = [m for m in vlm.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 3 + 2 and vlm.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(rows_of(vlm, tok, picture[0]), rows_of(plain, tok, picture[0]), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# What does not fit is refused in one line that says what and what to do
# ------------------------------------------------------------------------------------------------------------
def edit_shard(folder, change):
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
        tensors = {k: t.clone() for k, t in load_file(os.path.join(folder, file)).items()}
        save_file(change(tensors), os.path.join(folder, file))


@pytest.mark.parametrize("harm,message", [
    ("missing", r"llm, .*: language_model\.model\.norm\.weight is absent in the file, \(32,\)"),
    ("shape", r"llm, .*: language_model\.model\.norm\.weight is \(31,\) in the file, \(32,\)"),
    ("extra", r"language_model\.model\.more is \(2,\) in the file, absent"),
    ("truncated", r"model-00002-of-00002\.safetensors: .*fetch this file again"),
    ("lost", r"model-00001-of-00002\.safetensors: .*fetch this file again"),
    ("bin", r"model\.safetensors: .*pickled weights are not opened"), ("config", "has no config.json"),
    ("kind", "a mamba model; can be used: qwen2, llama"), ("vision", "a clip model; can be used: siglip"),
    ("vocabulary", r"tokens up to 303, the embedding 300 rows"),
    ("tokenizer", "has no tokenizer.json"), ("eos", "has no eos_token")])
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, harm, message):
    tok = tokenizer("qwen", eos_token=None) if harm == "eos" else None
    llm = llm_folder(tmp_path / "llm", rows=300 if harm == "vocabulary" else 320, tok=tok)[0]
    vision = vision_folder(tmp_path / "vision", "flat")[0]
    two = os.path.join(llm, "model-00002-of-00002.safetensors")
    if harm == "missing":
        edit_shard(llm, lambda d: {k: t for k, t in d.items() if k != "model.norm.weight"})
    elif harm == "shape":
        edit_shard(llm, lambda d: d | (
            {"model.norm.weight": torch.ones(31)} if "model.norm.weight" in d else {}))
    elif harm == "extra":
        edit_shard(llm, lambda d: d | {"model.more": torch.ones(2)})
    elif harm == "truncated":
        os.truncate(two, os.path.getsize(two) - 100)
    elif harm == "lost":
        os.remove(two.replace("00002-of", "00001-of"))
    elif harm == "bin":
        for file in os.listdir(llm):
            if "safetensors" in file:
                os.remove(os.path.join(llm, file))
        write(os.path.join(llm, "pytorch_model.bin"), "cos\nsystem\n(S'touch owned'\ntR.")
    elif harm in ("config", "tokenizer"):
        os.remove(os.path.join(llm, {"config": "config.json", "tokenizer": "tokenizer.json"}[harm]))
    elif harm in ("kind", "vision"):
        path = os.path.join(llm if harm == "kind" else vision, "config.json")
        write(path, json.dumps(json.load(open(path)) | {"model_type": "mamba" if harm == "kind" else "clip"}))
    with pytest.raises(SystemExit, match=message) as stopped:
        join(llm, vision)
    assert "\n" not in str(stopped.value)


def test_names_that_are_no_folder(tmp_path, monkeypatch):
    vision = vision_folder(tmp_path / "vision", "flat")[0]
    with pytest.raises(SystemExit, match="--llm /no/such: no such folder"):
        join("/no/such", vision)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=r"--llm some/model: .*LocalEntryNotFoundError.*"
                                         r"--local-dir DIR` elsewhere"):
        join("some/model", vision)
    llm = llm_folder(tmp_path / "llm")[0]
    with pytest.raises(SystemExit, match="a qwen2 model, neither ours.*--llm"):
        load_vlm(llm)


@pytest.mark.parametrize("flag", [
    ["--llm", "a"], ["--vision", "a"], ["--llm", "a", "--vision", "b", "--init", "c"]])
def test_llm_and_vision_go_together_and_not_with_init(flag, capsys):
    with pytest.raises(SystemExit):
        stage2_kl_align.parse_args(flag)
    assert "--llm and --vision go together" in capsys.readouterr().err


def test_nothing_random_and_nothing_twice_in_memory(tmp_path, monkeypatch):
    """Loading draws no random numbers but the new projector's, and makes no second copy of the model."""
    llm, vision = llm_folder(tmp_path / "l")[0], vision_folder(tmp_path / "v", "flat")[0]
    save_vlm(str(tmp_path / "o"), *join(llm, vision))
    before = torch.get_rng_state()
    vlm, _ = load_vlm(str(tmp_path / "o"))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(t.is_meta for t in [*vlm.parameters(), *vlm.buffers()])
    fresh = build(vlm.config)  # the ordinary way, with its own buffers
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, dict(vlm.named_buffers())[name]), name
