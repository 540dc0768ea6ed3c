"""Turn other people's data into the JSONL that the stages read, once.

    python convert/data.py train.json llava.json --images pictures --out mine.jsonl

Reads JSON arrays and JSONL.  The format of a row is known by its fields:
    released   image_url, instruction, output; a pair has the same again with _2
    LLaVA      image, conversations: a question of human, an answer of gpt
    Alpaca     instruction, input, output: the input becomes the end of the instruction
Every row is checked and every picture decoded now, so that no stage meets a bad one in its third
hour.  Bad rows are listed with file and row, left out and counted.
"""
import argparse
import functools
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where model.py is
from model import PAIR, ROW, check_row, load_image

MARK = "<image>"  # LLaVA's, where the picture goes; in the stages that is before the question


def parse_args(argv):
    """The flags, checked before anything runs. Both folders are resolved: no link is left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", help=".json arrays or .jsonl: of pairs, or of single rows")
    add("--images", help="folder that picture names start from; default: that of --out")
    add("--out", required=True, help=".jsonl file to write, beside --images or above")
    add("--first_turn", action="store_true", help="of a conversation use the first two turns")
    add("--workers", type=int, default=os.cpu_count(), help="processes that decode pictures")
    args = parser.parse_args(argv)

    for path in args.files:
        if not os.path.isfile(path):
            sys.exit(f"{path}: no such file")
    if args.workers < 1:
        sys.exit("--workers: give 1 or more")
    if not args.out.endswith(".jsonl") or os.path.lexists(args.out):
        sys.exit(f"--out {args.out}: give the name of a new .jsonl file")

    args.folder = Path(args.out).parent.resolve()
    args.images = Path(args.images or args.folder).resolve()
    if not args.images.is_dir() or not args.images.is_relative_to(args.folder):
        sys.exit(f"--images {args.images} is no folder inside that of --out, {args.folder}, where "
                 f"the stages look for pictures: give --out {args.images.parent}/NAME.jsonl")
    return args


def read_rows(path):
    """[(where, row)] of an array or of JSONL. A row of JSONL is bytes, not yet parsed."""
    with open(path, "rb") as f:
        if path.endswith(".jsonl"):
            lines = enumerate(f, 1)
            return [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        try:
            rows = json.load(f)
            if not isinstance(rows, list):
                raise ValueError("an object")
        except (ValueError, RecursionError) as error:  # nobody can tell where the next row starts
            sys.exit(f"{path} is no JSON array: {error} (a row a line is named .jsonl)")
    return [(f"{path}:row {number}", row) for number, row in enumerate(rows, 1)]


def convert(place, args):
    """(where, row) -> (where, line of --out, what is wrong with the row, notes to count).

    Runs in a worker process.  A row with something wrong has no line.
    """
    where, row = place
    notes = []
    try:
        if isinstance(row, bytes):
            row = json.loads(row)
        row = to_released(row, args, notes)
        # Raises for NaN, which is no JSON, and for half a character, "\ud800".
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RuntimeError) as error:  # RuntimeError: nested too deep, links in a circle
        return where, None, str(error), notes
    if re.search(rb"<image\d*>", line):
        notes.append("a mark such as <image> left in their text")
    return where, line + b"\n", None, notes


def to_released(row, args, notes):
    """A row of any format -> the released fields, and its id when it has one. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if row.get("conversations"):
        row = from_llava(row, args, notes)
    for field in ("image", "images", "video", "videos"):  # not to train on half a question
        if row.get(field):
            raise ValueError(f"'{field}' is not read: name a picture in 'image_url'")

    # Exported tables have all columns in all rows: null means that this row has no such field.
    is_pair = any(row.get(field) for field in PAIR[3:])
    fields = PAIR if is_pair else ROW
    released = {}
    for field in ("id", *fields):
        value = row.get(field)
        if field.startswith("image_url"):  # str: no file has the name of a list or a number
            value = find_picture(str(value or ""), args.images, args.folder)
        if value is not None:
            released[field] = value
    check_row(released | {"folder": args.folder}, fields)
    if row.get("input"):
        released["instruction"] += f"\n{row['input']}"
    return released


def from_llava(row, args, notes):
    """A row of LLaVA's with the released fields instead of "image". Raises ValueError.

    MARK at the start or end of the question is the picture and leaves the text; any other is text.
    """
    match row["conversations"]:
        case [{"from": "human", "value": str(question)}, {"from": "gpt", "value": answer}, *more]:
            question = question.strip()
        case _:  # a system turn has no place in a stage's prompt
            raise ValueError("'conversations' must begin with texts of human and gpt")
    if more:
        notes.append("more than two turns: left out, or cut to the first two by --first_turn")
        if not args.first_turn:
            raise ValueError("more than two turns")

    unmarked = question.removeprefix(MARK)
    if unmarked == question:
        unmarked = question.removesuffix(MARK)
    picture = row.pop("image", None)
    if bool(picture) != (unmarked != question):
        raise ValueError(f"{MARK} at the start or end of the question and a picture go together; "
                         f"'image' is {picture!r}")
    return row | {"image_url": picture, "instruction": unmarked.strip(), "output": answer}


@functools.lru_cache(maxsize=100_000)  # in many data sets one picture belongs to many rows
def find_picture(name, images, folder):
    """Decode a picture. -> its path from the folder of --out. Raises ValueError."""
    if not name:
        return ""  # text only
    path = Path(images, name).resolve()
    if not path.is_relative_to(images):  # by "..", a link, an absolute name
        raise ValueError(f"picture {name!r} is not inside {images}")
    load_image(path, 1)  # made 1 pixel wide: what it shows does not matter here
    return path.relative_to(folder).as_posix()


def convert_all(rows, args):
    """[(where, row)] -> (lines of --out, {note: how many rows}). Bad rows are printed."""
    lines = []
    counts = Counter()
    kinds = {}  # {is a pair: where the last such row is}
    with ProcessPoolExecutor(args.workers) as pool:
        results = pool.map(functools.partial(convert, args=args), rows, chunksize=16)
        # disable=None: a bar on a terminal, none in a log file
        for where, line, problem, notes in tqdm(results, total=len(rows), disable=None):
            counts.update(notes)
            if problem:
                tqdm.write(f"{where}: {problem}")  # print would tear the progress bar
                continue
            lines.append(line)
            kinds[b'"output_2": ' in line] = where  # the field: a quote in a text is \"
            if len(kinds) == 2:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{kinds[True]} is a pair, {kinds[False]} a single row: convert them "
                         "apart")
    return lines, counts


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # bad rows may hold what cannot be printed
    rows = []
    for path in args.files:
        rows += read_rows(path)
    try:
        lines, counts = convert_all(rows, args)
    except BrokenExecutor:
        sys.exit("a process died (no memory?), nothing is written: give fewer --workers")

    for note, n_rows in counts.items():
        print(f"{n_rows:,} rows have {note}")
    if not lines:
        sys.exit(f"{args.out} is not written: no row can be used")
    part = f"{args.out}.part-{os.getpid()}"
    with open(part, "wb") as f:
        f.writelines(lines)
    os.replace(part, args.out)  # so it is complete or absent
    print(f"{args.out}: {len(lines):,} rows, {len(rows) - len(lines):,} left out")


if __name__ == "__main__":
    main()
