r"""Make maths problems, each written six times, from "all in the text" to "all in the picture".

    python data_gen.py                # 4,000 training + 400 test problems into data/, about 15 s
    python data_gen.py --size 384     # the same, drawn for a real vision encoder, about a minute
    python data_gen.py --show 0       # print the ladder of problem 0, draw it in data_show_0.png

Math-PUMA (arXiv 2408.08640) needs pairs: one problem in a text-rich and a vision-rich form with ONE
answer.  Problem 0 of this generator at the two ends of its ladder, the picture in its 18 x 9
character cells:

    text_only (no picture)                     vision_only     +------------------+
    EFG is a triangle. H is on the extension of FG.            |Find angle EGH.   |
    angle E=74°, angle F=48°. Find angle EGH.                  |                  |
                                                               |                  |
                                                               |        E         |
    both are answered by                                       |        /\        |
                                                               |      /  \        |
    74+48=122. †Answer: 122°                                   |    / 74° \       |
                                                               |  / 48°   \ G   H |
                                                               |F --------------- |
                                                               +------------------+
The language model can solve the left one; stage 2 teaches the eyes to make the right one look alike
to it.

In this order:
    the ladder      which part of a problem stands in the text and which in the picture
    families        the first one spelled out, as the example to copy; eleven more
    problems        the i-th problem of a split: its names, words, answer, choices
    pictures        strokes, then labels in the free cells
    files           JSONL rows for each stage and for the test; --show; the command line
"""
import argparse
import json
import math
import re
import sys
import textwrap
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# The ladder, the paper's central idea: a condition is in one of three groups (MathVerse, arXiv
# 2403.14624):
#   descriptive   what the figure obviously is                "EFG is a triangle."
#   implicit      a property an expert sees in the figure     "H is on the extension of FG."
#   numeric       values without which nobody can solve it    "angle E=74°"
# Each rung takes one more group, at last the question, OUT of the text.  Nothing is lost: figures
# always show the first two.  (In MathVerse, vision_dominant keeps the implicit group; here a rung
# only ever loses text.)
#   version            left in the text                            picture
#   text_only          descriptive implicit numeric question       -
#   text_dominant      descriptive implicit numeric question       figure
#   text_lite                      implicit numeric question       figure
#   vision_intensive                        numeric question       figure
#   vision_dominant                                 question       figure + numbers
#   vision_only        (a fixed sentence)                          figure + numbers + question
# One answer, word for word, belongs to all six: only the place of the information moves.  A model
# right at the top and wrong further down knows the maths and fails to see: that gap is what stage 2
# closes.
LADDER = {  # version: (groups left in the text, name of the picture)
    "text_only": ("descriptive implicit numeric question", None),
    "text_dominant": ("descriptive implicit numeric question", "figure"),
    "text_lite": ("implicit numeric question", "figure"),
    "vision_intensive": ("numeric question", "figure"),
    "vision_dominant": ("question", "labelled"),
    "vision_only": ("", "question")}
# ours: a prompt needs some words even when the picture says it all
VISION_ONLY_TEXT = "Solve the problem."

# Stage 2 pairs use four of the six rungs: the paper draws a pyramid of 4 levels with 3 upward
# arrows.  Which rungs, is our reading; stage 2 never sees the two left out, so their accuracy shows
# what carries over.
PYRAMID = ("text_only", "text_dominant", "vision_dominant", "vision_only")
PAIRS = {  # (strong, weak): the teacher reads the first, the student the second
    # each level is pulled to the one above, as in the paper
    "neighbours": list(zip(PYRAMID, PYRAMID[1:])),
    # each level is pulled to the text
    "top": [(PYRAMID[0], weak) for weak in PYRAMID[1:]],
}

# Pictures are laid out in character cells, like a terminal, at any size: labels cannot overlap.
COLS, ROWS, QUESTION_ROWS = 18, 9, 3  # the question may fill rows 0-2; the figure owns rows 3-8
# pixels: a cell is then 6 x 12, which Pillow's built-in bitmap font fills exactly
DEFAULT_SIZE = 108


