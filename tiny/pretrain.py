"""Make the embedded backbones from nothing: tokenizer, SigLIP-style encoder, projector and Qwen2-style LLM.

    python tiny/pretrain.py    # 80 minutes on 2 CPU cores; README.md beside this has the log and times
    python tiny/pretrain.py --dense 20 --text 20 --joint 20 --pool 200 --out tiny_new    # does it run at all

They stand in, offline, for downloading an aligned SigLIP + Qwen2, and get the same kind of schooling: they
read text in pictures, caption figures, do arithmetic, answer easy questions about made-up pictures and have
seen textual problems.  They have NEVER been shown the solution of a problem together with its picture:
teaching that is what the stages do.

Three phases:
  dense   the encoder alone: which two characters stand in each patch (it has to see before all else pays off)
  text    the language model alone, on the next phase's text batches: a step costs under half of a joint one
  joint   everything, on two batches a step (weights in MIX_PICTURES, MIX_TEXT):
          pictures    read the numeric labels, read the question, compute with numbers found in a random
                      picture, solve a textual problem with a random picture beside it (a picture must not
                      make it forget the text)
          text        the same computing with the numbers in the text, plain arithmetic, textual problems
"""
import argparse
import copy
import math
import os
import random
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig,
                          SiglipVisionModel)

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from data_gen import (COLS, DEFAULT_SIZE, ROWS, draw_problem, make_problem,  # noqa: E402
                      place, text_of, write)
from model import (IGNORE, IMAGE_TOKEN, Projector, assemble, collate, encode_example,  # noqa: E402
                   save_vlm)

MIX_PICTURES = {"labels": .3, "question": .15, "compute": .35, "aside": .2}
MIX_TEXT = {"problem": .55, "arithmetic": .25, "compute": .2}
PATCH = 12  # two cells of 6 x 12 pixels: every patch holds exactly two characters
CHARS = [chr(c) for c in range(33, 127)] + ["°"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default=os.path.dirname(os.path.abspath(__file__)), help="folder to write")
    add("--dense", type=int, default=200, help="steps of the dense phase")
    add("--text", type=int, default=1200, help="steps of the text phase")
    add("--joint", type=int, default=2800, help="steps of the joint phase")
    add("--pool", type=int, default=12000,
        help="pictures of problems, and as many random ones, drawn beforehand")
    add("--batch", type=int, default=32, help="rows in each of the two batches of a step")
    add("--lr", type=float, default=2e-3, help="peak learning rate of each phase")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_tokenizer(texts):
    """Byte-level BPE over whole words; digits and capitals stay single: a label reads like the same text."""
    bpe = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Z](?![a-z])|[0-9]| ?[A-Za-z]+| ?[^A-Za-z0-9\s]|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
                               "{{ m.content }}<|im_end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


def number(r):
    return r.choice([r.randint(1, 12), r.randint(1, 99), r.randint(1, 180)])


def arithmetic(r):
    """One line of sums like those in the solutions -> (prompt, answer)."""
    op = r.choice("+-**/")
    a, b = number(r), r.choice([r.randint(1, 12), r.randint(1, 99)])
    if op == "+":
        c = a + b
    elif op == "-":
        a = r.choice([a, 90, 180])
        a, b = max(a, b), min(a, b)
        c = a - b
    elif op == "*":
        a, b = r.choice([(r.randint(2, 12), r.randint(2, 12)), (r.randint(1, 99), r.randint(1, 9))])
        c = a * b
    else:
        c, b = r.randint(1, 70), r.choice([2, 2, 3, r.randint(1, 12)])
        a = b * c
    return f"{a}{op}{b}=", f"{c}"


def computing(r):
    """Two or three named numbers and something to do with them -> (labels, question, answer)."""
    names = r.sample("ABCDEFGHKLMNPQRSWXYZabhrxy", 3)
    op = r.choice(["Add", "Subtract", "Multiply", "Halve", "Square", "Name"])
    values = [r.randint(2, 12), r.randint(2, 12), number(r)]
    if op in ("Add", "Subtract"):
        values[:2] = number(r), r.randint(1, 99)
        values[:2] = sorted(values[:2], reverse=True)
    if op == "Halve":
        values[0] *= 2
    a, b = values[:2]
    unit = r.choice(["", "", "°"])
    labels = [f"{n}={v}{unit}" for n, v in zip(names, values)][:r.choice([2, 3])]
    asked, answer = {
        "Add": (f"Add {names[0]} and {names[1]}.", f"{a}+{b}={a + b}."),
        "Subtract": (f"Subtract {names[1]} from {names[0]}.", f"{a}-{b}={a - b}."),
        "Multiply": (f"Multiply {names[0]} and {names[1]}.", f"{a}*{b}={a * b}."),
        "Halve": (f"Halve {names[0]}.", f"{a}/2={a // 2}."),
        "Square": (f"Square {names[1]}.", f"{b}*{b}={b * b}."),
        "Name": (f"Find {names[0]}.", f"{names[0]}={a}."),
    }[op]
    r.shuffle(labels)
    return labels, asked, answer


