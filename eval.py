"""Accuracy by problem version, and the gap between reading a problem and seeing it.

    python eval.py out/stage1 out/stage2 out/stage3   # table, out/accuracy.png, eval.json in each folder
    python eval.py out/stage2 --show 0                # a test problem, its six versions: prompt, reply, mark

Replies are decoded greedily and marked by `score_answer`: fixed rules, no judge, the same mark every time.
In this order: the scorer, the replies, the reports.
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
from string import ascii_uppercase

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_gen import LADDER
from model import load_vlm, make_batch, read_rows

IMAGE_VERSIONS = [version for version, (_, picture) in LADDER.items() if picture]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("models", nargs="+", help="model folders, or run folders with step-N checkpoints in them")
    add("--data", default="data", help="folder of data_gen.py")
    add("--limit", type=int, default=None, help="use only the first so many test problems")
    add("--batch_size", type=int, default=100,
        help="prompts decoded at once; the replies do not depend on it")
    add("--max_new_tokens", type=int, default=96, help="cut a reply here (the longest solution has about 55)")
    add("--chart", default="out/accuracy.png", help="bar chart to write")
    add("--show", type=int, default=None, metavar="I",
        help="print test problem I and the first model's replies")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# The scorer.  A reply is text that is searched and compared, never run, and whatever it says takes linear
# time.
# ------------------------------------------------------------------------------------------------------------
KINDS = ("choice", "choice_text", "integer", "float", "list", "free")
Score = namedtuple("Score", "match extracted rule")  # right or wrong; the text that was marked; why that text
MARK = re.compile(r"†\s*Answer:\s*([^\n†]*)")  # how solutions of data_gen.py and of the released data end
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
PHRASE = re.compile(r"(?:answer|答案)\s*(?:is|=|:|为|是)\s*(.+)", re.I)
NUMBER = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+))"
VALUE = re.compile(rf"(?:[A-Za-z]\s*=\s*)?"  # a name in front: "x = 4"
                   rf"\(?{NUMBER}\)?(?:\s*/\s*\(?{NUMBER}\)?)?"  # a number or a fraction
                   rf"\s*\*?\s*(pi)?\s*(°|degrees?|%|[a-zA-Z]+(?:\^?[23])?)?\.?")  # pi, a unit, a full stop


def normalise(text):
    """One spelling for one thing: Unicode forms, signs, LaTeX wrappers. -> str"""
    text = unicodedata.normalize("NFKC", text.rpartition("</think>")[2])  # thinking aloud is not the answer
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
    for old, new in (("−", "-"), ("×", "*"), ("π", "pi"), ("\\pi", "pi"), ("^{\\circ}", "°"),
                     ("^\\circ", "°"), ("\\circ", "°"), ("{,}", ""), ("\\left", ""), ("\\right", ""),
                     ("$", "")):
        text = text.replace(old, new)
    return text.strip()


def extract(reply):
    """The final answer in a normalised reply, a rule's last hit. -> (text or None, name of the rule)"""
    for rule, pattern in (("answer mark", MARK), ("boxed", BOXED), ("answer phrase", PHRASE)):
        hits = pattern.findall(reply)
        if hits:
            return hits[-1].strip() or None, rule
    if reply and "\n" not in reply and len(reply) <= 20:
        return reply, "bare line"
    return None, "nothing found"  # not the last number of the reply: that would be a guess


def value_of(text):
    """A number, or a fraction of numbers, as (Fraction, "pi" or "", unit or ""); None for anything else."""
    found = VALUE.fullmatch(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text[:80]).strip())  # 1,200 is 1200
    if not found or (found[2] and Fraction(found[2]) == 0):
        return None
    unit = re.sub("degrees?", "°", found[4] or "")
    return Fraction(found[1]) / Fraction(found[2] or 1), found[3] or "", unit


def same(a, b):
    """Equal values, or equal text when one is not a value. Units must agree only where both have one."""
    x, y = value_of(a), value_of(b)
    if x and y:
        return x[:2] == y[:2] and (x[2] == y[2] or not x[2] or not y[2])
    return re.sub(r"[\s.]+", "", a).lower() == re.sub(r"[\s.]+", "", b).lower()


