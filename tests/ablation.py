"""Train all variants on several seeds; write tests/results/ablation.json, assets/ablation.png.

    python data_gen.py
    python data_gen.py --out validation --n 1 --seed 2  # other test problems, to choose rates on
    python tiny/pretrain.py --out out/base1 --seed 1    # the second base
    python tests/ablation.py                            # all: hours
    python tests/ablation.py --trials --seeds 3407 --variants stage2 ce_only  # two runs, no trials

A seed changes the order of the rows in every stage, and two of the five start from the other base;
data and test problems stay the same.  Finished runs are kept in --out and not trained again: delete
one after you have changed its flags here.
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

RESULTS = os.path.join(ROOT, "tests", "results", "ablation.json")
PICTURE = os.path.join(ROOT, "assets", "ablation.png")

SEEDS = (3407, 3408, 3409, 3410, 3411)
OTHER_BASE = (3410, 3411)  # these start from out/base1, the others from tiny

# Flags of stage 2, six for each loss: four rates, then two settings near the best.  Tried on one
# seed, and marked on another draw of the test problems.
TRIALS = (
    "--lr 5e-4",
    "--lr 1e-3",
    "--lr 2e-3",
    "--lr 4e-3",
    "--lr 2e-3 --lam 0.1",
    "--lr 2e-3 --lam 0.9",
    "--lam 0 --lr 5e-4",
    "--lam 0 --lr 1e-3",
    "--lam 0 --lr 2e-3",
    "--lam 0 --lr 4e-3",
    "--lam 0 --lr 3e-3",
    "--lam 0 --lr 8e-3",
)

VARIANTS = {  # name: (module, parent, flags)
    "stage1": (stage1_text_sft, None, []),
    "stage2": (stage2_kl_align, "stage1", []),
    "stage3": (stage3_mm_instruct, "stage2", []),
    "without_stage1": (stage2_kl_align, None, []),
    "stage3_without_stage2": (stage3_mm_instruct, "stage1", ["--steps", "400"]),
    "ce_only": (stage2_kl_align, "stage1", ["--lam", "0"]),
    "tuned": (stage2_kl_align, "stage1", ["--lr", "2e-3", "--lam", "0.1"]),  # best of TRIALS
    "ce_only_tuned": (stage2_kl_align, "stage1", ["--lam", "0", "--lr", "3e-3"]),
    "stage3_tuned": (stage3_mm_instruct, "tuned", []),
    "alpha0": (stage2_kl_align, "stage1", ["--alpha", "0"]),
    "alpha1": (stage2_kl_align, "stage1", ["--alpha", "1"]),
    "neighbours": (stage2_kl_align, "stage1", ["--pairs", "neighbours"]),
    "standardize": (stage2_kl_align, "stage1", ["--standardize"]),
    "own_words_half": (stage2_kl_align, "stage1", ["--on_policy", "0.5"]),
    "own_words_all": (stage2_kl_align, "stage1", ["--on_policy", "1"]),
    "first_100": (stage2_kl_align, "stage1", ["--steps", "100"]),
    "then_100": (stage2_kl_align, "first_100", ["--steps", "100"]),
    "then_100_own_words": (stage2_kl_align, "first_100", ["--steps", "100", "--on_policy", "1"]),
}

COMPARISONS = (  # (variant, what is taken from it)
    ("stage3", "stage2"),
    ("without_stage1", "stage2"),
    ("stage3_without_stage2", "stage3"),
    ("stage3_without_stage2", "stage3_tuned"),
    ("ce_only", "stage2"),
    ("alpha0", "stage2"),
    ("alpha1", "stage2"),
    ("alpha1", "ce_only"),
    ("tuned", "stage2"),
    ("ce_only_tuned", "tuned"),
    ("neighbours", "stage2"),
    ("standardize", "stage2"),
    ("own_words_half", "stage2"),
    ("own_words_all", "stage2"),
    ("then_100_own_words", "then_100"),
)
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # seeds: Student's, two-sided 95 %
COLUMNS = ("all", "text_dominant", "vision_dominant", "vision_only")


def run(name, seed, folder):
    """Train and mark what is not there yet, parents first."""
    module, parent, flags = VARIANTS[name]
    out = folder_of(folder, seed, name)
    start = "out/base1" if seed in OTHER_BASE else "tiny"
    if parent is not None:
        run(parent, seed, folder)
        start = folder_of(folder, seed, parent)
    train_and_mark(module, [*flags, "--seed", str(seed), "--init", start], out, "data")


def try_setting(setting, seed, folder):
    """The same for one of TRIALS, marked on other problems than the variants."""
    run("stage1", seed, folder)
    start = folder_of(folder, seed, "stage1")
    flags = [*setting.split(), "--seed", str(seed), "--init", start]
    train_and_mark(stage2_kl_align, flags, folder_of(folder, "trials", setting), "validation")


def folder_of(folder, group, name):
    """Of a run; group: its seed, or "trials". "--lr 2e-3 --lam 0.1" -> "lr_2e-3_lam_0.1" """
    return os.path.join(folder, str(group), name.replace("--", "").replace(" ", "_"))


def train_and_mark(module, flags, out, data):
    """Run a stage into `out` and mark it on the test problems of `data`; both once only."""
    if not os.path.exists(os.path.join(out, "eval.json")):
        evaluate = [] if module is stage1_text_sft else ["--no-evaluate"]
        module.main([*flags, *evaluate, "--out", out])
        evaluation.main([out, "--data", data])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS)
    parser.add_argument("--out", default="out/ablation")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--trials", nargs="*", default=TRIALS, choices=TRIALS)
    args = parser.parse_args(argv)

    # The file is written after every run: what is killed keeps what it has.
    for setting in args.trials:
        try_setting(setting, SEEDS[0], args.out)
        collect(args.out)
    for seed in args.seeds:
        for name in args.variants:
            run(name, seed, args.out)
            collect(args.out)

    result = collect(args.out)
    print(trials_table(result["trials"]))
    print(runs_table(result["runs"]))
    print(differences_table(result["runs"]))
    draw_differences(result["runs"], PICTURE)


def stored():
    """What the file holds: {"trials": {setting: marks}, "runs": {seed: {name: marks}}, ...}

    Marks are the dict of an eval.json.
    """
    if not os.path.exists(RESULTS):
        return {"trials": {}, "runs": {}}
    with open(RESULTS) as f:
        return json.load(f)


def collect(folder):
    """Put every run that is finished under `folder` into the file. -> what it then holds"""
    result = stored()
    for setting in TRIALS:
        add_marks(result["trials"], folder, "trials", setting)
    for seed in SEEDS:
        runs = result["runs"].setdefault(str(seed), {})
        for name in VARIANTS:
            add_marks(runs, folder, seed, name)

    result["from_other_base"] = OTHER_BASE
    result["command"] = "python tests/ablation.py"
    result["date"] = time.strftime("%Y-%m-%d")
    result["torch"] = torch.__version__
    result["machine"] = f"{torch.get_num_threads()} CPU threads a run, {platform.machine()}"

    # Renamed when complete: another process, at another part, may be reading.
    part = f"{RESULTS}.{os.getpid()}"
    with open(part, "w") as f:
        json.dump(result, f, indent=1)
    os.replace(part, RESULTS)
    return result


def add_marks(results, folder, group, name):
    path = os.path.join(folder_of(folder, group, name), "eval.json")
    if os.path.exists(path):
        with open(path) as f:
            results[name] = json.load(f)


def trials_table(trials):
    """The README's table of settings: % of the validation problems, one seed."""
    columns = ("all", "vision_dominant", "vision_only")
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for setting in TRIALS:
        if setting in trials:
            cells = [f"{100 * figure(trials[setting], key):.1f}" for key in columns]
            lines.append(f"| `{setting}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_table(runs):
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


def points_of(runs, name, other, key):
    """A variant minus another, seed by seed, where both have run. -> {seed: points}"""
    points = {}
    for seed, run_of in runs.items():
        if name in run_of and other in run_of:
            points[seed] = 100 * (figure(run_of[name], key) - figure(run_of[other], key))
    return points


def difference(points):
    """{seed: points} -> (mean, half a 95 % interval); the half is None for a single seed"""
    n = len(points)
    mean = statistics.mean(points.values())
    if n == 1:
        return mean, None
    standard_error = statistics.stdev(points.values()) / n ** 0.5
    return mean, T_QUANTILES[n] * standard_error


def with_interval(points):
    """{seed: points} -> "+1.5 [+1.0, +2.0]" """
    mean, half = difference(points)
    interval = "" if half is None else f" [{mean - half:+.1f}, {mean + half:+.1f}]"
    return f"{mean:+.1f}{interval}"


def compared(runs):
    """COMPARISONS of which a pair has run"""
    return [pair for pair in COMPARISONS if points_of(runs, *pair, "all")]


def differences_table(runs):
    """The README's table of paired differences, in points."""
    lines = ["| | minus | seeds | " + " | ".join(COLUMNS) + " |",
             "|---|---|--:|" + "--:|" * len(COLUMNS)]
    for name, other in compared(runs):
        n = len(points_of(runs, name, other, "all"))
        cells = [with_interval(points_of(runs, name, other, key)) for key in COLUMNS]
        lines.append(f"| `{name}` | `{other}` | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_differences(runs, path):
    """Differences over the versions with a picture: a row a comparison, a dot a seed."""
    rows = compared(runs)
    image = Image.new("RGB", (900, 120 + 34 * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 12), "Mean of the five versions with a picture: difference in points", "black",
              ImageFont.load_default(18))
    draw.font = ImageFont.load_default(14)
    draw.text((20, 42), "Dot: one seed, hollow from the other base. Bar and line: mean, 95 % "
              "interval. < >: off the scale.", "black")

    def x_of(points):
        return 510 + 14 * max(-12, min(12, points))

    bottom = 90 + 34 * len(rows)
    for points in range(-10, 11, 5):
        color = "black" if points == 0 else "#dddddd"
        draw.line([x_of(points), 80, x_of(points), bottom], color)
        draw.text((x_of(points), bottom + 6), f"{points}", "black", anchor="ma")

    for k, (name, other) in enumerate(rows):
        y = 100 + 34 * k
        points_by_seed = points_of(runs, name, other, "all")
        mean, half = difference(points_by_seed)
        draw.text((20, y - 8), f"{name} - {other}", "black")
        draw.text((700, y - 8), with_interval(points_by_seed), "black")
        draw.text((880, y - 8), f"n = {len(points_by_seed)}", "black", anchor="ra")
        if abs(mean) > 12:
            draw.text((x_of(mean), y), "<" if mean < 0 else ">", "#1f3d63", anchor="mm")
            continue
        if half is not None:
            draw.line([x_of(mean - half), y, x_of(mean + half), y], "#1f3d63", 2)
        draw.line([x_of(mean), y - 9, x_of(mean), y + 9], "#1f3d63", 3)
        for seed, points in points_by_seed.items():
            fill = "white" if int(seed) in OTHER_BASE else "#1f3d63"
            draw.circle((x_of(points), y), 4, fill, "#1f3d63")
    image.save(path)


def figure(result, key):
    """A version's share of right answers, or one of the means in eval.json."""
    if key in LADDER:
        return share(result["versions"][key])
    return float("nan") if result[key] is None else result[key]


if __name__ == "__main__":
    main()
