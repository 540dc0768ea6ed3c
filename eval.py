"""Marks replies: accuracy by version of a problem, and the gap between reading it and seeing it.

    python eval.py out/stage1 out/stage2         # table, out/accuracy.png, eval.json in each folder
    python eval.py out/stage2 --show 0           # a test problem: prompts, replies, marks, rules
    python eval.py out/stage3 --ask "Find angle EGH." --picture mine.png
    python eval.py out/stage3 --data mathvista --max_new_tokens 1024   # other rows
    python eval.py --replies replies.jsonl --data mathvista            # of any model: marks only

It knows rows, not benchmarks: --data names a folder with test.jsonl and the pictures beside it.
data_gen.py makes one, convert/benchmarks.py makes others from MathVerse, MathVista and We-Math.

In this order:
    flags
    rows                  a problem a line: what is asked, and the right answer
    replies               decoded greedily, and kept: a killed run goes on
    table and pictures    counts, intervals, accuracy.png; loss.png at the end of each stage
    --ask and --show      any question; one test problem
    main
    the scorer            where the answer stands in a reply, and whether it is the right one
"""
import argparse
import functools
import hashlib
import json
import math
import operator
import os
import re
import sys
import unicodedata
from collections import namedtuple
from contextlib import suppress
from fractions import Fraction

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_gen import LADDER, make_problem, view
from model import (IGNORE, JsonLines, check_rows, file_hashes, find_model, is_main_process,
                   load_vlm, make_batches, read_json, says_it_in_one_line, write_json)

IMAGE_VERSIONS = [version for version, (_, picture) in LADDER.items() if picture]
KINDS = ("choice", "choice_text", "integer", "float", "list", "free")  # of answers
RULE_BASED = "rule-based: not comparable with judge-based papers"


# --------------------------------------------------------------------------------------------------
# Flags

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", help="model folders, or run folders with checkpoints")
    add("--data", default="data", help="folder with test.jsonl and pictures")
    add("--replies", help="mark these instead: id, reply")
    add("--ask", metavar="QUESTION", help="print the reply to this question")
    add("--picture", help="goes with the question")
    add("--show", type=int, help="print this problem's replies")
    add("--limit", type=int, help="the first so many rows only")
    add("--batch_size", type=int, default=100, help="prompts decoded at once")
    add("--max_new_tokens", type=int, default=64,  # the longest built-in solution has 53
        help="longest reply (real models: 1024)")
    args = parser.parse_args(argv)

    if bool(args.models) == bool(args.replies):
        parser.error("name model folders, or --replies")
    if args.replies and (args.ask or args.show is not None):
        parser.error("--ask and --show go with a model")
    if args.picture and not args.ask:
        parser.error("--picture goes with --ask")
    for flag in ("show", "limit", "batch_size", "max_new_tokens"):
        value = getattr(args, flag)
        lowest = 0 if flag == "show" else 1
        if value is not None and value < lowest:
            parser.error(f"--{flag} {value}: give {lowest} or more")
    return args


# --------------------------------------------------------------------------------------------------
# Rows: id, image_url (may be empty), instruction, answer, kind; where they apply: choices, a
# version (one of the ladder's six), groups (names of lines of the report that the row counts in)

def rows_by_id(path, fields):
    """{id: row} of a JSONL file. Exits with file:line when a field is missing or an id repeated."""
    if not os.path.isfile(path):
        sys.exit(f"{path} does not exist: name another, or run `python data_gen.py`")
    rows = JsonLines([path])
    check_rows(rows, fields)  # pictures, too: each is a file in the folder of the rows
    by_id = {}
    for row in rows:
        if row["id"] in by_id:
            sys.exit(f"{row['where']}: the id {row['id']!r} a second time; give each row its own")
        by_id[row["id"]] = row
    return by_id


def load_problems(folder):
    """{id: row} of folder/test.jsonl"""
    path = f"{folder}/test.jsonl"
    problems = rows_by_id(path, ("id", "image_url", "instruction", "answer", "kind"))
    for row in problems.values():
        wrong = what_is_wrong(row)
        if wrong:
            sys.exit(f"{row['where']}: {wrong}")
    return problems


def what_is_wrong(row):
    """Why a row cannot be marked or counted; None if it can."""
    if row["kind"] not in KINDS:
        return f"kind {row['kind']!r} is not one of {', '.join(KINDS)}"
    if not row["answer"].strip():
        return "field 'answer' is empty"
    if row["kind"] == "choice_text" and row["answer"] not in (row.get("choices") or []):
        return "the answer is none of the choices"
    if row.get("version", "text_only") not in LADDER:
        return f"version {row['version']!r} is not one of {', '.join(LADDER)}"
    return None


