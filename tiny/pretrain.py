"""Make the embedded backbones from nothing: tokenizer, SigLIP encoder, projector, Qwen2-style LLM.

    python tiny/pretrain.py    # README.md beside this has the log, the time and what was tried
    python tiny/pretrain.py --dense 4 --text 4 --joint 4 --pool 60 --out new    # does it run?

They stand in, offline, for an aligned SigLIP + Qwen2 and get the same kind of schooling: they read
what is written in pictures, do sums and chains of sums with numbers from a text or a picture, and
have seen textual problems of SIX of the twelve families.  What they have never seen:
    a solution of the other six families     stage 1 teaches those, in text
    a solution beside its own picture        stages 2 and 3 teach that

Three phases:
    dense   the encoder alone: which two characters stand in each patch; it has to see before all
            else pays off
    text    the language model alone, since a step without pictures costs under half
    joint   everything, a batch with pictures and one without in each step

In this order: tokenizer, tasks in words, pictures, batches, losses, training.  The same command
again goes on from pretrain.safetensors in --out, which is deleted at the end.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          SiglipVisionConfig, SiglipVisionModel)

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from data_gen import (COLS, DEFAULT_SIZE, FAMILIES, ROWS, draw_problem, free_cells,  # noqa: E402
                      make_problem, place, text_of, write)
from model import IGNORE, IMAGE_TOKEN, Projector, assemble, collate, encode_example  # noqa: E402
from model import optimizer_tensors, save_vlm  # noqa: E402

# Weights of the tasks; one task fills a batch, so that its rows are about equally long.
PICTURE_TASKS = {
    "labels": .3,  # read the labels of a problem's picture
    "question": .15,  # read the question in it
    "chain": .35,  # sums with numbers found in a random picture
    "aside": .2,  # a textual task with an unrelated picture: it must not make it forget the text
}
TEXT_TASKS = {
    "problem": .5,  # of the six schooled families
    "arithmetic": .2,
    "chain": .3,
}
PHASES = ("dense", "text", "joint")
PATCH = 12  # pixels: two cells of 6 x 12, so a patch holds exactly two characters
CHARACTERS = [chr(code) for code in range(33, 127)] + ["°"]
WIDTH = 128  # of encoder and language model
LETTERS = "ABCDEFGHKLMNPQRSWXYZabhrxy"
LOG_EVERY = 100  # steps
SAVE_EVERY = 250  # steps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default=HERE, help="folder to write")
    add("--dense", type=int, default=200, help="steps of the dense phase")
    add("--text", type=int, default=1000, help="steps of the text phase")
    add("--joint", type=int, default=2200, help="steps of the joint phase")
    add("--pool", type=int, default=12000, help="pictures of problems, and as many random ones")
    add("--batch", type=int, default=32, help="rows of each of the two batches of a step")
    add("--lr", type=float, default=2e-3, help="highest learning rate of each phase")
    add("--seed", type=int, default=0, help="of weights, tasks and pictures")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile: a third faster, needs a C++ compiler")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Tokenizer

def make_tokenizer(texts):
    """Byte-level BPE over whole words; digits and capitals stay single.

    So a label reads like the same characters in a text.
    """
    bpe = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Z](?![a-z])|[0-9]| ?[A-Za-z]+| ?[^A-Za-z0-9\s]|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


def corpus(seed):
    """Texts that hold every word of the tasks."""
    texts = ["user assistant\n"] * 20
    texts += ["Read the labels. Read the question. Solve the problem."] * 20
    for i in range(3000):
        problem = make_problem("train", i, seed + 1)
        texts += [text_of(problem, "text_only"), problem["output"]]
    r = Random(f"{seed}/corpus")
    for _ in range(300):
        _, question, answer = chain(r)
        texts += [question, answer]
    return texts


# --------------------------------------------------------------------------------------------------
# Tasks in words

def schooled_problem(r):
    """A problem of one of the six families, FAMILIES[::2], whose solutions the base sees.

    Drawn with seed 1, the stages' with seed 0; of training problems: never a test problem's givens.
    """
    i = r.randrange(500_000) * len(FAMILIES) + 2 * r.randrange(len(FAMILIES) // 2)
    return make_problem("train", i, 1)


def number(r):
    return r.choice([r.randint(1, 12), r.randint(1, 99), r.randint(1, 180)])


def arithmetic(r):
    """A sum like those in the solutions. -> (prompt, answer), "15*7=", "105" """
    sign = r.choice("+-**/")
    a = number(r)
    b = r.choice([r.randint(1, 12), r.randint(1, 99)])
    if sign == "+":
        result = a + b
    elif sign == "-":
        a = r.choice([a, 90, 180])
        a, b = max(a, b), min(a, b)
        result = a - b
    elif sign == "*":
        a = r.choice([r.randint(2, 12), r.randint(2, 10) * r.randint(2, 10)])
        b = r.randint(2, 12)
        result = a * b
    else:
        result = r.randint(1, 70)
        b = r.choice([2, 2, 3, r.randint(1, 12)])
        a = b * result
    return f"{a}{sign}{b}=", str(result)


def next_sums(a, operands):
    """The sums that may follow in a chain that has come to a. -> [(words, sum, result)]"""
    found = []
    for words, b in operands:
        if a + b < 200:
            found.append((f"add {words}", f"{a}+{b}", a + b))
        if a > b:
            found.append((f"subtract {words}", f"{a}-{b}", a - b))
        if 1 < b <= 12 and a <= 100:
            found.append((f"multiply by {words}", f"{a}*{b}", a * b))
        if 1 < b <= 12 and a % b == 0:
            found.append((f"divide by {words}", f"{a}/{b}", a // b))
    return found


def chain(r):
    """Named numbers and up to three sums in a row. -> (labels, question, answer)

    ["h=7", "a=3", "k=15"], "Take a, multiply by k, add h.", "3*15=45. 45+7=52."

    No family's solution is shown so, but each is such a chain: what is left to learn is which one.
    """
    names = r.sample(LETTERS, 3)
    values = [r.randint(2, 12), number(r), number(r)]
    unit = r.choice(["", "", "°"])
    labels = [f"{name}={value}{unit}" for name, value in zip(names, values)]
    operands = list(zip(names, values)) + [("2", 2), ("3", 3)]

    start, value = r.choice(operands[:3] + [("90", 90), ("180", 180)])
    question = f"Take {start}"
    sums = []
    for _ in range(r.choice([0, 1, 1, 2, 2, 3])):
        possible = next_sums(value, operands)
        verb = r.choice(sorted({words.split()[0] for words, _, _ in possible}))
        words, terms, value = r.choice([entry for entry in possible if entry[0].startswith(verb)])
        question += f", {words}"
        sums.append(f"{terms}={value}.")
    r.shuffle(labels)
    answer = " ".join(sums) or f"{start}={value}."
    return labels, f"{question}.", answer


def text_row(task, r):
    """-> (instruction, output)"""
    if task == "problem":
        problem = schooled_problem(r)
        return text_of(problem, "text_only"), problem["output"]
    if task == "chain":
        labels, question, answer = chain(r)
        return f"{', '.join(labels)}. {question}", answer
    # Three sums in a row: more answer tokens for about the same sequence.
    (prompt, first), second, third = [arithmetic(r) for _ in range(3)]
    return prompt, f"{first}. {''.join(second)}. {''.join(third)}."


# --------------------------------------------------------------------------------------------------
# Pictures, drawn beforehand

@dataclass
class Picture:
    pixels: np.ndarray  # (S, S) uint8
    cells: np.ndarray  # (P, 2): class of the left and right character of each patch, 0 = none
    tasks: dict  # {task: (instruction, output)}


def random_point(r):
    return 6 * r.uniform(1, 17), 6 * r.uniform(7, 17)


def random_picture(labels, r):
    """Labels at free places among random strokes, unlike any problem.

    -> (image, {cell: character})
    """
    image = Image.new("L", (DEFAULT_SIZE, DEFAULT_SIZE), 255)
    draw = ImageDraw.Draw(image)
    for _ in range(r.randint(0, 4)):
        x0, y0 = random_point(r)
        x1, y1 = random_point(r)
        if r.random() < .3:
            draw.arc([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], 0, 360, fill=0)
        else:
            draw.line([x0, y0, x1, y1], fill=0)

    free = free_cells(image)
    cells = {}
    for text in labels:
        try:
            col, row = place(free, text, r.uniform(0, 18), r.uniform(6, 18))
        except ValueError:  # too many strokes: draw others
            return random_picture(labels, r)
        cells |= write(draw, text, col, row, DEFAULT_SIZE)
    return image, cells


def classes_of(cells):
    """{(col, row): character} -> (P, 2)"""
    grid = np.zeros((ROWS, COLS), int)
    for (col, row), character in cells.items():
        grid[row, col] = 1 + CHARACTERS.index(character)
    return grid.reshape(-1, 2)


def problem_picture(i, seed):
    """A problem of any family, with what is written in its picture, but not its solution."""
    problem = make_problem("train", i, seed + 1)
    images, cells = draw_problem(problem)
    kind = "question" if i % 3 else "labelled"
    labels = text_of(problem, "vision_intensive").removesuffix(problem["question"]).strip()
    tasks = {"labels": ("Read the labels.", labels)}
    if kind == "question":
        tasks["question"] = ("Read the question.", problem["question"])
    return Picture(np.asarray(images[kind]), classes_of(cells[kind]), tasks)


def chain_picture(i, seed):
    r = Random(f"{seed}/random/{i}")
    labels, question, answer = chain(r)
    image, cells = random_picture(labels, r)
    return Picture(np.asarray(image), classes_of(cells), {"chain": (question, answer)})


def draw_pictures(n, seed):
    """-> {task: [Picture]}"""
    pictures = {"labels": [], "question": [], "chain": []}
    for i in tqdm(range(n), desc="pictures", disable=None):
        for picture in (problem_picture(i, seed), chain_picture(i, seed)):
            for task in picture.tasks:
                pictures[task].append(picture)
    return pictures


# --------------------------------------------------------------------------------------------------
# Batches and losses

@dataclass
class School:
    vlm: torch.nn.Module
    reader: torch.nn.Module  # (width) -> scores of two characters; thrown away at the end
    tokenizer: PreTrainedTokenizerFast
    pictures: dict  # see draw_pictures
    batch: int  # rows


def draw_task(tasks, r):
    return r.choices(list(tasks), list(tasks.values()))[0]


def normalised(pixels):
    """(S, S) uint8 -> (3, S, S) in [-1, 1]"""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).expand(3, -1, -1)


def encoded(school, instruction, output, picture=None):
    """What encode_example returns; it reads pictures from files, these are in memory."""
    vlm, tokenizer = school.vlm, school.tokenizer
    row = {"image_url": "", "instruction": instruction, "output": output}
    ids, labels, _ = encode_example(tokenizer, vlm.config, row)
    if picture is None:
        return ids, labels, None

    n = vlm.config["image_tokens"]
    before = len(tokenizer("<|im_start|>user\n").input_ids)  # there the placeholders go in
    ids = ids[:before] + [vlm.config["image_token_id"]] * n + ids[before:]
    labels = [IGNORE] * n + labels
    return ids, labels, normalised(picture.pixels)


def answer_loss(school, examples):
    vlm = school.vlm
    batch = collate(examples, school.tokenizer.pad_token_id, DEFAULT_SIZE)
    hidden = vlm(batch)  # (N, H)
    return F.cross_entropy(hidden @ vlm.lm_head.T, batch.labels[batch.labels != IGNORE])


def dense_losses(school, r):
    """[cross-entropy of the two characters of each patch, share of the written ones read right]"""
    task = r.choice(["labels", "chain"])
    pictures = r.choices(school.pictures[task], k=2 * school.batch)
    pixels = torch.stack([normalised(picture.pixels) for picture in pictures])
    cells = torch.from_numpy(np.stack([picture.cells for picture in pictures])).flatten()

    features = school.vlm.vision_model(pixel_values=pixels).last_hidden_state  # (B, P, W)
    scores = school.reader(features).view(len(cells), -1)  # (B * P * 2, classes)
    losses = F.cross_entropy(scores, cells, reduction="none")
    written = cells > 0  # most are not: the written ones get half of the weight
    loss = (losses[written].mean() + losses[~written].mean()) / 2
    right = (scores.argmax(-1) == cells)[written].float().mean()
    return [loss, right]


def text_losses(school, r):
    task = draw_task(TEXT_TASKS, r)
    rows = [text_row(task, r) for _ in range(school.batch)]
    return [answer_loss(school, [encoded(school, *row) for row in rows])]


def joint_losses(school, r):
    """[loss on the batch with pictures, on the one without]"""
    task = draw_task(PICTURE_TASKS, r)
    examples = []
    for _ in range(school.batch):
        if task == "aside":
            picture = r.choice(school.pictures[r.choice(["labels", "chain"])])
            row = text_row(r.choice(["problem", "chain"]), r)
        else:
            picture = r.choice(school.pictures[task])
            row = picture.tasks[task]
        examples.append(encoded(school, *row, picture))
    return [answer_loss(school, examples), *text_losses(school, r)]


# --------------------------------------------------------------------------------------------------
# Training

def build(tokenizer, seed):
    """New weights, in the architectures that transformers knows. -> VLM"""
    torch.manual_seed(seed)
    shape = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=4)
    llm = Qwen2ForCausalLM(Qwen2Config(
        **shape,
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        num_hidden_layers=5,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    vision = SiglipVisionModel(SiglipVisionConfig(
        **shape,
        num_hidden_layers=4,
        image_size=DEFAULT_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    ))
    return assemble(vision, Projector(WIDTH, WIDTH), llm, tokenizer, {
        "vision": "siglip",
        "projector": "mlp",
        "post_layernorm": False,  # as LLaVA takes the features: convert/llava.py
        "drop_first": 0,
        "after_image": "",
        "image_size": DEFAULT_SIZE,
        "pad_color": None,
    })


def make_optimizers(modules, lr):
    """Muon for the matrices between layers, AdamW for embeddings, norms and biases."""
    matrices = []
    others = []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr, weight_decay=.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(.9, .98), weight_decay=0, fused=True),
    ]


def lr_at(step, steps, peak):
    """Warm up over 100 steps, then a cosine down to 2 % of the peak."""
    rise = (step + 1) / min(100, steps)
    fall = .02 + .98 * .5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(rise, fall)


def write_base(out, school):
    half = copy.deepcopy(school.vlm).to(torch.bfloat16)  # half the size in the repository
    save_vlm(out, half, school.tokenizer)


def save_state(path, learner, optimizers, state):
    """All that a killed run needs: weights, the optimizers' tensors, and `state` in the header."""
    tensors = dict(learner.named_parameters())
    for optimizer in optimizers:
        tensors |= optimizer_tensors(learner, optimizer)
    save_file(tensors, path + ".part", {"state": json.dumps(state)})
    os.replace(path + ".part", path)


