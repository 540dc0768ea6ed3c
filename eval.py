"""Accuracy by problem version, the gap between reading a problem and seeing it, and three public benchmarks.

    python eval.py out/stage1 out/stage2 out/stage3   # table, out/accuracy.png, eval.json in each folder
    python eval.py out/stage2 --show 0                # a test problem, its six versions: prompt, reply, mark
    python eval.py out/stage3 --benchmark mathvista --data testmini.json --images FOLDER
    python eval.py --benchmark wemath --data testmini.json --replies replies.jsonl   # marks only, no model

Replies are decoded greedily and marked by `score_answer`: fixed rules, no judge, the same mark every time.
In this order: the problems, the replies, the reports, the scorer.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import namedtuple
from fractions import Fraction
from string import ascii_uppercase

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_gen import LADDER, make_problem, view
from model import (IGNORE, WEIGHTS, JsonLines, check_rows, file_hashes, find_model, is_main_process, load_vlm, make_batches,
                   read_json)

IMAGE_VERSIONS = [version for version, (_, picture) in LADDER.items() if picture]
RULE_BASED = "rule-based: not comparable with judge-based papers"

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("models", nargs="*", help="model folders, or run folders with step-N checkpoints in them")
    add("--benchmark", default="builtin", choices=["builtin", *BENCHMARKS], help="whose problems")
    add("--data", nargs="+", default=["data"],
        help="folder of data_gen.py; for a public benchmark its testmini.json (MathVerse: one file or both)")
    add("--images", help="folder where a public benchmark's picture names start (default: that of --data)")
    add("--replies", metavar="FILE", help="mark these replies, JSONL of id and reply, instead of a model's")
    add("--out", help="folder for the marks of --replies (default: its name without .jsonl)")
    add("--limit", type=int, default=None, help="use only the first so many test problems")
    add("--batch_size", type=int, default=100, help="prompts decoded at once")
    add("--max_new_tokens", type=int, default=64,
        help="cut a reply here (the longest built-in solution has about 55; give a real model 1024)")
    add("--chart", help="bar chart by version to write (default: out/accuracy.png)")
    add("--show", type=int, default=None, metavar="I", help="print the replies to test problem I")
    args = parser.parse_args(argv)
    if bool(args.models) == bool(args.replies):
        parser.error("name model folders (before the flags) or --replies FILE")
    return args
KINDS = ("choice", "choice_text", "integer", "float", "list", "free")

# ------------------------------------------------------------------------------------------------------------
# The problems.  Every benchmark becomes a list of rows like those of data_gen.py: id, image_url, instruction,
# answer, kind, choices, version where there is one, and groups: lines of the report that the row counts in.
# ------------------------------------------------------------------------------------------------------------
def options_in(text):
    """"A. 3, 5;B. 0.5" or "A:40°\\nB:60°" -> the options; None unless the letters run A, B, C, ..."""
    _, *found = re.split(r"(?:^|[;；\n])\s*([A-J])\s*[.:．：]", text)
    ordered = found and ascii_uppercase.startswith("".join(found[::2]))
    return [option.strip().rstrip(" ;.") for option in found[1::2]] if ordered else None

def mathverse(row):
    """arXiv 2403.14624. Versions get the names of our ladder; what is text only is counted apart."""
    version, meta = row["problem_version"].lower().replace(" ", "_"), row["metadata"]
    LADDER[version]  # a KeyError for another one
    asked = row.get("question_for_eval") or row["question"]  # vision_only: ""
    place = ("text only, " if version == "text_only" else "") + "{}: " + meta["subject"]
    return dict(id=row["sample_index"], image_url=row["image"], instruction=row["query_cot"], version=version,
                kind={"multi-choice": "choice", "free-form": "free"}[row["question_type"]],
                answer=row["answer"], choices=options_in(asked.partition("Choices:")[2]),
                groups=[place.format("subject"), f"{place.format('subfield')}, {meta['subfield']}"])

HINTS = {"choice_text": "option letter, e.g., A, B, C, D", "integer": "integer, e.g., 1, 2, 3",
         "float": "number with {precision} decimal place(s)", "list": "list, e.g., [1, 2]", "free": "answer"}

def mathvista(row):
    """arXiv 2310.02255. The prompt shows the options; the released Math-PUMA code withholds them."""
    options, meta = row["choices"] or [], row["metadata"]
    unit = f" (Unit: {row['unit']})" if row["unit"] else ""
    kind = "choice_text" if options else row["answer_type"].replace("text", "free")
    words = [row["question"] + unit, *(f"({c}) {option}" for c, option in zip(ascii_uppercase, options)),
             f"Please give the final {HINTS[kind].format(**row)}, at the end."]
    if options and row["answer"] not in options:
        raise ValueError("the answer is not one of the choices")
    return dict(id=row["pid"], image_url=row["image"], instruction="\n".join(words), kind=kind,
                choices=options, answer=row["answer"],
                groups=["ALL", f"question type: {row['question_type']}", f"task: {meta['task']}",
                        *(f"skill: {skill}" for skill in meta["skills"])])

def wemath(row):
    """arXiv 2407.01284. Steps and composite ("multi") of one ID, "2steps_7" or "3stpes_7", are a group."""
    steps, key = row["ID"][0], row["key"]
    if not re.fullmatch(rf"[23].*/{steps}steps_(?:[1-{steps}]|multi)", id := f"{row['ID']}/{key}"):
        raise ValueError(f"no step has the name {id}")
    return dict(id=id, image_url=row["image_path"], instruction=f"{row['question']}\n{row['option']}",
                kind="choice", answer=row["answer"], choices=options_in(row["option"]),
                groups=[f"S{steps if key.endswith('multi') else 1}"])

BENCHMARKS = {"mathverse": mathverse, "mathvista": mathvista, "wemath": wemath}
NOTES = {"mathvista": "; the prompts show the choices, the released Math-PUMA code withholds them",
         "wemath": "; only groups with all their steps count"}

def load_items(args):
    """The problems in order of id, and the folder of their pictures. Exits with file and row at a bad row."""
    if args.benchmark == "builtin":
        fields = ("image_url", "instruction", "answer", "kind", "version", "id")
        path = os.path.join(args.data[0], "test.jsonl")
        if not os.path.isfile(path):
            sys.exit(f"{path} does not exist: run `python data_gen.py` first, or name the right --data")
        rows = JsonLines([path])
        check_rows(rows, fields)
        return list(rows), args.data[0]
    items, help = {}, f"name the testmini.json of {args.benchmark} with --data"
    for path in args.data:
        try:
            with open(path, encoding="utf-8-sig") as f:
                rows = json.load(f)
            rows = list(rows.values() if isinstance(rows, dict) else rows)  # MathVista: {pid: row}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            sys.exit(f"{path}: {error}: {help}")
        for number, row in enumerate(rows, 1):
            try:
                item = BENCHMARKS[args.benchmark](row)
                for field in ("id", "instruction", "answer", "image_url"):
                    optional = field == "image_url" and item.get("version") == "text_only"
                    if not isinstance(item[field], str) or not (item[field] or optional):
                        raise ValueError(f"no {field}")
            except (LookupError, ValueError, TypeError, AttributeError) as error:
                sys.exit(f"{path}: row {number} is malformed ({error!r}): {help}")
            if len(args.data) > 1 and item.get("version") == "text_only":
                item["id"] = f"text_only/{item['id']}"  # both files of MathVerse count from 1
            if item["id"] in items:
                sys.exit(f"{path}: row {number}: id {item['id']!r} is there twice: {help}")
            items[item["id"]] = item
    if not items:
        sys.exit(f"{args.data[0]} has no rows: {help}")
    order = lambda id: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", id)]  # 9, 10
    return [items[id] for id in sorted(items, key=order)], args.images or os.path.dirname(args.data[0])

def picture_bytes(items, root):
    """Size of all pictures together. Exits when one is missing or its name leads out of root."""
    total = 0
    for item in items:
        name, path = item["image_url"], os.path.join(root, item["image_url"])
        if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
            sys.exit(f"{item['id']}: picture {name!r} lies outside of {root!r}: correct the name")
        if name and not os.path.isfile(path):
            sys.exit(f"{item['id']}: picture {path} does not exist: name their folder with --images")
        total += os.path.getsize(path) if name else 0
    return total

# ------------------------------------------------------------------------------------------------------------
# The replies.  replies.jsonl: a header, then a row for each problem.  While a model is at work it grows by a
# batch at a time, so a killed run loses one batch; at the end it is written anew, with marks, in order of id.
# ------------------------------------------------------------------------------------------------------------
def read_replies(path, own=False):
    """JSONL of id and reply -> (header or {}, {id: reply}). own: ours, its last line may be torn."""
    header, replies = {}, {}
    try:
        with open(path, "rb") as f:  # bytes: text mode would also break lines at U+2028
            lines = f.readlines()
    except OSError as error:
        return ({}, {}) if own else sys.exit(f"{path}: {error}: name the file of replies with --replies")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if number == 1 and "benchmark" in row:
                header = row
            elif not isinstance(row["id"], str) or not isinstance(row["reply"], str) or row["id"] in replies:
                raise ValueError("id and reply have to be strings, and no id may come twice")
            else:
                replies[row["id"]] = row["reply"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            if not own or line.endswith(b"\n"):
                sys.exit(f'{path}:{number}: {error!r}: write {{"id": "...", "reply": "..."}}')
    return header, replies if replies or own else sys.exit(f"{path} holds no replies")

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def write_jsonl(path, rows):
    """All or nothing: under another name first."""
    with open(f"{path}.part", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{path}.part", path)

def generate_replies(vlm, tokenizer, items, root, args):
    """Greedy replies -> lists of (item, reply), a batch each."""
    device, stop, pad = next(vlm.parameters()).device, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens, begun = 0, time.time()
    # Alike lengths share a batch, the longest come first: if memory does not suffice, it shows at once.
    items = sorted(items, key=lambda item: (not item["image_url"], -len(item["instruction"])))
    with tqdm(total=len(items), desc="replies", disable=not sys.stderr.isatty()) as bar:
        for part in (items[k:k + args.batch_size] for k in range(0, len(items), args.batch_size)):
            # No max_length: positions are rotary, no prompt is too long to be read
            rows = [{"folder": root, "where": f"row {item['id']}"} | item for item in part]
            try:
                [batch], _ = make_batches(tokenizer, vlm.config, rows, answer=False)
            except ValueError as error:
                sys.exit(str(error))
            # float32 on a CPU: the same reply in any batch.  bfloat16 on a GPU: the last bits depend on the
            # batch, and now and then a token does.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = vlm.generate(batch.to(device), args.max_new_tokens, stop, pad).tolist()
            out = [ids[:ids.index(stop)] if stop in ids else ids for ids in out]
            tokens += sum(map(len, out))
            bar.set_postfix_str(f"{tokens / (time.time() - begun):,.0f} tokens/s", refresh=False)
            bar.update(len(part))
            yield [(item, tokenizer.decode(ids)) for item, ids in zip(part, out)]

def model_replies(folder, path, header, items, root, args):
    """{id: reply}; decoded where path does not hold one of the same model, data and flags yet."""
    vlm, tokenizer = load_vlm(folder, header["device"])
    header |= {"model_sha256": file_hashes(find_model(folder), WEIGHTS)}
    old, replies = read_replies(path, own=True)
    differ = [key for key in header if key != "scorer" and old.get(key) != header[key]]  # marks are made anew
    if differ and os.path.exists(path):
        os.replace(path, path + ".old")
        print(f"{path} has another {', '.join(differ)}: decoding anew, the old file is now {path}.old")
        replies = {}
    write_jsonl(path, [header, *({"id": id, "reply": reply} for id, reply in replies.items())])
    todo = [item for item in items if item["id"] not in replies]
    with open(path, "a", encoding="utf-8") as f:
        for batch in generate_replies(vlm, tokenizer, todo, root, args) if todo else ():
            new = {item["id"]: reply for item, reply in batch}
            f.writelines(json.dumps({"id": id, "reply": new[id]}, ensure_ascii=False) + "\n" for id in new)
            f.flush()
            replies |= new
    return replies

def folder_of(name, args):
    """Where eval.json and replies.jsonl go."""
    if args.replies:
        return args.out or os.path.splitext(name)[0] + "_marked"
    return name if args.benchmark == "builtin" else os.path.join(name, args.benchmark)

def evaluate(name, items, root, args):
    """Replies of a model folder, or of a file, marked. -> eval.json's dict, written beside replies.jsonl"""
    begun, builtin, some = time.time(), args.benchmark == "builtin", items[:args.limit]
    folder, data = folder_of(name, args), [os.path.join(root, "test.jsonl")] if builtin else args.data
    path = os.path.join(folder, "replies.jsonl")
    header = {"benchmark": args.benchmark, "note": RULE_BASED, "scorer": sha256(__file__)[:12],
              "data_sha256": [sha256(file) for file in data]}
    if args.replies:
        _, replies = read_replies(name)
        if unknown := replies.keys() - {item["id"] for item in items}:
            sys.exit(f"{name}: no id {min(unknown)!r} in {' '.join(args.data)}: name the right --data")
        if os.path.exists(path) and os.path.samefile(path, name):
            sys.exit(f"the marks would overwrite {name}: name another folder with --out")
        os.makedirs(folder, exist_ok=True)
    else:
        header |= {"picture_bytes": picture_bytes(items, root), "max_new_tokens": args.max_new_tokens,
                   "device": "cuda" if torch.cuda.is_available() else "cpu"}
        os.makedirs(folder, exist_ok=True)
        replies = model_replies(name, path, header, some, root, args)
    if absent := [item["id"] for item in some if item["id"] not in replies]:
        print(f"{len(absent)} of {len(some)} ids have no reply, {absent[0]!r} first: counted as wrong")
    mark = lambda i: score_answer(replies.get(i["id"], ""), i["answer"], i["kind"], i["choices"])
    scores = {item["id"]: mark(item) for item in items}
    write_jsonl(path, [header, *(
        {"id": i["id"], "prompt": i["instruction"], "reply": replies[i["id"]], **scores[i["id"]]._asdict()}
        for i in items if i["id"] in replies)])  # beyond --limit too: nothing that was decoded gets lost
    result = {"benchmark": args.benchmark, **report(args.benchmark, some, scores),
              "seconds": time.time() - begun}
    with open(os.path.join(folder, "eval.json"), "w") as f:
        json.dump(result, f, indent=1)
    return result