def is_builtin(folder):
    return os.path.exists(f"{folder}/manifest.json")  # data_gen.py's


# --------------------------------------------------------------------------------------------------
# Replies

END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_utterance>")
MODEL_FILES = r"(model|projector).*\.safetensors|vlm\.json|tokenizer.*|.*\.jinja"


def replies_of_file(path, problems):
    """{id: reply} of any model. What stands behind an end mark is no part of a reply."""
    replies = {}
    for id, row in rows_by_id(path, ("id", "reply")).items():
        if id not in problems:
            sys.exit(f"{row['where']}: --data has no problem with the id {id!r}")
        reply = row["reply"]
        for end in END_MARKS:
            reply = reply.partition(end)[0]
        replies[id] = reply
    return replies


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def replies_of_model(folder, problems, wanted, args):
    """{id: reply}, decoded where the folder does not hold them yet.

    They are kept in decoded-KEY.jsonl, a line each, so a killed run goes on.  KEY stands for all
    that decides a reply: another model, picture or flag has another file, and no reply is lost.
    """
    files = sorted(file_hashes(find_model(folder), MODEL_FILES).items())
    digest = hashlib.sha256(f"{files} {best_device()} {args.max_new_tokens}".encode())
    for row in problems.values():
        digest.update(row["instruction"].encode())
        if row["image_url"]:
            with open(os.path.join(row["folder"], row["image_url"]), "rb") as f:
                digest.update(f.read())
    path = f"{folder}/decoded-{digest.hexdigest()[:8]}.jsonl"

    with open(path, "ab+") as f:
        f.seek(0)
        text = f.read()
        end = text.rfind(b"\n") + 1
        f.truncate(end)  # a kill may have left half a line
        replies = dict(json.loads(line) for line in text[:end].splitlines())
        missing = [row for row in wanted if row["id"] not in replies]
        if missing:
            vlm, tokenizer = load_vlm(folder, best_device())
            for row, reply in generate_replies(vlm, tokenizer, missing, args):
                replies[row["id"]] = reply
                f.write(json.dumps([row["id"], reply]).encode() + b"\n")
                f.flush()
    return replies


def generate_replies(vlm, tokenizer, rows, args):
    """Greedy replies -> yields (row, reply)"""
    device = next(vlm.parameters()).device
    # Rows alike in length share a batch, the longest come first: if memory does not suffice, it
    # shows at once.
    rows = sorted(rows, key=lambda row: (row["image_url"] == "", -len(row["instruction"])))
    for start in tqdm(range(0, len(rows), args.batch_size), desc="replies", disable=None):
        some = rows[start:start + args.batch_size]
        # no max_length: no prompt is too long to be read
        [batch], _ = make_batches(tokenizer, vlm.config, some, answer=False)
        # float32 on a CPU: the same reply in any batch.  bfloat16 on a GPU: the last bits depend on
        # the batch, and now and then a token does.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = vlm.generate(batch.to(device), args.max_new_tokens, tokenizer.eos_token_id,
                                  tokenizer.pad_token_id)
        yield from zip(some, tokenizer.batch_decode(output, skip_special_tokens=True))


def mark(row, reply):
    return score_answer(reply, row["answer"], row["kind"], row.get("choices"))


def evaluate(name, problems, args):
    """Mark the replies of a model folder, or of a file. -> the dict of eval.json"""
    rows = list(problems.values())[:args.limit]
    if args.replies:
        replies = replies_of_file(name, problems)
    else:
        replies = replies_of_model(name, problems, rows, args)
    absent = [row["id"] for row in rows if row["id"] not in replies]
    if absent:
        print(f"{len(absent)} of {len(rows)} rows have no reply, {absent[0]!r} first: all wrong")

    folder = result_folder(name, args)
    os.makedirs(folder, exist_ok=True)
    scores = {}
    with open(f"{folder}/replies.jsonl", "w", encoding="utf-8") as f:
        for row in rows:
            reply = replies.get(row["id"], "")
            score = mark(row, reply)
            scores[row["id"]] = score
            line = {"id": row["id"], "prompt": row["instruction"], "reply": reply}
            f.write(json.dumps(line | score._asdict(), ensure_ascii=False) + "\n")
    result = report(rows, scores)
    result["missing"] = len(absent)
    write_json(result, folder, "eval.json")
    return result


def result_folder(name, args):
    """Where replies.jsonl and eval.json go: some rows never take the place of all."""
    folder = name
    if args.replies:
        folder = os.path.splitext(name)[0] + "_marked"
    elif not is_builtin(args.data):
        folder = os.path.join(name, os.path.basename(os.path.abspath(args.data)))
    if args.limit:
        folder = f"{folder}/limit-{args.limit}"
    return folder


