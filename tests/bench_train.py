"""Time one optimizer step of stage 2 at the shapes of the real backbones, with random weights.

    python tests/bench_train.py                # CUDA: Qwen2-1.5B + SigLIP-so400m-384; a CPU: the same, shrunk
    python tests/bench_train.py --system 7b    # CUDA: Qwen2-7B

Every round runs every row of the table once on the same pairs; the table has medians over the rounds, and
ratios taken within a round.  Not counted: compilation, warm-up, reading data.  "ours" is stage2_kl_align.py's
step by its own functions; the rows below it change one thing each, the last two all that the released code
(wwzhuang01/Math-PUMA at commit 0012ba3) does otherwise:
    full logits    (B, L, V) of all positions, in both passes (models/qwen2/modeling_qwen2vlm.py:290-317), as
                   transformers 4.42 (requirements.txt:35) makes them float32
    mask, order    shuffled, with an attention mask (train/qwen2/dataset.py:258-259, 359-365)
    two pictures   the text-rich form has one too, if its row names one (dataset.py:278-283 there)
    LLM gradients  all parts train by default (train/args.py:27); train/qwen2/train_script.py:42-44 freezes
                   the LLM (train_main.py:97-106 there).  The last row has them, the one before has not.
Alike in all rows: model, pairs, dtypes, micro-batch, no checkpointing, AdamW on encoder and projector; kinder
than the original is: no standardized logits, two softmaxes for four, SDPA, no FSDP.
"""
import argparse
import importlib.util
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer  # base of both models' blocks
from bench_kl import CUDA, seconds  # its import puts the scripts' folder on the path
import model
import stage2_kl_align as stage2
from model import IGNORE

def config(llm, tied, vision, image):
    """model.build's dict. llm: H, MLP, layers, heads, kv heads, V; vision: W, MLP, layers, heads."""
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    text = dict(zip(keys + ["num_key_value_heads", "vocab_size"], llm), tie_word_embeddings=tied)
    return {"text_config": text,
            "vision_config": dict(zip(keys, vision), image_size=image, patch_size=14, vision_use_head=False),
            "image_token_id": llm[-1] - 1}

SO400M = (1152, 4304, 27, 16), 384  # 729 image tokens
# "shrunk", for a CPU: widths and V of 1.5b divided by 12, tokens by 9, as deep as it is.  So encoder, LLM and
# lm_head have the shares of the work that they have there.  "smoke" is for the tests.
SYSTEMS = {  # config, pairs a step, pairs a micro-batch, what the tokens below are divided by
    "1.5b": (config((1536, 8960, 28, 12, 2, 151_936), True, *SO400M), 32, 8, 1),
    "7b": (config((3584, 18944, 28, 28, 4, 152_064), False, *SO400M), 16, 4, 1),
    "shrunk": (config((128, 744, 28, 4, 1, 12_672), True, (96, 360, 27, 3), 126), 16, 4, 9),
    "smoke": (config((32, 64, 2, 2, 1, 200), True, (32, 64, 2, 2), 42), 4, 2, 9)}
PROMPT, MORE, ANSWER = (30, 121), 60, (80, 321)  # vision-rich prompt, what the text-rich has more, answer
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989}  # bfloat16 TFLOP/s
RELEASED = dict(compiled=False, bucketed=False, mask=True, full=True)
ROWS = {"ours": {}, "not compiled": dict(compiled=False), "without bucketing": dict(bucketed=False),
        "attention mask": dict(mask=True), "full logits": dict(full=True), "two pictures": dict(twice=True),
        "LLM gradients": dict(llm_grad=True), "released style, frozen LLM, one picture": RELEASED,
        "released style": RELEASED | dict(twice=True, llm_grad=True)}
WARMUP = 2 if CUDA else 1  # steps: compilation, optimizer state, lengths that differ

