"""Model folders: backbones of others join, load whole or not at all, and are saved bit for bit.

Expected logits come from transformers' own classes and a few lines of torch, not from model.py.
"""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SiglipVisionModel

import data_gen
import eval as evaluation
import model
import stage2_kl_align
import stage3_mm_instruct
from helpers import TINY, batch_of, equal, row, save_picture, weights
from model import IGNORE, encode_example, load_image, load_vlm, new_vlm, save_vlm
from small_models import (P, llama2_tokenizer, llama3_tokenizer, llm_folder, tokenizer,
                          vision_folder)

QWEN_PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\n{}\nFind angle A.<|im_end|>\n"
               "<|im_start|>assistant\n60. †Answer: 60°<|im_end|>")
LLAMA_PROMPT = ("<|begin_of_text|>User: {}\nFind angle A.\n\nAssistant:60. †Answer: 60°"
                "<|end_of_text|>")
QUESTION = row("Find angle A.", "60. †Answer: 60°", "p.png")


@pytest.fixture
def folder(tmp_path):
    save_picture(tmp_path / "p.png", 48)
    return tmp_path


@pytest.fixture
def backbones(tmp_path):
    """The folders of a small Qwen2 and a small SigLIP tower."""
    llm, _ = llm_folder(tmp_path / "llm")
    vision, _ = vision_folder(tmp_path / "vision", "flat")
    return llm, vision


def logits_of(vlm, tokenizer, rows, folder):
    [batch] = batch_of(vlm, tokenizer, rows, folder)
    with torch.no_grad():
        return vlm(batch) @ vlm.lm_head.T


# --------------------------------------------------------------------------------------------------
# Joining

@pytest.mark.parametrize("kind,tied,layout,projector", [
    ("qwen", True, "full", "mlp"),
    ("qwen", False, "prefixed", "gated"),
    ("llama", False, "flat", "mlp")])
def test_any_llm_and_tower_join_and_give_the_logits_of_transformers(
        folder, kind, tied, layout, projector):
    """Both projectors take features from before the last norm, gated one layer earlier."""
    llm_path, llm = llm_folder(folder / "a", kind, tied)
    vision_path, tower = vision_folder(folder / "b", layout)
    vlm, tok = new_vlm(llm_path, vision_path, projector)
    complete = QUESTION | {"folder": str(folder), "where": "row 0"}
    ids, labels, pixels = encode_example(tok, vlm.config, complete)

    with torch.no_grad():
        seen = tower(pixels[None], output_hidden_states=True).hidden_states  # embeddings, 3 layers
        features = seen[-1][0]
        if projector == "gated":
            features = seen[-2][0, 1:]
        x = llm.get_input_embeddings()(torch.tensor([ids])).clone()
        is_image = [token == vlm.config["image_token_id"] for token in ids]
        x[0, is_image] = vlm.projector(features)
        hidden = llm.model(inputs_embeds=x).last_hidden_state[0]
        wanted = (hidden @ llm.lm_head.weight.T)[[label != IGNORE for label in labels]]
    assert torch.allclose(logits_of(vlm, tok, [QUESTION], folder), wanted, atol=1e-4)
    assert wanted.std() > 0.3

    assert vlm.config["image_tokens"] == (P - 1 if projector == "gated" else P)
    assert (vlm.lm_head is vlm.language_model.get_input_embeddings().weight) == tied
    assert all(parameter.dtype == torch.float32 for parameter in vlm.parameters())


def test_the_seed_decides_the_new_projector(backbones):
    first = new_vlm(*backbones, "mlp", seed=1)[0].projector.state_dict()
    again = new_vlm(*backbones, "mlp", seed=1)[0].projector.state_dict()
    other = new_vlm(*backbones, "mlp", seed=2)[0].projector.state_dict()
    assert equal(first, again) and not equal(first, other)


@pytest.mark.parametrize("kind,prompt", [("qwen", QWEN_PROMPT), ("llama", LLAMA_PROMPT)])
def test_prompts_of_the_chat_template_and_of_a_tokenizer_without_one(folder, kind, prompt):
    llm, _ = llm_folder(folder / "llm", kind)
    vision, _ = vision_folder(folder / "vision", "flat")
    vlm, tok = new_vlm(llm, vision, "mlp")
    [batch] = batch_of(vlm, tok, [QUESTION], folder)
    assert tok.decode(batch.input_ids[0]) == prompt.format("<|image|>" * P)
    assert (batch.input_ids == tok.convert_tokens_to_ids("<|image|>")).sum() == P


