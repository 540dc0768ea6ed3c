"""Accuracy by problem version, and the gap between reading a problem and seeing it.

    python eval.py out/stage1 out/stage2 out/stage3   # table, out/accuracy.png, eval.json in each folder
    python eval.py out/stage2 --show 0                # a test problem, its six versions: prompt, reply, mark

Replies are decoded greedily and marked by `score_answer`: fixed rules, no judge, the same mark every time.
In this order: the scorer, the replies, the reports.
"""
import argparse
import ast
import functools
import json
import math
import operator
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
    add("--batch_size", type=int, default=100, help="prompts decoded at once; replies do not depend on it")
    add("--max_new_tokens", type=int, default=64, help="cut a reply here (the longest solution has about 55)")
    add("--chart", default="out/accuracy.png", help="bar chart to write")
    add("--show", type=int, default=None, metavar="I", help="print the replies to test problem I")
    return parser.parse_args(argv)

# ------------------------------------------------------------------------------------------------------------
# The scorer.  A reply is text that is searched and compared, never run.  In the order of the code: one
# spelling for one thing (normalise); the final answer, by the first rule that finds one (extract); its value
# (number); equal as values, lists, relations, equations or text (same); the verdict (score_answer).  In doubt
# it is wrong: no nearest option, no last number of a reply, nothing for an empty one.  The cases that it was
# written against, with a reason each, are a table in tests/score_cases.py.
# ------------------------------------------------------------------------------------------------------------
KINDS = ("choice", "choice_text", "integer", "float", "list", "free")
Score = namedtuple("Score", "match extracted rule")  # right or wrong; the text that was marked; why that text
SPELLING = [line.split() for line in (  # the last one of a line replaces the others
    "Â° 掳 º ˚ ^{\\circ} ^\\circ ^{°} ^° \\circ ^{\\degree} ^\\degree \\degree °", "× \\times \\cdot · ⋅ *",
    "÷ \\div /", "√ sqrt", "∞ \\infty inf", "− – — -", "\\leqslant \\leq ⩽ ≤ ≦ <=",
    "\\geqslant \\geq ⩾ ≥ ≧ >=", "\\neq ≠ !=", "\\lt <", "\\gt >", "\\approx ≈ =",
    "\\angle ∠", "\\{ {", "\\} }", "\\% %")]
LATEX = [(re.compile(pattern), new) for pattern, new in (  # from the inside out, a level a turn
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}", r"\1"),
    (r"\^\{([^{}]*)\}", r"^(\1)"), (r"\\[dtc]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\[dtc]?frac\s?(\d)\s?(\d)", r"(\1/\2)"), (r"\\sqrt\s?\{([^{}]*)\}", r" sqrt(\1)"),
    (r"\\sqrt\s?\[(\d)\]\s?\{([^{}]*)\}", r"((\2)^(1/\1))"), (r"\\(sqrt|sin|cos|tan|ln|log|pi)", r" \1 "),
    (r"π", " pi "), (r"\\le\b", "<="), (r"\\ge\b", ">="), (r"\\in\b|∈", " in "))]

def normalise(text):
    """One spelling for one thing: Unicode forms, signs, LaTeX. -> str.  Linear in the length of the text."""
    text = re.sub(r"(?<=[\w)])\*\*(?=[\d(])", "^", text.rpartition("</think>")[2])  # thinking is no answer
    text = re.sub(r"\\left|\\right|\\displaystyle|\\!|\{,\}|\*\*|[$`]", "", text)
    nfkc = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub("[½⅓⅔¼¾⅕⅛]", lambda m: f" {nfkc(m[0])}", text)  # NFKC alone: 3½ is 31/2, 10⁵ is 105
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^({nfkc(m[0])})", text)
    for *olds, new in SPELLING:
        for old in olds:
            text = text.replace(old, new)
    text = nfkc(text).replace("⁄", "/")
    for _ in range(6):  # what is nested deeper stays as it is, and equals nothing
        before = text
        for pattern, new in LATEX:
            text = pattern.sub(new, text)
        if text == before:
            break
    return re.sub(r"(?:\\[(),;: \[\]]|\\quad|~|[ \t])+", " ", text).strip()

