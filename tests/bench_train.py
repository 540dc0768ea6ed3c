"""Time one optimizer step of stage 2 at the shapes of the real backbones, with random weights.

    python tests/bench_train.py                # CUDA: Qwen2-1.5B + SigLIP-so400m-384; CPU: shrunk
    python tests/bench_train.py --system 7b    # CUDA: Qwen2-7B

Every round runs every row of the table once on the same pairs; the table has medians over the
rounds, and ratios taken within a round.  Not counted: compilation, warm-up, reading data.  "ours"
is stage2_kl_align.py's step by its own functions; the rows below it change one thing each, the last
two all that the released code (wwzhuang01/Math-PUMA at commit 0012ba3) does otherwise:

    full logits    (B, L, V) of all positions, in both passes (models/qwen2/modeling_qwen2vlm.py:
                   290-317), as transformers 4.42 (requirements.txt:35) makes them float32
    mask, order    shuffled, with an attention mask (train/qwen2/dataset.py:258-259, 359-365)
    two pictures   the text-rich form has one too, if its row names one (dataset.py:278-283 there)
    LLM gradients  all parts train by default (train/args.py:27); train/qwen2/train_script.py:42-44
                   freezes the LLM (train_main.py:97-106 there).  The last row has them, the one
                   before has not.

Alike in all rows: model, pairs, dtypes, micro-batch, no checkpointing of blocks, AdamW on encoder
and projector; kinder than the original is: no standardized logits, two softmaxes for four, SDPA, no
FSDP.
"""
import argparse
import functools
import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer  # base of both models' blocks

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import stage2_kl_align as stage2  # noqa: E402
from model import IGNORE, VLM, Projector, collate  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WARMUP = 2 if CUDA else 1  # steps: compilation, optimizer state, lengths that differ
PEAKS = {  # bfloat16 TFLOP/s, dense; the first name that the device's contains
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
}

# Tokens of a pair, divided by the system's shrink
PROMPT = (30, 121)  # of the vision-rich prompt without its picture: from, below
ANSWER = (80, 321)  # from, below
MORE = 60  # that the text-rich prompt has more


@dataclass
class System:
    """Shapes of a model, in the words of Hugging Face's config.json, and of a step."""
    text_config: dict
    vision_config: dict
    batch: int  # pairs a step
    micro_batch: int  # pairs a forward pass
    shrink: int = 1  # what the tokens above are divided by

    @property
    def image_tokens(self):
        """P of model.py"""
        patches_a_side = self.vision_config["image_size"] // self.vision_config["patch_size"]
        return patches_a_side ** 2