# --------------------------------------------------------------------------------------------------
# Table and pictures

def count(rows, scores):
    marks = [scores[row["id"]] for row in rows]
    return {
        "correct": sum(score.match for score in marks),
        "n": len(marks),
        "unparsed": sum(score.extracted is None for score in marks),
    }


def share(counted):
    return counted["correct"] / max(1, counted["n"])


def interval(counted):
    """95 % Wilson score interval as (low, high). Not +-2 standard errors: they are 0 at 0 right."""
    p = share(counted)
    z2 = 1.96 ** 2 / max(1, counted["n"])
    middle = p + z2 / 2
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def report(rows, scores):
    """What is counted, from {id: Score}: by version, with the gap between them, and by group."""
    versions = {}
    for version in LADDER:
        some = [row for row in rows if row.get("version") == version]
        if some:
            versions[version] = count(some, scores)
    groups = {} if versions else {"all rows": rows}
    for row in rows:
        for name in row.get("groups") or []:
            groups.setdefault(name, []).append(row)

    shares = [share(versions[version]) for version in IMAGE_VERSIONS if version in versions]
    result = {
        "versions": versions,
        "all": sum(shares) / len(shares) if shares else None,
        "gap": None,
        "relative_gap": None,
        "groups": {name: count(groups[name], scores) for name in sorted(groups)},
        "unparsed": count(rows, scores)["unparsed"],
    }
    if "text_dominant" in versions and "vision_only" in versions:
        top = share(versions["text_dominant"])
        result["gap"] = top - share(versions["vision_only"])
        result["relative_gap"] = result["gap"] / top if top else None
    return result


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


def cell(counted):
    low, high = interval(counted)
    return f"{percent(share(counted))} [{percent(low):>4s}, {percent(high):>5s}]"


def table(results):
    """{model: dict of eval.json} -> text, a column for each model"""
    columns = []
    for name, result in results.items():
        lines = {"": name}
        versions = result["versions"]
        for version in versions:
            lines[version] = cell(versions[version])
        if versions:
            lines["ALL (with picture)"] = percent(result["all"])
            lines["gap TD - VO"] = percent(result["gap"])
            lines["relative gap, %"] = percent(result["relative_gap"])
        for group, counted in result["groups"].items():
            lines[f"{group} (n={counted['n']})"] = cell(counted)
        lines["unparsed"] = str(result["unparsed"])
        columns.append(lines)

    n = max([counted["n"] for counted in versions.values()], default=0)
    problems = f", {n} problems a version" if n else ""
    rows = [f"accuracy in %{problems} [95 % interval]"]
    side = max(len(label) for label in columns[0])
    width = max([22, *(len(name) + 2 for name in results)])
    for label in columns[0]:
        cells = [f"{lines[label]:>{width}s}" for lines in columns]
        rows.append(f"{label:{side}s}" + "".join(cells))
    return "\n".join(rows)


SHADES = ("#1f3d63", "#c58b3d", "#5b84b1", "#7a9a5a", "#8a5a83", "#b8c4d6")
LEFT, RIGHT, TOP, BOTTOM = 70, 790, 100, 380  # of the plane of a chart, in pixels


def level(height):
    return BOTTOM + (TOP - BOTTOM) * height  # from 0, below, to 1


def new_chart(title, names, ticks):
    """A white picture with title, legend and lines at {label: height}. -> it, what draws on it"""
    image = Image.new("RGB", (RIGHT + 30, BOTTOM + 60), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 12), title, "black", ImageFont.load_default(18))
    draw.font = ImageFont.load_default(14)
    x = 20
    for name, shade in zip(names, SHADES):
        draw.rectangle([x, 50, x + 14, 64], shade)
        draw.text((x + 20, 48), name, "black")
        x += 50 + draw.textlength(name)
    for label, height in ticks.items():
        draw.line([LEFT, level(height), RIGHT, level(height)], "#dddddd")
        draw.text((LEFT - 8, level(height)), label, "black", anchor="rm")
    return image, draw


def draw_accuracy(results, path):
    """Bars by version, a shade for each of up to six models, lines: 95 % intervals."""
    ticks = {f"{percents} %": percents / 100 for percents in range(0, 101, 20)}
    image, draw = new_chart("Accuracy by version, with 95 % intervals", results, ticks)
    bar = 90 // len(results)
    left = LEFT + 15
    for version in results[min(results)]["versions"]:
        x = left
        for result, shade in zip(results.values(), SHADES):
            counted = result["versions"][version]
            low, high = interval(counted)
            draw.rectangle([x, level(share(counted)), x + bar - 3, BOTTOM], shade)
            draw.line([x + bar / 2 - 1, level(low), x + bar / 2 - 1, level(high)], "black")
            x += bar
        words = f"{version}\nn = {counted['n']}"
        draw.text((left + 45, BOTTOM + 10), words, "black", anchor="ma", align="center")
        left += 120
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path)