MAKERS = {
    "qwen2": lambda: tokenizer("qwen"),
    "llama3": llama3_tokenizer,
    "llama2": llama2_tokenizer,
}
CONFIG = {"image_tokens": 3, "image_size": 48, "pad_color": None, "after_image": "\n"}


def tokenizer_of(kind, folder):
    """As a model folder gives it, and the settings of a VLM with it."""
    MAKERS[kind]().save_pretrained(folder)
    tok = model.load_tokenizer(str(folder))
    return tok, CONFIG | {"image_token_id": tok.convert_tokens_to_ids("<|image|>")}


@pytest.mark.parametrize("text", ["Find angle A.", "  Find angle A. \n", "7", "\n\nFind\n"])
@pytest.mark.parametrize("kind", MAKERS)
def test_tokens_are_those_of_the_chat_template(kind, text, folder):
    tok, config = tokenizer_of(kind, folder / "tok")
    for url, words in (("", text), ("p.png", "<|image|>" * 3 + "\n" + text)):
        one = row(text, "60", url) | {"folder": str(folder), "where": "row 0"}
        turn = [{"role": "user", "content": words}]
        options = {"tokenize": True, "return_dict": False}
        wanted = tok.apply_chat_template(turn, add_generation_prompt=True, **options)
        assert encode_example(tok, config, one, answer=False)[0] == wanted

        # with the answer: up to its end mark, before which Llama 2 writes a space
        turn.append({"role": "assistant", "content": "60"})
        whole = tok.apply_chat_template(turn, **options)
        end = len(whole) - whole[::-1].index(tok.eos_token_id)
        answer = whole[len(wanted):end]
        if kind == "llama2":
            del answer[-2]
        assert encode_example(tok, config, one)[0] == wanted + answer


@pytest.mark.parametrize("kind", MAKERS)
def test_special_tokens_typed_by_a_user_stay_text_whatever_the_tokenizer(kind, folder):
    tok, config = tokenizer_of(kind, folder / "tok")
    text = f"What is <|image|> {tok.eos_token} {tok.bos_token or '<|im_start|>'}?"
    plain = row("What is", "60", "p.png") | {"folder": str(folder), "where": "row 0"}
    expected = encode_example(tok, config, plain)[0]
    ids = encode_example(tok, config, plain | {"instruction": text, "output": text})[0]
    for token in tok.get_added_vocab().values():
        if token != tok.unk_token_id:
            assert ids.count(token) == expected.count(token)
    assert tok.decode(ids).count(text) == 2


def test_a_template_writes_the_same_date_every_day(folder):
    tok, _ = tokenizer_of("llama3", folder / "tok")
    turn = [{"role": "user", "content": "7"}]
    assert "Today Date: 26 Jul 2024<|eot_id|>" in tok.apply_chat_template(turn, tokenize=False)
    assert "strftime_now" in MAKERS["llama3"]().chat_template


def test_a_template_that_refuses_a_system_turn(folder):
    """None is sent: nothing is refused in mid-run."""
    tok = tokenizer("qwen")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tok.chat_template = refusal + tok.chat_template
    tok.save_pretrained(folder / "tok")
    tok = model.load_tokenizer(str(folder / "tok"))
    one = row() | {"folder": str(folder), "where": "row 0"}
    assert "Find angle A." in tok.decode(encode_example(tok, CONFIG, one)[0])