# Where a final answer stands.  Inside a class of places the last one wins: replies correct themselves.
MARKS = [re.compile(p) for p in (  # made for it
    r"<answer>([^<]*)</answer>", r"\[\[([^\[\]]*)\]\]", r"####\s?([^\n]*)", r"†\s?Answer\s?:\s?([^\n†]*)",
    r"(?i)(?:^|\n)[# ]*(?:the )?(?:final )?answer:? ?\n\s*([^\n]{1,200})")]
REST, LETTER = r"(?=([^\n]{1,200}))", r"\(?((?-i:[A-J]))\)?"
PHRASES = re.compile(  # said in words
    r"(?:\banswers?(?: to (?:the|this) (?:question|problem))?|\b(?:correct|right|best) (?:option|choice|one)"
    r"|答案|\b(?:option|choice) that is correct)"
    r"\s?(?:】|is|are|=|:|would be|should be|must be|equals|为|是|应为|(?=不是))"
    rf"\s?:?\s?{REST}|\b(?:it|that|this) (?:should|must) be {REST}|(?:故选|应选|选择|选)\s?:?\s?{REST}"
    rf"|\b(?:choose|select|pick|go with)\b(?: option| choice)? {REST}"
    rf"|(?<![\w']){LETTER} (?:is|would be|must be) (?:the )?(?:correct|right|best)\b"
    rf"|\b(?:option|choice) {LETTER} is (?:the )?(?:correct|right|best|true)\b", re.I)
HEDGE = re.compile(
    r"\b(?:might|maybe|perhaps|probably|possibly|may be|could be|not (?:\w+ )?(?:sure|certain)|unsure|guess"
    r"|either|cannot (?:be )?(?:determined?|say|tell)|can't (?:tell|say))\b|可能|也许|不确定|无法确定", re.I)
TAKEN_BACK = re.compile(r"\b(?:wait|actually|correction|scratch that|on second thought)\b|等等|不对|更正", re.I)
NOT = re.compile(r"(?:not|n't|neither|never)\b|不", re.I)
END = re.compile(
    r"(?<=[^A-Z.])\.(?=\s|$)|。|;|,? (?:because|since|so that|which|where)\b|, (?:so|as|and) |,? 因为")
LEAD = re.compile(
    r"(?:therefore|thus|so|hence|approximately|about|roughly|exactly|equal to|option|choice|the)\s+", re.I)

def clean(text):
    """A candidate without the words around it."""
    text = END.split(text.strip(), maxsplit=1)[0].rstrip(" .,:!\"'*\n").lstrip(" ,:!\"'*\n")
    return text[m.end():] if (m := LEAD.match(text)) else text

def boxed(reply):
    """(place, content) of the last \\boxed{...}s, braces balanced."""
    for start in [m.end() for m in re.finditer(r"\\f?box(?:ed)?\s?\{", reply)][-9:]:
        depth = 1
        for end in range(start, min(len(reply), start + 500)):
            depth += {"{": 1, "}": -1}.get(reply[end], 0)
            if depth == 0:
                yield start, reply[start:end]
                break