# ------------------------------------------------------------------------------------------------------------
# The reports
# ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def caption_loss(vlm, tokenizer, folder, device):
    """Nats a token for reading the numbers off 64 test pictures in data_gen.py's folder."""
    manifest = read_json(folder, "manifest.json")
    rows = []
    for i in range(min(64, manifest["n_test"])):
        problem = make_problem("test", i, manifest["seed"])
        row = view(problem, "vision_dominant")  # its picture shows the numbers, its text does not say them
        row["instruction"] = "Read the labels."  # as tiny/ learnt it
        row["output"] = problem["numeric"]
        rows.append(row | {"folder": folder, "where": problem["id"]})
    [batch], _ = make_batches(tokenizer, vlm.config, rows)
    batch = batch.to(device)
    logits = F.linear(vlm(batch), vlm.lm_head).float()  # (N, V)
    return F.cross_entropy(logits, batch.labels[batch.labels != IGNORE]).item()

def print_caption_loss(vlm, tokenizer, folder, device, when):
    """A model that only ever gets text may unlearn to look: this number shows it. folder None: nothing."""
    if folder is not None and read_json(folder, "manifest.json")["n_test"] > 0:
        loss = caption_loss(vlm, tokenizer, folder, device)
        if is_main_process():
            print(f"caption loss {when}: {loss:.3f} nats a token", flush=True)