def draw_losses(out):
    """out/loss.png of out/metrics.jsonl. A step that stands there twice: the last line counts."""
    path = f"{out}/metrics.jsonl"
    if not os.path.exists(path):  # no step was made
        return
    rows = JsonLines([path])
    by_step = {}
    for i in range(len(rows)):
        with suppress(ValueError):  # a kill or a full disk may have left half a line
            by_step[rows[i]["step"]] = rows[i]
    steps = sorted(by_step)
    names = [name for name in ("loss", "kl_ts", "kl_st", "ce") if name in by_step[steps[-1]]]
    # One logarithmic axis for all runs, so that they can be compared.  It has no place for 0: what
    # is smaller than 0.001 lies on the axis.
    ticks = {"0.001": 0, "0.01": 1 / 4, "0.1": 2 / 4, "1": 3 / 4, "10": 1}
    image, draw = new_chart(f"{out}: nats a token, log scale", names, ticks)
    scale = (RIGHT - LEFT) / steps[-1]  # pixels a step

    for step in (0, steps[-1] // 2, steps[-1]):
        draw.text((LEFT + scale * step, BOTTOM + 10), f"step {step}", "black", anchor="ma")
    for name, shade in zip(names, SHADES):
        points = []
        for step in steps:
            loss = max(0.001, by_step[step][name])
            points.append((LEFT + scale * step, level((math.log10(loss) + 3) / 4)))
        draw.line(points, shade, 3)
        draw.circle(points[-1], 3, shade)  # all that a run of one step has
    image.save(f"{out}/loss.png")


@torch.no_grad()
def caption_loss(vlm, tokenizer, folder, device):
    """Nats a token for reading the numbers off 64 test pictures in data_gen.py's folder."""
    manifest = read_json(folder, "manifest.json")
    rows = []
    for i in range(min(64, manifest["n_test"])):
        problem = make_problem("test", i, manifest["seed"])
        row = view(problem, "vision_dominant")  # its picture shows the numbers, its text does not
        row["instruction"] = "Read the labels."  # as tiny/ learnt it
        row["output"] = problem["numeric"]
        rows.append(row | {"folder": folder, "where": problem["id"]})
    [batch], _ = make_batches(tokenizer, vlm.config, rows)
    batch = batch.to(device)
    logits = F.linear(vlm(batch), vlm.lm_head).float()  # (N, V)
    return F.cross_entropy(logits, batch.labels[batch.labels != IGNORE]).item()


def print_caption_loss(vlm, tokenizer, folder, device, when):
    """A model that only ever gets text may unlearn to look. folder None, own rows: nothing."""
    if folder is not None and read_json(folder, "manifest.json")["n_test"] > 0:
        loss = caption_loss(vlm, tokenizer, folder, device)
        if is_main_process():
            print(f"caption loss {when}: {loss:.3f} nats a token", flush=True)


# --------------------------------------------------------------------------------------------------
# --ask and --show

def ask(args):
    """Any question, with or without a picture."""
    row = {"instruction": args.ask, "image_url": args.picture or "", "folder": "", "where": "--ask"}
    for model in args.models:
        vlm, tokenizer = load_vlm(model, best_device())
        [(_, reply)] = generate_replies(vlm, tokenizer, [row], args)
        print(f"{model}: {args.ask}  [{args.picture or 'no picture'}]\n  {reply}")


def show(args, problems):
    """One problem in its versions: what went in, what came out, how it was marked and why."""
    each = len(LADDER) if is_builtin(args.data) else 1
    rows = list(problems.values())[args.show * each:(args.show + 1) * each]
    if not rows:
        sys.exit(f"--show {args.show}: test problems are 0 to {len(problems) // each - 1}")
    for model in args.models:
        replies = replies_of_model(model, problems, rows, args)
        for row in rows:
            reply = replies[row["id"]]
            score = mark(row, reply)
            verdict = "right" if score.match else f"WRONG, it is {row['answer']}"
            print(f"\n{row['id']}: {row['instruction']}  [{row['image_url'] or 'no picture'}]\n"
                  f"  {reply}\n  {verdict}: {score.extracted!r}, found by the rule {score.rule!r}")


# --------------------------------------------------------------------------------------------------

@says_it_in_one_line
def main(argv=None):
    args = parse_args(argv)
    if args.ask:
        return ask(args)
    problems = load_problems(args.data)
    if args.show is not None:
        return show(args, problems)

    names = args.models or [args.replies]
    results = {name: evaluate(name, problems, args) for name in names}
    folders = [result_folder(name, args) for name in names]
    print(table(results))
    if not is_builtin(args.data):
        print(RULE_BASED)
    if results[names[0]]["versions"]:
        is_usual = folders == names  # models, all rows, the built-in problems
        chart = os.path.join("out" if is_usual else folders[0], "accuracy.png")
        draw_accuracy(results, chart)
        print(f"chart: {chart}")
    print(f"every reply and its mark: replies.jsonl in {', '.join(folders)}")


# --------------------------------------------------------------------------------------------------
# The scorer.  An answer is read from a slot, never from prose: the prompt asks for a last line
# "Answer: X", and whatever else a reply says does not count.  What stands in a slot has to be an
# answer from end to end: "5 or 6", "5, I think" and "not 5" are none.  In this order:
#
#     slots           where an answer stands: "Answer: X", "The answer is X", \boxed{X}, <answer>
#     spelling        one spelling for one thing: LaTeX and Unicode become plain text
#     numbers         a small grammar, read by hand: nothing is run, and fractions stay exact
#     equality        of texts, lists, numbers with units, equations; which option is meant
#     score_answer    right = nothing follows the last slot, and EVERY slot holds the right answer
#
# Why not rules that read prose: the first version had 677 lines of them, and of 444 wrong replies
# written to get past them 201 were marked right.  The price: replies to prompts that ask for no
# slot are mostly unparsed.

Score = namedtuple("Score", "match extracted rule")  # right?  what was marked, or None; which slot

LONGEST_READ = 4000  # characters at the end of a reply; more has no place in an answer
SAYS = r"""
    (?: (?: so | thus | hence | therefore | and ) ,? \  )*
    (?: the\  )? (?: final\  | correct\  )? (?: answer | option | choice ) \b
"""
SENTENCE = re.compile(rf"(?<= [.!?$†] ) \s* (?= {SAYS} )", re.I | re.X)
SLOT = re.compile(rf"""
    ^ [#*>`\ -]* {SAYS} [*\ ]*+
    (?: [:：] | is\b :? | \n )       # or a heading, and the answer on the line below it
    (?: [*\s$] | \\\[ )*+ (?P<line> \S.* ) $
  |
    (?: ^ | (?<! [<>!/] ) (?<! not ) (?<! not\  ) [=:] | \b is | \b are )  # not "2\boxed{5}"
    [\ $*\\(\[&]* (?P<box> \\boxed .* ) $
  |
    <answer> (?P<tag> (?s: .*? ) ) </answer>
""", re.I | re.M | re.X)
BOXED = re.compile(r"""
    \\boxed \s* \{ ( (?: [^{}] | \{ (?: [^{}] | \{ [^{}]* \} )* \} )* ) \}  # three levels of braces
""", re.X)


def visible(reply):
    """What a reply says when it has thought, or its end; empty if it never stopped thinking."""
    text = reply.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    if len(text) > LONGEST_READ:
        text = "…" + text[-LONGEST_READ:]  # the cut is no start of a line
    return text


def find_slots(text):
    """-> {content: rule} of all slots; empty if something follows the last one."""
    text = SENTENCE.sub("\n", text)  # "So x = 5. The answer is 5": that sentence gets its own line
    slots = {}
    end = 0
    for found in SLOT.finditer(text):
        rule = found.lastgroup
        content = BOXED.sub(r" \1 ", found[rule])  # "\boxed{5} cm" says 5 cm
        slots[plain(content)] = rule
        end = found.end()
    only_closing = re.fullmatch(r"[\s.$*\\\])}`]*", text[end:])
    return slots if only_closing and len(slots) < 20 else {}  # twenty answers are none


# Spelling

LATEX = [  # from the inside out, again and again until nothing changes
    (r"\\(?:left|right)(?![a-z])|\\displaystyle", ""),
    (r"(?<=\d)(?:\\,|\{,\})(?=\d{3})", ""),  # 1{,}200
    (r"\\\$ ?([\d.,]+)", r"\1 dollar"),
    (r"(?<!\d)([€£¥]) ?([\d.,]+)", r"\2 \1"),
    (r"\\[,;:! ]|\\q?quad\b|~", " "),
    (r"\\[()\[\]]|[$`]|\*\*|__", ""),
    (r"\\(?:text|math)\w?\w?\s*\{([^{}]*)\}", r"\1"),
    (r"\^?\{?\\circ\b\}?|\^\{?°\}?", "°"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^])(\d+) ?\\[dt]?frac\s*\{ *(\d+) *\}\s*\{ *(\d+) *\}", r"(\1+\2/\3)"),  # 2 1/2
    (r"(?<![\w.^])(\d+) (\d+)[/⁄](\d+)", r"(\1+\2/\3)"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)^(1/\1))"),
    (r"sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\b(?:square|sq\.?) ([a-z]+)", r"\1^2"),
    (r"\bcubic ([a-z]+)", r"\1^3"),
    (r"\\(sqrt|pi|sin|cos|tan|log|ln|%|\{|\})", r"\1"),
]
SIGNS = [  # the first spelling of a line takes the place of the others
    r"- − – — ‐",
    r"* × · ⋅ \times \cdot",
    r"/ ÷ ⁄ \div",
    r"<= ≤ ⩽ \leqslant \leq \le",
    r">= ≥ ⩾ \geqslant \geq \ge",
    r"∪ \cup",
    r"± \pm",
    r"∞ \infty +∞",
    r"∠ \angle",
    r"θ \theta",
    r"pi π",
    r"sqrt √",
]
# of brackets: what follows is not "5)", nor "sqrt(5))"; four levels
OUTSIDE = r"(?!(?:[^()\[\]{}]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*[)\]}])"
THOUSANDS = r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])" + OUTSIDE  # (1,200) is a point