def fill_optimizers(optimizers, learner, tensors):
    """Give saved tensors, "<parameter>/<field>", to the optimizer that has the parameter."""
    owner_of = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner_of[parameter] = optimizer

    for key, tensor in tensors.items():
        name, _, field = key.partition("/")
        if field:
            parameter = learner.get_parameter(name)
            owner_of[parameter].state[parameter][field] = tensor


def main(argv=None):
    args = parse_args(argv)
    begun = time.time()
    tokenizer = make_tokenizer(corpus(args.seed))
    vlm = build(tokenizer, args.seed)
    reader = torch.nn.Linear(WIDTH, 2 * (1 + len(CHARACTERS)))
    for name, module in vlm.named_children():
        print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters")
    school = School(vlm, reader, tokenizer, draw_pictures(args.pool, args.seed), args.batch)
    print(f"{len(tokenizer)} tokens; 2 x {args.pool} pictures; {time.time() - begun:.0f} s")
    if args.compile:
        vlm.vision_model.compile()
        vlm.language_model.model.compile(dynamic=True)

    learning = {
        "dense": [vlm.vision_model, reader],
        "text": [vlm.language_model],
        "joint": [vlm],
    }
    losses_of = {"dense": dense_losses, "text": text_losses, "joint": joint_losses}

    # A killed run goes on from here.
    learner = torch.nn.ModuleDict({"vlm": vlm, "reader": reader})
    path = os.path.join(args.out, "pretrain.safetensors")
    state = {"phase": PHASES[0], "step": 0}
    saved = {}
    if os.path.exists(path):
        with safe_open(path, "pt") as f:
            state = json.loads(f.metadata()["state"])
        if state["args"] != vars(args):
            sys.exit(f"{path} is from a run with other flags: delete it to begin anew")
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                parameter.copy_(saved[name])

    vlm.train()
    for phase in PHASES[PHASES.index(state["phase"]):]:
        steps = getattr(args, phase)
        modules = learning[phase]
        parameters = [p for module in modules for p in module.parameters()]
        optimizers = make_optimizers(modules, args.lr)
        first = 0
        if phase == state["phase"]:
            first = state["step"]
            fill_optimizers(optimizers, learner, saved)

        logged = []
        for step in range(first, steps):
            # A step's rows depend on its number alone, so that a run can be continued.
            losses = losses_of[phase](school, Random(f"{args.seed}/{phase}/{step}"))
            loss = losses[0] if phase == "dense" else sum(losses)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step, steps, args.lr)
                optimizer.step()
                optimizer.zero_grad()

            logged.append([value.item() for value in losses])
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                means = " ".join(f"{mean:.4f}" for mean in np.mean(logged, axis=0))
                print(f"{phase} step {done}/{steps} | {means} | {time.time() - begun:.0f} s",
                      flush=True)
                logged = []
            if done % SAVE_EVERY == 0 or done == steps:
                write_base(args.out, school)
                save_state(path, learner, optimizers,
                           {"args": vars(args), "phase": phase, "step": done})
    os.remove(path)
    print(f"wrote {args.out}, {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
