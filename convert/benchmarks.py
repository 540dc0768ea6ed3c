"""Turn MathVerse, MathVista or We-Math into the rows that eval.py reads, once.

    python convert/benchmarks.py wemath testmini.json --images wemath --out wemath
    python eval.py out/stage3 --data wemath --max_new_tokens 1024
    python convert/benchmarks.py diagnosis out/stage3/wemath/replies.jsonl

The last line prints We-Math's diagnosis from the marks that eval.py wrote.  MathVerse has two
files: testmini.json, the five versions with a picture, and testmini_text_only.json; give both to
get all six.  The pictures have to lie in --out, for eval.py reads no other folder.  What a row
of --out/test.jsonl holds:

    id                     MathVerse: sample_index, in text_only with "text_only/" before it, as
                           both files count from 1; MathVista: pid; We-Math: ID/key, spelled
                           3steps_7/3steps_1 also where its file says 3stpes_7
    image_url              the picture, decoded once to see that it can be
    instruction            the question, and last ENDING, which asks for what eval.py can mark
    answer, kind, choices  what is right; how it is compared, see eval.py; texts of the options
    version, groups        MathVerse: one of the ladder's six; lines of the report

Besides ENDING, two prompts differ from the released Math-PUMA code's: for MathVista it withholds
choices, unit and precision; for We-Math it adds a description of the knowledge needed.  A bad row
ends the run: without it, the score would be that of another benchmark.
"""
import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where model.py is
from convert.data import find_picture
from model import JsonLines

ENDING = "End with a line `Answer: X`, X being only the option letter or the value."
LETTERS = "ABCDEFGHIJ"


def parse_args(argv):
    """The flags. Both folders are resolved: no link is left."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # its lines stay as they are
    )
    add = parser.add_argument
    add("benchmark", choices=[*CONVERT, "diagnosis"])
    add("files", nargs="+", help="testmini.json; MathVerse: both; diagnosis: replies.jsonl")
    add("--images", help="where picture names start; default: --out")
    add("--out", default=".", help="folder for test.jsonl, with the pictures in it")
    args = parser.parse_args(argv)
    args.out = Path(args.out).resolve()
    args.images = Path(args.images or args.out).resolve()
    return args


# --------------------------------------------------------------------------------------------------
# A row of each benchmark -> one of eval.py's

def options_in(text):
    """"A. 3, 5;B. 0.5" or "A:40°\\nB:60°" -> the options. [] unless the letters run A, B, C."""
    pieces = re.split(r"(?:^|[;；\n])\s*([A-J])\s*[.:．：]", text)
    if not LETTERS.startswith("".join(pieces[1::2])):
        return []  # "A. you get shape ;C.; B. ...": a letter can be marked right all the same
    return [option.strip().rstrip(" ;.") for option in pieces[2::2]]


def from_mathverse(row):
    """arXiv 2403.14624."""
    version = row["problem_version"].lower().replace(" ", "_")
    prefix = "text_only/" if version == "text_only" else ""
    subject = f"{prefix}{row['metadata']['subject']}"
    asked = row.get("question_for_eval") or row["question"]  # of Vision Only, question is empty
    return {
        "id": f"{prefix}{row['sample_index']}",
        "image_url": row["image"],
        "instruction": row["query_cot"],
        "kind": "choice" if row["question_type"] == "multi-choice" else "free",
        "choices": options_in(asked),
        "version": version,
        "groups": [subject, f"{subject}, {row['metadata']['subfield']}"],
    }


def from_mathvista(row):
    """arXiv 2310.02255."""
    asked = row["question"]
    for letter, choice in zip(LETTERS, row["choices"] or []):
        asked += f"\n({letter}) {choice}"
    for hint in ("answer_type", "unit"):
        if row[hint]:
            asked += f"\n{hint}: {row[hint]}"
    if row["precision"]:
        asked += f"\ndecimal places: {row['precision']}"
    return {
        "id": row["pid"],
        "image_url": row["image"],
        "instruction": asked,
        "kind": "choice_text" if row["choices"] else row["answer_type"],
        "choices": row["choices"],
        "groups": [row["metadata"]["task"], *row["metadata"]["skills"]],
    }


def from_wemath(row):
    """arXiv 2407.01284. The steps of an ID, and what is composed of them, "multi", are a group."""
    id = f"{row['ID']}/{row['key']}".replace("stpes", "steps")
    return {
        "id": id,
        "image_url": row["image_path"],
        "instruction": f"{row['question']}\n{row['option']}",
        "kind": "choice",
        "choices": options_in(row["option"]),
        "groups": [f"S{id[0]}" if id.endswith("multi") else "S1"],
    }


CONVERT = {"mathverse": from_mathverse, "mathvista": from_mathvista, "wemath": from_wemath}


def convert(row, args):
    """Raises some error at a bad row."""
    new = CONVERT[args.benchmark](row)
    if not row["answer"] or not new["image_url"] and new.get("version") != "text_only":
        raise ValueError("no answer or no picture")
    new["answer"] = row["answer"]
    new["instruction"] += f"\n{ENDING}"
    new["image_url"] = find_picture(new["image_url"], args.images, args.out)
    return new


def read_rows(args):
    """In order of id, so that We-Math's groups stand together; in its file they do not."""
    found = {}
    for path in args.files:
        where = path
        try:
            rows = json.loads(Path(path).read_bytes())
            if isinstance(rows, dict):  # MathVista: {pid: row}
                rows = rows.values()
            for number, row in enumerate(rows, 1):
                where = f"{path}:row {number}"
                row = convert(row, args)
                if row["id"] in found:
                    raise ValueError("its id is there twice")
                found[row["id"]] = row
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"{where}: {error!r}: give the testmini.json of {args.benchmark}, and as "
                     "--images the folder in --out that its picture names start from")
    return [found[id] for id in sorted(found)]