def test_of_several_templates_the_default_one_is_used_and_saved(folder, backbones):
    llm, vision = backbones
    tok = tokenizer("qwen")
    template = tok.chat_template
    tok.chat_template = {"default": template, "tool_use": "another one"}
    tok.save_pretrained(llm)
    assert os.path.isdir(os.path.join(llm, "additional_chat_templates"))
    vlm, tok = new_vlm(llm, vision, "mlp")
    assert tok.chat_template == template
    save_vlm(str(folder / "out"), vlm, tok)
    assert load_vlm(str(folder / "out"))[1].chat_template == template


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [17, 1, 0])
def test_the_image_token_goes_into_a_padded_row_or_the_matrix_grows_by_one(
        folder, tied, spare_rows):
    n_tokens = len(tokenizer("qwen"))
    n_rows = n_tokens + spare_rows
    llm_path, llm = llm_folder(folder / "llm", "qwen", tied, n_rows)
    vision, _ = vision_folder(folder / "vision", "flat")
    vlm, tok = new_vlm(llm_path, vision, "mlp")
    old = llm.lm_head.weight
    assert vlm.config["image_token_id"] == n_tokens
    assert len(vlm.lm_head) == vlm.language_model.config.vocab_size == max(n_rows, n_tokens + 1)
    assert torch.equal(vlm.lm_head[:n_rows], old)
    if spare_rows == 0:
        assert torch.allclose(vlm.lm_head[n_rows], old.mean(0), atol=1e-6)
    save_vlm(str(folder / "out"), vlm, tok)
    assert torch.equal(load_vlm(str(folder / "out"))[0].lm_head, vlm.lm_head)


def test_pad_is_eos_where_there_is_no_pad(folder):
    """Rows of different length: nothing may depend on pads being a token of their own."""
    llm, _ = llm_folder(folder / "llm", "llama")
    vision, _ = vision_folder(folder / "vision", "flat")
    vlm, tok = new_vlm(llm, vision, "mlp")
    assert tok.pad_token_id == tok.eos_token_id
    rows = [QUESTION, QUESTION | {"instruction": "Find angle A. " * 5}]
    [batch] = batch_of(vlm, tok, rows, folder)
    assert (batch.labels == tok.eos_token_id).sum() == 2
    alone = torch.cat([logits_of(vlm, tok, [one], folder) for one in rows])
    assert torch.allclose(logits_of(vlm, tok, rows, folder), alone, atol=1e-4)


def test_frozen_parts_are_bfloat16_where_asked_and_stay_so_on_disk(folder, backbones):
    trained = ("vision_model", "projector")
    exact_vlm, tok = new_vlm(*backbones, "mlp", trained=trained)
    save_vlm(str(folder / "exact"), exact_vlm, tok)
    vlm, tok = load_vlm(str(folder / "exact"), "cpu", trained, torch.bfloat16)
    dtypes = {}
    for name, child in vlm.named_children():
        dtypes[name] = {parameter.dtype for parameter in child.parameters()}
    assert dtypes == {"vision_model": {torch.float32}, "projector": {torch.float32},
                      "language_model": {torch.bfloat16}}
    assert vlm.language_model.model.rotary_emb.inv_freq.dtype == torch.float32

    save_vlm(str(folder / "out"), vlm, tok)
    saved = load_file(folder / "out" / "llm" / "model.safetensors")
    assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in saved
    saved = load_file(folder / "out" / "projector.safetensors")
    assert saved["up.weight"].dtype == torch.float32

    exact = logits_of(exact_vlm, tok, [QUESTION], folder)
    rounded = logits_of(vlm, tok, [QUESTION], folder)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.1 * exact.norm()


# --------------------------------------------------------------------------------------------------
# Folders