# --------------------------------------------------------------------------------------------------
# Problem families.  Each takes a random.Random, draws its numbers and returns a plain dict:
#   numbers   the givens; they alone decide whether this may be a training or a test problem
#   text      the four groups of the ladder: descriptive | implicit | numeric | question
#   names     texts and labels are written with the points A, B, C, D; these letters then take their
#             places
#   work      the sums; the result of the last one, with its unit, is the answer
#   leads     three ways into the sums, one drawn: the teacher's soft distribution then says more
#             than a label
#   lines     polylines
#   arcs      of ellipses: (centre, radius in x and y, degrees: 180 is the lower half)
#   labels    (words, anchor); a third entry is what the plain figure, without numbers, shows
#             instead
# Coordinates: 18 x 18 units, y down, the figure owns y 6..18; a cell is 1 wide, 2 high.  A point is
# a complex number: A + 3 - 2j is 3 to the right of A and 2 above, abs(B - A) how far B is from A.
# Figures are not to scale, so no answer can be measured.  Ranges are ours: sums a model of 1
# million parameters can learn.
NAMES = ["ABCD", "PQRS", "EFGH", "KLMN", "WXYZ"]


def mix(p, q, t=.5):
    """The point a share t of the way from p to q; t < 0 lies behind p."""
    return p + t * (q - p)


def exterior_angle(r):
    """An angle outside a triangle is the sum of the two far ones inside."""
    names = r.choice(NAMES)
    a = r.randint(20, 85)
    b = r.randint(20, 75)
    A = r.uniform(7, 9) + 8j
    B = 2 + 16j
    C = r.uniform(11, 12) + 16j
    D = 16 + 16j  # on one line with B and C
    return {
        "subject": "plane",
        "names": names,
        "numbers": (a, b),
        "text": "ABC is a triangle. | "  # descriptive
                "D is on the extension of BC. | "  # implicit
                f"angle A={a}°, angle B={b}°. | "  # numeric
                "Find angle ACD.",  # question
        "leads": [
            "ACD is an exterior angle, so it is ",
            "",
            f"angle A={a} and angle B={b}. The far angles add: ",
        ],
        "work": f"{a}+{b}={a + b}.",
        "unit": "°",
        "lines": [(A, B, D), (A, C)],
        "labels": [
            ("A", A - 1.5j),
            ("B", B - 1 + 1j),
            ("C", C + 1.5j),
            ("D", D + 1),
            (f"{b}°", mix(B, mix(A, C), .45), ""),  # "": the plain figure shows no number here
            (f"{a}°", mix(A, mix(B, C), .55), ""),
        ],
    }


# The other eleven have the same form.  First what they draw with.
AXES = [  # with half arrow heads
    (1 + 15.5j, 17 + 15.5j, 16.5 + 15.1j),
    (3 + 17.5j, 3 + 8.2j, 2.6 + 8.7j),
]


def outside(*points):
    """Labels A, B, ... just outside the corners of a polygon."""
    middle = sum(points) / len(points)
    return [(letter, mix(point, middle, -.25)) for letter, point in zip("ABCD", points)]


def dashed(p, q):
    """A hidden edge: dashes with gaps of the same length."""
    n = max(2, round(1.2 * abs(q - p)))
    return [(mix(p, q, k / n), mix(p, q, (k + .5) / n)) for k in range(n)]


def tick(p, q):
    """The small stroke across a side: "as long as the other side with this mark"."""
    middle = mix(p, q)
    half = .5 / abs(q - p) * 1j * (q - p)  # times 1j: a quarter turn
    return middle + half, middle - half


def corner(p, q, s):
    """The square of a right angle at q, between q-p and q-s."""
    a = (p - q) / abs(p - q)
    b = (s - q) / abs(s - q)
    return q + a, q + a + b, q + b


def isosceles_triangle(r):
    """Equal sides stand on equal base angles; all three angles add up to 180."""
    names = r.choice(NAMES)
    given, find = r.sample("AB", 2)  # A is the apex
    base = r.randint(41 if given == "A" else 15, 80)  # an apex over 99 would not fit its corner
    apex = 180 - 2 * base
    A = r.uniform(8.5, 9.5) + 7.5j
    B = r.uniform(2, 3.5) + 16j
    C = r.uniform(14.5, 16) + 16j
    if given == "A":
        a = apex
        work = f"180-{apex}={2 * base}. {2 * base}/2={base}."
        anchor = A + 5.5j
    else:
        a = base
        work = f"{base}*2={2 * base}. 180-{2 * base}={apex}."
        anchor = mix(B, mix(A, C), .38)
    return {
        "subject": "plane",
        "names": names,
        "numbers": (given, a),
        "text": f"ABC is a triangle. | AB=AC. | angle {given}={a}°. | Find angle {find}.",
        "leads": ["", "The base angles are equal. ", f"angle {given}={a}. "],
        "work": work,
        "unit": "°",
        "lines": [(A, B, C, A), tick(A, B), tick(A, C)],
        "labels": [*outside(A, B, C), (f"{a}°", anchor, "")]}


