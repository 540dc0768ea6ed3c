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

VARIANTS = {  # name: flags of stage 2, or the parent of a stage 3
    "stage2": [],
    "stage3": "stage2",
    "ce_only": ["--lam", "0"],
    "alpha0": ["--alpha", "0"],
    "alpha1": ["--alpha", "1"],
    "neighbours": ["--pairs", "neighbours"],
    "stage3_without_stage2": "stage1",
}


def run(module, out, flags):
    """Train unless done; -> (eval.json, seconds this call trained)"""
    begun = time.time()
    module.main([*flags, "--out", out])
    seconds = time.time() - begun
    if not os.path.exists(os.path.join(out, "eval.json")):
        evaluation.main([out, "--data", "data"])
    with open(os.path.join(out, "eval.json")) as f:
        return json.load(f) | {"train_seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 3408, 3409])
    parser.add_argument("--out", default="out/ablation")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "ablation.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for seed in map(str, args.seeds):
        at, common = lambda name: os.path.join(args.out, seed, name), ["--seed", seed]
        new = {"stage1": run(stage1_text_sft, at("stage1"), common)}
        for name in args.variants:
            if isinstance(VARIANTS[name], str):
                flags, module = ["--init", at(VARIANTS[name])], stage3_mm_instruct
            else:
                flags, module = [*VARIANTS[name], "--init", at("stage1")], stage2_kl_align
            new[name] = run(module, at(name), [*common, *flags, "--no-evaluate"])
        runs = {}
        if os.path.exists(path):  # read late: another process may be at another seed
            with open(path) as f:
                runs = json.load(f)["runs"]
        runs[seed] = runs.get(seed, {}) | new
        threads = torch.get_num_threads()
        result = {
            "command": "python tests/ablation.py",
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "machine": f"{threads} CPU threads a run, {platform.machine()}",
            "runs": dict(sorted(runs.items())),
        }
        with open(path, "w") as f:  # after every seed: a killed run keeps what it has
            json.dump(result, f, indent=1)
    print(markdown(runs))


def markdown(runs):
    """The README's table: mean over the seeds that have run; if several, lowest and highest."""
    columns = [*LADDER, "ALL", "relative gap"]
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---|--:|" + "--:|" * len(columns)]
    for name in ["stage1", *VARIANTS]:
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