def share(count):
    return count["correct"] / max(1, count["n"])

def interval(count):
    """95 % Wilson score interval as (low, high). Not +-2 standard errors: that is (0, 0) at 0 right."""
    n, p, z = max(1, count["n"]), share(count), 1.96
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

def count_by(items, scores, names, start=()):
    """{name: {"correct", "n", "unparsed"}} over the names(item) of every item."""
    counts = {name: {"correct": 0, "n": 0, "unparsed": 0} for name in start}
    for item in items:
        for name in names(item):
            count, score = counts.setdefault(name, {"correct": 0, "n": 0, "unparsed": 0}), scores[item["id"]]
            count["correct"] += score.match
            count["n"] += 1
            count["unparsed"] += score.extracted is None
    return counts

def outcomes(groups, scores):
    """We-Math's diagnosis of its groups, in shares of them. Strict: all steps have to be right; loose: one.

    IK  insufficient knowledge: composite and a step wrong    CM  complete mastery: composite right, steps too
    IG  inadequate generalization: only composite wrong     RM  rote memorization: composite right, no CM
                                                                (a share of the right composites)
    """
    marks = [[scores[item["id"]].match for item in group] for group in groups]  # the composite is the last
    result, n = {"complete_groups": len(groups)}, max(1, len(groups))
    for rule, enough in (("strict", all), ("loose", any)):
        ik, ig = (sum(not m and all(s) == good for *s, m in marks) / n for good in (False, True))
        cm, rm = (sum(m and enough(s) == good for *s, m in marks) / n for good in (True, False))
        result[rule] = {"score": cm + ig / 2, "IK": ik, "IG": ig, "CM": cm, "RM": rm and rm / (rm + cm)}
    return result