def rectangle(r):
    """Area multiplies the sides, perimeter adds them."""
    names = r.choice(NAMES)
    a = r.randint(3, 12)
    b = r.randint(3, 12)
    A = complex(r.uniform(3, 4), r.uniform(8, 9))
    B = A + r.uniform(9, 11)
    down = r.uniform(5.5, 6.5) * 1j
    C = B + down
    D = A + down
    find = "area"  # what is asked is no given: see is_test
    work = f"{a}*{b}={a * b}."
    if r.random() >= .5:
        find = "perimeter"
        work = f"{a}+{b}={a + b}. {a + b}*2={2 * (a + b)}."
    return {
        "subject": "plane",
        "names": names,
        "numbers": (a, b),
        "text": "ABCD is a quadrilateral. | All its angles are right angles. | "
                f"AB={a}, BC={b}. | Find the {find}.",
        "leads": ["", f"AB={a} and BC={b}. ", "It is a rectangle. "],
        "work": work,
        "lines": [(A, B, C, D, A), corner(A, B, C), corner(C, D, A)],
        "labels": [
            *outside(A, B, C, D),
            (f"{a}", mix(A, B) - 1j, ""),
            (f"{b}", mix(B, C) + 1.5, "")]}


def circle_diameter(r):
    """An angle over a diameter is a right angle (Thales)."""
    names = r.choice(NAMES)
    a = r.randint(15, 75)
    t = math.radians(r.uniform(8, 24))
    given, find = r.sample("AB", 2)  # either acute angle may be the known one
    side = -1 if given == "A" else 1  # C leans to the given angle: room for the number in it
    O = 9 + 12j
    R = 5.7
    A = O - R
    B = O + R
    C = O + side * R * math.sin(t) - R * math.cos(t) * 1j
    return {
        "subject": "plane",
        "names": names,
        "numbers": (given, a),
        "text": "A, B and C are on circle O. | AB is a diameter. | "
                f"angle {given}={a}°. | Find angle {find}.",
        "leads": ["", "Angle C is a right angle, so ", f"angle {given}={a}. "],
        "work": f"90-{a}={90 - a}.",
        "unit": "°",
        "lines": [(A, B, C, A), (O - .3j, O + .3j)],
        "arcs": [(O, R + R * 1j, 360)],
        "labels": [
            ("A", A - 1 + 1j),
            ("B", B + 1 + 1j),
            ("C", O + 5 * side - 5j),
            ("O", O + 3j),
            (f"{a}°", O + 2.5 * side - 1j, "")]}


def box_volume(r):
    """Volume is base area times height."""
    a = r.randint(2, 9)
    b = r.randint(2, 9)
    h = r.randint(2, 6)
    A = complex(r.uniform(3, 4), r.uniform(10, 11))  # A, B, C, D: the front face
    B = A + r.uniform(7, 8)
    C = B + 5j
    D = A + 5j
    back = r.uniform(2.5, 3.2) * (1 - 1j)  # from there to the face behind it
    E = A + back
    F = B + back
    G = C + back
    H = D + back
    find = "base area"
    work = f"{a}*{b}={a * b}."
    if r.random() < .6:
        find = "volume"
        work += f" {a * b}*{h}={a * b * h}."
    return {
        "subject": "solid",
        "numbers": (a, b, h),
        "text": "The solid is a box. | All its faces are rectangles. | "
                f"a={a}, b={b}, h={h}. | Find the {find}.",
        "leads": ["", f"a={a}, b={b}. ", f"The base is {a} by {b}. "],
        "work": work,
        "lines": [(A, B, C, D, A, E, F, B), (F, G, C), *dashed(D, H), *dashed(H, G), *dashed(H, E)],
        "labels": [
            (f"a={a}", mix(D, C) + 1j, "a"),
            (f"b={b}", C + back.real, "b"),
            (f"h={h}", mix(A, D) - 2, "h")]}


