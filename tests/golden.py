"""What the code computes, in numbers.  tests/golden.json is by an earlier version, commit 7ce9497.

    python tests/golden.py    # measure again and write tests/golden.json

Hashes of tokens, labels and pixels are the same on every machine.  Trained weights and logits
differ in their last digits between machines: for them a norm and a sum with fixed signs are
compared, and only on the machine that wrote the file the hashes as well.
"""
import hashlib
import json
import os
import sys
import tempfile

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)

import data_gen  # noqa: E402
import model  # noqa: E402
import stage1_text_sft  # noqa: E402
import stage2_kl_align  # noqa: E402
import small_models  # noqa: E402
import stage3_mm_instruct  # noqa: E402
from convert import released  # noqa: E402

TINY = os.path.join(os.path.dirname(HERE), "tiny")
STAGES = {"stage1": stage1_text_sft, "stage2": stage2_kl_align, "stage3": stage3_mm_instruct}
PROBLEMS = 60


def summary(tensor):
    """A hash (of this machine), the norm, and a sum in which each number's place and sign count."""
    numbers = tensor.detach().double().flatten()
    signs = torch.cos(torch.arange(len(numbers), dtype=torch.float64))
    digest = hashlib.sha256(tensor.detach().contiguous().float().numpy().tobytes()).hexdigest()
    return {"sha256": digest, "norm": numbers.norm().item(), "signed_sum": (numbers @ signs).item()}


def digest_of(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_data(folder):
    """60 training problems, and their manifest's hashes."""
    data_gen.main(["--out", folder, "--n", str(PROBLEMS), "--n_test", "12"])
    with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as f:
        manifest = json.load(f)
    return {"rows": manifest["sha256"], "pixels": manifest["pixels_sha256"]}


def batches(data):
    """Tokens, labels and pixels of 60 problems in six versions, one hash a version."""
    vlm, tokenizer = model.load_vlm(TINY)
    result = {}
    for version in data_gen.LADDER:
        problems = [data_gen.make_problem("train", i) for i in range(PROBLEMS)]
        rows = []
        for problem in problems:
            row = data_gen.view(problem, version)
            rows.append(row | {"folder": data, "where": problem["id"]})
        [batch], _ = model.make_batches(tokenizer, vlm.config, rows)
        result[version] = {
            "input_ids": digest_of([batch.input_ids]),
            "labels": digest_of([batch.labels]),
            "pixels": digest_of([batch.pixel_values]),
        }
    return result


def train(stage, data, out):
    """What six steps change in the weights of tiny/, and the weights themselves, part by part."""
    flags = ["--init", TINY, "--data", data, "--out", out, "--steps", "6", "--batch", "8",
             "--micro_batch", "4", "--lr", "3e-4", "--warmup", "0.02"]
    if stage != "stage1":
        flags.append("--no-evaluate")
    STAGES[stage].main(flags)
    before = flat_parts(TINY)
    after = flat_parts(out)
    result = {}
    for name in after:
        update = after[name] - before[name]
        result[name] = {"weights": summary(after[name]), "update": summary(update)}
    return result


def flat_parts(folder):
    """{part of the model: all its numbers in one vector, in the order of their names}"""
    vlm, _ = model.load_vlm(folder)
    parts = {}
    for name, child in vlm.named_children():
        tensors = child.state_dict()
        parts[name] = torch.cat([tensors[key].flatten() for key in sorted(tensors)])
    return parts


def released_logits(folder):
    """Logits of a small random checkpoint in the released Qwen2 layout, for a picture's prompt."""
    checkpoint = small_models.released_folder(os.path.join(folder, "released"))[0]
    ours = os.path.join(folder, "ours")
    released.from_released(checkpoint, ours)
    vlm, tokenizer = model.load_vlm(ours)
    small_models.write_picture(folder)
    row = small_models.data_row(folder)
    return summary(small_models.answer_logits(vlm, tokenizer, [row]))


def measure():
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        result = {"data": make_data(data), "batches": batches(data)}
        for stage in STAGES:
            result[stage] = train(stage, data, os.path.join(folder, stage))
        result["released_logits"] = released_logits(folder)
    return result


if __name__ == "__main__":
    with open(os.path.join(HERE, "golden.json"), "w", encoding="utf-8") as f:
        json.dump(measure(), f, indent=1)
