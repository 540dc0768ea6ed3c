"""Train all variants on several seeds and write tests/results/ablation.json, for the README.

    python tests/ablation.py                                          # all; hours on 2 CPU cores
    python tests/ablation.py --seeds 3407 --variants stage2 ce_only   # a part, added to the file

A seed changes the order of the rows in every stage; data, backbones and test problems stay the
same.  Finished runs are kept in --out and not trained again.
"""
import argparse
import json
import os
import platform
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
    "stage3_without_stage2": (stage3_mm_instruct, "stage1", []),
    "stage3_without_stage2_400": (stage3_mm_instruct, "stage1", ["--steps", "400"]),
    "own_words_half": (stage2_kl_align, "stage1", ["--on_policy", "0.5"]),
    "own_words_all": (stage2_kl_align, "stage1", ["--on_policy", "1"]),
    "first_100": (stage2_kl_align, "stage1", ["--steps", "100"]),
    "then_100": (stage2_kl_align, "first_100", ["--steps", "100"]),
    "then_100_own_words": (stage2_kl_align, "first_100", ["--steps", "100", "--on_policy", "1"]),
}


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
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "ablation.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
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


def figure(result, key):
    """A version's share of right answers, or one of the means in eval.json (None: 0)."""
    if key in LADDER:
        return share(result["versions"][key])
    return result[key] or 0


if __name__ == "__main__":
    main()