def cylinder(r):
    """Volume is the base circle times height, lateral area its circumference times height."""
    a = r.randint(2, 9)
    h = r.randint(2, 9)
    top = r.uniform(8, 10) + 8j
    R = r.uniform(3.5, 4.5)
    foot = top + r.uniform(7, 8) * 1j
    find = "volume"  # pi a a h
    c = a
    if r.random() >= .5:
        find = "lateral area"  # pi 2 a h
        c = 2
    return {
        "subject": "solid",
        "numbers": (a, h),
        "text": "The solid is a cylinder. | h is perpendicular to r. | "
                f"r={a}, h={h}. | Find the {find}.",
        "leads": ["", f"r={a} and h={h}. ", "Leave pi to the end. "],
        "work": f"{c}*{a}={c * a}. {c * a}*{h}={c * a * h}.",
        "unit": "pi",
        "lines": [(top - R, foot - R), (top + R, foot + R), (top, top + R), *dashed(top, foot)],
        "arcs": [(top, R + 1j, 360), (foot, R + 1j, 180)],
        "labels": [(f"r={a}", top + R + 3, "r"), (f"h={h}", mix(top, foot) - R - 2, "h")]}


def cone(r):
    """A third of the cylinder around it."""
    a = r.randint(2, 10)
    k = r.randint(1, 12)  # h = 3k
    top = r.uniform(8, 10) + 7j
    foot = top + 8j
    R = r.uniform(4, 5)
    rim = foot + R
    return {
        "subject": "solid",
        "numbers": (a, k),
        "text": "The solid is a cone. | h is perpendicular to r. | "
                f"r={a}, h={3 * k}. | Find the volume.",
        "leads": ["", f"r={a} and h={3 * k}. ", "A cone is a third of a cylinder. "],
        "work": f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}.",
        "unit": "pi",
        "lines": [(foot - R, top, rim), (foot, rim), *dashed(top, foot), corner(top, foot, rim)],
        "arcs": [(foot, R + 1j, 180)],
        "labels": [
            (f"r={a}", mix(foot, rim) + 2j, "r"),
            (f"h={3 * k}", mix(top, foot) - R - 2, "h")]}


def square_pyramid(r):
    """A third of the box around it."""
    a = r.randint(2, 10)
    k = r.randint(1, 12)  # h = 3k
    A = r.uniform(2.5, 4) + 16j  # A, B, C, D: the base, seen from the front
    B = A + r.uniform(8, 9)
    back = r.uniform(2.5, 3.5) - 3j
    C = B + back
    D = A + back
    foot = mix(A, C)  # the height stands on the middle of the base
    top = foot - 7.5j
    return {
        "subject": "solid",
        "numbers": (a, k),
        "text": "The solid is a pyramid. | Its base is a square. | "
                f"a={a}, h={3 * k}. | Find the volume.",
        "leads": ["", f"a={a} and h={3 * k}. ", "A pyramid is a third of a box. "],
        "work": f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}.",
        "lines": [
            (A, B, C, top, A), (B, top),
            *dashed(A, D), *dashed(D, C), *dashed(D, top), *dashed(top, foot)],
        "labels": [(f"a={a}", mix(A, B) + 1j, "a"), (f"h={3 * k}", A - .5 - 6j, "h")]}


def line_value(r):
    """Put x into the equation of a line."""
    m = r.randint(2, 9)
    b = r.randint(1, 12)
    x = r.randint(2, 9)
    start = complex(1.5, r.uniform(13.5, 14.5) + .8)
    end = complex(15, r.uniform(8.3, 9.5))
    A = mix(start, end, r.uniform(.5, .7))
    foot = A.real + 15.5j  # on the x-axis, below A
    return {
        "subject": "functions",
        "names": r.choice("PQRS"),
        "numbers": (m, b, x),
        "text": "The graph is a line. | A is on the line. | "
                f"y={m}x+{b}, x={x} at A. | Find y at A.",
        "leads": ["", f"Put x={x} in y={m}x+{b}. ", f"x={x}. "],
        "work": f"{m}*{x}={m * x}. {m * x}+{b}={m * x + b}.",
        "lines": [*AXES, (start, end), *dashed(A, foot)],
        "labels": [
            ("A", A + 1.8 + 1.5j),
            (f"y={m}x+{b}", 7 + 7j, ""),
            (f"x={x}", foot + 1.5j, "")]}


