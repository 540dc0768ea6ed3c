"""Train all variants on several seeds; write tests/results/ablation.json, assets/ablation.png.

    python tests/ablation.py                                          # all; hours on 2 CPU cores
    python tests/ablation.py --seeds 3407 --variants stage2 ce_only   # a part, added to the file

A seed changes the order of the rows in every stage; data, backbones and test problems stay the
same.  Finished runs are kept in --out and not trained again.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import eval as evaluation  # noqa: E402
import stage1_text_sft  # noqa: E402
import stage2_kl_align  # noqa: E402
import stage3_mm_instruct  # noqa: E402
from data_gen import LADDER  # noqa: E402
from eval import share  # noqa: E402

VARIANTS = {  # name: (module, parent, flags)
    "stage1": (stage1_text_sft, None, []),
    "stage2": (stage2_kl_align, "stage1", []),
    "stage3": (stage3_mm_instruct, "stage2", []),
    "ce_only": (stage2_kl_align, "stage1", ["--lam", "0"]),
    "alpha0": (stage2_kl_align, "stage1", ["--alpha", "0"]),
    "alpha1": (stage2_kl_align, "stage1", ["--alpha", "1"]),
    "neighbours": (stage2_kl_align, "stage1", ["--pairs", "neighbours"]),
    "lr_half": (stage2_kl_align, "stage1", ["--lr", "5e-4"]),
    "lr_double": (stage2_kl_align, "stage1", ["--lr", "2e-3"]),
    "lr_quadruple": (stage2_kl_align, "stage1", ["--lr", "4e-3"]),
    "ce_only_lr_half": (stage2_kl_align, "stage1", ["--lam", "0", "--lr", "5e-4"]),
    "ce_only_lr_double": (stage2_kl_align, "stage1", ["--lam", "0", "--lr", "2e-3"]),
    "ce_only_lr_quadruple": (stage2_kl_align, "stage1", ["--lam", "0", "--lr", "4e-3"]),
    "tau4": (stage2_kl_align, "stage1", ["--tau", "4"]),
    "standardize": (stage2_kl_align, "stage1", ["--standardize"]),
    "without_stage1": (stage2_kl_align, None, ["--init", "tiny", "--no-evaluate"]),
    "stage3_without_stage2": (stage3_mm_instruct, "stage1", []),
    "stage3_without_stage2_400": (stage3_mm_instruct, "stage1", ["--steps", "400"]),
    "own_words_half": (stage2_kl_align, "stage1", ["--on_policy", "0.5"]),
    "own_words_all": (stage2_kl_align, "stage1", ["--on_policy", "1"]),
    "first_100": (stage2_kl_align, "stage1", ["--steps", "100"]),
    "then_100": (stage2_kl_align, "first_100", ["--steps", "100"]),
    "then_100_own_words": (stage2_kl_align, "first_100", ["--steps", "100", "--on_policy", "1"]),
}


COMPARED_WITH = {  # all others: stage2
    "stage3": "stage2",
    "stage3_without_stage2": "stage3",
    "stage3_without_stage2_400": "stage3",
    "ce_only_lr_half": "ce_only",
    "ce_only_lr_double": "ce_only",
    "ce_only_lr_quadruple": "ce_only",
    "then_100_own_words": "then_100",
}
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # seeds: Student's, two-sided 95 %
COLUMNS = ("all", "text_only", "vision_dominant", "vision_only")


def run(name, seed, folder):
    """Train and mark what is not there yet, parents first. -> the dict of eval.json"""
    module, parent, flags = VARIANTS[name]
    out = os.path.join(folder, str(seed), name)
    marks = os.path.join(out, "eval.json")
    if not os.path.exists(marks):
        line = [*flags, "--out", out, "--seed", str(seed)]
        if parent is not None:
            run(parent, seed, folder)
            line += ["--init", os.path.join(folder, str(seed), parent), "--no-evaluate"]
        module.main(line)
        evaluation.main([out, "--data", "data"])
    with open(marks) as f:
        return json.load(f)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 3408, 3409])
    parser.add_argument("--out", default="out/ablation")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    path = os.path.join(ROOT, "tests", "results", "ablation.json")
    for seed in args.seeds:
        for name in args.variants:
            marks = run(name, seed, args.out)
            runs = {}
            if os.path.exists(path):  # read late: another process may be at another run
                with open(path) as f:
                    runs = json.load(f)["runs"]
            runs.setdefault(str(seed), {})[name] = marks
            threads = torch.get_num_threads()
            result = {
                "command": "python tests/ablation.py",
                "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__,
                "machine": f"{threads} CPU threads a run, {platform.machine()}",
                "runs": dict(sorted(runs.items())),
            }
            with open(path, "w") as f:  # after every run: what is killed keeps what it has
                json.dump(result, f, indent=1)
    print(markdown(runs))
    print(differences_table(runs))
    draw_differences(runs, os.path.join(ROOT, "assets", "ablation.png"))


def markdown(runs):
    """The README's table: mean over the seeds that have run; if several, lowest and highest."""
    columns = [*LADDER, "ALL", "relative gap"]
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---|--:|" + "--:|" * len(columns)]
    for name in VARIANTS:
        results = [run[name] for run in runs.values() if name in run]
        if not results:
            continue
        cells = []
        for key in [*LADDER, "all", "relative_gap"]:
            values = [100 * figure(result, key) for result in results]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f}")
            if len(values) > 1:
                cells[-1] += f" ({min(values):.1f} - {max(values):.1f})"
        lines.append(f"| `{name}` | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(runs, name, key):
    """Of a variant and what it is compared with, seed by seed. -> (mean, half a 95 % interval)

    In points; the half is None for a single seed.
    """
    other = COMPARED_WITH.get(name, "stage2")
    values = []
    for seed in runs.values():
        if name in seed and other in seed:
            values.append(100 * (figure(seed[name], key) - figure(seed[other], key)))
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, T_QUANTILES[len(values)] * error


def compared(runs):
    """Variants of which a pair has run, as [(variant, what it is compared with, seeds)]"""
    rows = []
    for name in VARIANTS:
        other = COMPARED_WITH.get(name, "stage2")
        n = sum(name in seed and other in seed for seed in runs.values())
        if n > 0 and name not in ("stage1", "stage2", "first_100"):
            rows.append((name, other, n))
    return rows


def differences_table(runs):
    """The README's table of paired differences, in points."""
    lines = ["| | compared with | seeds | " + " | ".join(COLUMNS) + " |",
             "|---|---|--:|" + "--:|" * len(COLUMNS)]
    for name, other, n in compared(runs):
        cells = []
        for key in COLUMNS:
            mean, half = differences(runs, name, key)
            interval = "" if half is None else f" [{mean - half:+.1f}, {mean + half:+.1f}]"
            cells.append(f"{mean:+.1f}{interval}")
        lines.append(f"| `{name}` | `{other}` | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_differences(runs, path):
    """Differences over the versions with a picture, a row a variant; lines: 95 % intervals."""
    rows = compared(runs)
    image = Image.new("RGB", (900, 90 + 34 * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 12), "ALL (with picture): points more than what it is compared with", "black",
              ImageFont.load_default(18))
    draw.font = ImageFont.load_default(14)
    zero = 640
    scale = 8  # pixels a point
    bottom = 60 + 34 * len(rows)
    for points in range(-30, 31, 10):
        x = zero + scale * points
        draw.line([x, 50, x, bottom], "black" if points == 0 else "#dddddd")
        draw.text((x, bottom + 6), f"{points:+d}", "black", anchor="ma")
    for k, (name, other, n) in enumerate(rows):
        y = 70 + 34 * k
        draw.text((20, y - 8), f"{name} - {other}  (n = {n})", "black")
        mean, half = differences(runs, name, "all")
        mean = max(-30, min(30, mean))
        if half is not None:
            ends = [max(-31, min(31, mean + sign * half)) for sign in (-1, 1)]
            draw.line([zero + scale * ends[0], y, zero + scale * ends[1], y], "#1f3d63", 2)
        draw.circle((zero + scale * mean, y), 5, "#1f3d63")
    image.save(path)


def figure(result, key):
    """A version's share of right answers, or one of the means in eval.json (None: 0)."""
    if key in LADDER:
        return share(result["versions"][key])
    return result[key] or 0


if __name__ == "__main__":
    main()
