"""The released Math-PUMA checkpoints: into a model folder of ours, once, and back.

    python convert/released.py puma-1.5b --out puma             # then: --init puma
    python convert/released.py out/stage3 --back_to DIR --like puma-1.5b

The first reads the Qwen2 systems (model_type qwen2vlm) and, with deepseek_vl.py, the DeepSeek one
(multi_modality).  The second writes the layout of the Qwen2 systems, whose own class needs
transformers 4.43.  Tokenizer and backbones of what it writes were loaded in 4.43.4: same ids, same
logits.  The model must have their projector: it began as one of them, or with --projector gated.

Encoder layers above the one whose features are read, and the pooling head, do not come along: our
folder has 26 of SigLIP's 27 layers, and what is written back says so.
"""
import argparse
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from convert import deepseek_vl  # noqa: E402
from model import load_tokenizer, load_vlm, read_json, says_it_in_one_line, write_json  # noqa: E402

TEMPLATE = (  # the prompt of the released Qwen2 systems
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STARTS = {  # of the released names of a part's tensors; their ends are ours
    "vision": "vision_model.vision_model.",
    "projector": "aligner.",
    "llm": "language_model.",
}
TOKENIZER_FILES = r"(tokenizer|vocab|special_tokens|added_tokens|preprocessor).*\.json|merges\.txt"


@contextmanager
def new_folder(out):
    """A folder that gets the name `out` when all is written, and is deleted when something fails"""
    part = out.rstrip("/") + ".part"
    for path in (out, part):
        if os.path.exists(path):
            sys.exit(f"{path} exists: delete it or name another folder")
    os.makedirs(part)
    try:
        yield part
        for path in Path(part).rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets only the owner read them
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after the rename nothing has that name


def write_weights(folder, config, tensors):
    os.makedirs(folder, exist_ok=True)
    write_json(config, folder, "config.json")
    # transformers 4.43 refuses a file whose metadata has no "format"
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------
# From the released layout

def split_qwen2(folder, config, tensors):
    """-> entries of vlm.json, chat template, configs of vision and llm, {part: {name: tensor}}"""
    if config.get("projector_hidden_act", "gelu") != "gelu":
        sys.exit(f"{folder}: the projector's activation is not gelu")
    vision_config = config["vision_config"]
    total = vision_config["num_hidden_layers"]
    layer = config.get("vision_feature_layer", -2)
    n_layers = layer % (total + 1)  # -1: all; hidden_states has the input of the first layer, too

    tower = STARTS["vision"]
    never_read = [f"{tower}encoder.layers.{i}." for i in range(n_layers, total)]
    never_read.append(f"{tower}head.")
    names = [(start, part, {"": ""}) for part, start in STARTS.items()]
    parts = deepseek_vl.sort_tensors(folder, tensors, names, tuple(never_read))

    vision_config["num_hidden_layers"] = n_layers
    vision_config["vision_use_head"] = False
    strategy = config.get("vision_feature_select_strategy", "default")
    ours = {
        "vision": "siglip",
        "projector": "gated",
        "post_layernorm": False,
        "drop_first": int(strategy == "default"),
        "after_image": "\n",
        "image_size": vision_config["image_size"],
        "pad_color": None,
    }
    configs = {"vision": vision_config, "llm": config["text_config"]}
    return ours, TEMPLATE, configs, parts


def from_released(folder, out):
    """Write the released checkpoint in `folder` as a model folder."""
    config, tensors = deepseek_vl.read_released(folder)
    kind = config.get("model_type")
    if kind == "qwen2vlm":
        ours, template, configs, parts = split_qwen2(folder, config, tensors)
    elif kind == "multi_modality":
        ours, template, configs, parts = deepseek_vl.split(folder, config, tensors)
    else:
        sys.exit(f"{folder}: a {kind} model; released ones are qwen2vlm and multi_modality")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template

    with new_folder(out) as part:
        for name in ("vision", "llm"):
            write_weights(f"{part}/{name}", configs[name], parts[name])
        save_file(parts["projector"], f"{part}/projector.safetensors")
        tokenizer.save_pretrained(part)
        write_json(ours, part, "vlm.json")

        # Exits when a tensor is missing, left over or of another shape.
        vlm, _ = load_vlm(part, frozen_dtype=torch.bfloat16)
        write_json(vlm.config, part, "vlm.json")  # now with the count and the id of image tokens
        token = vlm.config["image_token_id"]
        if config.get("image_token_index", token) != token:  # DeepSeek's placeholder is another
            sys.exit(f"{folder}: config.json has another image token than the tokenizer, {token}")


# --------------------------------------------------------------------------------------------------
# Back to it

def to_released(model, out, dtype, like):
    """Write our model, with the released projector, in the layout of the released Qwen2 systems.

    like  None, or a released checkpoint whose tokenizer files are copied
    """
    vlm, tokenizer = load_vlm(model, frozen_dtype=getattr(torch, dtype))
    llm = vlm.language_model.config
    if vlm.config["projector"] != "gated" or llm.model_type != "qwen2":
        sys.exit(f"{model}: {llm.model_type} with projector {vlm.config['projector']}; the "
                 "released layout: qwen2 with --projector gated")
    if like and load_tokenizer(like).get_vocab() != tokenizer.get_vocab():
        sys.exit(f"--like {like}: its tokenizer is not that of {model}")

    parts = {"vision": vlm.vision_model, "projector": vlm.projector, "llm": vlm.language_model}
    tensors = {}
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            tensors[STARTS[part] + name] = tensor
    if llm.tie_word_embeddings:
        del tensors["language_model.lm_head.weight"]

    text_config = llm.to_dict()
    text_config["rope_theta"] = llm.rope_parameters["rope_theta"]  # where 4.43 looks for it
    config = {
        "architectures": ["Qwen2vlmForConditionalGeneration"],
        "model_type": "qwen2vlm",
        "image_token_index": vlm.config["image_token_id"],
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "torch_dtype": dtype,
        "vision_feature_layer": -1,  # the last we have; in 4.43 that is before post_layernorm
        "vision_feature_select_strategy": "default" if vlm.config["drop_first"] else "full",
        "vision_config": vlm.vision_model.config.to_dict(),
        "text_config": text_config,
    }
    with new_folder(out) as part:
        write_weights(part, config, tensors)
        if like:
            for name in os.listdir(like):
                if re.fullmatch(TOKENIZER_FILES, name):
                    shutil.copy(f"{like}/{name}", part)
        else:
            write_old_tokenizer(tokenizer, part)


def write_old_tokenizer(tokenizer, folder):
    """As save_pretrained, in a form that transformers 4.43 (tokenizers 0.19) reads as well."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template inside the json
    settings = read_json(folder, "tokenizer_config.json")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(settings, folder, "tokenizer_config.json")

    contents = read_json(folder, "tokenizer.json")
    bpe = contents["model"]
    bpe["merges"] = [" ".join(pair) for pair in bpe["merges"]]  # 0.19 knows no lists there
    write_json(contents, folder, "tokenizer.json")


@says_it_in_one_line
def main(argv=None):
    parser = argparse.ArgumentParser(description="Released checkpoints to our folders and back.")
    parser.add_argument("model", help="a released checkpoint; for --back_to a model or run folder")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--out", help="model folder to write")
    direction.add_argument("--back_to", help="folder to write in the released Qwen2 layout")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"],
                        help="with --back_to (default: bfloat16)")
    parser.add_argument("--like", help="with --back_to: copy its tokenizer files")
    args = parser.parse_args(argv)

    if args.back_to:
        to_released(args.model, args.back_to, args.dtype or "bfloat16", args.like)
    elif args.dtype or args.like:
        parser.error("--dtype and --like go with --back_to")
    else:
        from_released(args.model, args.out)


if __name__ == "__main__":
    main()