def plain(text):
    """LaTeX and Unicode to plain text: "$\\frac{9}{4}\\pi$" -> "((9)/(4))pi"."""
    # NFKC makes full-width letters plain, but 10⁵ would be 105, 3½ 31/2, 5₂ 52, and 60º 60o.
    text = re.sub("[º˚掳]", "°", text)  # the last one stands in We-Math's file
    text = re.sub("([¹²³⁰-ⁿˣ]+)", r"^{\1}", text)
    text = re.sub("([¼-¾⅐-⅞₀-₉])", r" \1", text)
    text = unicodedata.normalize("NFKC", text)

    for _ in range(6):  # what is nested deeper stays as it is, and equals nothing
        before = text
        for pattern, new in LATEX:
            text = re.sub(pattern, new, text)
        if text == before:
            break
    for line in SIGNS:
        new, *others = line.split()
        for sign in others:
            text = text.replace(sign, new)

    text = re.sub(r"\s+", " ", text)
    text = re.sub(THOUSANDS, lambda found: found[0].replace(",", ""), text)
    return text.rstrip(' .,;:*"†。').lstrip(' ,;:*"')


# Numbers

TOKEN = re.compile(r"""
    \d+ \.? \d* | \. \d+ | sqrt | sin | cos | tan | log | ln | pi | [A-Za-zα-ωΑ-Ω] | [-+*/^()]
""", re.X)
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4}  # how strongly a sign holds what stands beside it
FUNCTIONS = {
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "log": math.log10,
    "ln": math.log,
}
LARGEST = 10 ** 15  # in school mathematics numbers stay below; tan(pi/2) is 1.6e16
LONGEST_VALUE = 100  # characters


