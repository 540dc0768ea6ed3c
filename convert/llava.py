"""Our model as a LlavaForConditionalGeneration of transformers, once.

    python convert/llava.py out/stage3 --out llava-model

What is written loads in transformers (tried: 5.17 and 5.24) and gives the same logits, with
--dtype float32 to the last bit; the default, bfloat16, rounds weights that were trained:

    model = LlavaForConditionalGeneration.from_pretrained("llava-model")
    processor = AutoProcessor.from_pretrained("llava-model")
    messages = [{"role": "user", "content": "<|image|>\\n" + question}]
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")

It is for models whose features are those before the encoder's last norm and whose projector is
mlp, which is what LLaVA has: tiny/ and what began with it (then without the "\\n" above, see
after_image in vlm.json), or with `--llm --vision --projector mlp`; not for the gated projector.
"""
import argparse
import os
import sys

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from convert.released import new_folder  # noqa: E402
from model import IMAGE_TOKEN, load_vlm, says_it_in_one_line, write_json  # noqa: E402

NAMES = {  # starts of names: ours -> LLaVA's
    "vision_model.": "model.vision_tower.",
    "projector.up.": "model.multi_modal_projector.linear_1.",
    "projector.down.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


def check(model, config):
    """Exits when LLaVA has no place for what this model does."""
    needed = {
        "projector": "mlp",
        "post_layernorm": False,  # vision_feature_layer -1 is taken before that norm
        "drop_first": 0,  # LLaVA can drop the first, but no model with this projector does
        "pad_color": None,
    }
    for key, value in needed.items():
        if config[key] != value:
            sys.exit(f"{model}: {key} is {config[key]} in vlm.json; what LLaVA computes is {key} "
                     f"{value}: a model that began with tiny/, or with --projector mlp")


def write_llava(model, out, dtype):
    vlm, tokenizer = load_vlm(model, frozen_dtype=dtype)
    check(model, vlm.config)
    vision = vlm.vision_model.config
    side = vlm.config["image_size"]

    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=vlm.language_model.config.to_dict(),
        image_token_index=vlm.config["image_token_id"],
        image_seq_length=vlm.config["image_tokens"],
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    tensors = {}
    for name, tensor in vlm.state_dict().items():
        for ours, llava in NAMES.items():
            if name.startswith(ours):
                tensors[llava + name.removeprefix(ours)] = tensor
    with torch.device("meta"):  # no memory, no random numbers: all weights are put in
        llava_model = LlavaForConditionalGeneration(config)
    llava_model.load_state_dict(tensors, assign=True)

    image_processor = {  # as model.load_image
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    with new_folder(out) as part:
        llava_model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_json(image_processor, part, "preprocessor_config.json")
        write_json(processor, part, "processor_config.json")


@says_it_in_one_line
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model folder or run folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    write_llava(args.model, args.out, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
