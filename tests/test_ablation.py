"""tests/ablation.py: who starts from whom, what is kept, and the arithmetic of its tables."""
import json
import os

import pytest
import torch
from PIL import Image

import ablation


def marks(correct):
    return {"all": correct, "versions": {}}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stages check their flags and train nothing. -> [flags of a run], in order"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", "results.json")
    monkeypatch.setattr(ablation, "PICTURE", "picture.png")
    runs = []

    def stands_in_for(module):
        def main(line):
            runs.append(module.parse_args(line))
        monkeypatch.setattr(module, "main", main)

    for module in (ablation.stage1_text_sft, ablation.stage2_kl_align, ablation.stage3_mm_instruct):
        stands_in_for(module)

    def mark(line):
        out, _, data = line
        os.makedirs(out)
        with open(f"{out}/eval.json", "w") as f:
            json.dump({"all": 0.5, "relative_gap": None, "data": data,
                       "versions": {v: {"correct": 1, "n": 2} for v in ablation.LADDER}}, f)
    monkeypatch.setattr(ablation.evaluation, "main", mark)
    return runs


def test_parents_come_first_and_nothing_is_trained_twice(trained):
    part = ["--out", "runs", "--trials", "--seeds", "3408", "--variants", "stage3"]
    ablation.main(part)
    ablation.main(part)
    assert [(args.out, args.init) for args in trained] == [
        ("runs/3408/stage1", "tiny"),
        ("runs/3408/stage2", "runs/3408/stage1"),
        ("runs/3408/stage3", "runs/3408/stage2"),
    ]
    assert all(args.seed == 3408 for args in trained)


def test_two_of_the_seeds_start_from_the_other_base(trained):
    ablation.main(["--out", "runs", "--trials", "--variants", "stage1", "without_stage1"])
    starts = {args.out: args.init for args in trained}
    for name in ("stage1", "without_stage1"):
        assert [starts[f"runs/{seed}/{name}"] for seed in ablation.SEEDS] == [
            "tiny", "tiny", "tiny", "out/base1", "out/base1"]


def test_every_variant_and_setting_has_flags_that_its_stage_takes(trained):
    ablation.main(["--out", "runs", "--seeds", "3411"])
    # 1: stage 1 of seed 3407, where all trials start
    assert len(trained) == len(ablation.TRIALS) + 1 + len(ablation.VARIANTS)
    result = ablation.stored()
    assert list(result["runs"]["3411"]) == list(ablation.VARIANTS)
    assert all(run["data"] == "data" for run in result["runs"]["3411"].values())
    assert list(result["trials"]) == list(ablation.TRIALS)
    assert all(run["data"] == "validation" for run in result["trials"].values())


def test_both_losses_have_as_many_settings():
    of_cross_entropy = [line for line in ablation.TRIALS if "--lam 0 " in line]
    assert len(of_cross_entropy) == len(ablation.TRIALS) / 2


def test_tuned_is_the_best_of_its_settings():
    trials = ablation.stored()["trials"]
    for name, cross_entropy in (("tuned", False), ("ce_only_tuned", True)):
        settings = [line for line in ablation.TRIALS if ("--lam 0 " in line) == cross_entropy]
        best = max(settings, key=lambda line: trials[line]["all"])
        flags = ablation.VARIANTS[name][2]
        assert sorted(best.split()) == sorted(flags)


def test_a_part_is_added_to_the_file_with_its_parents(trained):
    part = ["--trials", "--seeds", "3408", "--variants"]
    ablation.main(["--out", "runs", *part, "alpha0"])
    ablation.main(["--out", "other", *part, "stage2"])
    runs = ablation.stored()["runs"]
    assert set(runs["3408"]) == {"stage1", "alpha0", "stage2"}
    assert not runs["3407"]
    assert set(os.listdir(".")) == {"runs", "other", "results.json", "picture.png"}