def extract(reply):
    """The final answer in a normalised reply. -> (text or None, name of the rule that found it)"""
    back = max((m.end() for m in TAKEN_BACK.finditer(reply)), default=0)
    if back and (later := extract(reply[back:]))[0]:
        return later
    marks = [*boxed(reply), *((m.start(1), m[1]) for mark in MARKS for m in mark.finditer(reply))]
    if marks:
        (last, text), *rest = sorted(marks, reverse=True)
        if rest and rest[0][1] != text and re.fullmatch(
                r"\W*(?:or|and|或)\W*(?:\\f?box(?:ed)?)?\W*", reply[rest[0][0] + len(rest[0][1]):last]):
            return None, "two answers marked"
        return text.strip() or None, "answer mark"
    found = None
    for m in PHRASES.finditer(reply):
        text, before = next(filter(None, m.groups())), reply[max(0, m.start() - 40):m.start()]
        if NOT.match(text):  # "not B but C" states C; "not B" takes back what was said before if that was B
            other = re.search(r"(?:\bbut\b|\bit is\b|\bit's\b|而是) ?(.+)", text)
            same_again = found and clean(text[3:]) == clean(found[1])
            found = (m, other[1]) if other else None if same_again else found
        elif not re.search(r"(?:n't|not|doubt) (?:\w+ )?(?:that )?(?:the )?$", before):
            found = m, text
    if found:
        said = reply[reply.rfind(".", 0, found[0].start()) + 1:]  # and what follows: a doubt may come late
        return (None, "hedged") if HEDGE.search(said) else (clean(found[1]) or None, "answer phrase")
    lines = [line.strip(" #*") for line in reply.split("\n") if line.strip(" #*")]
    if not lines or HEDGE.search(reply[-300:]):
        return None, "hedged" if lines else "nothing found"
    label = re.compile(r"[(\[]?([A-J])[)\]]?(?:[.:)]|$)")
    first, labels = lines[0], {m[1] for m in map(label.match, lines) if m}  # several: it lists the options
    bare = re.sub("sqrt|sin|cos|tan|log|ln|pi|inf|in|and|or", "", first)
    formula = re.search("[=<>]", first) and not re.search(r"[^\W\d_]{2}", bare)
    words = not re.search(r"[=<>]|\b(?:is|are|has|have)\b", first)
    if len(labels) == 1 and label.match(first) or len(first) <= 60 and (
            number(unlabel(clean(first))[1]) or len(lines) == 1 and (formula or words)):
        return clean(first), "first line" if len(lines) > 1 else "only line"
    *_, last = [s for s in re.split(r"(?<=[^A-Z.])[.!。](?:\s|$)", lines[-1]) if s.strip()] or [""]
    text = re.split(r"(?<![<>!])=|\b(?:is|are|be|equals)\b|为|是|等于", last)[-1]
    stated = text != last and len(text) <= 60 and not NOT.search(last)
    return (clean(text), "last sentence") if stated else (None, "nothing found")

# Units: what they measure (a power of a length, ...) and how many of the first of its kind they are.
UNITS = {name: (kind, Fraction(amount)) for kind, group in (
    ("length1", "m meter metre 米 1 km kilometer kilometre 千米 1000 dm decimeter 分米 1/10 cm centimeter "
     "centimetre 厘米 1/100 mm millimeter millimetre 毫米 1/1000 inch inche 127/5000 ft foot feet 381/1250 "
     "mile 201168/125"),
    ("length3", "L l liter litre 升 1/1000 mL ml milliliter millilitre 毫升 1/1000000"), ("money", "dollar 1"),
    ("mass", "g gram 克 1 kg kilogram 千克 1000 mg milligram 1/1000 t ton tonne 吨 1000000"),
    ("time", "s sec second 秒 1 min minute 分钟 60 h hr hour 小时 3600 day 天 86400 week 604800"),
    ("angle", "° deg degree 度 1"), ("percent", "% percent 1"),
    ("radian", "rad radian 1"), ("energy", "J 1 kJ 1000"), ("force", "N 1"))
    for names, amount in re.findall(r"((?:[^\d\s]+ )+)([\d/]+)", group) for name in names.split()}
POWERS = {"square": 2, "sq": 2, "平方": 2, "squared": 2, "cubic": 3, "立方": 3, "cubed": 3}
NAME = "|".join(sorted(UNITS, key=len, reverse=True))
UNIT = re.compile(rf"(.*?[\d)i°]) ?(square |sq\.? ?|cubic |平方|立方)?({NAME})s?"
                  rf"(?:\^?\(?([23])\)?| (squared|cubed))?(?: ?(?:/|per) ?({NAME}))?")
