"""Count what has to be understood in Python files: tokens, not lines.

    python tests/count_tokens.py              # every file of the project
    python tests/count_tokens.py model.py

Python's own tokens, without comments, docstrings and line ends; a string counts 1 and one more for
each 12 characters, so that a long pattern is not one token.
"""
import glob
import io
import os
import sys
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENDMARKER)
STARTS_A_STATEMENT = (None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def tokens_by_line(source):
    """{line number: tokens}, for the lines that hold code."""
    counts = {}
    before = None  # kind of the token before, a line break inside a statement not counted
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_string = token.type == tokenize.STRING
        is_docstring = is_string and before in STARTS_A_STATEMENT
        if token.type not in LAYOUT and not is_docstring:
            lines = token.string.split("\n")
            for number, text in enumerate(lines, token.start[0]):
                weight = 1 + len(text) // 12 if is_string else 1
                counts[number] = counts.get(number, 0) + weight
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.type
    return counts


def measure(name):
    """-> (tokens, tokens a code line, widest line, lines) of a file of the project."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        source = f.read()
    counts = tokens_by_line(source)
    total = sum(counts.values())
    lines = source.split("\n")
    widest = max(len(line) for line in lines)
    return total, total / max(1, len(counts)), widest, len(lines) - 1


def python_files():
    names = []
    for pattern in ("*.py", "convert/*.py", "tiny/*.py", "assets/*.py", "tests/*.py"):
        names += sorted(glob.glob(pattern, root_dir=ROOT))
    return names


def main():
    print("tokens  a line  widest  lines")
    for name in sys.argv[1:] or python_files():
        tokens, density, widest, lines = measure(name)
        print(f"{tokens:6,} {density:7.1f} {widest:7} {lines:6,}  {name}")


if __name__ == "__main__":
    main()
