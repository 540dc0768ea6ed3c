"""What several test files need: a small data set, runs of a stage, weights and rows to compare."""
import json
import os
import signal
import subprocess
import sys

import torch
import torch.nn.functional as F
from PIL import Image

import model
import stage1_text_sft
import stage2_kl_align
import stage3_mm_instruct

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "tiny")
STAGES = {1: stage1_text_sft, 2: stage2_kl_align, 3: stage3_mm_instruct}
LONG = "Find angle A. " * 40  # more than 130 tokens


def flags(stage, data, out, **changes):
    """Command line of a short run; `changes` are flags with their values, True: none."""
    values = {"init": TINY, "data": data, "out": out, "batch": 4, "micro_batch": 2, "steps": 3,
              "lr": 1e-3}
    values |= changes
    line = []
    for flag, value in values.items():
        if value is True:
            line.append(f"--{flag}")
        elif value is not None:
            line += [f"--{flag}", str(value)]
    if stage > 1:
        line.append("--no-evaluate")
    return line


def train(stage, data, out, **changes):
    """Run a stage in this process. -> its weights afterwards"""
    STAGES[stage].main(flags(stage, data, out, **changes))
    return weights(out)


def train_with_processes(world, runs, folder):
    """Runs of stages, one after the other in one process group under one torchrun. -> what it said

    runs  [(stage, its command line), ("copy", [folder, its copy]) or ("differ", [(stage, command
          line) of each process])], see run_stages.py

    Each process hashes strings in its own way: nothing may hang on the order of a set.
    """
    own_hashes = 'PYTHONHASHSEED=$RANK exec "$0" "$@"'
    script = os.path.join(ROOT, "tests", "run_stages.py")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}",
               "--standalone", "--no-python", "sh", "-c", own_hashes, sys.executable, script,
               json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def takes_ctrl_c():
    """For Popen's preexec_fn: whoever starts the tests in the background has turned SIGINT off."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def weights(folder):
    """{name: float32 tensor} of a model folder or a run's newest checkpoint."""
    vlm, _ = model.load_vlm(str(folder))
    tensors = {}
    for name, tensor in vlm.named_parameters():  # a tied lm_head is not among them twice
        tensors[name] = tensor.detach().clone()  # not the mapped file, which some tests damage
    return tensors


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


def distance(some, others):
    """||some - others|| / ||others|| over all parameters.

    Not the largest difference: where a gradient is pure rounding noise, Adam turns it into a step
    of up to lr either way.
    """
    difference = 0.0
    size = 0.0
    for name, tensor in others.items():
        difference += (some[name].double() - tensor.double()).square().sum().item()
        size += tensor.double().square().sum().item()
    return (difference / size) ** 0.5


def metrics(out):
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def row(instruction="Find angle A.", output="90-30=60. †Answer: 60°", image_url="", **more):
    return {"image_url": image_url, "instruction": instruction, "output": output} | more


def pair(**changes):
    """A pair: all in the text, against a short text and a picture."""
    strong = row("angle B=30°. Find angle A.")
    weak = row(image_url="p.png")
    return strong | {f"{field}_2": text for field, text in weak.items()} | changes


def write_rows(path, rows):
    """Rows (dicts, or lines as they stand) as JSONL. -> the path as text"""
    lines = []
    for one in rows:
        lines.append(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False))
    text = "".join(line + "\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(path)


def save_picture(path, size=108):
    """A picture of noise, the same each time."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 255, (size, size), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def batch_of(vlm, tokenizer, rows, folder=".", forms=("",), **options):
    """One Batch for each form of rows that are not in a file."""
    complete = []
    for number, one in enumerate(rows):
        complete.append(one | {"folder": str(folder), "where": f"row {number}"})
    batches, _ = model.make_batches(tokenizer, vlm.config, complete, forms, **options)
    return batches


def labels_of(batch):
    """The answer tokens of a batch, (N,)."""
    return batch.labels[batch.labels != model.IGNORE]


@torch.no_grad()
def cross_entropy(vlm, batch):
    """Mean over all answer tokens of a batch, in nats."""
    logits = vlm(batch) @ vlm.lm_head.T
    return F.cross_entropy(logits, labels_of(batch)).item()