def random_picture(labels, r):
    """Labels at random free places among random strokes, unlike any problem. -> (image, {cell: character})"""
    image = Image.new("L", (DEFAULT_SIZE, DEFAULT_SIZE), 255)
    draw = ImageDraw.Draw(image)
    point = lambda: (r.uniform(1, 17) * 6, r.uniform(7, 17) * 6)
    for _ in range(r.randint(0, 4)):
        (x0, y0), (x1, y1) = point(), point()
        if r.random() < .3:
            draw.arc([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], 0, 360, fill=0)
        else:
            draw.line([x0, y0, x1, y1], fill=0)
    ink = image.resize((COLS, ROWS), Image.Resampling.BOX).tobytes()
    free = ["".join("." if v == 255 else "#" for v in ink[w * COLS:(w + 1) * COLS]) for w in range(ROWS)]
    at = {}
    for text in labels:
        try:
            col, row = place(free, text, r.uniform(0, 18), r.uniform(6, 18))
        except ValueError:  # too many strokes: draw others
            return random_picture(labels, r)
        write(draw, text, col, row, DEFAULT_SIZE)
        at |= {(col + k, row): c for k, c in enumerate(text)}
    return image, at


def cell_labels(at):
    """{(col, row): character} -> (P, 2) class of the left and right cell of each patch; 0 = blank."""
    grid = np.zeros((ROWS, COLS), int)
    for (col, row), c in at.items():
        grid[row, col] = 1 + CHARS.index(c)
    return grid.reshape(ROWS * COLS // 2, 2)


def make_pool(n, seed):
    """Pictures drawn once, of problems and random ones.

    -> two lists of (uint8 picture, cell classes, {task: (instruction, output)})
    """
    problems, others = [], []
    for i in tqdm(range(n), desc="pictures", disable=not sys.stderr.isatty()):
        p = make_problem("train", i, seed + 1)  # not the stages' seed, and never a test problem's givens
        pictures, at = draw_problem(p)
        kind = "question" if i % 3 else "labelled"
        tasks = {"labels": ("Read the labels.",
                            text_of(p, "vision_intensive").removesuffix(p["question"]).strip())}
        if kind == "question":
            tasks["question"] = ("Read the question.", p["question"])
        problems.append((np.asarray(pictures[kind]), cell_labels(at[kind]), tasks))
        r = random.Random(f"{seed}/random/{i}")
        labels, asked, answer = computing(r)
        image, cells = random_picture(labels, r)
        others.append((np.asarray(image), cell_labels(cells), {"compute": (asked, answer)}))
    return problems, others


def picture_rows(pool, task, r, n):
    """n rows (picture, cell classes, instruction, output) of one task; one task a batch: little padding."""
    problems, others = pool
    if task == "aside":
        some = [make_problem("train", r.randrange(10 ** 6), 1) for _ in range(n)]
        return [(*r.choice(others)[:2], text_of(p, "text_only"), p["output"]) for p in some]
    fitting = [entry for entry in (others if task == "compute" else problems) if task in entry[2]]
    return [(*entry[:2], *entry[2][task]) for entry in r.choices(fitting, k=n)]


def text_rows(task, r, n):
    """n rows (instruction, output) of one task."""
    if task == "problem":
        some = [make_problem("train", r.randrange(10 ** 6), 1) for _ in range(n)]
        return [(text_of(p, "text_only"), p["output"]) for p in some]
    if task == "compute":
        return [(", ".join(labels) + ". " + asked, answer)
                for labels, asked, answer in (computing(r) for _ in range(n))]
    rows = []
    for _ in range(n):
        sums = [arithmetic(r) for _ in range(3)]  # three in a row: more answer tokens for the same sequence
        rows.append((sums[0][0], f"{sums[0][1]}. " + " ".join(f"{a}{b}." for a, b in sums[1:])))
    return rows


def to_batch(tokenizer, rows, config):
    """rows of (instruction, output) or (picture, cells, instruction, output) -> Batch"""
    examples = []
    for *_, instruction, output in rows:
        row = {"image_url": "", "instruction": instruction, "output": output}
        examples.append(encode_example(tokenizer, config, row))
    if len(rows[0]) == 2:
        return collate(examples, tokenizer.pad_token_id, DEFAULT_SIZE)
    # encode_example reads pictures from files; these are in memory, so the placeholders are put in by hand
    image = config["image_token_id"]
    P = config["image_tokens"]
    k = len(tokenizer("<|im_start|>user\n").input_ids)
    examples = [(ids[:k] + [image] * P + ids[k:], [IGNORE] * P + labels,
                 torch.from_numpy(row[0].astype(np.float32) / 127.5 - 1).expand(3, -1, -1))
                for (ids, labels, _), row in zip(examples, rows)]
    return collate(examples, tokenizer.pad_token_id, DEFAULT_SIZE)


def answer_loss(vlm, batch):
    hidden = vlm(batch)
    return F.cross_entropy(hidden @ vlm.lm_head.T, batch.labels[batch.labels != IGNORE])


def main(argv=None):
    args, start = parse_args(argv), time.time()
    torch.manual_seed(args.seed)
    r = random.Random(f"{args.seed}/order")
    corpus = [line for i in range(3000) for p in [make_problem("train", i, args.seed + 1)]
              for line in (text_of(p, "text_only"), p["output"])]
    corpus += [" ".join(computing(r)[1:]) for _ in range(300)] + [
        "user assistant\n", "Read the labels. Read the question. Solve the problem."] * 20
    tokenizer = make_tokenizer(corpus)
    special = tokenizer.convert_tokens_to_ids
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16, hidden_size=128, intermediate_size=384,
        num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=special("<|im_end|>"), pad_token_id=special("<|endoftext|>")))
    vision = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=DEFAULT_SIZE, patch_size=PATCH, vision_use_head=False))
    vlm = assemble(vision, Projector(128, 128), llm, tokenizer, {
        "vision": "siglip", "projector": "mlp", "post_layernorm": True, "drop_first": 0,
        "after_image": "", "image_size": DEFAULT_SIZE, "pad_color": None})
    reader = torch.nn.Linear(128, 2 * (len(CHARS) + 1))  # thrown away at the end
    print({n: f"{sum(p.numel() for p in m.parameters()):,}" for n, m in vlm.named_children()},
          "vocabulary", len(tokenizer))
    pool = make_pool(args.pool, args.seed)
    print(f"{args.pool} + {args.pool} pictures drawn, {time.time() - start:.0f} s", flush=True)
    vlm.vision_model.compile()
    vlm.language_model.model.compile(dynamic=True)

    def read_loss(features, cells):
        """Cross-entropy of the two cells of each patch; most are blank: written ones get half the weight."""
        logits = reader(features).unflatten(-1, (2, -1)).flatten(0, 2)  # (B * P * 2, classes)
        cells = cells.flatten()
        each = F.cross_entropy(logits, cells, reduction="none")
        written = cells > 0
        recall = (logits.argmax(-1) == cells)[written].float().mean()
        return (each[written].mean() + each[~written].mean()) / 2, recall

    def run(name, steps, named, loss_of):
        # Muon (torch.optim) for matrices between layers, AdamW for embeddings, norms and biases
        hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named if not (p.ndim == 2 and "embed" not in n)]
        parameters = hidden + rest
        optimizers = (torch.optim.Muon(hidden, lr=args.lr, weight_decay=.05, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(rest, lr=args.lr, betas=(.9, .98), weight_decay=0, fused=True))
        seen, begun = [], time.time()
        for step in range(steps):
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = args.lr * min((step + 1) / min(100, steps),
                                            .02 + .98 * .5 * (1 + math.cos(math.pi * step / steps)))
            loss, logged = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen.append([x.item() for x in logged])
            if (step + 1) % 100 == 0 or step + 1 == steps:
                mean = np.mean(seen[-100:], axis=0)
                print(f"{name} step {step + 1}/{steps} | " + " ".join(f"{x:.4f}" for x in mean) +
                      f" | {time.time() - begun:.0f} s", flush=True)
            if name == "joint" and ((step + 1) % 500 == 0 or step + 1 == steps):
                half = copy.deepcopy(vlm).to(torch.bfloat16)  # half the size in the repository
                save_vlm(args.out, half, tokenizer)

    def dense():
        rows = picture_rows(pool, r.choice(["labels", "compute"]), r, 2 * args.batch)
        pixels = torch.stack([torch.from_numpy(row[0].astype(np.float32) / 127.5 - 1).expand(3, -1, -1)
                              for row in rows])
        loss, recall = read_loss(vlm.vision_model(pixel_values=pixels).last_hidden_state,
                                 torch.from_numpy(np.stack([row[1] for row in rows])))
        return loss, (loss, recall)

    def draw(mix):
        return r.choices(list(mix), list(mix.values()))[0]

    def text():
        loss = answer_loss(vlm, to_batch(tokenizer, text_rows(draw(MIX_TEXT), r, args.batch), vlm.config))
        return loss, (loss,)

    def joint():
        pictures = answer_loss(vlm, to_batch(
            tokenizer, picture_rows(pool, draw(MIX_PICTURES), r, args.batch), vlm.config))
        words, _ = text()
        return pictures + words, (pictures, words)

    vlm.train()
    run("dense", args.dense, [*vlm.vision_model.named_parameters(), *reader.named_parameters()], dense)
    run("text", args.text, list(vlm.language_model.named_parameters()), text)
    run("joint", args.joint, list(vlm.named_parameters()), joint)
    print(f"wrote {args.out}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