def test_transformers_loads_the_two_inner_folders_as_they_are(folder, backbones):
    vlm, tok = new_vlm(*backbones, "gated")
    save_vlm(str(folder / "out"), vlm, tok)
    for model_class, name, part in ((AutoModelForCausalLM, "llm", vlm.language_model),
                                    (SiglipVisionModel, "vision", vlm.vision_model)):
        loaded, report = model_class.from_pretrained(
            folder / "out" / name, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert equal(loaded.state_dict(), part.state_dict())


def test_a_saved_folder_loads_bit_for_bit_and_generates_the_same(folder):
    vlm, tok = load_vlm(TINY)
    save_vlm(str(folder / "out"), vlm, tok)
    again, tok_again = load_vlm(str(folder / "out"))
    assert equal(again.state_dict(), vlm.state_dict())
    assert again.config == vlm.config
    assert again.lm_head is again.language_model.get_input_embeddings().weight  # still tied
    assert tok_again("Find angle A. †").input_ids == tok("Find angle A. †").input_ids
    assert tok_again.chat_template == tok.chat_template


def change_tensors(path, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def remove_norm(tensors):
    del tensors["model.norm.weight"]


def misshape_norm(tensors):
    tensors["model.norm.weight"] = torch.ones(31)


def add_tensor(tensors):
    tensors["model.more"] = torch.ones(2)


def add_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize("change,message", [
    (remove_norm, "['model.norm.weight']"),
    (misshape_norm, "[('model.norm.weight', torch.Size([31]), torch.Size([32]))]"),
    (add_tensor, "['model.more']"),
    (add_head, "config.json says tied, but lm_head.weight is another matrix")])
@pytest.mark.parametrize("ours", [True, False])
def test_weights_that_do_not_fit_are_refused_by_name(change, message, ours, folder, backbones):
    """In a folder of ours and in one that joins."""
    llm, vision = backbones
    vlm, tok = new_vlm(llm, vision, "mlp")
    save_vlm(str(folder / "out"), vlm, tok)
    whole = folder / "out" / "llm"
    change_tensors(whole / "model.safetensors", change)
    with pytest.raises(SystemExit) as stopped:
        if ours:
            load_vlm(str(folder / "out"))
        else:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / "out" / name, whole)
            new_vlm(str(whole), vision, "mlp")
    said = stopped.value.code
    assert message in said and str(whole) in said and "\n" not in said


@pytest.mark.parametrize("name", ["up.weight", "more"])
def test_a_projector_that_does_not_fit_is_refused(name, folder):
    shutil.copytree(TINY, folder / "out")
    change_tensors(folder / "out" / "projector.safetensors",
                   lambda tensors: tensors.update({name: torch.zeros(2, 3)}))
    with pytest.raises(SystemExit) as stopped:
        load_vlm(str(folder / "out"))
    said = stopped.value.code
    assert "projector.safetensors: " in said and name in said and "\n" not in said


@model.says_it_in_one_line
def in_one_line(argv):
    llm, vision = argv
    new_vlm(llm, vision, "mlp")


def cut_shard(llm):
    path = os.path.join(llm, "model-00002-of-00002.safetensors")
    os.truncate(path, os.path.getsize(path) - 100)


def lose_shard(llm):
    os.remove(os.path.join(llm, "model-00001-of-00002.safetensors"))


def pickle_weights(llm):
    for name in os.listdir(llm):
        if "safetensors" in name:
            os.remove(os.path.join(llm, name))
    with open(os.path.join(llm, "pytorch_model.bin"), "w", encoding="utf-8") as f:
        f.write("cos\nsystem\n(S'touch owned'\ntR.")


def lose_config(llm):
    os.remove(os.path.join(llm, "config.json"))


def lose_tokenizer(llm):
    os.remove(os.path.join(llm, "tokenizer.json"))


def be_a_mamba(llm):
    path = os.path.join(llm, "config.json")
    config = model.read_json(path)
    config["model_type"] = "mamba"
    model.write_json(config, path)


@pytest.mark.parametrize("harm,message", [
    (cut_shard, "only safetensors are read"),
    (lose_shard, "only safetensors are read"),
    (pickle_weights, "only safetensors are read"),
    (lose_config, "No such file or directory: '.*llm/config.json'"),
    (lose_tokenizer, "No such file or directory: '.*llm/tokenizer.json'"),
    (be_a_mamba, "llm: a mamba model; can be used: qwen2, llama, ")])
def test_a_folder_that_is_no_language_model_is_refused(harm, message, backbones, monkeypatch):
    llm, vision = backbones
    harm(llm)
    monkeypatch.chdir(os.path.dirname(llm))
    with pytest.raises(SystemExit, match=message) as stopped:
        in_one_line([llm, vision])
    assert "\n" not in stopped.value.code
    assert not os.path.exists("owned")


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "7", '{"a": ', b"\xff\xfe"])
@pytest.mark.parametrize("name", [
    "vlm.json", "tokenizer.json", "tokenizer_config.json", "llm/config.json", "vision/config.json"])