def score_answer(reply, gold, kind, choices=None):
    """Mark one reply. -> Score(match, extracted, rule)

    reply     what the model said, any text
    gold      the right answer: a letter for "choice", one of choices for "choice_text", else a value or text
    kind      one of KINDS
    choices   the options of a multiple choice question, in order
    raises    ValueError for an unknown kind

    A reply without an answer has extracted None: it is wrong, and counted as unparsed besides.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    found, rule = extract(normalise(reply))
    gold = normalise(gold)
    if found is None:
        return Score(False, None, rule)
    if kind in ("choice", "choice_text"):
        options = [normalise(option) for option in choices or []]
        letter = re.fullmatch(r"\(?([A-Z])\)?(?:[.:)].*)?", found)
        index = ascii_uppercase.index(letter[1]) if letter else None
        if index is None or (options and index >= len(options)):  # then the one option with this very value
            equal = [k for k, option in enumerate(options) if same(found, option)]
            index, rule = ((equal[0], f"{rule}, option text") if len(equal) == 1
                           else (None, f"{rule}, no option"))
        if index is None:
            return Score(False, found, rule)
        if kind == "choice":
            return Score(ascii_uppercase[index] == gold.strip("() "), found, rule)
        return Score(index < len(options) and same(options[index], gold), found, rule)
    if kind == "float":  # equal after rounding to as many decimals as the gold has
        x, y = value_of(found), value_of(gold)
        return Score(bool(x and y) and round(x[0], len(gold.partition(".")[2])) == y[0] and x[1] == y[1],
                     found, rule)
    if kind == "list":
        ours, theirs = (text.strip("[](){} ").split(",") for text in (found, gold))
        return Score(len(ours) == len(theirs) and all(map(same, ours, theirs)), found, rule)
    return Score(same(found, gold), found, rule)


# ------------------------------------------------------------------------------------------------------------
# The replies
# ------------------------------------------------------------------------------------------------------------
def generate_replies(vlm, tokenizer, rows, root, batch_size, max_new_tokens):
    """Greedy replies to the rows, in the order of the rows."""
    device, stop = next(vlm.parameters()).device, tokenizer.eos_token_id
    # Alike lengths share a batch, the longest come first: if memory does not suffice, it shows at once.
    order = sorted(range(len(rows)),
                   key=lambda i: (not rows[i]["image_url"], -len(rows[i]["instruction"]), i))
    replies = [None] * len(rows)
    with tqdm(total=len(rows), desc="replies", disable=not sys.stderr.isatty()) as bar:
        for part in (order[k:k + batch_size] for k in range(0, len(order), batch_size)):
            batch = make_batch(vlm, tokenizer, [rows[i] for i in part], root=root, answer=False).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = vlm.generate(batch, max_new_tokens, stop, tokenizer.pad_token_id)
            for i, ids in zip(part, out.tolist()):
                replies[i] = tokenizer.decode(ids[:ids.index(stop)] if stop in ids else ids)
            bar.update(len(part))
    return replies


def evaluate(folder, rows, args):
    """Replies of a model to the rows; eval.json and replies.jsonl go into its folder. -> eval.json's dict"""
    begun = time.time()
    vlm, tokenizer = load_vlm(folder, "cuda" if torch.cuda.is_available() else "cpu")
    replies = generate_replies(vlm, tokenizer, rows, args.data, args.batch_size, args.max_new_tokens)
    versions = {version: {"correct": 0, "n": 0, "unparsed": 0} for version in LADDER}
    with open(os.path.join(folder, "replies.jsonl"), "w", encoding="utf-8") as f:
        for row, reply in zip(rows, replies):
            score = score_answer(reply, row["answer"], row["kind"], row["choices"])
            count = versions[row["version"]]
            count["correct"] += score.match
            count["n"] += 1
            count["unparsed"] += score.extracted is None
            item = {"id": row["id"], "prompt": row["instruction"], "reply": reply, **score._asdict()}
            f.write(json.dumps(item, ensure_ascii=False) + "\n")
    top, bottom = share(versions["text_dominant"]), share(versions["vision_only"])
    result = {"benchmark": "builtin", "versions": versions,
              "all": sum(share(versions[v]) for v in IMAGE_VERSIONS) / len(IMAGE_VERSIONS),  # their mean
              "gap": top - bottom, "relative_gap": (top - bottom) / top if top else None,
              "seconds": time.time() - begun}
    with open(os.path.join(folder, "eval.json"), "w") as f:
        json.dump(result, f, indent=1)
    return result


# ------------------------------------------------------------------------------------------------------------
# The reports
# ------------------------------------------------------------------------------------------------------------
def share(count):
    return count["correct"] / max(1, count["n"])