def needed_flops(config, prompt, answer, strong, causal=.5):
    """Operations stage 2 needs for a pair, without padding. -> {part: count}; (a, b) @ (b, c) counts 2abc

    prompt, answer, strong: tokens of the vision-rich prompt, of the answer, of the whole text-rich form
    causal: the share of the LLM's attention scores that counts.  Backward of attention counts twice its
    forward, as if nothing were computed again.  The frozen LLM has dL/dx, not dL/dW.
    """
    v, t = config["vision_config"], config["text_config"]
    P, W, H = (v["image_size"] // v["patch_size"]) ** 2, v["hidden_size"], t["hidden_size"]
    patches, L = 2 * P * 3 * v["patch_size"] ** 2 * W, P + prompt + answer
    encoder = v["num_hidden_layers"] * (4 * P * W * (2 * W + v["intermediate_size"]) + 4 * P * P * W)
    kv = H // t["num_attention_heads"] * t["num_key_value_heads"]
    linear = 2 * (2 * H * H + 2 * H * kv + 3 * H * t["intermediate_size"])  # of a layer, a token
    llm = lambda L, scores=1: t["num_hidden_layers"] * (L * linear + scores * causal * 4 * L * L * H)
    return {"encoder": 2 * patches + 3 * encoder, "projector": 3 * 2 * P * (W * H + H * H),  # no dL/dpixels
            "student forward": llm(L), "student dL/dx": llm(L, scores=2), "teacher forward": llm(strong),
            "lm_head": 6 * answer * H * t["vocab_size"]}

def make_rows(n, shrink):
    """Pairs as lengths only: texts of so many letters, since rows_of_step sorts by letters."""
    draw = np.random.default_rng(0)
    prompts, answers = ((draw.integers(*bounds, n) // shrink).tolist() for bounds in (PROMPT, ANSWER))
    return [{"id": i, "image_url_2": "picture", "instruction_2": "x" * prompt, "output_2": "y" * answer,
             "lengths": (prompt, answer, prompt + MORE // shrink + answer)}
            for i, prompt, answer in zip(range(n), prompts, answers)]

def make_batches(vlm, parts, twice):
    """Micro-batches of rows -> [(strong, weak)] of random content; twice: a picture in strong too."""
    size, image = vlm.vision_model.config.image_size, vlm.image_token_id  # image: above all random tokens
    def example(row, strong):  # as encode_example lays it out; the answer is the same in both forms
        draw, (prompt, answer, whole) = np.random.default_rng(row["id"]), row["lengths"]
        target = draw.integers(0, image, answer).tolist()
        words = draw.integers(0, image, whole - answer if strong else prompt).tolist()
        words, pixels = [image] * vlm.image_tokens * (twice or not strong) + words, None
        if twice or not strong:
            pixels = torch.from_numpy(draw.uniform(-1, 1, (3, size, size))).float()
        return words + target, [IGNORE] * (len(words) - 1) + target + [IGNORE], pixels
    return [tuple(model.collate([example(row, strong) for row in rows], 0, size).to(vlm.lm_head.device)
                  for strong in (True, False)) for rows in parts]

def hidden_states(vlm, batch, mask):
    """(B, L, H) of all positions. With a mask attention cannot take its fast causal path."""
    x, mask = vlm.embed(batch.input_ids, batch.pixel_values), batch.attention_mask if mask else None
    return vlm.language_model.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state

def full_logits_loss(vlm, strong, weak, args, n_total, mask):
    """Loss and parts of stage 2 from float32 logits of all positions, in plain PyTorch."""
    with torch.no_grad():
        z_t = F.linear(hidden_states(vlm, strong, mask), vlm.lm_head).float()  # (B, L, V)
    z_s = F.linear(hidden_states(vlm, weak, mask), vlm.lm_head).float()  # (B, L, V)
    log_p, log_q = (z[b.labels != IGNORE].log_softmax(-1) for z, b in ((z_t, strong), (z_s, weak)))  # (N, V)
    fkl, rkl = (F.kl_div(*logs, log_target=True, reduction="sum") / n_total
                for logs in ((log_q, log_p), (log_p, log_q)))
    ce = F.cross_entropy(z_s.flatten(0, 1), weak.labels.flatten(), reduction="sum") / n_total  # skips IGNORE
    loss = args.lam * (args.alpha * fkl + (1 - args.alpha) * rkl) + (1 - args.lam) * ce
    return loss, {"kl_teacher_student": fkl, "kl_student_teacher": rkl, "ce": ce}

def train_step(vlm, optimizer, batches, args, full=False, mask=False, llm_grad=False, compiled=True):
    """The loop body of stage2_kl_align.main, one process. -> loss, both KLs and ce, nats a token"""
    vlm.language_model.requires_grad_(llm_grad)
    n_total, found = sum(int((weak.labels != IGNORE).sum()) for _, weak in batches), np.zeros(4)
    run = (lambda batch: hidden_states(vlm, batch, mask)[batch.labels != IGNORE]) if mask else vlm
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        for strong, weak in batches:
            with torch.autocast(weak.labels.device.type, torch.bfloat16, enabled=CUDA):
                if full:
                    loss, parts = full_logits_loss(vlm, strong, weak, args, n_total, mask)
                else:
                    ht, hs, labels = stage2.pair_of_rows(run, run, strong, weak)
                    loss, parts = stage2.kl_align_loss(hs, ht, vlm.lm_head, labels, alpha=args.alpha,
                                                       lam=args.lam, n_total=n_total)
            loss.backward()
            found += [loss.item(), *(x.item() for x in parts.values())]
    assert all((p.grad is not None) == p.requires_grad for p in vlm.parameters())
    torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip)
    optimizer.step()
    vlm.zero_grad()  # the LLM's too, which no optimizer here knows
    return found

def build(config, args, compile_blocks):
    """-> VLM with a frozen LLM, true bfloat16 on CUDA, and the stage's optimizer over the rest."""
    with torch.device("cuda" if CUDA else "cpu"):  # random weights made where they are used
        vlm = model.build(config)
    for name, child in vlm.named_children():  # before the first forward, as in the stage
        child.requires_grad_(name in stage2.TRAINABLE)
    for p in vlm.language_model.parameters() if CUDA else ():
        p.data = p.data.bfloat16()  # not .to(bfloat16): that would round the rotary frequencies too, a buffer
    if compile_blocks:
        torch._dynamo.config.recompile_limit = 64  # all rows together make 10 graphs, the limit is 8
        for block in vlm.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.compile()
    return vlm.train(), stage2.make_optimizer(vlm, args)

def measure(config, shrink, args, rounds, compile_blocks):
    """-> {row: figures or None}, lines on what was left out, needed TFLOP a pair"""
    torch.manual_seed(0)
    vlm, optimizer = build(config, args, compile_blocks)
    data, left_out, memory, work = make_rows((rounds + WARMUP) * args.batch, shrink), [], {}, []
    cases = {name: how for name, how in ROWS.items() if name != "not compiled" or compile_blocks}
    times, found = {name: [] for name in cases}, dict.fromkeys(cases)
    for step in range(rounds + WARMUP):
        bucketed = stage2.rows_of_step(step, data, args, 0, 1, "_2")
        rows = [row for part in bucketed for row in part]
        work.append(sum(sum(needed_flops(config, *row["lengths"]).values()) for row in rows) / 1e12)
        np.random.default_rng(step).shuffle(rows)
        given = [rows[k:k + args.micro_batch] for k in range(0, len(rows), args.micro_batch)]
        for name in list(cases):
            how = {"bucketed": True, "twice": False} | cases[name]
            batches = make_batches(vlm, bucketed if how.pop("bucketed") else given, how.pop("twice"))
            try:
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                times[name].append(seconds(lambda: train_step(vlm, optimizer, batches, args, **how)))
                memory[name] = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
            except torch.OutOfMemoryError:
                left_out.append(f"{name}: out of memory in micro-batches of {args.micro_batch}")
                del cases[name]
            vlm.zero_grad()  # after `except`, whose traceback holds the tensors of a step that did not fit
        print(f"step {step + 1}/{rounds + WARMUP}{' (warm-up)' * (step < WARMUP)}, seconds:",
              ", ".join(f"{name} {times[name][-1]:.2f}" for name in cases), flush=True)
    work = np.array(work[WARMUP:])
    for name in cases:
        t = np.array(times[name][WARMUP:])
        ratio = t / (times["ours"][WARMUP:] if "ours" in cases else np.nan)
        found[name] = {"seconds": np.median(t), "pairs_s": args.batch / np.median(t), "gb": memory[name],
                       "tflops": np.median(work / t), "over_ours": np.median(ratio),
                       "low": ratio.min(), "high": ratio.max()}
    return found, left_out, work.mean() / args.batch

def table(result):
    """The README's table of a run."""
    lines = ["| step | pairs/s | TFLOP/s | MFU | peak memory | time / ours |", "|---|--:|--:|--:|--:|--:|"]
    for name, r in result["rows"].items():
        if r is None:
            lines.append(f"| {name} | out of memory | | | | |")
            continue
        mfu = f"{r['tflops'] / result['peak_tflops']:.0%}" if result["peak_tflops"] else "-"
        gb = f"{r['gb']:.0f} GB" if r["gb"] else "-"
        ratio = f"{r['over_ours']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        lines.append(f"| {name} | {r['pairs_s']:.2f} | {r['tflops']:.3g} | {mfu} | {gb} | {ratio} |")
    return "\n".join(lines)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--system", default="1.5b" if CUDA else "shrunk", choices=list(SYSTEMS), help="shapes")
    add("--rounds", type=int, default=10 if CUDA else 9, help="timed steps of each row")
    add("--micro_batch", type=int, default=None, help="pairs a forward pass (default: the system's)")
    add("--compile", action=argparse.BooleanOptionalAction, default=CUDA, help="blocks, not in released rows")
    add("--out", default=None, help="JSON file (default: tests/results/bench_train_<system>.json)")
    flags = parser.parse_args(argv)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the rows' blocks differ
    shape, batch, micro_batch, shrink = SYSTEMS[flags.system]
    args = stage2.make_parser().parse_args(
        [f"--batch={batch}", f"--micro_batch={flags.micro_batch or micro_batch}"])
    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    peak = next((tflops for key, tflops in PEAKS.items() if key in device), None)
    result = vars(flags) | {"batch": batch, "micro_batch": args.micro_batch, "device": device,
                            "dtype": "bfloat16" if CUDA else "float32", "date": time.strftime("%Y-%m-%d"),
                            "command": " ".join(["python", *sys.argv])}
    result |= {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "triton")
               if importlib.util.find_spec(name)}
    print(*(f"{key}={value}" for key, value in result.items()))
    rows, left_out, tflop = measure(shape, shrink, args, flags.rounds, flags.compile)
    left_out += ["reading data, logging, checkpoints, more than one process"]
    left_out += [] if peak else [f"MFU: no peak known for {device}"]
    left_out += [] if flags.compile else ["compiled blocks"]
    left_out += [] if CUDA else [f"real shapes, bfloat16, peak memory: no CUDA device; {flags.system} ran"]
    result |= {"config": shape, "rows": rows, "left_out": left_out, "peak_tflops": peak, "tflop": tflop}
    print(f"\n{tflop:.4g} TFLOP needed a pair", table(result), "left out:", *left_out, sep="\n")
    path = flags.out or os.path.join(os.path.dirname(__file__), "results", f"bench_train_{flags.system}.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
    print(f"\nwrote {os.path.relpath(path)}")

if __name__ == "__main__":
    main()