def test_a_json_file_that_is_not_what_it_should_be_is_one_line(name, content, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "m" / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([str(tmp_path / "m"), "--ask", "7*8="])
    said = stopped.value.code
    assert str(tmp_path / "m" / os.path.dirname(name)) in said and "\n" not in said


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": ', "null"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_and_so_in_the_folder_of_a_language_model(name, content, backbones):
    llm, vision = backbones
    with open(os.path.join(llm, name), "w", encoding="utf-8") as f:
        f.write(content)
    with pytest.raises(SystemExit, match=llm) as stopped:
        in_one_line([llm, vision])
    assert "\n" not in stopped.value.code


def test_tokenizers_that_do_not_fit(tmp_path, backbones):
    _, vision = backbones
    small, _ = llm_folder(tmp_path / "small", rows=300)  # its tokenizer has tokens up to 302
    with pytest.raises(SystemExit, match="tokens up to 303, the embedding .* 300 rows"):
        new_vlm(small, vision, "mlp")
    endless, _ = llm_folder(tmp_path / "endless", tok=tokenizer("qwen", eos_token=None))
    with pytest.raises(SystemExit, match="no eos_token"):
        new_vlm(endless, vision, "mlp")


def test_names_that_are_no_folder(backbones):
    llm, vision = backbones
    for name in ("/no/such", "some/model"):  # an id is no folder: nothing is downloaded
        with pytest.raises(SystemExit, match=f"No such file or directory: '{name}/config.json'"):
            in_one_line([name, vision])
        with pytest.raises(SystemExit, match=f"No such file or directory: '{name}/config.json'"):
            in_one_line([llm, name])
    with pytest.raises(SystemExit, match="holds no model: .*goes to --llm"):
        load_vlm(llm)


# --------------------------------------------------------------------------------------------------
# Training

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("set") / "data")
    data_gen.main(["--out", folder, "--n", "12", "--n_test", "2"])
    return folder


def short_run(data, out, **changes):
    values = {"data": data, "out": out, "batch": 2, "micro_batch": 2, "steps": 1, "lr": 1e-3}
    line = ["--no-evaluate"]
    for flag, value in (values | changes).items():
        line += [f"--{flag}", str(value)]
    return line


def test_from_a_qwen_and_a_siglip_folder_through_stages_2_and_3_to_the_table(
        tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llm, language_model = llm_folder(tmp_path / "Qwen2")
    vision, _ = vision_folder(tmp_path / "siglip", "full")
    joined = {"llm": llm, "vision": vision, "projector": "gated"}
    stage2_kl_align.main(short_run(data, "out/stage2", steps=2, **joined))
    after, _ = load_vlm("out/stage2")
    before, _ = new_vlm(llm, vision, "gated", seed=3407)
    assert torch.equal(after.lm_head, language_model.lm_head.weight)
    assert not torch.equal(after.projector.up_proj.weight, before.projector.up_proj.weight)
    assert "projector: 3,072 parameters, trained" in capsys.readouterr().out

    stage3_mm_instruct.main(short_run(data, "out/stage3", init="out/stage2"))
    evaluation.main(["out/stage3", "--data", data, "--max_new_tokens", "4"])
    assert "relative gap" in capsys.readouterr().out


def test_resuming_a_joined_model_is_exact(tmp_path, data, backbones):
    llm, vision = backbones
    joined = {"llm": llm, "vision": vision, "steps": 2, "save_every": 1}
    stage2_kl_align.main(short_run(data, tmp_path / "a", **joined))
    shutil.copytree(tmp_path / "a" / "step-1", tmp_path / "b" / "step-1")
    stage2_kl_align.main(short_run(data, tmp_path / "b", **joined))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_pixels_of_the_joined_model_have_its_size(folder, backbones):
    vlm, tok = new_vlm(*backbones, "mlp")
    save_picture(folder / "large.png", 300)
    [batch] = batch_of(vlm, tok, [QUESTION | {"image_url": "large.png"}], folder)
    assert torch.equal(batch.pixel_values[0], load_image(folder / "large.png", 48))


def test_the_folder_says_how_it_is_put_together(folder, backbones):
    vlm, tok = new_vlm(*backbones, "gated")
    save_vlm(str(folder / "out"), vlm, tok)
    with open(folder / "out" / "vlm.json", encoding="utf-8") as f:
        config = json.load(f)
    assert config == {
        "vision": "siglip", "projector": "gated", "post_layernorm": False, "drop_first": 1,
        "after_image": "\n", "image_size": 48, "pad_color": None, "image_tokens": P - 1,
        "image_token_id": tok.convert_tokens_to_ids("<|image|>")}