def slope(r):
    """Rise over run."""
    x1 = r.randint(0, 5)
    y1 = r.randint(0, 9)
    dx = r.randint(1, 4)
    k = r.randint(1, 9)
    x2 = x1 + dx
    y2 = y1 + dx * k
    names = r.choice(NAMES)
    A = complex(r.uniform(5, 6), r.uniform(13, 14))
    B = complex(r.uniform(12, 13), r.uniform(8.5, 9.5))
    return {
        "subject": "functions",
        "names": names,
        "numbers": (x1, y1, x2, y2),
        "text": "The graph is a line. | A and B are on the line. | "
                f"A({x1},{y1}), B({x2},{y2}). | Find the slope.",
        "leads": ["", "Divide the rise by the run. ", f"A({x1},{y1}), B({x2},{y2}). "],
        "work": f"{y2}-{y1}={y2 - y1}. {x2}-{x1}={dx}. {y2 - y1}/{dx}={k}.",
        "lines": [
            *AXES,
            (mix(A, B, -.25), mix(A, B, 1.25)),
            tick(mix(A, B, -1), B),  # the middle of this side is A, of the next B
            tick(A, mix(A, B, 2))],
        "labels": [  # the letter alone stands where it stands in A(x,y)
            (f"A({x1},{y1})", A + 5 + .5j, "A     "),
            (f"B({x2},{y2})", B - 5 - 1j, "     B")]}


def parabola_value(r):
    """Put x into the equation of a parabola."""
    h = r.randint(1, 9)
    k = r.randint(1, 9)
    d = r.randint(1, 9)
    x = h + d  # larger than h, so the point is on the right arm
    names = r.choice("PQRS")
    lowest = complex(r.uniform(7, 9), r.uniform(13, 14.5))
    wide = r.uniform(3.5, 4.5)
    curve = [lowest + wide * u / 6 - 5j * (u / 6) ** 2 for u in range(-6, 7)]
    A = curve[10]
    foot = A.real + 15.5j
    return {
        "subject": "functions",
        "names": names,
        "numbers": (h, k, x),
        "text": "The graph is a parabola. | A is on the curve. | "
                f"y=(x-{h})^2+{k}, x={x} at A. | Find y at A.",
        "leads": ["", f"Put x={x} in y=(x-{h})^2+{k}. ", f"x={x}. "],
        "work": f"{x}-{h}={d}. {d}*{d}={d * d}. {d * d}+{k}={d * d + k}.",
        "lines": [*AXES, curve, *dashed(A, foot)],
        "labels": [
            ("A", A + 1.5 + .5j),
            (f"y=(x-{h})^2+{k}", 9 + 7j, ""),
            (f"x={x}", foot + 1.5j, "")]}


def x_intercept(r):
    """A graph meets the x-axis where y is 0."""
    a = r.randint(2, 12)
    x = r.randint(2, 12)
    names = r.choice("PQRS")
    A = r.uniform(7, 10) + 15.5j  # on the x-axis
    top = complex(r.uniform(14, 16), r.uniform(8.5, 9.5))
    return {
        "subject": "functions",
        "names": names,
        "numbers": (a, x),
        "text": f"The graph is a line. | A is on the x-axis. | y={a}x-{a * x}. | Find x at A.",
        "leads": ["", "Set y=0. ", f"y={a}x-{a * x}. "],
        "work": f"{a}x={a * x}. {a * x}/{a}={x}.",
        "lines": [*AXES, (mix(A, top, -.15), top)],
        "labels": [("A", A + 1 + 1.5j), (f"y={a}x-{a * x}", 8 + 7j, "")]}


FAMILIES = [  # a new one goes in here; each is drawn equally often
    exterior_angle, isosceles_triangle, rectangle, circle_diameter,
    box_volume, cylinder, cone, square_pyramid,
    line_value, slope, parabola_value, x_intercept,
]


# --------------------------------------------------------------------------------------------------
# The problems of a split

def is_test(family, numbers):
    """The givens alone decide: no version, naming or wording of a test problem is ever trained on.

    1 in 5; not by hash(), which differs between runs.
    """
    return sha256(f"{family}{numbers}".encode()).digest()[0] < 51