def interval(count):
    """95 % Wilson score interval as (low, high). Not +-2 standard errors: that is (0, 0) at 0 right."""
    n, z = count["n"], 1.96
    if n == 0:
        return 0.0, 1.0
    middle = share(count) + z * z / (2 * n)
    half = z * (share(count) * (1 - share(count)) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def table(results):
    """{model: eval.json} -> text with a column for each model."""
    width = max(22, *(len(name) + 2 for name in results))
    every = list(results.values())
    line = lambda title, cells: f"{title:18s}" + "".join(f"{cell:>{width}s}" for cell in cells)
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    cell = lambda c: f"{percent(share(c)):>5s} [{percent(interval(c)[0]):>4s}, {percent(interval(c)[1]):>5s}]"
    return "\n".join([
        f"accuracy in %, {every[0]['versions']['text_only']['n']} problems a version [95 % interval]",
        line("", results),
        *(line(version, (cell(r["versions"][version]) for r in every)) for version in LADDER),
        line("ALL (with picture)", (percent(r["all"]) for r in every)),
        line("gap TD - VO", (percent(r["gap"]) for r in every)),
        line("relative gap, %", (percent(r["relative_gap"]) for r in every)),
        line("unparsed", (str(sum(c["unparsed"] for c in r["versions"].values())) for r in every))])


def draw_chart(results, path):
    """A PNG: bars by version, one shade for each model, whiskers = 95 % intervals."""
    shades = ("#b8c4d6", "#5b84b1", "#1f3d63", "#c58b3d", "#7a9a5a", "#8a5a83")
    font = ImageFont.load_default(15)
    left, top, height, bar = 60, 60, 260, max(12, 84 // len(results))
    group = bar * len(results) + 30
    image = Image.new("RGB", (left + group * len(LADDER) + 20, top + height + 60), "white")
    draw = ImageDraw.Draw(image)
    level = lambda x: top + height * (1 - x)
    for percent in range(0, 101, 20):
        draw.line([left, level(percent / 100), image.width - 20, level(percent / 100)], fill="#dddddd")
        draw.text((left - 8, level(percent / 100)), f"{percent} %", font=font, fill="black", anchor="rm")
    for k, (name, result) in enumerate(results.items()):
        shade = shades[k % len(shades)]
        draw.rectangle([left + k * 190, 20, left + k * 190 + 14, 34], fill=shade)
        draw.text((left + k * 190 + 20, 27), name[-22:], font=font, fill="black", anchor="lm")
        for j, version in enumerate(LADDER):
            count, x = result["versions"][version], left + j * group + 15 + k * bar
            low, high = interval(count)
            draw.rectangle([x, level(share(count)), x + bar - 3, level(0)], fill=shade)
            draw.line([x + bar / 2 - 1, level(low), x + bar / 2 - 1, level(high)], fill="black")
    for j, version in enumerate(LADDER):
        x, y = left + (j + .5) * group, top + height + 10
        draw.text((x, y), version.replace("_", "\n"), font=font, fill="black", anchor="ma", align="center")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(path)


def show(args, rows):
    """One problem in its versions: what went in, what came out, how it was marked and by which rule."""
    some = rows[args.show * len(LADDER):(args.show + 1) * len(LADDER)] if args.show >= 0 else []
    if not some:
        sys.exit(f"--show {args.show}: there are test problems 0 to {len(rows) // len(LADDER) - 1}")
    vlm, tokenizer = load_vlm(args.models[0])
    print(f"right answer: {some[0]['answer']} ({some[0]['kind']})")
    replies = generate_replies(vlm, tokenizer, some, args.data, len(some), args.max_new_tokens)
    for row, reply in zip(some, replies):
        score = score_answer(reply, row["answer"], row["kind"], row["choices"])
        print(f"\n{row['version']}: {row['instruction']}  [{row['image_url'] or 'no picture'}]\n  {reply}")
        print(f"  {'right' if score.match else 'WRONG'}: {score.extracted!r}, "
              f"found by the rule {score.rule!r}")


def main(argv=None):
    args = parse_args(argv)
    rows = read_rows(os.path.join(args.data, "test.jsonl"),
                     ("image_url", "instruction", "answer", "kind", "version", "id"))
    if args.show is not None:
        return show(args, rows)
    rows = rows[:args.limit * len(LADDER)] if args.limit else rows
    results = {folder.rstrip("/"): evaluate(folder, rows, args) for folder in args.models}
    print(table(results))
    draw_chart(results, args.chart)
    print(f"chart: {args.chart}; every reply and its mark: replies.jsonl in the model folders")


if __name__ == "__main__":
    main()