SO400M = {  # SigLIP's, 729 image tokens
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
SYSTEMS = {
    "1.5b": System(
        batch=32,
        micro_batch=8,
        vision_config=SO400M,
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "7b": System(
        batch=16,
        micro_batch=4,
        vision_config=SO400M,
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "tie_word_embeddings": False,
        },
    ),
    # For a CPU: widths and V of 1.5b divided by 12, tokens by 9, as deep as it is.  So encoder, LLM
    # and lm_head have the shares of the work that they have there.
    "shrunk": System(
        batch=16,
        micro_batch=4,
        shrink=9,
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 360,
            "num_hidden_layers": 27,
            "num_attention_heads": 3,
            "image_size": 126,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "hidden_size": 128,
            "intermediate_size": 744,
            "num_hidden_layers": 28,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": 12_672,
            "tie_word_embeddings": True,
        },
    ),
    "smoke": System(  # for the tests
        batch=4,
        micro_batch=2,
        shrink=9,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 42,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 200,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass
class Variant:
    """How a row of the table makes its step; the defaults are ours."""
    compiled: bool = True  # the blocks, where --compile has compiled them
    bucketed: bool = True  # rows alike in length share a micro-batch
    mask: bool = False  # attention gets one
    full_logits: bool = False  # of all positions, in float32
    two_pictures: bool = False  # the text-rich form has one too
    llm_grad: bool = False  # the LLM's weights get gradients, though nothing uses them


RELEASED = {"compiled": False, "bucketed": False, "mask": True, "full_logits": True}
ROWS = {
    "ours": Variant(),
    "not compiled": Variant(compiled=False),
    "without bucketing": Variant(bucketed=False),
    "attention mask": Variant(mask=True),
    "full logits": Variant(full_logits=True),
    "two pictures": Variant(two_pictures=True),
    "LLM gradients": Variant(llm_grad=True),
    "released style, frozen LLM, one picture": Variant(**RELEASED),
    "released style": Variant(**RELEASED, two_pictures=True, llm_grad=True),
}


# --------------------------------------------------------------------------------------------------
# The work

def needed_flops(system, prompt, answer, strong, causal=0.5):
    """Operations that stage 2 needs for a pair, without padding. -> {part: count}

    (a, b) @ (b, c) counts 2 a b c.  Backward of attention counts twice its forward, as if nothing
    were computed again.  The frozen LLM has dL/dx, not dL/dW.

    prompt  tokens of the vision-rich prompt without its picture
    answer  tokens of the answer
    strong  tokens of the whole text-rich form
    causal  the share of the LLM's attention scores that counts
    """
    vision = system.vision_config
    P = system.image_tokens
    W = vision["hidden_size"]
    patches = 2 * P * 3 * vision["patch_size"] ** 2 * W
    vision_products = 4 * P * W * (2 * W + vision["intermediate_size"])
    vision_attention = 4 * P * P * W
    encoder = vision["num_hidden_layers"] * (vision_products + vision_attention)

    text = system.text_config
    H = text["hidden_size"]
    kv_width = H // text["num_attention_heads"] * text["num_key_value_heads"]
    products_a_token = 2 * (2 * H * H + 2 * H * kv_width + 3 * H * text["intermediate_size"])

    def llm(n_tokens, score_passes):
        attention = score_passes * causal * 4 * n_tokens ** 2 * H
        return text["num_hidden_layers"] * (n_tokens * products_a_token + attention)

    weak = P + prompt + answer
    return {
        "encoder": 2 * patches + 3 * encoder,  # no dL/dpixels
        "projector": 3 * 2 * P * (W * H + H * H),
        "student forward": llm(weak, score_passes=1),
        "student dL/dx": llm(weak, score_passes=2),
        "teacher forward": llm(strong, score_passes=1),
        "lm_head": 6 * answer * H * text["vocab_size"],
    }


def needed_tflop(system, rows):
    total = 0
    for row in rows:
        total += sum(needed_flops(system, *row["lengths"]).values())
    return total / 1e12


# --------------------------------------------------------------------------------------------------
# Model and batches

def build(system, args, compile_blocks):
    """-> VLM with a frozen LLM, true bfloat16 on CUDA, and the stage's optimizer over the rest"""
    text_config = Qwen2Config(**system.text_config)
    vision_config = SiglipVisionConfig(**system.vision_config)
    with torch.device(DEVICE):  # random weights made where they are used
        language_model = Qwen2ForCausalLM(text_config)
        vision_model = SiglipVisionModel(vision_config)
        projector = Projector(vision_config.hidden_size, text_config.hidden_size)
    config = {
        "drop_first": 0,
        "image_size": vision_config.image_size,
        "image_tokens": system.image_tokens,
        "image_token_id": text_config.vocab_size - 1,
    }
    vlm = VLM(vision_model, projector, language_model, config)

    for name, child in vlm.named_children():  # before the first forward, as in the stage
        child.requires_grad_(name in stage2.TRAINABLE)
    if CUDA:
        # Not language_model.to(bfloat16): that would round the rotary frequencies too, a buffer.
        for parameter in language_model.parameters():
            parameter.data = parameter.data.bfloat16()
    if compile_blocks:
        torch._dynamo.config.recompile_limit = 64  # all rows together make 10 graphs, default 8
        for block in vlm.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.compile()
    optimizer = stage2.make_optimizer(vlm, args)
    for group in optimizer.param_groups:
        group["lr"] = args.lr  # the stage does so in each step
    return vlm, optimizer


def make_rows(n_rows, shrink):
    """Pairs as lengths only. A text has a letter a token, since rows_of_step sorts by letters."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(*PROMPT, n_rows) // shrink
    answers = generator.integers(*ANSWER, n_rows) // shrink
    rows = []
    for number in range(n_rows):
        prompt = int(prompts[number])
        answer = int(answers[number])
        strong = prompt + MORE // shrink + answer
        rows.append({
            "id": number,
            "image_url_2": "picture",
            "instruction_2": "x" * prompt,
            "output_2": "y" * answer,
            "lengths": (prompt, answer, strong),
        })
    return rows


def make_example(vlm, row, is_strong, has_picture):
    """A form of a pair, of random content, as encode_example lays it out; both answer alike."""
    prompt, answer, strong = row["lengths"]
    image = vlm.config["image_token_id"]  # above all random tokens
    generator = np.random.default_rng(row["id"])
    target = generator.integers(0, image, answer).tolist()
    n_words = strong - answer if is_strong else prompt
    words = generator.integers(0, image, n_words).tolist()

    pixels = None
    if has_picture:
        size = vlm.config["image_size"]
        words = [image] * vlm.config["image_tokens"] + words
        pixels = torch.from_numpy(generator.uniform(-1, 1, (3, size, size))).float()
    labels = [IGNORE] * (len(words) - 1) + target + [IGNORE]
    return words + target, labels, pixels


def make_batches(vlm, micro_batches, two_pictures):
    """Lists of rows -> [(strong, weak)], a pair of Batch for each list"""
    size = vlm.config["image_size"]
    device = vlm.lm_head.device
    batches = []
    for rows in micro_batches:
        strong = [make_example(vlm, row, True, two_pictures) for row in rows]
        weak = [make_example(vlm, row, False, True) for row in rows]
        batches.append((
            collate(strong, 0, size).to(device),
            collate(weak, 0, size).to(device),
        ))
    return batches


# --------------------------------------------------------------------------------------------------
# One step

def hidden_states(vlm, batch, mask):
    """(B, L, H) of all positions. With a mask attention cannot take its fast causal path."""
    x = vlm.embed(batch.input_ids, batch.pixel_values)  # (B, L, H)
    attention_mask = batch.attention_mask if mask else None
    output = vlm.language_model.model(
        inputs_embeds=x, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state


def full_logits_loss(vlm, strong, weak, args, n_answer_tokens, mask):
    """Loss and parts of stage 2 from float32 logits of all positions, in plain PyTorch."""
    with torch.no_grad():
        z_t = F.linear(hidden_states(vlm, strong, mask), vlm.lm_head).float()  # (B, L, V)
    z_s = F.linear(hidden_states(vlm, weak, mask), vlm.lm_head).float()  # (B, L, V)

    ln_p = z_t[strong.labels != IGNORE].log_softmax(-1)  # (N, V)
    ln_q = z_s[weak.labels != IGNORE].log_softmax(-1)  # (N, V)
    fkl = F.kl_div(ln_q, ln_p, log_target=True, reduction="sum") / n_answer_tokens
    rkl = F.kl_div(ln_p, ln_q, log_target=True, reduction="sum") / n_answer_tokens
    ce_sum = F.cross_entropy(z_s.flatten(0, 1), weak.labels.flatten(), reduction="sum")
    ce = ce_sum / n_answer_tokens  # cross_entropy skips IGNORE

    loss = args.lam * (args.alpha * fkl + (1 - args.alpha) * rkl) + (1 - args.lam) * ce
    return loss, {"kl_teacher_student": fkl, "kl_student_teacher": rkl, "ce": ce}


def align_loss(vlm, strong, weak, args, n_answer_tokens, mask):
    """The same as the stage computes it."""

    def masked(batch):  # the VLM's forward, but for the mask
        return hidden_states(vlm, batch, True)[batch.labels != IGNORE]

    run = masked if mask else vlm
    ht, hs, labels = stage2.pair_of_rows(run, run, strong, weak)
    return stage2.kl_align_loss(
        hs, ht, vlm.lm_head, labels, alpha=args.alpha, lam=args.lam, n_total=n_answer_tokens)


def train_step(vlm, optimizer, batches, args, variant):
    """The loop body of stage2_kl_align.main, one process. -> {"loss", both KLs, "ce"}"""
    vlm.language_model.requires_grad_(variant.llm_grad)
    # The stage's loss has no gradient of lm_head (tied: nor has the embedding, the same matrix).
    vlm.lm_head.requires_grad_(variant.llm_grad and variant.full_logits)
    loss_of = full_logits_loss if variant.full_logits else align_loss
    device = vlm.lm_head.device.type
    n_answer_tokens = 0
    for _, weak in batches:
        n_answer_tokens += int((weak.labels != IGNORE).sum())

    sums = {}
    stance = "default" if variant.compiled else "force_eager"
    with torch.compiler.set_stance(stance):
        for strong, weak in batches:
            with torch.autocast(device, torch.bfloat16, enabled=CUDA):
                loss, parts = loss_of(vlm, strong, weak, args, n_answer_tokens, variant.mask)
            loss.backward()
            parts["loss"] = loss
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()

    for name, parameter in vlm.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip)
    optimizer.step()
    vlm.zero_grad()  # the LLM's too, which no optimizer here knows
    return {name: value.item() for name, value in sums.items()}


# --------------------------------------------------------------------------------------------------
# The measurement

def timed(run):
    """-> seconds of one call, peak memory in GB on CUDA"""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if not CUDA:
        return time.perf_counter() - started, None
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9


def measure(system, args, rounds, compile_blocks):
    """-> {row: figures, or None: out of memory}, lines on what was left out, needed TFLOP a pair"""
    torch.manual_seed(0)
    vlm, optimizer = build(system, args, compile_blocks)
    n_steps = WARMUP + rounds
    data = make_rows(n_steps * args.batch, system.shrink)
    variants = dict(ROWS)
    if not compile_blocks:
        del variants["not compiled"]
    found = dict.fromkeys(variants)
    times = {name: [] for name in variants}
    memory = {}
    left_out = []
    work = []  # TFLOP that each step needs

    for step in range(n_steps):
        bucketed = stage2.rows_of_step(step, data, args, 0, 1)
        rows = sum(bucketed, [])
        work.append(needed_tflop(system, rows))
        np.random.default_rng(step).shuffle(rows)
        shuffled = []
        for start in range(0, len(rows), args.micro_batch):
            shuffled.append(rows[start:start + args.micro_batch])

        for name, variant in list(variants.items()):
            micro_batches = bucketed if variant.bucketed else shuffled
            batches = make_batches(vlm, micro_batches, variant.two_pictures)
            run = functools.partial(train_step, vlm, optimizer, batches, args, variant)
            try:
                seconds, memory[name] = timed(run)
                times[name].append(seconds)
            except torch.OutOfMemoryError:
                left_out.append(f"{name}: out of memory in micro-batches of {args.micro_batch}")
                del variants[name]
            # After `except`, whose traceback holds the tensors of a step that did not fit.
            vlm.zero_grad()
        last = ", ".join(f"{name} {times[name][-1]:.2f}" for name in variants)
        note = " (warm-up)" if step < WARMUP else ""
        print(f"step {step + 1}/{n_steps}{note}, seconds: {last}", flush=True)

    work = np.array(work[WARMUP:])
    ours = np.array(times["ours"][WARMUP:]) if "ours" in variants else np.nan
    for name in variants:
        seconds = np.array(times[name][WARMUP:])
        ratio = seconds / ours
        found[name] = {
            "seconds": np.median(seconds),
            "pairs_s": args.batch / np.median(seconds),
            "gb": memory[name],
            "tflops": np.median(work / seconds),
            "over_ours": np.median(ratio),
            "low": ratio.min(),
            "high": ratio.max(),
        }
    return found, left_out, work.mean() / args.batch


def table(result):
    """The README's table of a run."""
    lines = [
        "| step | pairs/s | TFLOP/s | MFU | peak memory | time / ours |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["rows"].items():
        if row is None:
            lines.append(f"| {name} | out of memory | | | | |")
            continue
        mfu = "-"
        if result["peak_tflops"]:
            mfu = f"{row['tflops'] / result['peak_tflops']:.0%}"
        memory = f"{row['gb']:.0f} GB" if row["gb"] else "-"
        ratio = f"{row['over_ours']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"| {name} | {row['pairs_s']:.2f} | {row['tflops']:.3g} | {mfu} | {memory} | "
                     f"{ratio} |")
    return "\n".join(lines)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--system", default="1.5b" if CUDA else "shrunk", choices=list(SYSTEMS), help="shapes")
    add("--rounds", type=int, default=10 if CUDA else 9, help="timed steps of each row")
    add("--micro_batch", type=int, help="pairs a forward pass (default: the system's)")
    add("--compile", action=argparse.BooleanOptionalAction, default=CUDA,
        help="blocks, not in released rows")
    add("--out", help="JSON file (default: tests/results/bench_train_<system>.json)")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse_args(argv)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # blocks differ
    system = SYSTEMS[flags.system]
    micro_batch = flags.micro_batch or system.micro_batch
    args = stage2.make_parser().parse_args(
        [f"--batch={system.batch}", f"--micro_batch={micro_batch}"])
    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    peak = None
    for name, tflops in PEAKS.items():
        if peak is None and name in device:
            peak = tflops

    result = vars(flags) | {
        "batch": system.batch,
        "micro_batch": micro_batch,
        "device": device,
        "dtype": "bfloat16" if CUDA else "float32",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if stage2.triton:
        result["triton"] = stage2.triton.__version__
    print(*(f"{key}={value}" for key, value in result.items()))
    rows, left_out, tflop = measure(system, args, flags.rounds, flags.compile)

    left_out.append("reading data, logging, checkpoints, more than one process")
    if peak is None:
        left_out.append(f"MFU: no peak known for {device}")
    if not flags.compile:
        left_out.append("compiled blocks")
    if not CUDA:
        left_out.append("real shapes, bfloat16, peak memory: no CUDA device; "
                        f"{flags.system} ran")
    result["config"] = {
        "text_config": system.text_config,
        "vision_config": system.vision_config,
        "image_token_id": system.text_config["vocab_size"] - 1,
    }
    result["rows"] = rows
    result["left_out"] = left_out
    result["peak_tflops"] = peak
    result["tflop"] = tflop
    print(f"\n{tflop:.4g} TFLOP needed a pair")
    print(table(result))
    print("left out:", *left_out, sep="\n")

    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
    path = flags.out or os.path.join(results, f"bench_train_{flags.system}.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
    print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