def make_problem(split, i, seed=0):
    """Problem i of a split ("train" or "test") as a dict; depends on nothing but its arguments."""
    r = Random(f"{seed}/{split}/{i}")
    family = FAMILIES[i % len(FAMILIES)]

    # Draw until the givens belong to this split.
    while True:
        problem = family(r)
        if is_test(family.__name__, problem["numbers"]) == (split == "test"):
            break

    # Give the points A, B, C, D their names.
    new_letters = str.maketrans(dict(zip("ABCD", problem.get("names", ""))))

    def rename(words):
        return re.sub(r"\b[A-D]+\b", lambda m: m[0].translate(new_letters), words)  # ABC, not All

    groups = ("descriptive", "implicit", "numeric", "question")
    problem |= zip(groups, rename(problem["text"]).split(" | "))
    labels = []
    for words, anchor, *plain in problem["labels"]:
        labels.append((rename(words), anchor, *map(rename, plain)))
    problem["labels"] = labels

    # The answer is the result of the last sum.
    steps = rename(r.choice(problem["leads"])) + problem["work"]
    unit = problem.get("unit", "")
    value = int(re.findall(r"\d+", problem["work"])[-1])
    answer = f"{value}{unit}"

    # One in four (ours) asks for one of four options, if the longer question can be drawn.
    wrong = {value + d for d in (-10, -2, -1, 1, 2, 10, value)}
    wrong = sorted(v for v in wrong if v > 0)
    options = [f"{v}{unit}" for v in r.sample(wrong, 3)] + [answer]
    r.shuffle(options)
    longer = problem["question"]
    for letter, option in zip("ABCD", options):
        longer += f" {letter}.{option}"
    problem |= {
        "id": f"{split}-{i:06d}",
        "family": family.__name__,
        "output": f"{steps} †Answer: {answer}",  # the mark of the released data
        "answer": answer,
        "kind": "free",
        "choices": None,
    }
    if r.random() < .25 and len(textwrap.wrap(longer, COLS)) <= QUESTION_ROWS:
        problem["question"] = longer
        problem["kind"] = "choice_text"  # text, not letter: see tiny/README.md
        problem["choices"] = options
    return problem


def text_of(problem, version):
    """The words of one version: the groups that its rung leaves in the text."""
    words = [problem[group] for group in LADDER[version][0].split()]
    return " ".join(words) or VISION_ONLY_TEXT


# --------------------------------------------------------------------------------------------------
# Drawing: the strokes first, then every label in the free cells nearest to its anchor

SINK = .15  # strokes sit a little low, so a thick base line does not reach into the cells above it
bitmap_font = cache(ImageFont.load_default_imagefont)  # nothing loads at import
outline_font = cache(ImageFont.load_default)