def test_a_killed_command_keeps_what_it_has_finished(trained, monkeypatch):
    def killed(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.stage3_mm_instruct, "main", killed)
    part = ["--out", "runs", "--seeds", "3408", "--variants"]
    with pytest.raises(KeyboardInterrupt):
        ablation.main([*part, "stage3", "--trials", "--lr 4e-3"])
    assert set(ablation.stored()["trials"]) == {"--lr 4e-3"}
    with pytest.raises(KeyboardInterrupt):
        ablation.main([*part, "stage2", "stage3", "--trials"])
    assert set(ablation.stored()["runs"]["3408"]) == {"stage1", "stage2"}


def test_no_other_seeds(trained):
    with pytest.raises(SystemExit):  # T_QUANTILES ends at five
        ablation.main(["--out", "runs", "--seeds", "1"])


def test_paired_differences_by_hand():
    runs = {
        "1": {"stage2": marks(0.50), "ce_only": marks(0.48)},
        "2": {"stage2": marks(0.60), "ce_only": marks(0.56)},
        "3": {"stage2": marks(0.70)},
    }
    points = ablation.points_of(runs, "ce_only", "stage2", "all")
    assert points == {"1": pytest.approx(-2), "2": pytest.approx(-4)}
    mean, half = ablation.difference(points)
    assert mean == pytest.approx(-3)
    assert half == pytest.approx(12.71 * 2 ** 0.5 / 2 ** 0.5)  # deviation sqrt(2), two seeds
    assert ablation.with_interval(points) == "-3.0 [-15.7, +9.7]"
    assert ablation.with_interval({"1": -2.0}) == "-2.0"
    assert ablation.compared(runs) == [("ce_only", "stage2")]


def test_the_table_of_runs_by_hand():
    runs = {
        "1": {"stage2": marks(0.50)},
        "2": {"stage2": marks(0.60)},
        "3": {"stage1": marks(0.10)},
    }
    for run in runs.values():
        for result in run.values():
            result["versions"] = {v: {"correct": 3, "n": 4} for v in ablation.LADDER}
            result["relative_gap"] = None
    header, _, *rows = ablation.runs_table(runs).split("\n")
    assert header.startswith("| | seeds | text_only |") and header.endswith("ALL | relative gap |")
    assert rows[0] == "| `stage1` | 1 | " + "75.0 | " * 6 + "10.0 | nan |"
    assert rows[1].startswith("| `stage2` | 2 | 75.0 (75.0 - 75.0) | ")
    assert "| 55.0 (50.0 - 60.0) |" in rows[1]


@pytest.mark.parametrize("n", ablation.T_QUANTILES)
def test_95_percent_lie_within_the_quantile(n):
    """The density of Student's t with n - 1 degrees of freedom, summed up to the quantile."""
    t = torch.linspace(0, ablation.T_QUANTILES[n], 100_001, dtype=torch.float64)
    density = torch.distributions.StudentT(n - 1).log_prob(t).exp()
    assert 2 * torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=0.001)


def test_the_picture_has_a_row_a_variant_and_a_dot_a_seed(tmp_path):
    runs = {
        "3407": {"stage2": marks(0.50), "ce_only": marks(0.40), "alpha0": marks(0.30)},
        "3410": {"stage2": marks(0.50), "ce_only": marks(0.60)},
    }
    path = str(tmp_path / "picture.png")
    ablation.draw_differences(runs, path)
    with Image.open(path) as made:
        assert made.size == (900, 120 + 34 * 2)
        dark, white = (31, 61, 99), (255, 255, 255)
        assert made.getpixel((510 - 140, 98)) == dark  # -10 points; above the interval's line
        assert made.getpixel((510 + 140, 98)) == white  # +10, the other base: hollow
        assert made.getpixel((510 + 140, 96)) == dark
        assert made.getpixel((510 - 168, 134 - 8)) == white  # -20: no bar at the edge, but a "<"