def read(tokens, binding, point):
    """Take an expression off the end of `tokens`, which are in reverse order. -> its value

    binding  it ends before a sign that does not bind more strongly: "3*4" of "3*4+5" for 1
    point    a letter stands for a number, for another one at each point
    raises   ValueError, ArithmeticError or IndexError if no expression stands there
    """
    token = tokens.pop()
    if token in FUNCTIONS:
        x = FUNCTIONS[token](read(tokens, BINDS["^"], point))
    elif token == "(":
        x = read(tokens, 0, point)
        tokens.pop()  # ")", or an IndexError: it ends nowhere else
    elif token in "+-":
        x = read(tokens, BINDS["*"], point)
        if token == "-":
            x = -x
    elif token == "pi":
        x = math.pi
    elif token.isalpha():
        x = Fraction(pow(ord(token), point + 2, 1009) + 1, 211)
    else:
        x = Fraction(token)

    while tokens and tokens[-1] != ")":
        sign = tokens[-1]
        if sign not in BINDS:  # 2x and 2(x + 1) are products, "2 3" and "x2" are not
            if sign[0] in ".0123456789":
                raise ValueError("two numbers")
            sign = "*"
        if BINDS[sign] <= binding:
            break
        if tokens[-1] == sign:
            tokens.pop()
        right = read(tokens, 3 if sign == "^" else BINDS[sign], point)  # 2^3^2 is 2^9
        x = CALCULATE[sign](x, right)

    is_long = isinstance(x, Fraction) and x.denominator > LARGEST ** 20
    if is_long or abs(x) > LARGEST:
        raise ValueError("too large")
    return x


def power(x, n):
    if abs(n) > 64 or (x < 0 and n != int(n)):
        raise ValueError("too large, or not real")
    return x ** n


CALCULATE = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": power,
}