WORDS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13)))
CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf}
FUNCTIONS = {"sqrt": lambda x: power(x, Fraction(1, 2)), "sin": math.sin, "cos": math.cos, "tan": math.tan,
             "ln": math.log, "log": math.log10, "abs": abs}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: lambda a, b: power(a, b)}
Number = namedtuple("Number", "values unit scale decimals")  # decimals: (places, digits)

def power(a, b):
    """a ** b, exact where it can be. ValueError for what has no real value or would fill a page."""
    if abs(b) > 64 or (isinstance(a, Fraction) and max(abs(a.numerator), a.denominator) > 10 ** 40):
        raise ValueError("too large")
    if isinstance(a, Fraction) and b == Fraction(1, 2) and a >= 0:
        root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
        return root if root * root == a else math.sqrt(a)
    if getattr(b, "denominator", 0) == 1:
        return a ** int(b)
    if a < 0 and b != Fraction(1, 3):
        raise ValueError("no real value")
    return math.copysign(float(abs(a)) ** float(b), a)

def value(node, k):
    """The value of a syntax tree at point k of its letters. What is not listed has none: nothing runs."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left, k), value(node.right, k))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return value(node.operand, k) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return FUNCTIONS[node.func.id](value(node.args[0], k))
    if isinstance(node, ast.Name):
        return CONSTANTS.get(node.id) or Fraction(3 + 7 * k + ord(node.id) % 29, 11 + k)
    return Fraction(repr(node.value))  # of a number as it was typed: .1 is 1/10

def expression(text):
    """Numbers, letters, + - * / ^, brackets, roots, named functions -> values at three points, or None."""
    source, last = "", ""
    for token in re.findall(r"\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\S", text) if len(text) <= 120 else ():
        if token.isalpha() and token not in FUNCTIONS and token not in CONSTANTS:
            if len(token) > 2:
                return None  # a word
            token = "*".join(token)
        if last in FUNCTIONS and token != "(":
            token = f"({token})"  # sqrt 3
        elif re.search(r"[\w)]$", last) and re.match(r"[\w(.]", token) and last not in FUNCTIONS:
            if token[0] in ".0123456789" and last[-1] != ")":
                return None  # two numbers side by side
            source += "*"
        source, last = source + token, token
    try:
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", source).replace("^", "**"), mode="eval").body
        return tuple(value(tree, k) for k in range(3))
    except (SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError,
            MemoryError):
        return None

@functools.lru_cache(maxsize=256)
def number(text):
    """A text as Number, or None: "12 cm^2", "3 1/2", "1,200", "2sqrt(3)", "x+1", "50%", "seven"."""
    text = re.sub(r"^(?:approximately|about|roughly|=) ?", "", text.strip().rstrip(".").strip()[:121])
    text = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?!\d)", lambda m: m[1].replace(",", ""), text)
    text = re.sub(r"^(-?)(\d+) ?(?:\(\((\d+)\)/\((\d+)\)\)|(?<= )(\d+)/(\d+))", r"\1(\2+\3\5/\4\6)", text)
    text = re.sub(r"^[A-Za-z]+\b", lambda m: str(WORDS.get(m[0].lower(), m[0])), text)
    text, unit, scale = re.sub(r" ?\b(?:square |cubic )?units?$", "", text), None, 1
    if (m := UNIT.fullmatch(text)) and expression(m[1]):
        raised = int(m[4] or POWERS.get((m[2] or m[5] or "").strip(" ."), 1))
        text, (kind, scale) = m[1], UNITS[m[3]]
        unit, scale = kind if raised == 1 else f"{kind.rstrip('1')}{raised}", scale ** raised
        if m[6]:
            unit, scale = f"{unit}/{UNITS[m[6]][0]}", scale / UNITS[m[6]][1]
        if unit == "radian":
            unit, scale = "angle", 180 / math.pi
    elif m := re.fullmatch(r"(.*\d\)?) ([A-Za-z]{3,}[A-Za-z ]*)", text):
        text, unit = m[1], m[2].lower().removesuffix("s")  # "5 apples"
    values, plain = expression(text), re.fullmatch(r"[+-]?\d*\.(\d+)", text)
    decimals = (len(plain[1]), len(text.lstrip("+-0.").replace(".", ""))) if plain else None
    return values and Number(values, unit, scale, decimals)

def near(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return a == b if exact else math.isclose(a, b, abs_tol=1e-12)

def same_number(a, b):
    """Equal values; units have to agree where both have one. An exact value equals its correct rounding."""
    if a.unit and b.unit and a.unit != b.unit:
        return False
    scale = a.scale / b.scale if a.unit and b.unit else 1
    left, right = [v * scale for v in a.values], b.values
    for rounded, other in ((a.decimals, b.decimals), (b.decimals, a.decimals)):
        if rounded and rounded[1] >= 3 and (not other or other[0] > rounded[0]):  # 3 significant digits
            return all(abs(x - y) <= .5000001 * 10 ** -rounded[0] for x, y in zip(left, right))
    return all(map(near, left, right))

def elements(text):
    """"(4, 0]" -> ("(", ["4", "0"], "]"); no brackets around it: ("", [...], "")."""
    whole, depth, cuts = re.fullmatch(r"([(\[{])(.*)([)\]}])", text.strip(), re.S), 0, []
    inner = whole[2] if whole else text.strip()
    for i, c in enumerate(inner[:400]):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:  # "(1, 2) and (3, 4)"
            return "", [text], ""
        if depth == 0 and c in ",;、":
            cuts.append(i)
    parts = [inner[i + 1:j].strip() for i, j in zip([-1, *cuts], [*cuts, len(inner)])]
    if len(parts) == 1 and not whole:
        parts = re.split(" and | or |和|或", inner)
    return (whole[1], parts, whole[3]) if whole else ("", parts, "")

def unlabel(text):
    """"slope = -4" -> ("slope", "-4"); "2 + 2 = 4" -> ("", "4"); an equation proper stays whole."""
    name = r"(?:[A-Za-z_∠△' ]|[A-Za-z]_?\d){0,40}(?:\([A-Za-z]\))?"
    if m := re.fullmatch(rf" ?({name}) ?=(?:[^=]*=)* ?([^=]+)", text[-400:]):
        return m[1].strip(), m[2].strip()
    left, _, right = text.rpartition("=")
    return "", right.strip() if re.fullmatch(r"[-\d +*/^()=.]+", left) else text

def proportional(a, b):
    """Two equations say the same: the differences of their sides are equal up to a factor that is not 0."""
    sides = [[expression(side) for side in text.split("=")] for text in (a, b)]
    if any(len(two) != 2 or None in two for two in sides):
        return False
    p, q = ([left - right for left, right in zip(*two)] for two in sides)
    return any(p) and any(q) and all(near(p[0] * q[k], p[k] * q[0]) for k in (1, 2))

def same(found, gold):
    """Whether two normalised answers are equal as values, lists, relations, equations, or as plain text."""
    (name, f), (gold_name, g) = unlabel(found), unlabel(gold)
    if len(name) == len(gold_name) == 1 and name != gold_name or "=" in re.sub("[<>!]=", "", f + g):
        return proportional(found, gold)  # "x = 4" is not "y = 4"
    if (x := number(f)) and (y := number(g)):
        return same_number(x, y)
    relations = [re.split("(<=|>=|!=|<|>)", text) for text in (f, g)]
    if min(map(len, relations)) > 1:  # 3 > x is x < 3
        left, right = ([part.replace(">", "<") for part in r[::-1 if ">" in r[1] else 1]] for r in relations)
        return len(left) == len(right) and all(p == q if k % 2 else same(p.strip(), q.strip())
                                               for k, (p, q) in enumerate(zip(left, right)))
    some, others = (elements(re.sub(r"^\w in ", "", text)) for text in (f, g))
    if len(others[1]) > 1 or others[0]:
        named = [unlabel(part) for part in elements(found)[1]]
        if len(named) > 1 and all(n for n, _ in named) and named == sorted(named):  # "x = 4, y = 0" is (4, 0)
            some = others[0], [v for _, v in named], others[2]
        return some[::2] == others[::2] and same_list(some[1], others[1])
    if len(both := re.split(" or |或", f)) > 1:
        return all(same(part, g) for part in both)  # "1/2 or 0.5"
    bare = lambda text: re.sub(r"[\s.,:;!?'\"()]+", "", re.sub("^(?:the|a|an) ", "", text.lower()))
    return bare(f) == bare(g) != "" and not x and not number(g)

def same_list(some, others):
    return len(some) == len(others) and all(map(same, some, others))

def letter_of(found, n):
    """The index of the option letter that an answer starts with, or None. The article "A" is no letter."""
    m = re.match(r"[(\[]?([A-Z])(?:[)\].:]+|选项|项)?(?=$|\s|[^\w(=+*/^'-])", found) or re.fullmatch(
        r"[(\[]?([a-j])[)\]]?\.?", found)
    rest = found[m.end():] if m else ""
    if not m or re.match(r"\s*(?:,|/|&|、|or\b|and\b|或|和)\s*[(\[]?[A-J]\b", rest) or (
            m[0] in "AI" and re.match(" (?!is |because |since |as )[a-z]", rest)):
        return None
    index = ascii_uppercase.index(m[1].upper())
    return index if index < n else None

def score_answer(reply, gold, kind, choices=None):
    """Mark one reply. -> Score(match, extracted, rule)

    reply     what the model said, any text
    gold      the right answer: a letter for "choice", one of choices for "choice_text", else value or text
    kind      one of KINDS
    choices   the options of a multiple choice question, in order
    raises    ValueError for an unknown kind

    A reply without an answer has extracted None: it is wrong, and counted as unparsed besides.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    reply, gold, options = normalise(reply), normalise(gold), [normalise(option) for option in choices or ()]
    starts = [reply.lower()]  # "Yes, because ...": for options that are words their text is enough
    if kind == "choice_text" and not TAKEN_BACK.search(reply):
        starts.append(re.split(r"[,;:!\n]|\.(?=\s|$)", starts[0])[0])
    said = [option for option in options if option.lower() in starts]
    found, rule = (said[0], "first words") if said else extract(reply)
    if found is None:
        return Score(False, None, rule)
    if kind in ("choice", "choice_text"):
        index = letter_of(found, len(options) or 10)
        equal = [k for k, option in enumerate(options) if same(found, option)]
        if index is None or (kind == "choice_text" and equal):
            rule += ", option text" if equal else ", no option"
            index = equal[0] if len(equal) == 1 else None
        letter = re.search("[A-Z]", gold) if kind == "choice" else None
        if index is None or (not letter and index >= len(options)):
            return Score(False, found, rule)
        match = ascii_uppercase[index] == letter[0] if letter else same(options[index], gold)
        return Score(match, found, rule)
    if kind == "list":
        return Score(same_list(elements(unlabel(found)[1])[1], elements(gold)[1]), found, rule)
    x, y = number(unlabel(found)[1]), number(unlabel(gold)[1])
    if kind == "free" or not y:
        return Score(same(found, gold), found, rule)
    if not x or (x.unit and y.unit and x.unit != y.unit) or len(set(x.values)) > 1:
        return Score(False, found, rule)
    half = Fraction(1, 2 * 10 ** len(gold.partition(".")[2])) if kind == "float" else 0  # of the last place
    mine = x.values[0] * x.scale / y.scale if x.unit and y.unit else x.values[0]
    return Score(bool(abs(mine - y.values[0]) <= half), found, rule)

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
