"""Memory of one process in stage 3, by arithmetic, for the README's table. A minute on a CPU.

    python tests/count_memory.py    # writes tests/results/memory.json

One row of 2,048 tokens, all of them answers, with one picture.  What autograd keeps (activations)
is counted on small runs at the real widths, under bfloat16 autocast: it grows by the same amount
with each layer, and in a layer with each token.  The rest is arithmetic:

    state        16 bytes a weight: float32 weight, gradient, AdamW's two moments; / processes
    whole        what --shard holds together through a step: embedding, lm_head, projector, and
                 lm_head's gradient, 4 bytes each
    in flight    weights and gradients of two layers of the LLM, 8 bytes a weight
    recompute    the activations of one layer at a time
    logits       14 bytes: bfloat16 and its gradient, float32, its log-softmax and gradient
"""
import argparse
import json
import os
import sys

import torch
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          SiglipVisionConfig, SiglipVisionModel)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from bench_train import SO400M, SYSTEMS  # noqa: E402
from model import VLM, recompute  # noqa: E402

TOKENS = 2048  # of a row
DEEPSEEK = {  # deepseek-math-7b's config.json
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 102_400,
    "tie_word_embeddings": False,
}
LLMS = {
    "qwen2-1.5b": (Qwen2ForCausalLM, Qwen2Config, SYSTEMS["1.5b"].text_config),
    "qwen2-7b": (Qwen2ForCausalLM, Qwen2Config, SYSTEMS["7b"].text_config),
    "deepseek-math-7b": (LlamaForCausalLM, LlamaConfig, DEEPSEEK),
}
COLUMNS = [(1, False), (1, True), (4, False), (4, True), (8, False), (8, True)]


def kept_by(module, **inputs):
    """Bytes that autograd keeps for the backward pass of one forward, without the weights."""
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: its place stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            module(**inputs)
    return sum(n_bytes for n_bytes, _ in kept.values())


def llm_activations(name, again):
    """Bytes for TOKENS tokens, from runs with 1 and 2 layers on 64 and 128 tokens."""
    model_class, config_class, text = LLMS[name]
    counted = {}
    for layers in (1, 2):
        small = text | {"num_hidden_layers": layers, "vocab_size": 8}
        llm = model_class(config_class(**small)).train()
        if again:
            recompute(VLM(None, None, llm, {}))
        for tokens in (64, 128):
            x = torch.randn(1, tokens, text["hidden_size"], requires_grad=True)
            counted[layers, tokens] = kept_by(llm.model, inputs_embeds=x, use_cache=False)

    def at_all_tokens(layers):
        a_token = (counted[layers, 128] - counted[layers, 64]) / 64
        return counted[layers, 64] + (TOKENS - 64) * a_token

    a_layer = at_all_tokens(2) - at_all_tokens(1)
    return at_all_tokens(1) + (text["num_hidden_layers"] - 1) * a_layer


def vision_activations():
    """Bytes for one picture through the encoder, from runs with 1 and 2 layers."""
    counted = []
    for layers in (1, 2):
        encoder = SiglipVisionModel(SiglipVisionConfig(**SO400M | {"num_hidden_layers": layers}))
        counted.append(kept_by(encoder, pixel_values=torch.randn(1, 3, 384, 384)))
    return counted[0] + (SO400M["num_hidden_layers"] - 1) * (counted[1] - counted[0])


def weights_of(name):
    """-> weights of the whole system with an mlp projector, of what is in no layer, of a layer"""
    model_class, config_class, text = LLMS[name]
    with torch.device("meta"):
        llm = model_class(config_class(**text))
        encoder = SiglipVisionModel(SiglipVisionConfig(**SO400M))
    hidden = text["hidden_size"]
    projector = SO400M["hidden_size"] * hidden + hidden + hidden * hidden + hidden
    everything = llm.num_parameters() + encoder.num_parameters() + projector
    a_layer = sum(parameter.numel() for parameter in llm.model.layers[0].parameters())
    in_no_layer = llm.num_parameters() - len(llm.model.layers) * a_layer + projector
    return everything, in_no_layer, a_layer


def count(name):
    """-> {"4 recompute": gigabytes, ...} for COLUMNS"""
    everything, in_no_layer, a_layer = weights_of(name)
    text = LLMS[name][2]
    lm_head = text["vocab_size"] * text["hidden_size"]
    logits = 14 * TOKENS * text["vocab_size"]
    pictures = vision_activations()
    plain = llm_activations(name, again=False)
    one_layer = plain / text["num_hidden_layers"]  # what is made again at a time
    activations = {False: plain, True: llm_activations(name, again=True) + one_layer}
    result = {}
    for world, again in COLUMNS:
        total = 16 * everything / world + logits + pictures + activations[again]
        if world > 1:
            total += 4 * in_no_layer + 4 * lm_head + 8 * 2 * a_layer
        result[f"{world} recompute" if again else f"{world}"] = round(total / 1e9, 1)
    return result


def table(result):
    lines = ["| | 1 GPU | `--recompute` | 4 GPUs, `--shard` | both | 8 GPUs, `--shard` | both |",
             "|---|" + "--:|" * len(COLUMNS)]
    for name, row in result.items():
        lines.append(f"| {name} | " + " | ".join(f"{value} GB" for value in row.values()) + " |")
    return "\n".join(lines)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    result = {name: count(name) for name in LLMS}
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "memory.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
    print(table(result))


if __name__ == "__main__":
    main()