def values(text):
    """An expression's values at three points, None if it is not one from end to end.

    Fractions stay exact.  Two expressions with letters that agree at three points are the same.
    """
    words = re.sub("sqrt|sin|cos|tan|log|ln|pi", "", text).strip()
    is_text = re.search("[A-Za-z]{3}", words) or re.fullmatch("[A-Za-z ]{2,}", words)
    is_range = re.fullmatch(r"[\d.]+ ?- ?[\d.]+", text)  # 0.2 - 0.4
    tokens = TOKEN.findall(text)
    if is_text or is_range or "".join(tokens) != text.replace(" ", ""):
        return None

    found = []
    try:
        for point in range(3):
            rest = tokens[::-1]
            found.append(read(rest, 0, point))
    except (ValueError, ArithmeticError, IndexError):
        return None
    return None if rest else found  # something is left over


UNITS = [  # other names of the first one; units are not converted into each other
    "mm millimeter millimetre",
    "cm centimeter centimetre",
    "m meter metre",
    "km kilometer kilometre",
    "ft foot feet",
    "in inch inche",
    "mile",
    "g gram",
    "kg kilogram",
    "L litre liter",
    "° degree deg",
    "% percent",
    "€ euro",
    "£ pound",
    "¥ yuan",
    "dollar",
    "s sec second",
    "min minute",
    "h hr hour",
    "year",
    "m/s",
    "km/h",
    "unit",
]
UNIT = re.compile(r"""
    (?P<value> (?: [^A-Za-z] | pi | sqrt )* (?<= [\d)i] ) ) \ ?
    (?P<name> [A-Za-z°%€£¥/]+ )
    (?: (?<= [a-z] ) \^? \(? (?P<exponent> [23] ) \)? )?
""", re.X)
EXACT = 1000  # decimals of a fraction, a root, a whole number
Number = namedtuple("Number", "values unit decimals")


def unit_name(name):
    for line in UNITS:
        names = line.split()
        if name in names or (len(name) > 2 and name.removesuffix("s") in names):
            return names[0]
    return None


@functools.lru_cache(10_000)  # options are compared with every slot
def number(text):
    """"3.50 cm^2" -> Number([7/2, 7/2, 7/2], "cm2", 2); None if it is none."""
    found = UNIT.fullmatch(text)
    unit = unit_name(found["name"]) if found else None
    if unit:
        text = found["value"]
        unit += found["exponent"] or ""
    if values(text) is None:
        return None
    decimal = re.fullmatch(r"[-+]?\d*\.(\d+)", text)
    return Number(values(text), unit, len(decimal[1]) if decimal else EXACT)


# Equality

NAME = re.compile(r"""
    (?: (?: m?∠ | angle ) \ ? )?
    (?: [A-Za-zα-ω] | [A-Z]{2,4} )
    (?: [_\ ]?\d )?
    (?: \ ?\([a-z]\) )?
""", re.X)
LABELLED = re.compile(r"([∠A-Za-zα-ω][^-+*/^<>=!]*?|) ?= ?([^=]+)")  # not 2x = 5, x >= 5
COMMA = re.compile(" ?, ?" + OUTSIDE)
BRACKETS = re.compile(r"[(\[{].*,.*[)\]}]")
OPTION = re.compile(r"(?ai)(?:option |choice )?\(?([A-J])\)?(?:$|[.:,) ]+(.*))")


def close(x, y):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return math.isclose(x, y, rel_tol=1e-9)


def same_number(found, gold, is_rounded):
    """Equal, or one is the other rounded, to three digits at least.

    is_rounded  the gold is a rounded value, however few its digits, and has to be reached:
                3.14159 is 3.14, but 3.1 is not
    """
    if found.unit and gold.unit and found.unit != gold.unit:
        return False  # a unit that only one of them has does not matter
    for exact, short in ((found, gold), (gold, found)):
        has_three_digits = abs(exact.values[0]) >= 10 ** (2 - short.decimals)
        is_enough = short is gold if is_rounded else has_three_digits
        if short.decimals < exact.decimals and is_enough:
            half = Fraction(1, 2 * 10 ** short.decimals)
            return all(abs(x - y) <= half for x, y in zip(exact.values, short.values))
    return all(close(x, y) for x, y in zip(found.values, gold.values))


def difference(text):
    """"x > 5" -> ("<", values of 5 - x); the sign is "" if it is no equation and no inequality."""
    parts = re.split("(<=|>=|[<>=])", text)
    if len(parts) != 3:
        return "", None
    left, sign, right = parts
    if ">" in sign:
        left, right = right, left
    return sign.replace(">", "<"), values(f"({left})-({right})")