# --------------------------------------------------------------------------------------------------
# We-Math's diagnosis: is it knowledge that a model lacks, or putting it together?

def percent(marks):
    return 100 * sum(marks) / max(1, len(marks))


def diagnose(path):
    """Print it, of the groups with a mark for every step."""
    marks_of = defaultdict(list)  # {ID: [step right?, ..., composite right?]}
    try:
        for row in sorted(JsonLines([path]), key=lambda row: row["id"]):
            marks_of[row["id"].split("/")[0]].append(row["match"])
        groups = [marks for ID, marks in marks_of.items() if ID[0] == str(len(marks) - 1)]
        if not groups:
            raise ValueError("no group of We-Math's has all its steps")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{path}: {error!r}: give a replies.jsonl that eval.py wrote")

    right = defaultdict(list)
    for *steps, composite in groups:
        right["S1"] += steps
        right[f"S{len(steps)}"].append(composite)
    print(f"{len(groups)} groups have all their steps and count, in %")
    for name, marks in right.items():
        print(f"{name:6}{percent(marks):7.1f}  n={len(marks)}")

    # Insufficient knowledge, inadequate generalization, complete mastery: shares of the groups.
    # Rote memorization: share of the right composites, as in We-Math's own code.
    print("        score     IK     IG     CM     RM")
    for name, enough in (("strict", all), ("loose", any)):  # steps that have to be right for CM
        IK = percent([not composite and not all(steps) for *steps, composite in groups])
        IG = percent([not composite and all(steps) for *steps, composite in groups])
        CM = percent([composite and enough(steps) for *steps, composite in groups])
        RM = percent([not enough(steps) for *steps, composite in groups if composite])
        print(f"{name:6}{CM + IG / 2:7.1f}{IK:7.1f}{IG:7.1f}{CM:7.1f}{RM:7.1f}")
    print("rule-based: not comparable with judge-based papers")


def main(argv=None):
    args = parse_args(argv)
    if args.benchmark == "diagnosis":
        return diagnose(args.files[0])

    path = args.out / "test.jsonl"
    if path.exists() or not args.images.is_dir():
        sys.exit("give as --out a folder with the pictures and no test.jsonl")
    rows = read_rows(args)
    part = path.with_suffix(".part")  # so that test.jsonl is complete or absent
    with open(part, "wb") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    part.replace(path)
    print(f"{path}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
