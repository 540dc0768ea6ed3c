"""Accuracy by problem version, and the gap between reading a problem and seeing it.

    python eval.py out/stage1 out/stage2 out/stage3      # table on screen, chart in out/accuracy.png, eval.json beside each model
    python eval.py out/stage2 --show 0                   # one test problem in its six versions: prompt, reply, mark

Answers are decoded greedily and marked by `score_answer` below: fixed rules, no judge model, the same mark every time.
"""
import argparse
import json
import os
import re
import sys
import time
import unicodedata
from collections import namedtuple
from fractions import Fraction

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_gen import LADDER
from model import load_vlm, make_batch, read_rows

IMAGE_VERSIONS = [v for v in LADDER if v != "text_only"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("models", nargs="+", help="model folders, or run folders with step-N checkpoints in them")
    add("--data", default="data", help="folder of data_gen.py")
    add("--limit", type=int, default=None, help="use only the first so many test problems")
    add("--batch_size", type=int, default=100, help="prompts decoded at once; the replies do not depend on it")
    add("--max_new_tokens", type=int, default=96, help="cut a reply here (the longest solution has about 55 tokens)")
    add("--chart", default="out/accuracy.png", help="bar chart to write")
    add("--show", type=int, default=None, metavar="I", help="print test problem I with the first model's replies instead")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# The scorer
# ----------------------------------------------------------------------------------------------------------------------
Score = namedtuple("Score", "match extracted rule")  # right or wrong; what was taken from the reply (None = nothing); by which rule

PHRASES = re.compile(r"(?:answer|答案)\s*(?:is|=|:|：|为|是)\s*(.+)", re.I)
NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)"


def normalise(text):
    """One spelling for one thing: Unicode forms, signs, LaTeX wrappers. -> str"""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u03c0", "pi").replace("\u00d7", "*")
    text = text.rpartition("</think>")[2]  # what a model thinks aloud before that is not its answer
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = text.replace("^\\circ", "°").replace("^{\\circ}", "°").replace("\\circ", "°").replace("\\pi", "pi").replace("{,}", "")
    return text.replace("\\left", "").replace("\\right", "").replace("$", "").strip()


def extract(reply):
    """The final answer inside a reply. -> (text or None, name of the rule that found it); the last hit of a rule wins."""
    for rule, pattern in (("answer mark", r"\u2020\s*Answer:\s*([^\n\u2020]*)"), ("boxed", r"\\boxed\s*\{([^{}]*)\}")):
        hits = re.findall(pattern, reply)
        if hits:
            return (hits[-1].strip() or None), rule
    hits = PHRASES.findall(reply)
    if hits:
        return hits[-1].strip(), "answer phrase"
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) <= 20:
        return lines[0], "bare line"
    return None, "nothing found"


def value_of(text):
    """A number with an optional pi, fraction and unit as (exact Fraction, pi or "", unit), else None. Never runs the text."""
    m = re.fullmatch(rf"\s*(?:[A-Za-z]\s*=\s*)?\(?({NUMBER})\)?(?:\s*/\s*\(?({NUMBER})\)?)?\s*\*?\s*(pi)?\s*(°|degrees?|%|[a-zA-Z]+(?:\^?[23])?)?\.?\s*",
                     re.sub(r"(?<=\d),(?=\d{3}\b)", "", text[:80]))
    if not m or (m[2] and Fraction(m[2]) == 0):
        return None
    return Fraction(m[1]) / Fraction(m[2] or 1), m[3] or "", re.sub("degrees?", "°", m[4] or "")


def same_value(a, b):
    """Equal numbers; units must agree only where both have one."""
    x, y = value_of(a), value_of(b)
    if x and y:
        return x[:2] == y[:2] and (x[2] == y[2] or not x[2] or not y[2])
    return re.sub(r"[\s.]+", "", a).lower() == re.sub(r"[\s.]+", "", b).lower()


