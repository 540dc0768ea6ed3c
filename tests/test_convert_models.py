"""Released checkpoints into our model folders and back; LLaVA's layout. With small random models.

Expected logits come from transformers' own classes and a few lines of torch, not from model.py.
"""
import os
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, Qwen2Config,
                          Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel)

import small_models
from convert import deepseek_vl, llava, released
from model import IGNORE, load_image, load_vlm, new_vlm, save_checkpoint, save_vlm
from small_models import (P, PIXEL_MEAN, PIXEL_STD, SAM, SIGLIP_OF_HYBRID, answer_logits, batch_of,
                          data_row, hybrid_folder, llm_folder, read_json, released_folder,
                          vision_folder, write_json, write_picture)

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tiny")
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|image|>\nFind angle A.<|im_end|>\n<|im_start|>assistant\n"
)


def gated_projector(aligner, features):
    gate = F.linear(features, aligner["aligner.gate_proj.weight"])
    up = F.linear(features, aligner["aligner.up_proj.weight"])
    return F.linear(F.gelu(gate) * up, aligner["aligner.down_proj.weight"])


def new_model(folder, projector, tied=True):
    """A small new model, saved in folder/ours. -> its path, VLM, tokenizer"""
    llm, _ = llm_folder(folder / "llm", "qwen", tied)
    vision, _ = vision_folder(folder / "vision", "flat")
    vlm, tok = new_vlm(llm, vision, projector)
    out = str(folder / "ours")
    save_vlm(out, vlm, tok)
    return out, vlm, tok