def report(benchmark, items, scores):
    """The figures of a benchmark from {id: Score}: shares and counts."""
    result = {}
    if benchmark == "wemath":
        groups = {}
        for item in items:
            groups.setdefault(item["id"].partition("/")[0], []).append(item)
        groups = [group for ID, group in groups.items() if len(group) == int(ID[0]) + 1]  # no step missing
        result, items = outcomes(groups, scores), sum(groups, [])
    elif benchmark != "mathvista":
        versions = count_by(items, scores, lambda item: [item["version"]], LADDER)
        seen = {v: share(c) for v, c in versions.items() if c["n"]}
        shown, top, bottom = [seen[v] for v in IMAGE_VERSIONS if v in seen], *map(
            seen.get, ("text_dominant", "vision_only"))
        gap = top - bottom if {"text_dominant", "vision_only"} <= seen.keys() else None
        result = {"versions": versions, "all": sum(shown) / len(shown) if shown else None,  # their mean
                  "gap": gap, "relative_gap": gap / top if gap is not None and top else None}
    if benchmark != "builtin":
        result["groups"] = dict(sorted(count_by(items, scores, lambda item: item["groups"]).items()))
        result["unparsed"] = sum(scores[item["id"]].extracted is None for item in items)
    return result

def table(results):
    """{model: eval.json} -> text with a column for each model."""
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    ends = lambda c: "[{:>4s}, {:>5s}]".format(*map(percent, interval(c)))
    cell = lambda c: f"{percent(share(c)):>5s} {ends(c)}" if c["n"] else "-"
    n = max((c["n"] for r in results.values() for c in r.get("versions", {}).values()), default=0)
    columns = []
    for name, result in results.items():
        versions, lines = result.get("versions", {}), {"": name}
        lines |= {version: cell(versions[version]) for version in LADDER if versions}
        means = {"ALL (with picture)": "all", "gap TD - VO": "gap", "relative gap, %": "relative_gap"}
        lines |= {label: percent(result[key]) for label, key in means.items() if versions}
        lines |= {f"{group} (n={c['n']})": cell(c) for group, c in result.get("groups", {}).items()}
        lines |= {f"{rule} {key}": percent(x) for rule in ("strict", "loose")
                  for key, x in result.get(rule, {}).items()}
        lines |= {"complete groups": str(result["complete_groups"])} if "strict" in result else {}
        unparsed = result.get("unparsed", sum(c["unparsed"] for c in versions.values()))
        columns.append(lines | {"unparsed": str(unparsed)})
    side, width = max(map(len, columns[0])), max(22, *(len(name) + 2 for name in results))
    rows = [f"{label:{side}s}" + "".join(f"{column[label]:>{width}s}" for column in columns)
            for label in columns[0]]
    return "\n".join([f"accuracy in %{f', {n} problems a version' * bool(n)} [95 % interval]", *rows])