def score_answer(reply, gold, kind, choices=None):
    """Mark one reply. -> Score(match, extracted, rule)

    reply    what the model said, any text; it is searched, never run
    gold     the right answer: a letter for kind "choice", one of choices for "choice_text", else a value or a text
    kind     "choice", "choice_text", "integer", "float", "list" or "free"
    choices  the options of a multiple choice question, in order
    An empty reply is wrong; a reply without any answer has extracted None and is counted as unparsed.
    """
    if kind not in ("choice", "choice_text", "integer", "float", "list", "free"):
        raise ValueError(f"kind {kind!r} is not one of choice, choice_text, integer, float, list, free")
    found, rule = extract(normalise(reply))
    if found is None:
        return Score(False, None, rule)
    gold = normalise(gold)
    if kind in ("choice", "choice_text"):
        options = [normalise(c) for c in choices or []]
        letter = re.fullmatch(r"\(?([A-Z])\)?(?:[.:)].*)?", found)
        index = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(letter[1]) if letter else None
        if index is None or (options and index >= len(options)):
            same = [k for k, option in enumerate(options) if same_value(found, option)]
            index, rule = (same[0], rule + ", option text") if len(same) == 1 else (None, rule)
        if kind == "choice":
            return Score(index is not None and "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index] == gold.strip("() "), found, rule)
        return Score(index is not None and index < len(options) and same_value(options[index], gold), found, rule)
    if kind == "float":
        x, y = value_of(found), value_of(gold)
        digits = len(gold.partition(".")[2])
        return Score(bool(x and y) and round(x[0], digits) == y[0] and x[1] == y[1], found, rule)
    if kind == "list":
        a, b = ([part for part in s.strip("[](){} ").split(",")] for s in (found, gold))
        return Score(len(a) == len(b) and all(map(same_value, a, b)), found, rule)
    return Score(same_value(found, gold), found, rule)


# ----------------------------------------------------------------------------------------------------------------------
# Replies
# ----------------------------------------------------------------------------------------------------------------------
def generate_replies(vlm, tokenizer, rows, root, batch_size, max_new_tokens):
    """Greedy replies to the rows, in their order. Long prompts first, so the first batch shows whether memory suffices."""
    device = next(vlm.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["image_url"], -len(rows[i]["instruction"]), i))
    replies = [None] * len(rows)
    with tqdm(total=len(rows), desc="replies", disable=not sys.stderr.isatty()) as bar:
        for k in range(0, len(order), batch_size):
            part = order[k:k + batch_size]
            batch = make_batch(vlm, tokenizer, [rows[i] for i in part], root=root, answer=False).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = vlm.generate(batch, max_new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id)
            for i, ids in zip(part, out.tolist()):
                ids = ids[:ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
                replies[i] = tokenizer.decode(ids)
            bar.update(len(part))
    return replies


def evaluate(folder, rows, args):
    """Run one model over the test rows; writes eval.json and replies.jsonl into its folder. -> the dict of eval.json"""
    begun = time.time()
    vlm, tokenizer = load_vlm(folder, "cuda" if torch.cuda.is_available() else "cpu")
    replies = generate_replies(vlm, tokenizer, rows, args.data, args.batch_size, args.max_new_tokens)
    versions = {v: {"correct": 0, "n": 0, "unparsed": 0} for v in LADDER}
    with open(os.path.join(folder, "replies.jsonl"), "w", encoding="utf-8") as f:
        for row, reply in zip(rows, replies):
            score = score_answer(reply, row["answer"], row["kind"], row["choices"])
            count = versions[row["version"]]
            count["correct"] += score.match
            count["n"] += 1
            count["unparsed"] += score.extracted is None
            f.write(json.dumps({"id": row["id"], "prompt": row["instruction"], "reply": reply, **score._asdict()}, ensure_ascii=False) + "\n")
    share = {v: c["correct"] / max(1, c["n"]) for v, c in versions.items()}
    gap = share["text_dominant"] - share["vision_only"]
    result = {"benchmark": "builtin", "versions": versions, "all": sum(share[v] for v in IMAGE_VERSIONS) / len(IMAGE_VERSIONS),
              "gap": gap, "relative_gap": gap / share["text_dominant"] if share["text_dominant"] else None, "seconds": time.time() - begun}
    with open(os.path.join(folder, "eval.json"), "w") as f:
        json.dump(result, f, indent=1)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------
def interval(correct, n):
    """95 % Wilson score interval of a proportion, in percent (Wilson 1927)."""
    if n == 0:
        return 0.0, 100.0
    z, share = 1.96, correct / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def table(results):
    """{model: eval.json} -> text, one column a model: percent and its 95 % interval."""
    names, width = list(results), max(22, *(len(name) + 2 for name in results))
    n = next(iter(results.values()))["versions"]["text_only"]["n"]
    lines = [f"accuracy in %, {n} problems a version [95 % interval]", f"{'':18s}" + "".join(f"{name:>{width}s}" for name in names)]
    for v in LADDER:
        cells = [r["versions"][v] for r in results.values()]
        lines.append(f"{v:18s}" + "".join("{:>{w}s}".format("{:5.1f} [{:4.1f}, {:5.1f}]".format(
            100 * c["correct"] / max(1, c["n"]), *interval(c["correct"], c["n"])), w=width) for c in cells))
    lines.append(f"{'ALL (with image)':18s}" + "".join(f"{100 * r['all']:{width}.1f}" for r in results.values()))
    lines.append(f"{'gap TD - VO':18s}" + "".join(f"{100 * r['gap']:{width}.1f}" for r in results.values()))
    lines.append(f"{'relative gap':18s}" + "".join(f"{'-' if r['relative_gap'] is None else format(r['relative_gap'], '.2f'):>{width}s}"
                                                   for r in results.values()))
    lines.append(f"{'unparsed':18s}" + "".join(f"{sum(c['unparsed'] for c in r['versions'].values()):{width}d}" for r in results.values()))
    return "\n".join(lines)


def draw_chart(results, path):
    """Bars by version, one shade a model, whiskers = 95 % intervals; a PNG."""
    shades, font = ["#b8c4d6", "#5b84b1", "#1f3d63", "#c58b3d", "#7a9a5a", "#8a5a83"], ImageFont.load_default(15)
    left, top, height, bar = 60, 60, 260, max(12, 84 // len(results))
    group = bar * len(results) + 30
    image = Image.new("RGB", (left + group * len(LADDER) + 20, top + height + 60), "white")
    draw = ImageDraw.Draw(image)
    for percent in range(0, 101, 20):
        y = top + height * (1 - percent / 100)
        draw.line([left, y, image.width - 20, y], fill="#dddddd")
        draw.text((left - 8, y), f"{percent} %", font=font, fill="black", anchor="rm")
    for k, (name, result) in enumerate(results.items()):
        draw.rectangle([left + k * 190, 20, left + k * 190 + 14, 34], fill=shades[k % len(shades)])
        draw.text((left + k * 190 + 20, 27), name[-22:], font=font, fill="black", anchor="lm")
        for j, v in enumerate(LADDER):
            c, x = result["versions"][v], left + j * group + 15 + k * bar
            y = [top + height * (1 - share / 100) for share in (100 * c["correct"] / max(1, c["n"]), *interval(c["correct"], c["n"]))]
            draw.rectangle([x, y[0], x + bar - 3, top + height], fill=shades[k % len(shades)])
            draw.line([x + bar / 2 - 1, y[1], x + bar / 2 - 1, y[2]], fill="black")
    for j, v in enumerate(LADDER):
        draw.text((left + j * group + group / 2, top + height + 10), v.replace("_", "\n"), font=font, fill="black", anchor="ma", align="center")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(path)


def show(args, rows):
    """One problem, six versions, one model: what went in, what came out, how it was marked and by which rule."""
    vlm, tokenizer = load_vlm(args.models[0])
    some = rows[args.show * len(LADDER):(args.show + 1) * len(LADDER)]
    print(f"gold answer: {some[0]['answer']} ({some[0]['kind']})")
    for row, reply in zip(some, generate_replies(vlm, tokenizer, some, args.data, len(some), args.max_new_tokens)):
        score = score_answer(reply, row["answer"], row["kind"], row["choices"])
        print(f"\n{row['version']}: {row['image_url'] or 'no picture'} + {row['instruction']}\n  {reply}\n  "
              f"{'right' if score.match else 'WRONG'}: took {score.extracted!r} by the rule {score.rule!r}")


def main(argv=None):
    args = parse_args(argv)
    rows = read_rows(os.path.join(args.data, "test.jsonl"), ("image_url", "instruction", "answer", "kind", "version", "id"))
    if args.show is not None:
        return show(args, rows)
    rows = rows[:args.limit * len(LADDER)] if args.limit else rows
    results = {folder.rstrip("/"): evaluate(folder, rows, args) for folder in args.models}
    print(table(results))
    draw_chart(results, args.chart)
    print(f"chart: {args.chart}; details: eval.json and replies.jsonl in each model folder")


if __name__ == "__main__":
    main()