def draw_strokes(problem, size):
    """The figure without any label. -> size x size grey PIL image"""
    big = size if size <= 2 * DEFAULT_SIZE else 2 * size  # large ones: drawn twice as large
    unit = big / COLS
    width = max(1, big // 150)
    image = Image.new("L", (big, big), 255)
    draw = ImageDraw.Draw(image)

    def pixels(points):
        return [(p.real * unit, (p.imag + SINK) * unit) for p in points]

    for points in problem["lines"]:
        draw.line(pixels(points), fill=0, width=width, joint="curve")  # no notches at corners
    for centre, radius, degrees in problem.get("arcs", ()):
        box = pixels([centre - radius, centre + radius])
        draw.arc(box, 0, degrees, fill=0, width=width)
    return image.resize((size, size), Image.BOX)  # the mean of each 2 x 2


def free_cells(strokes):
    """A string for each row of cells: "." where no stroke passes, "#" elsewhere."""
    means = strokes.resize((COLS, ROWS), Image.BOX)  # 255: nothing but white
    free = []
    for row in range(ROWS):
        line = ""
        for col in range(COLS):
            line += "." if means.getpixel((col, row)) == 255 else "#"
        free.append(line)
    return free


def place(free, text, x, y):
    """The free run of cells nearest to (x, y). -> (col, row); `free`, see above, is updated.

    Even columns only, so a patch of tiny/ holds characters of ONE label: ours, meant to make
    reading easy.
    """
    n = len(text)
    spots = []
    for row in range(QUESTION_ROWS, ROWS):
        for col in range(0, COLS - n + 1, 2):
            if free[row].startswith("." * n, col):
                distance = math.dist((col + n / 2, 2 * row + 1), (x, y))
                spots.append((distance, col, row))
    if not spots:
        raise ValueError(f"no room for the label {text!r}")

    _, col, row = min(spots)
    free[row] = free[row][:col] + "#" * n + free[row][col + n:]
    return col, row


def write(draw, text, col, row, size):
    """One run of characters in the cells (col .., row). -> {(col, row): character}, no blanks"""
    if not re.fullmatch("[ -~°]*", text):
        raise ValueError(f"no glyph for a character of {text!r}: use ASCII and °")
    unit = size / COLS
    col += len(text) - len(text.lstrip())  # outer blanks only keep room
    text = text.strip()

    if size == DEFAULT_SIZE:  # bitmap: crisp, one character per cell
        at = (col * unit, 2 * row * unit)
        draw.text(at, text.encode("latin-1"), font=bitmap_font(), fill=0)
    else:  # outlines, 80 % of a cell high, smaller when the run is wider than its cells
        height = 1.6 * unit
        fit = min(1, len(text) * unit / outline_font(height).getlength(text))
        font = outline_font(height * fit)
        x = col if row < QUESTION_ROWS else col + len(text) / 2
        anchor = "lm" if row < QUESTION_ROWS else "mm"
        draw.text((x * unit, (2 * row + 1) * unit), text, font=font, fill=0, anchor=anchor)
    return {(col + k, row): letter for k, letter in enumerate(text) if letter != " "}


def draw_problem(problem, size=DEFAULT_SIZE):
    """The three pictures of a problem and where their characters stand.

    -> ({"figure", "labelled", "question": size x size grey images},
        {same keys: {(col, row): character}})
    """
    strokes = draw_strokes(problem, size)
    blank = free_cells(draw_strokes(problem, DEFAULT_SIZE))  # labels stand alike at any size
    pictures = {}
    cells = {}
    for kind in ("figure", "labelled"):  # each finds its own places: plain letters are shorter
        pictures[kind] = strokes.copy()
        cells[kind] = {}
        draw = ImageDraw.Draw(pictures[kind])
        free = list(blank)
        for words, anchor, *plain in problem["labels"]:
            if kind == "figure" and plain:
                words = plain[0]
            if words:
                col, row = place(free, words, anchor.real, anchor.imag)
                cells[kind] |= write(draw, words, col, row, size)

    pictures["question"] = pictures["labelled"].copy()
    cells["question"] = dict(cells["labelled"])
    draw = ImageDraw.Draw(pictures["question"])
    for row, line in enumerate(textwrap.wrap(problem["question"], COLS)):
        cells["question"] |= write(draw, line, 0, row, size)
    return pictures, cells


# --------------------------------------------------------------------------------------------------
# Files, in the released row format: image_url, instruction, output; pairs add the same with _2.  No
# suffix: strong (text-rich, teacher); _2: weak (vision-rich, student).  Other fields are ours,
# training ignores them.

def view(problem, version, suffix=""):
    """The three fields of one version of a problem."""
    picture = LADDER[version][1]
    return {
        f"image_url{suffix}": f"images/{problem['id']}-{picture}.png" if picture else "",
        f"instruction{suffix}": text_of(problem, version),
        f"output{suffix}": problem["output"],
    }


def rows_for_training(problem, i, seed):
    """-> [(name of the file, row)]"""
    about = {field: problem[field] for field in ("id", "family", "subject")}
    rows = [("stage1", view(problem, "text_only") | about)]

    for name, arrows in PAIRS.items():
        for strong, weak in arrows:
            pair = view(problem, strong) | view(problem, weak, "_2")
            rows.append((f"stage2_{name}", pair | about | {"levels": [strong, weak]}))

    # Two versions of each problem: ours.  Those whose text lacks the numbers come twice as often as
    # the others, since they are the hard ones.
    weights = [1 if "numeric" in groups else 2 for groups, _ in LADDER.values()]
    r = Random(f"{seed}/stage3/{i}")
    for version in r.choices(list(LADDER), weights, k=2):
        rows.append(("stage3", view(problem, version) | about | {"version": version}))
    return rows


def rows_for_test(problem):
    """-> [(name of the file, row)], a row for each rung, with what eval.py needs to grade"""
    fields = ("id", "family", "subject", "answer", "kind", "choices")
    about = {field: problem[field] for field in fields}
    rows = []
    for version in LADDER:
        row = view(problem, version) | about | {"version": version}
        row["id"] += f"/{version}"
        rows.append(("test", row))
    return rows


def build(job):
    """Draw and save one problem; runs in a worker. -> (digest of its pixels, its rows)"""
    split, i, seed, size, folder = job
    problem = make_problem(split, i, seed)
    pictures, _ = draw_problem(problem, size)
    pixels = sha256()  # not of the files: PNG bytes depend on zlib
    for kind, image in pictures.items():
        pixels.update(image.tobytes())
        path = f"{folder}/images/{problem['id']}-{kind}.png"
        image.save(path, compress_level=1)  # 1: fast, and still small
    rows = rows_for_test(problem) if split == "test" else rows_for_training(problem, i, seed)
    return pixels.digest(), rows


def write_data(args, folder):
    """All files of a data set, into a folder that is not there yet. -> {file: number of rows}"""
    (folder / "images").mkdir(parents=True)
    jobs = []
    for split, n in (("train", args.n), ("test", args.n_test)):
        jobs += [(split, i, args.seed, args.size, folder) for i in range(n)]

    # Results come in the order of the jobs, whichever worker is first; one that dies is an error.
    lines = {}  # of each file; about 3 kB a problem
    pixels = sha256()
    with ProcessPoolExecutor(args.workers) as pool:
        each = map if args.workers == 1 else pool.map  # one needs no other process
        results = tqdm(each(build, jobs), total=len(jobs), desc="problems", disable=None)
        for digest, rows in results:
            pixels.update(digest)
            for name, row in rows:
                line = json.dumps(row, ensure_ascii=False) + "\n"  # ° stays °
                lines.setdefault(name, []).append(line)

    manifest = {
        "seed": args.seed,
        "n": args.n,
        "n_test": args.n_test,
        "size": args.size,
        "rows": {},
        "sha256": {},
        "pixels_sha256": pixels.hexdigest(),
    }
    for name, some in lines.items():
        data = "".join(some).encode()
        (folder / f"{name}.jsonl").write_bytes(data)
        manifest["rows"][name] = len(some)
        manifest["sha256"][f"{name}.jsonl"] = sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest["rows"]


def show(i, seed, size):
    """Print the ladder of one training problem and save its pictures side by side."""
    problem = make_problem("train", i, seed)  # of any i: it does not depend on how many there are
    pictures, _ = draw_problem(problem, size)
    tile = max(size, 324)
    sheet = Image.new("L", (len(LADDER) * (tile + 10), tile + 90), 235)
    draw = ImageDraw.Draw(sheet)
    font = outline_font(15)

    print(f"training problem {i} ({problem['family']}, {problem['subject']}); "
          f"answer for all six: {problem['output']}\n")
    for k, (version, (_, picture)) in enumerate(LADDER.items()):
        text = text_of(problem, version)
        print(f"{version:17s} picture: {picture or '-':9s} text: {text}")
        x = k * (tile + 10)
        if picture:
            image = pictures[picture].resize((tile, tile), Image.NEAREST)
            sheet.paste(image, (x, 0))
        else:
            draw.text((x + 9, 9), "no picture", font=font, fill=0)
        words = f"{version}\n{textwrap.fill(text, 46)}"
        draw.text((x + 9, tile + 4), words, font=font, fill=0)
    sheet.save(f"data_show_{i}.png")
    print(f"\nwrote data_show_{i}.png")


def parse_args(argv=None):
    """The flags, checked before anything is written."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default="data", help="folder to write; it appears only when complete")
    add("--n", type=int, default=4000, help="training problems (ours: stage 1 sees each 3 times)")
    add("--n_test", type=int, default=400, help="test problems, each in every version")
    add("--size", type=int, default=DEFAULT_SIZE, help="side of a picture in pixels; SigLIP: 384")
    add("--seed", type=int, default=0, help="same seed, same problems and pixels")
    add("--workers", type=int, default=1, help="processes; the result does not depend on it")
    add("--show", type=int, help="print and draw this training problem, write no data")
    args = parser.parse_args(argv)

    lowest = {"n": 0, "n_test": 0, "show": 0, "workers": 1, "size": DEFAULT_SIZE}
    for flag, limit in lowest.items():
        value = getattr(args, flag)
        if value is not None and value < limit:
            sys.exit(f"data_gen.py: --{flag} {value}: give {limit} or more")
    if args.show is not None:
        for flag in ("out", "n", "n_test", "workers"):
            if getattr(args, flag) != parser.get_default(flag):
                sys.exit(f"data_gen.py: --show writes no data set: leave out --{flag}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.show is not None:
        show(args.show, args.seed, args.size)
        return
    out = Path(args.out).resolve()
    if out.is_file() or any(out.glob("*")):
        sys.exit(f"data_gen.py: {args.out} already exists: delete it or name another folder with "
                 "--out")

    # Complete or absent: the data gets its name when everything is in it.  Until then it is in a
    # folder of this process alone, so two that write the same --out do not mix: the second to end
    # finds the name taken.  Only a killed run leaves its folder, out.part-..., behind.
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as part:
            whole = Path(part, "data")
            rows = write_data(args, whole)
            whole.rename(out)  # cannot happen by half
    except (OSError, BrokenExecutor) as error:  # no space, no permission; a worker that was killed
        sys.exit(f"data_gen.py: --out {args.out} is not written: {error}")
    except KeyboardInterrupt:
        print("stopped: nothing is written")
        sys.exit(130)  # as a shell counts it
    print(f"wrote {args.out}/: {3 * (args.n + args.n_test)} pictures, {args.size} x {args.size}; "
          f"rows {rows}")


if __name__ == "__main__":
    main()