def draw_chart(results, path):
    """A PNG: bars by version, one shade for each model, whiskers = 95 % intervals."""
    shades = ("#b8c4d6", "#5b84b1", "#1f3d63", "#c58b3d", "#7a9a5a", "#8a5a83")
    font, bar = ImageFont.load_default(15), max(12, 84 // len(results))
    group, level = bar * len(results) + 30, lambda x: 320 - 260 * x
    image = Image.new("RGB", (80 + group * len(LADDER), 380), "white")
    draw = ImageDraw.Draw(image)
    for tenth in range(0, 11, 2):
        draw.line([60, level(tenth / 10), image.width - 20, level(tenth / 10)], fill="#dddddd")
        draw.text((52, level(tenth / 10)), f"{10 * tenth} %", font=font, fill="black", anchor="rm")
    for k, (name, result) in enumerate(results.items()):
        shade = shades[k % len(shades)]
        draw.rectangle([60 + k * 190, 20, 74 + k * 190, 34], fill=shade)
        draw.text((80 + k * 190, 27), name[-22:], font=font, fill="black", anchor="lm")
        for j, version in enumerate(LADDER):
            count, x = result["versions"][version], 75 + j * group + k * bar
            draw.rectangle([x, level(share(count)), x + bar - 3, level(0)], fill=shade)
            low, high = map(level, interval(count))
            draw.line([x + bar / 2 - 1, low, x + bar / 2 - 1, high], fill="black")
    for j, version in enumerate(LADDER):
        draw.text((60 + (j + .5) * group, 330), version.replace("_", "\n"), font=font, fill="black",
                  anchor="ma", align="center")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image.save(path)

def show(args, items, root):
    """One problem in its versions: what went in, what came out, how it was marked and by which rule."""
    each = len(LADDER) if args.benchmark == "builtin" else 1
    some = items[args.show * each:(args.show + 1) * each] if args.show >= 0 else []
    if not some:
        sys.exit(f"--show {args.show}: there are test problems 0 to {len(items) // each - 1}")
    picture_bytes(some, root)
    print(f"right answer: {some[0]['answer']} ({some[0]['kind']})")
    replies = {item["id"]: reply for part in generate_replies(*load_vlm(args.models[0]), some, root, args)
               for item, reply in part}
    for item in some:
        score = score_answer(replies[item["id"]], item["answer"], item["kind"], item["choices"])
        picture = item["image_url"] or "no picture"
        print(f"\n{item.get('version', item['id'])}: {item['instruction']}  [{picture}]\n"
              f"  {replies[item['id']]}\n  {'right' if score.match else 'WRONG'}: {score.extracted!r}, "
              f"found by the rule {score.rule!r}")

def main(argv=None):
    args = parse_args(argv)
    items, root = load_items(args)
    if args.show is not None:
        return show(args, items, root)
    builtin = args.benchmark == "builtin"
    args.limit = args.limit and args.limit * (len(LADDER) if builtin else 1)
    names = [args.replies] if args.replies else [folder.rstrip("/") for folder in args.models]
    results = {name: evaluate(name, items, root, args) for name in names}
    print(table(results))
    if not builtin:
        print(RULE_BASED + NOTES.get(args.benchmark, ""))
    if args.benchmark in ("builtin", "mathverse"):
        chart = args.chart or f"out/accuracy{'' if builtin else '_mathverse'}.png"
        draw_chart(results, chart)
        print(f"chart: {chart}; ", end="")
    where = "the model folders" if args.models and builtin else ", ".join(folder_of(n, args) for n in names)
    print(f"every reply and its mark: replies.jsonl in {where}")


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
LONGEST_BARE = 500
SAYS = r"""
    (?: (?: so | thus | hence | therefore | and ) ,? \  )*
    (?: the\  )? (?: final\  | correct\  )? (?: answer | option | choice ) \b
"""
SENTENCE = re.compile(rf"(?<= [.!?$†] ) \s* (?= {SAYS} )", re.I | re.X)
SLOT = re.compile(rf"""
    ^ [#*>`\ -]* {SAYS} [*\ ]*+
    (?: : | is\b :? | \n )           # or a heading, and the answer on the line below it
    [*\s]*+ (?P<line> \S.* ) $
  |
    (?: ^ | (?<! [<>!/] ) (?<! \\not ) (?<! \\not\  ) = | : | \b is | \b are )  # not "2\boxed{5}"
    [\ $*\\(\[&]* (?P<box> \\boxed .* ) $
  |
    <answer> (?P<tag> (?s: .*? ) ) </answer>
""", re.I | re.M | re.X)
BOXED = re.compile(r"""
    \\boxed \s* \{ ( (?: [^{}] | \{ (?: [^{}] | \{ [^{}]* \} )* \} )* ) \}  # three levels of braces
""", re.X)
CLOSING = re.compile(r"[\s.$*\\\])}`]*")  # may follow the last slot


def visible(reply):
    """What a reply says when it has thought, or its end; empty if it never stopped thinking."""
    text = reply.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    if len(text) > LONGEST_READ:
        text = "…" + text[-LONGEST_READ:]  # the cut is no start of a line
    return text


def find_slots(text):
    """-> [(content, rule)] of all slots; empty if something follows the last one."""
    text = SENTENCE.sub("\n", text)  # "So x = 5. The answer is 5": that sentence gets its own line
    slots = []
    end = 0
    for found in SLOT.finditer(text):
        rule = found.lastgroup
        content = BOXED.sub(r" \1 ", found[rule])  # "\boxed{5} cm" says 5 cm
        slots.append((content, rule))
        end = found.end()
    return slots if CLOSING.fullmatch(text[end:]) else []


# Spelling

SIGNS = {  # the spelling that is used here: others
    "-": r"− – —",
    "*": r"× · ⋅ \times \cdot",
    "/": r"÷ ⁄ \div",
    "<=": r"≤ ⩽ \leqslant \leq \le",
    ">=": r"≥ ⩾ \geqslant \geq \ge",
    "∪": r"\cup",
    "∞": r"\infty",
    "°": r"º ˚ 掳",  # the last one stands in We-Math's file
    "∠": r"\angle",
    "θ": r"\theta",
    "α": r"\alpha",
    "β": r"\beta",
    "pi": r"π \pi",
    "sqrt": r"√",
}
LATEX = [  # from the inside out, again and again until nothing changes
    (r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1"),
    (r"\^?\{?\\circ\b\}?|\^\{?°\}?", "°"),
    (r"(?<![\w.])(\d+) ?\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),  # 2 1/2
    (r"(?<![\w.])(\d+) (\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r"(\1/\2)"),
    (r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)^(1/\1))"),
    (r"sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\^\{([^{}]*)\}", r"^(\1)"),
]
MARKUP = [
    (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle", ""),
    (r"(?<=\d)(?:\\,|\{,\})(?=\d{3})", ""),  # 1{,}200
    (r"\\\$ ?([\d.,]+)", r"\1 dollar"),
    (r"([€£¥]) ?([\d.,]+)", r"\2 \1"),
    (r"\\[,;:! ]|\\q?quad\b|~", " "),
    (r"\\[()\[\]]|[$`]|\*\*|__", ""),
]
THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
NAMES = r"\\(sqrt|sin|cos|tan|log|ln|%|\{|\})"  # as in LaTeX, without the backslash


def plain(text):
    """LaTeX and Unicode to plain text: "$\\frac{9}{4}\\pi$" -> "((9)/(4))pi"."""
    for pattern, new in MARKUP:
        text = re.sub(pattern, new, text)
    for new, others in SIGNS.items():
        for sign in others.split():
            text = text.replace(sign, new)

    # NFKC makes full-width letters plain, but 10⁵ would be 105, 3½ 31/2, and x₁ x1.
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda sign: f"^({normal(sign[0])})", text)
    text = re.sub("([¼-¾⅐-⅞])", r" \1", text)
    text = re.sub("([₀-₉]+)", r"_\1", text)
    text = normal(text).replace("⁄", "/")

    for _ in range(6):  # what is nested deeper stays as it is, and equals nothing
        before = text
        for pattern, new in LATEX:
            text = re.sub(pattern, new, text)
        if text == before:
            break
    text = re.sub(NAMES, r"\1", text)
    text = re.sub(r"\s+", " ", text)
    if not re.search(r"[(\[{]", text):  # 1,200 is a number, (1,200) is a point
        text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    return text.rstrip(' .,;:*"†').lstrip(' ,;:*"')


def normal(text):
    return unicodedata.normalize("NFKC", text)


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
        if tokens.pop() != ")":
            raise ValueError("a bracket is open")
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
                raise ValueError("a number behind another value")
            sign = "*"
        if BINDS[sign] <= binding:
            break
        if tokens[-1] == sign:
            tokens.pop()
        right = read(tokens, 3 if sign == "^" else BINDS[sign], point)  # 2^3^2 is 2^9
        x = calculate(x, sign, right)

    is_long = isinstance(x, Fraction) and x.denominator > LARGEST ** 20
    if is_long or abs(x) > LARGEST:
        raise ValueError("too large")
    return x


def calculate(x, sign, y):
    if sign == "+":
        return x + y
    if sign == "-":
        return x - y
    if sign == "*":
        return x * y
    if sign == "/":
        return x / y
    if abs(y) > 64 or (x < 0 and y != int(y)):
        raise ValueError("a power that would fill the memory, or has no real value")
    return x ** y


@functools.lru_cache(10_000)
def values(text):
    """An expression's values at three points, None if it is not one from end to end.

    Fractions stay exact.  Two expressions with letters that agree at three points are the same.
    """
    words = re.sub("sqrt|sin|cos|tan|log|ln|pi", "", text).strip()
    is_text = re.search("[A-Za-z]{3}", words) or re.fullmatch("[A-Za-z ]{2,}", words)
    is_range = re.fullmatch(r"[\d.]+ ?- ?[\d.]+", text)  # 0.2 - 0.4
    tokens = TOKEN.findall(text[:LONGEST_VALUE])
    if is_text or is_range or "".join(tokens) != text.replace(" ", ""):
        return None

    found = []
    for point in range(3):
        rest = tokens[::-1]
        try:
            found.append(read(rest, 0, point))
        except (ValueError, ArithmeticError, IndexError):
            return None
        if rest:
            return None
    return found


UNITS = {  # the name that is used here: others; they are not converted into each other
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "ft": "foot feet",
    "in": "inch inche",
    "mile": "mi",
    "g": "gram",
    "kg": "kilogram",
    "L": "l litre liter",
    "°": "degree deg",
    "°C": "",
    "%": "percent",
    "dollar": "",
    "€": "euro",
    "£": "pound",
    "¥": "yuan",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "year": "",
    "m/s": "",
    "km/h": "",
    "unit": "",
}
UNIT = re.compile(r"""
    (?P<value> .* (?: [\d)] | pi ) ) \ ?
    (?P<power> square\  | cubic\  )?
    (?P<name> [A-Za-z°%€£¥/]+ )
    (?: \^? \(? (?P<exponent> [23] ) \)? )?
""", re.X)
Number = namedtuple("Number", "values unit decimals")


def unit_name(name):
    for unit, others in UNITS.items():
        if name in (unit, unit + "s") or name.removesuffix("s") in others.split():
            return unit
    return None


def number(text):
    """"3.50 cm^2" -> Number([7/2, 7/2, 7/2], "cm2", 2); None if it is none."""
    unit = ""
    found = UNIT.fullmatch(text)
    if found and unit_name(found["name"]):
        text = found["value"]
        exponent = {"square ": "2", "cubic ": "3", None: found["exponent"]}[found["power"]]
        unit = unit_name(found["name"]) + (exponent or "")
    if values(text) is None:
        return None
    decimal = re.fullmatch(r"[-+]?\d*\.(\d+)", text)
    return Number(values(text), unit, len(decimal[1]) if decimal else None)


# Equality

NAME = re.compile(r"""
    (?: (?: m?∠ | angle ) \ ? )? (?: [A-Za-zα-ω] | [A-Z]{2,4} ) (?: _?\d )? (?: \ ?\([a-z]\) )?  # x, AB, ∠A, f(x)
""", re.X)
BRACKETS = re.compile(r"([(\[{])(.*,.*)([)\]}])")
OPTION = re.compile(r"(?:option |choice )?\(?([A-J])\)?(?:$|[.:,) ]+(.*))", re.I)


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
        if short.decimals is None:
            continue
        if exact.decimals is not None and exact.decimals <= short.decimals:
            continue
        has_three_digits = abs(exact.values[0]) >= 10 ** (2 - short.decimals)
        if short is gold if is_rounded else has_three_digits:
            half = Fraction(1, 2 * 10 ** short.decimals)
            return all(abs(x - y) <= half for x, y in zip(exact.values, short.values))
    return all(close(x, y) for x, y in zip(found.values, gold.values))


def relation(text):
    """"x > 5" -> ("<", values of 5 - x); None if it is no equation and no inequality."""
    parts = re.split("(<=|>=|[<>=])", text)
    if len(parts) != 3:
        return None
    left, sign, right = parts
    if ">" in sign:
        left, right = right, left
    if values(left.strip()) is None or values(right.strip()) is None:
        return None
    pairs = zip(values(left.strip()), values(right.strip()))
    return sign.replace(">", "<"), [x - y for x, y in pairs]


def same_relation(found, gold):
    """2x < 6 is x < 3: one ratio at all points, and a positive one where order counts."""
    sign, some = found
    gold_sign, others = gold
    if sign != gold_sign or 0 in some or 0 in others:
        return False
    ratio = some[0] / others[0]
    if sign != "=" and ratio < 0:
        return False
    return all(close(x, ratio * y) for x, y in zip(some, others))


def split_list(text):
    """"(1, 2), 3" -> ["(1, 2)", "3"]: at the commas outside of brackets."""
    parts = [""]
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
        if depth < 0:
            return [text]
    return [part.strip() for part in parts]


def unlabel(text):
    """"AB = 5" -> ("ab", "5"), "P(4, 0)" -> ("p", "(4, 0)"), "5" -> ("", "5")"""
    text = re.sub(r"^([^=]*)= ?([a-z])$", r"\2=\1", text)  # 5 = x
    text = re.sub(r"^([A-Z]) ?(\(.*,.*\))$", r"\1=\2", text)
    label, sign, rest = text.partition("=")
    return (label.strip(), rest.strip()) if sign else ("", text)


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

    parts = split_list(found)
    gold_parts = split_list(gold)
    if len(parts) > 1 or len(gold_parts) > 1:
        if len(parts) != len(gold_parts):
            return False
        return all(same(x, y, is_rounded) for x, y in zip(parts, gold_parts))

    label, x = unlabel(found)
    gold_label, y = unlabel(gold)
    is_name = NAME.fullmatch(label) and not gold_label  # "half = 5" is not 5, x = 5 is
    if not label or is_name or label.lower() == gold_label.lower():
        if x and squeeze(x) == squeeze(y):
            return True
        brackets = BRACKETS.fullmatch(x)
        gold_brackets = BRACKETS.fullmatch(y)
        if brackets and gold_brackets and brackets.group(1, 3) == gold_brackets.group(1, 3):
            return same(brackets[2], gold_brackets[2], is_rounded)
        if number(x) and number(y):
            return same_number(number(x), number(y), is_rounded)

    if relation(found) and relation(gold):
        return same_relation(relation(found), relation(gold))
    return False


def option_named(text, options, is_text):
    """Index of the option that an answer names, by letter, text or both if they agree; or None.

    is_text  an option's text counts before a letter: some options are themselves letters
    """
    by_text = [k for k, option in enumerate(options) if option == text]
    if not by_text:
        by_text = [k for k, option in enumerate(options) if same(text, option)]
    if is_text and len(by_text) == 1:
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
    is_text = kind == "choice_text"
    right = option_named(gold, options, is_text)
    if right is None and not OPTION.fullmatch(gold):  # a choice without options to choose from
        return same(text, gold)
    return right is not None and option_named(text, options, is_text) == right


def score_answer(reply, answer, kind, choices=None):
    """Mark one reply. -> Score(match, extracted, rule)

    answer  the right one: a letter for "choice", one of choices for "choice_text", else a value
            or a text
    A reply without an answer has extracted None: it is wrong, and counted as unparsed besides.
    """
    golds = {plain(line) for line in answer.split("\n")}  # some shipped ones are there twice
    gold = golds.pop()
    options = [plain(choice) for choice in choices or []]

    text = visible(reply)
    slots = find_slots(text)
    if not slots and len(text) < LONGEST_BARE and "\n" not in text.strip():
        bare = plain(text)
        is_option = option_named(bare, options, kind == "choice_text") is not None
        if is_option or number(bare) or is_right(bare, gold, kind, options):
            slots = [(text, "bare")]
    if not slots:
        return Score(False, None, "no slot")

    # Two different golds, "C\nD": no reply can be both, so all are wrong.
    marks = []
    for content, _ in slots:
        marks.append(not golds and is_right(plain(content), gold, kind, options))
    if any(marks) and not all(marks):
        return Score(False, None, "two answers")
    content, rule = slots[-1]
    return Score(all(marks), plain(content), rule)


if __name__ == "__main__":
    main()