def assert_same_weights(a, b):
    a = a.state_dict()
    b = b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def refused(function, arguments):
    """The one line that it exits with."""
    with pytest.raises(SystemExit) as stopped:
        function(arguments)
    message = str(stopped.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------
# The Qwen2 systems

@pytest.mark.parametrize("tied", [True, False])
def test_a_released_checkpoint_gives_the_logits_of_the_released_code(tmp_path, tied):
    """By hand: the one <|image|> becomes the features of hidden layer -2 without the first.

    Positions count from the first real token; pads on either side are masked.
    """
    folder, tower, llm, aligner, _ = released_folder(tmp_path / "r", tied, template=False)
    pixels = write_picture(tmp_path)
    out = str(tmp_path / "ours")
    released.main([folder, "--out", out])
    vlm, tok = load_vlm(out)
    rows = answer_logits(vlm, tok, [data_row(tmp_path)])

    image = tok.convert_tokens_to_ids("<|image|>")
    prompt = tok(PROMPT).input_ids
    answer = tok("60. †Answer: 60°").input_ids + [tok.convert_tokens_to_ids("<|im_end|>")]
    place = prompt.index(image)
    with torch.no_grad():
        hidden_states = tower(pixels, output_hidden_states=True).hidden_states
        features = gated_projector(aligner, hidden_states[-2][:, 1:])  # (1, P - 1, H)
        x = llm.get_input_embeddings()(torch.tensor([prompt + answer]))
        x = torch.cat([x[:, :place], features, x[:, place + 1:]], dim=1)  # (1, L, H)
        for n_left, n_right in [(0, 0), (3, 0), (0, 2), (3, 2)]:
            mask = F.pad(torch.ones(1, x.shape[1]).long(), (n_left, n_right))
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            padded = F.pad(x, (0, 0, n_left, n_right))
            logits = llm(inputs_embeds=padded, attention_mask=mask, position_ids=positions).logits
            end = n_left + x.shape[1]
            expected = logits[0, end - len(answer) - 1:end - 1]
            assert torch.allclose(rows, expected, atol=1e-4)
    assert expected.std() > 0.3
    assert vlm.config["image_tokens"] == P - 1
    assert vlm.config == read_json(out, "vlm.json")
    assert read_json(out, "vision", "config.json")["vision_use_head"] is False  # else a random one
    assert not os.path.exists(out + ".part")
    for part in ("projector", "llm/model", "vision/model"):
        mode = os.stat(os.path.join(out, f"{part}.safetensors")).st_mode
        assert mode & 0o044 == 0o044  # others may read it


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_written_back_and_converted_again(tmp_path, tied):
    folder, _, _, _, tensors = released_folder(tmp_path / "r", tied)
    write_picture(tmp_path)
    ours = str(tmp_path / "ours")
    back = str(tmp_path / "back")
    again = str(tmp_path / "again")
    released.main([folder, "--out", ours])
    released.main([ours, "--back_to", back, "--dtype", "float32"])
    released.main([back, "--out", again])

    written = load_file(os.path.join(back, "model.safetensors"))
    not_read = ("vision_model.vision_model.encoder.layers.2.", "vision_model.vision_model.head.")
    expected = {name for name in tensors if not name.startswith(not_read)}
    assert len(tensors) - len(expected) == 16 + 11  # a layer, the head
    assert written.keys() == expected
    for name in expected:
        assert torch.equal(written[name], tensors[name]), name

    before = read_json(folder, "config.json")
    after = read_json(back, "config.json")
    for key in ("model_type", "architectures", "image_token_index", "projector_hidden_act",
                "vision_feature_select_strategy", "torch_dtype"):
        assert before[key] == after[key], key
    assert before["text_config"].items() <= after["text_config"].items()  # rope_theta, too
    assert after["vision_feature_layer"] == -1
    changed = {"num_hidden_layers": 2, "vision_use_head": False}
    assert (before["vision_config"] | changed).items() <= after["vision_config"].items()

    first, tok = load_vlm(ours)
    second, tok_again = load_vlm(again)
    assert_same_weights(first, second)
    assert first.config == second.config
    rows = [data_row(tmp_path)]
    assert torch.equal(answer_logits(first, tok, rows), answer_logits(second, tok_again, rows))


def test_a_run_of_a_new_gated_model_becomes_a_released_checkpoint(tmp_path):
    """What is written gives our logits with transformers' classes and none of our code."""
    pixels = write_picture(tmp_path)
    _, vlm, tok = new_model(tmp_path, "gated")
    optimizer = torch.optim.AdamW(vlm.parameters())
    save_checkpoint(str(tmp_path / "run"), 7, vlm, tok, optimizer, {"steps": 7})
    back = str(tmp_path / "back")
    released.main([str(tmp_path / "run"), "--back_to", back, "--dtype", "float32"])

    config = read_json(back, "config.json")
    parts = {"vision_model.vision_model.": {}, "aligner.": {}, "language_model.": {}}
    for name, tensor in load_file(os.path.join(back, "model.safetensors")).items():
        for start in parts:
            if name.startswith(start):
                parts[start][name.removeprefix(start)] = tensor
    weights = parts["language_model."]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    tower = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"]))
    llm = Qwen2ForCausalLM(Qwen2Config(**config["text_config"]))
    tower.load_state_dict(parts["vision_model.vision_model."])
    llm.load_state_dict(weights)

    batch = batch_of(vlm, tok, [data_row(tmp_path)])
    is_image = batch.input_ids == config["image_token_index"]
    aligner = {f"aligner.{name}": tensor for name, tensor in parts["aligner."].items()}
    with torch.no_grad():
        hidden_states = tower(pixels, output_hidden_states=True).hidden_states
        seen = hidden_states[config["vision_feature_layer"]][:, 1:]
        x = llm.get_input_embeddings()(batch.input_ids)
        x = x.masked_scatter(is_image[..., None], gated_projector(aligner, seen))
        expected = llm(inputs_embeds=x).logits[batch.labels != IGNORE]
    rows = answer_logits(vlm, tok, [data_row(tmp_path)])
    assert torch.allclose(rows, expected, atol=1e-5)


def test_the_default_dtype_is_bfloat16(tmp_path):
    ours, vlm, _ = new_model(tmp_path, "gated", tied=False)
    back = str(tmp_path / "back")
    released.main([ours, "--back_to", back])
    written = load_file(os.path.join(back, "model.safetensors"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["language_model.lm_head.weight"], vlm.lm_head.bfloat16())
    assert read_json(back, "config.json")["torch_dtype"] == "bfloat16"


def test_old_transformers_can_read_the_tokenizer(tmp_path):
    """By the form: in transformers 4.43.4 it was tried by hand."""
    ours, _, tok = new_model(tmp_path, "gated")
    back = str(tmp_path / "back")
    released.main([ours, "--back_to", back])
    settings = read_json(back, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == tok.chat_template
    merges = read_json(back, "tokenizer.json")["model"]["merges"]
    assert len(merges) > 10
    assert all(isinstance(merge, str) for merge in merges)

    loaded = AutoTokenizer.from_pretrained(back)
    text = "<|im_start|>user\n<|image|>\nFind angle A: x² < 60°.<|im_end|>"
    assert loaded(text).input_ids == tok(text).input_ids
    assert loaded.eos_token_id == tok.eos_token_id
    assert loaded.pad_token_id == tok.pad_token_id


def test_with_like_the_tokenizer_files_are_copied(tmp_path):
    folder, *_ = released_folder(tmp_path / "r")
    settings = read_json(folder, "tokenizer_config.json")
    write_json(settings | {"note": "theirs"}, folder, "tokenizer_config.json")
    write_json({"note": "theirs"}, folder, "special_tokens_map.json")
    ours = str(tmp_path / "ours")
    back = str(tmp_path / "back")
    released.main([folder, "--out", ours])
    released.main([ours, "--back_to", back, "--like", folder])
    copied = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(back)) == ["config.json", "model.safetensors"] + copied
    for name in copied:
        assert read_json(back, name) == read_json(folder, name)


# --------------------------------------------------------------------------------------------------
# The DeepSeek system

@pytest.fixture
def hybrid(tmp_path, monkeypatch):
    """A small hybrid checkpoint, converted. -> transformers' model, VLM, tokenizer"""
    sizes = {"sam_b_downsample": SAM, "siglip_large_patch16_384": SIGLIP_OF_HYBRID}
    monkeypatch.setattr(deepseek_vl, "SIZES", sizes)
    folder, whole, _ = hybrid_folder(tmp_path / "r")
    out = str(tmp_path / "ours")
    released.main([folder, "--out", out])
    vlm, tok = load_vlm(out)

    generator = torch.manual_seed(0)
    pixels = torch.randint(0, 255, (96, 96, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "p.png")
    return whole, vlm, tok


def test_the_released_deepseek_layout_gives_the_logits_of_transformers(tmp_path, hybrid):
    whole, vlm, tok = hybrid
    pixels = load_image(tmp_path / "p.png", 96)[None]
    mean = torch.tensor(PIXEL_MEAN)[:, None, None]
    std = torch.tensor(PIXEL_STD)[:, None, None]
    large = ((pixels + 1) / 2 - mean) / std
    small = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)

    batch = batch_of(vlm, tok, [data_row(tmp_path)])
    whole.config.image_token_id = vlm.config["image_token_id"]
    whole.model.config.image_token_id = vlm.config["image_token_id"]
    with torch.no_grad():
        logits = whole(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=small,
            high_res_pixel_values=large,
        ).logits
    expected = logits[batch.labels != IGNORE]
    rows = answer_logits(vlm, tok, [data_row(tmp_path)])
    assert torch.allclose(rows, expected, atol=1e-4)
    assert expected.std() > 0.3
    assert vlm.config["image_tokens"] == P
    assert vlm.config["image_size"] == 96


def test_the_prompt_and_the_margins_are_deepseeks(tmp_path, hybrid):
    _, vlm, tok = hybrid
    batch = batch_of(vlm, tok, [data_row(tmp_path)])
    prompt = tok.decode(batch.input_ids[0])
    start = "<|begin_of_text|>You are a helpful language and vision assistant."
    assert prompt.startswith(start)
    turn = "natural language.\n\nUser: " + "<|image|>" * P + "Find angle A.\n\nAssistant:60"
    assert turn in prompt

    Image.new("RGB", (96, 48), "white").save(tmp_path / "wide.png")
    row = data_row(tmp_path, image="wide.png")
    square = batch_of(vlm, tok, [row]).pixel_values[0]  # (3, 96, 96)
    assert square[:, 48, 48].min() > 0.99
    margin = (square[:, 0, 0] + 1) * 127.5
    assert torch.allclose(margin, torch.tensor([122.0, 116.0, 104.0]))


def test_a_hybrid_is_saved_and_loaded(tmp_path, hybrid):
    _, vlm, tok = hybrid
    out = str(tmp_path / "again")
    save_vlm(out, vlm, tok)
    again, _ = load_vlm(out)
    assert_same_weights(vlm, again)
    rows = [data_row(tmp_path)]
    exact = answer_logits(vlm, tok, rows)
    assert torch.equal(answer_logits(again, tok, rows), exact)

    half, _ = load_vlm(out, frozen_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = answer_logits(half, tok, rows)
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert (logits - exact).norm() < 0.1 * exact.norm()


# --------------------------------------------------------------------------------------------------
# LLaVA's layout

@pytest.mark.parametrize("tied", [True, False])
def test_transformers_llava_gives_our_logits(tmp_path, tied):
    ours, vlm, tok = new_model(tmp_path, "mlp", tied)
    write_picture(tmp_path)
    out = str(tmp_path / "llava")
    llava.main([ours, "--out", out, "--dtype", "float32"])
    model, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    for problem, names in report.items():
        assert not names, problem

    batch = batch_of(vlm, tok, [data_row(tmp_path)])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
    expected = answer_logits(vlm, tok, [data_row(tmp_path)])
    assert torch.allclose(logits[batch.labels != IGNORE], expected, atol=1e-5)
    assert expected.std() > 0.3
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == tied
    written = load_file(os.path.join(out, "model.safetensors"))
    has_lm_head = any("lm_head" in name for name in written)
    assert has_lm_head != tied  # a tied one is not written twice


def test_the_embedded_base_is_a_llava_too(tmp_path):
    vlm, tok = load_vlm(TINY)
    write_picture(tmp_path)
    out = str(tmp_path / "llava")
    llava.main([TINY, "--out", out, "--dtype", "float32"])
    model = LlavaForConditionalGeneration.from_pretrained(out)
    batch = batch_of(vlm, tok, [data_row(tmp_path)])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
    expected = answer_logits(vlm, tok, [data_row(tmp_path)])
    assert torch.allclose(logits[batch.labels != IGNORE], expected, atol=1e-4)
    assert expected.std() > 1


def test_llavas_processor_gives_our_tokens_and_pixels(tmp_path):
    ours, vlm, tok = new_model(tmp_path, "mlp")
    Image.linear_gradient("L").resize((70, 40)).convert("RGB").save(tmp_path / "p.png")
    out = str(tmp_path / "llava")
    llava.main([ours, "--out", out])
    processor = AutoProcessor.from_pretrained(out)
    messages = [{"role": "user", "content": "<|image|>\nFind angle A."}]
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)
    with Image.open(tmp_path / "p.png") as picture:
        inputs = processor(
            images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")

    batch = batch_of(vlm, tok, [data_row(tmp_path)], answer=False)
    assert torch.equal(inputs.input_ids, batch.input_ids)
    assert torch.allclose(inputs.pixel_values, batch.pixel_values, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What does not fit is refused in one line that names the thing, and nothing is left behind

def replace_tensors(folder, tensors):
    for name in os.listdir(folder):
        if ".safetensors" in name:
            os.remove(os.path.join(folder, name))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, os.path.join(folder, "model.safetensors"))


NORM = "language_model.model.norm.weight"
TOWER = "vision_model.vision_model."


@pytest.mark.parametrize("harm, message", [
    ("missing in the language model", r"llm is not .* are \['model.norm.weight'\]"),
    ("missing in the tower", r"vision is not .* are \['post_layernorm.weight'\]"),
    ("missing in the projector", r"projector.safetensors: .*Missing.* \"up_proj.weight\""),
    ("misshapen", r"llm is not .* are \[\('model.norm.weight', torch.Size\(\[31\]"),
    ("left over in the language model", r"llm is not .* are \['model.more'\]"),
    ("left over in the tower", r"vision is not .* are \['encoder.layers.3.more'\]"),
    ("left over", r"left over vision_model.more: no part"),
    ("separate lm_head", r"says tied, but lm_head.weight is another"),
])
def test_a_released_checkpoint_with_a_wrong_tensor(tmp_path, harm, message):
    folder, *_, tensors = released_folder(tmp_path / "r")
    if harm == "missing in the language model":
        del tensors[NORM]
    elif harm == "missing in the tower":
        del tensors[TOWER + "post_layernorm.weight"]
    elif harm == "missing in the projector":
        del tensors["aligner.up_proj.weight"]
    elif harm == "misshapen":
        tensors[NORM] = torch.ones(31)
    elif harm == "left over in the language model":
        tensors["language_model.model.more"] = torch.ones(2)
    elif harm == "left over in the tower":
        tensors[TOWER + "encoder.layers.3.more"] = torch.ones(2)
    elif harm == "left over":
        tensors["vision_model.more"] = torch.ones(2)
    elif harm == "separate lm_head":
        tensors["language_model.lm_head.weight"] = torch.ones(320, 32)
    replace_tensors(folder, tensors)

    said = refused(released.main, [folder, "--out", str(tmp_path / "ours")])
    assert re.search(message, said), said
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("harm, message", [
    ("config.json", "is no released checkpoint"),
    ("weights", "is no released checkpoint"),
    ("truncated", "model-00002-of-00002.safetensors: "),
    ("a shard", "missing, left over or of another shape are ["),
    ("tokenizer.json", "tokenizer.json"),
    ("kind", "a qwen2 model; released ones are qwen2vlm and multi_modality"),
    ("activation", "activation is not gelu"),
    ("image token", "another image token than the tokenizer, 303"),
])
def test_a_released_folder_that_lacks_something(tmp_path, harm, message):
    folder, *_ = released_folder(tmp_path / "r")
    config = read_json(folder, "config.json")
    shards = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    last_shard = os.path.join(folder, shards[-1])
    if harm in ("config.json", "tokenizer.json"):
        os.remove(os.path.join(folder, harm))
    elif harm == "weights":
        for name in shards:
            os.remove(os.path.join(folder, name))
    elif harm == "truncated":
        os.truncate(last_shard, os.path.getsize(last_shard) - 100)
    elif harm == "a shard":
        os.remove(last_shard)
    elif harm == "kind":
        write_json(config | {"model_type": "qwen2"}, folder, "config.json")
    elif harm == "activation":
        write_json(config | {"projector_hidden_act": "relu"}, folder, "config.json")
    elif harm == "image token":
        write_json(config | {"image_token_index": 302}, folder, "config.json")

    said = refused(released.main, [folder, "--out", str(tmp_path / "ours")])
    assert message in said
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("harm, message", [
    ("missing", r"vision is not .* shape are \['high_res_vision_alpha'\]"),
    ("misshapen", r"another shape are \[\('vision_model.post_layernorm.weight'"),
    ("left over", r"left over vision_model.vision_tower_high.vision_tower.more"),
    ("left over in a layer", r"left over .* \['vision_model.encoder.layers.7.mlp.fc1.bias'\]"),
    ("one encoder", "vision encoder None; known: sam_b_downsample and siglip_large_patch16_384"),
])
def test_a_hybrid_that_does_not_fit(tmp_path, monkeypatch, harm, message):
    sizes = {"sam_b_downsample": SAM, "siglip_large_patch16_384": SIGLIP_OF_HYBRID}
    monkeypatch.setattr(deepseek_vl, "SIZES", sizes)
    folder, _, tensors = hybrid_folder(tmp_path / "r")
    if harm == "missing":
        del tensors[small_models.RELEASED_HIGH + "hd_alpha_downsamples"]
    elif harm == "misshapen":
        tensors[small_models.RELEASED_LOW + "norm.weight"] = torch.ones(31)
    elif harm == "left over":
        tensors[small_models.RELEASED_HIGH + "more"] = torch.ones(2)
    elif harm == "left over in a layer":
        tensors[small_models.RELEASED_LOW + "blocks.7.mlp.fc1.bias"] = torch.ones(2)
    elif harm == "one encoder":
        config = read_json(folder, "config.json")
        del config["vision_config"]["params"]["high_res_cfg"]
        write_json(config, folder, "config.json")
    replace_tensors(folder, tensors)

    said = refused(released.main, [folder, "--out", str(tmp_path / "ours")])
    assert re.search(message, said), said
    assert os.listdir(tmp_path) == ["r"]


def test_a_model_that_the_other_layout_has_no_place_for(tmp_path):
    out = str(tmp_path / "out")
    mlp, _, _ = new_model(tmp_path / "mlp", "mlp")
    gated, _, _ = new_model(tmp_path / "gated", "gated")
    said = refused(released.main, [mlp, "--back_to", out])
    assert f"{mlp}: qwen2 with projector mlp; the released layout: qwen2" in said
    said = refused(llava.main, [gated, "--out", out])
    assert "projector is gated" in said
    config = read_json(mlp, "vlm.json")
    write_json(config | {"post_layernorm": True}, mlp, "vlm.json")
    said = refused(llava.main, [mlp, "--out", out])
    assert "post_layernorm is True in vlm.json; what LLaVA computes is post_layernorm False" in said
    said = refused(released.main, [gated, "--back_to", out, "--like", TINY])
    assert f"--like {TINY}: its tokenizer is not that of {gated}" in said
    assert sorted(os.listdir(tmp_path)) == ["gated", "mlp"]


def test_what_exists_is_not_overwritten(tmp_path):
    folder, *_ = released_folder(tmp_path / "r")
    gated = str(tmp_path / "gated")
    released.main([folder, "--out", gated])
    mlp, _, _ = new_model(tmp_path / "mlp", "mlp")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("not to be lost")
    for main, arguments in [
        (released.main, [folder, "--out"]),
        (released.main, [gated, "--back_to"]),
        (llava.main, [mlp, "--out"]),
    ]:
        said = refused(main, arguments + [str(mine)])
        assert said == f"{mine} exists: delete it or name another folder"
    assert os.listdir(mine) == ["thesis.txt"]

    part = tmp_path / "new.part"
    mine.rename(part)
    said = refused(released.main, [folder, "--out", str(tmp_path / "new")])
    assert said == f"{part} exists: delete it or name another folder"
    assert os.listdir(part) == ["thesis.txt"]


@pytest.mark.parametrize("flags, message", [
    (["--out", "x", "--dtype", "float32"], "--dtype and --like go with --back_to"),
    (["--out", "x", "--like", "y"], "--dtype and --like go with --back_to"),
    (["--out", "x", "--back_to", "y"], "not allowed with argument"),
    ([], "one of the arguments --out --back_to is required"),
])
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        released.main(["model"] + flags)
    assert message in capsys.readouterr().err