def same_relation(found, gold):
    """2x < 6 is x < 3: one ratio at all points, and a positive one where order counts."""
    sign, some = difference(found)
    gold_sign, others = difference(gold)
    if sign != gold_sign or not some or not others or 0 in some + others:
        return False
    ratio = some[0] / others[0]
    is_turned = sign != "=" and ratio < 0
    return not is_turned and all(close(x, ratio * y) for x, y in zip(some, others))


def unlabel(text):
    """"AB = 5" -> ("AB", "5"), "P(4, 0)" -> ("P", "(4, 0)"), "5" -> ("", "5")"""
    text = re.sub(r"^([^=]*)= ?([a-z])$", r"\2=\1", text)  # 5 = x
    text = re.sub(r"^([A-Z]) ?(\(.*,.*\))$", r"\1=\2", text)
    found = LABELLED.fullmatch(text)
    return found.groups() if found else ("", text)


def squeeze(text):
    """Without what makes no difference: spaces in a formula, capitals in words."""
    if re.search(r"[\d+*/^=<>()]", text):
        return re.sub(r"(?<!\d) | (?!\d)", "", text)
    return text.lower() if len(text) > 1 else text


def same(found, gold, is_rounded=False):
    """Whether two answers in plain spelling are equal: as texts, lists, numbers or relations."""
    if found and squeeze(found) == squeeze(gold):
        return True
    if len(found) > LONGEST_VALUE or len(gold) > LONGEST_VALUE:
        return False

    parts = COMMA.split(found)
    gold_parts = COMMA.split(gold)
    if len(parts) != len(gold_parts):
        return False
    if len(parts) > 1:
        return all(same(x, y, is_rounded) for x, y in zip(parts, gold_parts))

    label, x = unlabel(found)
    gold_label, y = unlabel(gold)
    is_name = NAME.fullmatch(label) and not gold_label  # "half = 5" is not 5, x = 5 is
    if not label or is_name or label.lower() == gold_label.lower():
        if x and squeeze(x) == squeeze(y):
            return True
        are_lists = BRACKETS.fullmatch(x) and BRACKETS.fullmatch(y)
        if are_lists and x[0] == y[0] and x[-1] == y[-1]:
            return same(x[1:-1], y[1:-1], is_rounded)
        if number(x) and number(y):
            return same_number(number(x), number(y), is_rounded)

    return same_relation(found, gold)


@functools.lru_cache(1000)  # the gold one is asked for with every slot
def option_named(text, options, kind):
    """Index of the option that an answer names, by letter, text or both if they agree; or None.

    For "choice_text" the text counts before the letter: some options are themselves letters.
    """
    by_text = [k for k, option in enumerate(options) if option == text]
    if not by_text:
        by_text = [k for k, option in enumerate(options) if same(text, option)]
    if kind == "choice_text" and len(by_text) == 1:
        return by_text[0]

    lettered = OPTION.fullmatch(text)
    if lettered:
        k = "ABCDEFGHIJ".index(lettered[1].upper())
        rest = lettered[2]
        if not rest and (k < len(options) or not options):
            return k
        if rest and k < len(options):
            if same(rest, options[k]) or same(rest.strip("()"), options[k]):
                return k
    return by_text[0] if len(by_text) == 1 else None


# The verdict

def is_right(text, gold, kind, options):
    if kind not in ("choice", "choice_text"):
        return same(text, gold, is_rounded=kind == "float")
    right = option_named(gold, options, kind)
    if right is None and not OPTION.fullmatch(gold):  # a choice without options to choose from
        return same(text, gold)
    return right is not None and option_named(text, options, kind) == right


def score_answer(reply, answer, kind, choices=None):
    """Mark one reply. -> Score(match, extracted, rule)

    answer  the right one: a letter for "choice", one of choices for "choice_text", else a value
            or a text
    A reply without an answer has extracted None: it is wrong, and counted as unparsed besides.
    """
    golds = {plain(line) for line in answer.split("\n")}  # some shipped ones are there twice
    gold = golds.pop()
    options = tuple(plain(choice) for choice in choices or [])

    text = visible(reply)
    slots = find_slots(text)
    if not slots and len(text) < 500 and "\n" not in text.strip():
        bare = plain(text)
        is_option = option_named(bare, options, kind) is not None
        if is_option or number(bare) or is_right(bare, gold, kind, options):
            slots = {bare: "bare"}
    if not slots:
        return Score(False, None, "no slot")

    # Two different golds, "C\nD": no reply can be both, so all are wrong.
    marks = []
    for content in slots:
        marks.append(not golds and is_right(content, gold, kind, options))
    if any(marks) and not all(marks):
        return Score(False, None, "two answers")
    content, rule = slots.popitem()
    return Score(all(marks), content, rule)


if __name__ == "__main__":
    main()
