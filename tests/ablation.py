"""Train all variants on several seeds and write tests/results/ablation.json: where the README's result tables come from.

    python tests/ablation.py                  # 3 seeds x (stage 1, five stage 2 variants, stage 3), about an hour on 2 CPU cores

A seed changes the order of the rows in every stage; data, backbones and test problems stay the same.  Finished runs are
kept in --out and not trained again.
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

VARIANTS = {  # stage 2 flags; the first is the default
    "stage2": [],
    "ce_only": ["--lam", "0"],
    "alpha0": ["--alpha", "0"],
    "alpha1": ["--alpha", "1"],
    "neighbours": ["--pairs", "neighbours"],
}


def run(module, out, flags):
    """Train unless done; -> (eval.json, seconds this call trained)"""
    begun = time.time()
    module.main([*flags, "--out", out])
    seconds = time.time() - begun
    if not os.path.exists(os.path.join(out, "eval.json")):
        evaluation.main([out, "--data", "data", "--chart", os.path.join(out, "accuracy.png")])
    with open(os.path.join(out, "eval.json")) as f:
        return json.load(f) | {"train_seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 3408, 3409])
    parser.add_argument("--out", default="out/ablation")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "ablation.json")
    runs = {}
    for seed in args.seeds:
        at = lambda name: os.path.join(args.out, str(seed), name)
        common = ["--seed", str(seed)]
        runs[seed] = {"stage1": run(stage1_text_sft, at("stage1"), common)}
        for name in args.variants:
            runs[seed][name] = run(stage2_kl_align, at(name), [*common, *VARIANTS[name], "--init", at("stage1"), "--no-evaluate"])
            if name == "stage2":
                runs[seed]["stage3"] = run(stage3_mm_instruct, at("stage3"), [*common, "--init", at("stage2"), "--no-evaluate"])
        with open(path, "w") as f:  # after every seed: a killed run keeps what it has
            json.dump({"command": "python tests/ablation.py", "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                       "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU", "runs": runs}, f, indent=1)
    names = list(dict.fromkeys(name for r in runs.values() for name in r))
    print(f"\nmean (lowest .. highest) of {len(runs)} seeds, %\n{'':12s}" + "".join(f"{v:>24s}" for v in [*LADDER, "ALL", "relative gap"]))
    for name in names:
        cells = []
        for v in [*LADDER, "all", "relative_gap"]:
            some = [100 * (r[name]["versions"][v]["correct"] / r[name]["versions"][v]["n"] if v in LADDER else r[name][v]) for r in runs.values()]
            cells.append(f"{sum(some) / len(some):.1f} ({min(some):.1f} .. {max(some):.1f})")
        print(f"{name:12s}" + "".join(f"{c:>24s}" for c in cells))


if __name__ == "__main__":
    main()
