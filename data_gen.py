r"""Make the maths problems: each one written six times, from "all in the text" to "all in the picture".

    python data_gen.py                # 4,000 training + 400 test problems into data/, about 15 s on one core
    python data_gen.py --size 384     # the same problems drawn for a real vision encoder, about a minute
    python data_gen.py --show 0       # print the ladder of problem 0, write its pictures to data_show_0.png

Math-PUMA (arXiv 2408.08640) needs pairs: one problem in a text-rich and a vision-rich form with ONE answer.
Problem 0 of this generator at the two ends of its ladder, the picture in its 18 x 9 character cells:

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
The language model can solve the left one; stage 2 teaches the eyes to make the right one look alike to it."""
import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import random
import re
import shutil
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------
# The ladder, the paper's central idea: a condition is in one of three groups (MathVerse, arXiv 2403.14624):
#   descriptive   what the figure obviously is                "EFG is a triangle."
#   implicit      a property an expert sees in the figure     "H is on the extension of FG."
#   numeric       values without which nobody can solve it    "angle E=74°"
# Each rung takes one more group, at last the question, OUT of the text.  Nothing is lost: figures always show
# the first two.  (In MathVerse, vision_dominant keeps the implicit group; here a rung only ever loses text.)
#   version            left in the text                            picture
#   text_only          descriptive implicit numeric question       -
#   text_dominant      descriptive implicit numeric question       figure
#   text_lite                      implicit numeric question       figure
#   vision_intensive                        numeric question       figure
#   vision_dominant                                 question       figure + numbers
#   vision_only        (a fixed sentence)                          figure + numbers + question
# One answer, word for word, belongs to all six: only the place of the information moves.  A model right at
# the top and wrong further down knows the maths and fails to see: that gap is what stage 2 closes.
LADDER = {  # version: (groups left in the text, name of the picture)
    "text_only": ("descriptive implicit numeric question", None),
    "text_dominant": ("descriptive implicit numeric question", "figure"),
    "text_lite": ("implicit numeric question", "figure"),
    "vision_intensive": ("numeric question", "figure"),
    "vision_dominant": ("question", "labelled"),
    "vision_only": ("", "question")}
VISION_ONLY_TEXT = "Solve the problem."  # ours: a prompt needs some words even when the picture says it all
# Stage 2 pairs use four of the six rungs: the paper draws a pyramid of 4 levels with 3 upward arrows.  Which
# rungs, is our reading; stage 2 never sees the two left out, so their accuracy shows what carries over.
PYRAMID = ("text_only", "text_dominant", "vision_dominant", "vision_only")
PAIRS = {  # (strong, weak): the teacher reads the first, the student the second
    "neighbours": list(zip(PYRAMID, PYRAMID[1:])),  # each level is pulled to the one above, as in the paper
    "top": [(PYRAMID[0], weak) for weak in PYRAMID[1:]]}  # each level is pulled to the text
# Pictures are laid out in character cells, like a terminal, at any size: labels cannot overlap.
COLS, ROWS, QUESTION_ROWS = 18, 9, 3  # the question may fill rows 0-2; the figure owns rows 3-8
DEFAULT_SIZE = 108  # pixels: a cell is then 6 x 12, which Pillow's built-in bitmap font fills exactly

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="data", help="folder to write; it appears only when complete")
    add("--n", type=int, default=4000, help="training problems (ours: what stage 1 sees once by default)")
    add("--n_test", type=int, default=400, help="test problems, each in six versions")
    add("--size", type=int, default=DEFAULT_SIZE, help="picture side, pixels (108: tiny/, 384: SigLIP)")
    add("--seed", type=int, default=0, help="same seed, same problems and pixels")
    add("--workers", type=int, default=1, help="processes; the result does not depend on it")
    add("--show", type=int, metavar="I", help="print and draw training problem I, write no data set")
    args = parser.parse_args(argv)
    idle = [f"--{k}" for k in ("out", "n", "n_test", "workers") if getattr(args, k) != parser.get_default(k)]
    for wrong, message in (
        (min(args.n, args.n_test, args.show or 0) < 0, "--n, --n_test and --show must be 0 or more"),
        (args.workers < 1, "--workers must be 1 or more"),
        (args.size < DEFAULT_SIZE, f"--size {args.size}: letters would be unreadable, give 108 or more"),
        (args.show is not None and idle, f"--show writes no data set: leave out {' '.join(idle)}")):
        if wrong:
            sys.exit(f"data_gen.py: {message}")
    return args

# ----------------------------------------------------------------------------------------------------------
# Problem families.  Each takes a random.Random, draws its numbers and returns a plain dict:
#   numbers   the givens; they alone decide whether this may be a training or a test problem
#   text      the four groups of the ladder: descriptive | implicit | numeric | question
#   names     texts and labels are written with the points A, B, C, D; these letters then take their places
#   work      the sums; the result of the last one, with its unit, is the answer
#   leads     three ways into the sums, one drawn: the teacher's soft distribution then says more than a label
#   lines     polylines; arcs: of ellipses (centre x, y, radius x, y, from, to in degrees)
#   labels    (words, anchor x, y); a fourth entry is what the plain figure, without numbers, shows instead
# Coordinates: 18 x 18 units, y down, the figure owns y 6..18; a cell is 1 wide, 2 high.  Figures are not
# to scale, so no answer can be measured.  Ranges are ours: sums a model of 1 million parameters can learn.
NAMES = ["ABCD", "PQRS", "EFGH", "KLMN", "WXYZ"]
AXES = [((1, 15.5), (17, 15.5), (16.5, 15.1)), ((3, 17.5), (3, 8.2), (2.6, 8.7))]  # with half arrow heads

def mix(p, q, t=.5):  # the point a share t of the way from p to q; t < 0 lies behind p
    return p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])

def outside(*points):  # labels A, B, ... just outside the corners of a polygon
    middle = [sum(axis) / len(points) for axis in zip(*points)]
    return [(c, *mix(p, middle, -.25)) for c, p in zip("ABCD", points)]

def dashed(p, q):  # a hidden edge: dashes with gaps of the same length
    n = max(2, round(1.2 * math.dist(p, q)))
    return [(mix(p, q, k / n), mix(p, q, (k + .5) / n)) for k in range(n)]

def tick(p, q):  # the small stroke across a side that says "as long as the other side with this mark"
    m, t = mix(p, q), .5 / math.dist(p, q)
    across = m[0] - (q[1] - p[1]), m[1] + (q[0] - p[0])
    return mix(m, across, t), mix(m, across, -t)

def corner(p, q, s):  # the square of a right angle at q, between q-p and q-s
    a, b = mix(q, p, 1 / math.dist(p, q)), mix(q, s, 1 / math.dist(q, s))
    return a, mix(q, mix(a, b), 2), b

def exterior_angle(r):  # an angle outside a triangle is the sum of the two far ones inside
    names, a, b = r.choice(NAMES), r.randint(20, 85), r.randint(20, 75)
    A, B, C, D = (r.uniform(7, 9), 8), (2, 16), (r.uniform(11, 12), 16), (16, 16)  # B, C, D lie on one line
    return dict(names=names, numbers=(a, b), work=f"{a}+{b}={a + b}.", unit="°", lines=[(A, B, D), (A, C)],
        text="ABC is a triangle. | D is on the extension of BC. | "
             f"angle A={a}°, angle B={b}°. | Find angle ACD.", leads=[
            "ACD is an exterior angle, so it is ", "", f"angle A={a} and angle B={b}. The far angles add: "],
        labels=[("A", A[0], 6.5), ("B", 1, 17), ("C", C[0], 17.5), ("D", 17, 16),
                (f"{b}°", *mix(B, mix(A, C), .45), ""), (f"{a}°", *mix(A, mix(B, C), .55), "")])

def isosceles_triangle(r):  # equal sides stand on equal base angles
    names, (given, find) = r.choice(NAMES), r.sample("AB", 2)  # A is the apex
    base = r.randint(41 if given == "A" else 15, 80)  # an apex of three digits would not fit under its corner
    both, apex = 2 * base, 180 - 2 * base  # the angles of a triangle add up to 180
    A, B, C = (r.uniform(8.5, 9.5), 7.5), (r.uniform(2, 3.5), 16), (r.uniform(14.5, 16), 16)
    a, at = (apex, (A[0], 13)) if given == "A" else (base, mix(B, mix(A, C), .38))
    work = f"180-{apex}={both}. {both}/2={base}." if given == "A" else f"{base}*2={both}. 180-{both}={apex}."
    return dict(names=names, numbers=(given, a), work=work, unit="°",
        text=f"ABC is a triangle. | AB=AC. | angle {given}={a}°. | Find angle {find}.",
        leads=["", "The base angles are equal. ", f"angle {given}={a}. "],
        lines=[(A, B, C, A), tick(A, B), tick(A, C)], labels=[*outside(A, B, C), (f"{a}°", *at, "")])

def rectangle(r):  # area multiplies the sides, perimeter adds them
    names, a, b = r.choice(NAMES), r.randint(3, 12), r.randint(3, 12)
    x, y, w, h = r.uniform(3, 4), r.uniform(8, 9), r.uniform(9, 11), r.uniform(5.5, 6.5)
    A, B, C, D = (x, y), (x + w, y), (x + w, y + h), (x, y + h)
    find = "area" if r.random() < .5 else "perimeter"  # what is asked is no given: see is_test
    return dict(names=names, numbers=(a, b), lines=[(A, B, C, D, A), corner(A, B, C), corner(C, D, A)],
        text="ABCD is a quadrilateral. | All its angles are right angles. | "
             f"AB={a}, BC={b}. | Find the {find}.", leads=["", f"AB={a} and BC={b}. ", "It is a rectangle. "],
        work=f"{a}*{b}={a * b}." if find == "area" else f"{a}+{b}={a + b}. {a + b}*2={2 * (a + b)}.",
        labels=[*outside(A, B, C, D), (f"{a}", x + w / 2, y - 1, ""), (f"{b}", x + w + 1.5, y + h / 2, "")])

def circle_diameter(r):  # an angle over a diameter is a right angle (Thales)
    names, a, t, R = r.choice(NAMES), r.randint(15, 75), math.radians(r.uniform(8, 24)), 5.7
    given, find = r.sample("AB", 2)  # either acute angle may be the known one
    side = -1 if given == "A" else 1  # C leans to the given angle: room for the number in it
    A, B, C = (9 - R, 12), (9 + R, 12), (9 + side * R * math.sin(t), 12 - R * math.cos(t))
    return dict(names=names, numbers=(given, a), work=f"90-{a}={90 - a}.", unit="°",
        text=f"A, B and C are on circle O. | AB is a diameter. | angle {given}={a}°. | Find angle {find}.",
        leads=["", "Angle C is a right angle, so ", f"angle {given}={a}. "],
        lines=[(A, B, C, A), ((9, 11.7), (9, 12.3))], arcs=[(9, 12, R, R, 0, 360)], labels=[("A", 2.3, 13),
            ("B", 15.7, 13), ("C", 9 + 5 * side, 7), ("O", 9, 15), (f"{a}°", 9 + 2.5 * side, 11, "")])

def box_volume(r):  # volume is base area times height
    a, b, h = r.randint(2, 9), r.randint(2, 9), r.randint(2, 6)
    x, y, w, d = r.uniform(3, 4), r.uniform(10, 11), r.uniform(7, 8), r.uniform(2.5, 3.2)
    A, B, C, D = (x, y), (x + w, y), (x + w, y + 5), (x, y + 5)  # the front face
    E, F, G, H = [(u + d, v - d) for u, v in (A, B, C, D)]  # the face behind it
    find, last = ("volume", f" {a * b}*{h}={a * b * h}.") if r.random() < .6 else ("base area", "")
    return dict(numbers=(a, b, h), work=f"{a}*{b}={a * b}." + last,
        text=f"The solid is a box. | All its faces are rectangles. | a={a}, b={b}, h={h}. | Find the {find}.",
        leads=["", f"a={a}, b={b}. ", f"The base is {a} by {b}. "],
        lines=[(A, B, C, D, A, E, F, B), (F, G, C), *dashed(D, H), *dashed(H, G), *dashed(H, E)], labels=[
            (f"a={a}", x + w / 2, y + 6, "a"), (f"b={b}", G[0], y + 5, "b"), (f"h={h}", x - 2, y + 2.5, "h")])

def cylinder(r):  # volume is the base circle times height, lateral area its circumference times height
    a, h, x, R, t = r.randint(2, 9), r.randint(2, 9), r.uniform(8, 10), r.uniform(3.5, 4.5), r.uniform(7, 8)
    top, foot, left, right = (x, 8), (x, 8 + t), (x - R, 8), (x + R, 8)
    find, c = ("volume", a) if r.random() < .5 else ("lateral area", 2)  # pi a a h or pi 2 a h
    return dict(numbers=(a, h), work=f"{c}*{a}={c * a}. {c * a}*{h}={c * a * h}.", unit="pi",
        text=f"The solid is a cylinder. | h is perpendicular to r. | r={a}, h={h}. | Find the {find}.",
        leads=["", f"r={a} and h={h}. ", "Leave pi to the end. "],
        lines=[(left, (x - R, 8 + t)), (right, (x + R, 8 + t)), (top, right), *dashed(top, foot)],
        arcs=[(*top, R, 1, 0, 360), (*foot, R, 1, 0, 180)],
        labels=[(f"r={a}", x + R + 3, 8, "r"), (f"h={h}", x - R - 2, 8 + t / 2, "h")])

def cone(r):  # a third of the cylinder around it
    a, k, x, R = r.randint(2, 10), r.randint(1, 12), r.uniform(8, 10), r.uniform(4, 5)  # h = 3k
    top, foot, rim = (x, 7), (x, 15), (x + R, 15)
    return dict(numbers=(a, k), work=f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}.", unit="pi",
        text=f"The solid is a cone. | h is perpendicular to r. | r={a}, h={3 * k}. | Find the volume.",
        leads=["", f"r={a} and h={3 * k}. ", "A cone is a third of a cylinder. "],
        lines=[((x - R, 15), top, rim), (foot, rim), *dashed(top, foot), corner(top, foot, rim)], labels=[
            (f"r={a}", x + R / 2, 17, "r"), (f"h={3 * k}", x - R - 2, 11, "h")], arcs=[(x, 15, R, 1, 0, 180)])

def square_pyramid(r):  # a third of the box around it
    a, k = r.randint(2, 10), r.randint(1, 12)  # h = 3k
    x, w, d = r.uniform(2.5, 4), r.uniform(8, 9), r.uniform(2.5, 3.5)
    A, B, C, D = (x, 16), (x + w, 16), (x + w + d, 13), (x + d, 13)  # the base, seen from the front
    top, foot = (x + (w + d) / 2, 7), (x + (w + d) / 2, 14.5)  # the height stands on the middle of the base
    return dict(numbers=(a, k), work=f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}.",
        text=f"The solid is a pyramid. | Its base is a square. | a={a}, h={3 * k}. | Find the volume.",
        leads=["", f"a={a} and h={3 * k}. ", "A pyramid is a third of a box. "],
        lines=[(A, B, C, top, A), (B, top), *dashed(A, D), *dashed(D, C), *dashed(D, top),
               *dashed(top, foot)], labels=[(f"a={a}", x + w / 2, 17, "a"), (f"h={3 * k}", x - .5, 10, "h")])

def line_value(r):  # put x into the equation of a line
    m, b, x = r.randint(2, 9), r.randint(1, 12), r.randint(2, 9)
    start, end = (1.5, r.uniform(13.5, 14.5) + .8), (15, r.uniform(8.3, 9.5))
    (px, py), name = mix(start, end, r.uniform(.5, .7)), r.choice("PQRS")  # the point at x
    return dict(names=name, numbers=(m, b, x), work=f"{m}*{x}={m * x}. {m * x}+{b}={m * x + b}.",
        text=f"The graph is a line. | A is on the line. | y={m}x+{b}, x={x} at A. | Find y at A.",
        leads=["", f"Put x={x} in y={m}x+{b}. ", f"x={x}. "],
        lines=[*AXES, (start, end), *dashed((px, py), (px, 15.5))],
        labels=[("A", px + 1.8, py + 1.5), (f"y={m}x+{b}", 7, 7, ""), (f"x={x}", px, 17, "")])

def slope(r):  # rise over run
    x1, y1, dx, k = r.randint(0, 5), r.randint(0, 9), r.randint(1, 4), r.randint(1, 9)
    x2, y2, dy, names = x1 + dx, y1 + dx * k, dx * k, r.choice(NAMES)
    A, B = (r.uniform(5, 6), r.uniform(13, 14)), (r.uniform(12, 13), r.uniform(8.5, 9.5))
    return dict(names=names, numbers=(x1, y1, x2, y2), work=f"{y2}-{y1}={dy}. {x2}-{x1}={dx}. {dy}/{dx}={k}.",
        text=f"The graph is a line. | A and B are on the line. | A({x1},{y1}), B({x2},{y2}). | "
             "Find the slope.", leads=["", "Divide the rise by the run. ", f"A({x1},{y1}), B({x2},{y2}). "],
        lines=[*AXES, (mix(A, B, -.25), mix(A, B, 1.25)), tick(mix(A, B, -1), B), tick(A, mix(A, B, 2))],
        labels=[(f"A({x1},{y1})", A[0] + 5, A[1] + .5, f"{'A':6}"),
                (f"B({x2},{y2})", B[0] - 5, B[1] - 1, f"{'B':>6}")])

def parabola_value(r):  # put x into the equation of a parabola
    h, k, d, name = r.randint(1, 9), r.randint(1, 9), r.randint(1, 9), r.choice("PQRS")
    cx, bottom, wide = r.uniform(7, 9), r.uniform(13, 14.5), r.uniform(3.5, 4.5)
    curve = [(cx + wide * u / 6, bottom - 5 * (u / 6) ** 2) for u in range(-6, 7)]
    x, (px, py) = h + d, curve[10]  # x > h, so the point is on the right arm
    return dict(names=name, numbers=(h, k, x), work=f"{x}-{h}={d}. {d}*{d}={d * d}. {d * d}+{k}={d * d + k}.",
        text=f"The graph is a parabola. | A is on the curve. | y=(x-{h})^2+{k}, x={x} at A. | Find y at A.",
        leads=["", f"Put x={x} in y=(x-{h})^2+{k}. ", f"x={x}. "],
        lines=[*AXES, curve, *dashed((px, py), (px, 15.5))],
        labels=[("A", px + 1.5, py + .5), (f"y=(x-{h})^2+{k}", 9, 7, ""), (f"x={x}", px, 17, "")])

def x_intercept(r):  # a graph meets the x-axis where y is 0
    a, x, name = r.randint(2, 12), r.randint(2, 12), r.choice("PQRS")
    zero, top = (r.uniform(7, 10), 15.5), (r.uniform(14, 16), r.uniform(8.5, 9.5))  # zero: on the axis
    return dict(names=name, numbers=(a, x), work=f"{a}x={a * x}. {a * x}/{a}={x}.",
        text=f"The graph is a line. | A is on the x-axis. | y={a}x-{a * x}. | Find x at A.",
        leads=["", "Set y=0. ", f"y={a}x-{a * x}. "], lines=[*AXES, (mix(zero, top, -.15), top)],
        labels=[("A", zero[0] + 1, 17), (f"y={a}x-{a * x}", 8, 7, "")])

FAMILIES = [(subject, family) for subject, group in {
    "plane": (exterior_angle, isosceles_triangle, rectangle, circle_diameter),
    "solid": (box_volume, cylinder, cone, square_pyramid),
    "functions": (line_value, slope, parabola_value, x_intercept)}.items() for family in group]

def is_test(family, numbers):
    """The givens alone decide, so no version, naming or wording of a test problem is ever trained on."""
    return hashlib.sha256(f"{family}{numbers}".encode()).digest()[0] < 51  # 1 in 5; hash() varies by run

def make_problem(split, i, seed=0):
    """Problem i of a split ("train" or "test") as a dict; depends on nothing but its arguments."""
    r, (subject, family) = random.Random(f"{seed}/{split}/{i}"), FAMILIES[i % len(FAMILIES)]  # equally often
    while is_test(family.__name__, (p := family(r))["numbers"]) != (split == "test"):
        pass  # draw again until the givens belong to this split
    names = str.maketrans(dict(zip("ABCD", p.get("names", ""))))  # solids have no named points
    rename = lambda words: re.sub(r"\b[A-D]+\b", lambda m: m[0].translate(names), words)  # ABC, not All
    p |= zip(("descriptive", "implicit", "numeric", "question"), rename(p["text"]).split(" | "))
    p["labels"] = [(rename(words), x, y, *map(rename, bare)) for words, x, y, *bare in p["labels"]]
    steps, unit = rename(r.choice(p["leads"])) + p["work"], p.get("unit", "")
    value = int(p["work"][:-1].split("=")[-1])  # behind the last "="
    p |= dict(subject=subject, family=family.__name__, answer=f"{value}{unit}", kind="free", choices=None)
    wrong = {value + d for d in (-10, -2, -1, 1, 2, 10, value) if value + d > 0}
    options = [f"{v}{unit}" for v in r.sample(sorted(wrong), 3)] + [p["answer"]]
    r.shuffle(options)  # the right one was last
    question = " ".join([p["question"], *(f"{c}.{o}" for c, o in zip("ABCD", options))])
    if r.random() < .25 and len(textwrap.wrap(question, COLS)) <= QUESTION_ROWS:  # ours: 1 in 4, if drawable
        p |= dict(question=question, choices=options, kind="choice_text")  # text, not letter: README, Results
    return p | {"id": f"{split}-{i:06d}", "output": f"{steps} †Answer: {p['answer']}"}  # the released mark

def text_of(p, version):
    """The words of one version: the groups that its rung leaves in the text."""
    return " ".join(p[group] for group in LADDER[version][0].split()) or VISION_ONLY_TEXT

# ----------------------------------------------------------------------------------------------------------
# Drawing: the strokes first, then every label in the free cells nearest to its anchor.
SINK = .15  # strokes sit a little below their y, so a thick base line does not reach into the cells above it
bitmap_font = functools.cache(ImageFont.load_default_imagefont)  # not constants: nothing loads at import
outline_font = functools.cache(ImageFont.load_default)

def draw_strokes(p, size):
    """The figure without any label. -> size x size grey PIL image"""
    big = size if size <= 2 * DEFAULT_SIZE else 2 * size  # large ones: drawn twice as large and averaged
    image, u, width = Image.new("L", (big, big), 255), big / COLS, max(1, big // 150)
    draw, pixels = ImageDraw.Draw(image), lambda points: [(x * u, (y + SINK) * u) for x, y in points]
    for points in p["lines"]:
        draw.line(pixels(points), fill=0, width=width, joint="curve")  # no notches at corners
    for x, y, rx, ry, start, end in p.get("arcs", ()):
        draw.arc(pixels([(x - rx, y - ry), (x + rx, y + ry)]), start, end, fill=0, width=width)
    return image if big == size else image.resize((size, size), Image.Resampling.BOX)

def write(draw, text, col, row, size):
    """One run of characters in the cells (col .., row). -> {(col, row): character}, blanks left out"""
    if not re.fullmatch("[ -~°]*", text):
        raise ValueError(f"no glyph for a character of {text!r}: use ASCII and °")
    u, col, text = size / COLS, col + len(text) - len(text.lstrip()), text.strip()  # outer blanks: only room
    if size == DEFAULT_SIZE:  # bitmap: crisp, one character per cell
        draw.text((round(col * u), round(row * 2 * u)), text.encode("latin-1"), font=bitmap_font(), fill=0)
    else:  # outlines, 80 % of a cell high, smaller when the run is wider than its cells
        fit = min(1, len(text) * u / outline_font(1.6 * u).getlength(text))
        x, anchor = (col, "lm") if row < QUESTION_ROWS else (col + len(text) / 2, "mm")
        draw.text((x * u, (2 * row + 1) * u), text, font=outline_font(1.6 * u * fit), fill=0, anchor=anchor)
    return {(col + k, row): c for k, c in enumerate(text) if c != " "}

def place(free, text, x, y):
    """The free run of cells nearest to (x, y), as (col, row). `free` (a string a row, "." = free) is updated.
    Even columns only, so a patch of tiny/ holds characters of ONE label: ours, meant to make reading easy."""
    n, room = len(text), "." * len(text)
    spots = [((c + n / 2 - x) ** 2 + (2 * w + 1 - y) ** 2, c, w)  # squared distance first, for min
        for w in range(QUESTION_ROWS, ROWS) for c in range(0, COLS - n + 1, 2) if free[w].startswith(room, c)]
    if not spots:
        raise ValueError(f"no room for the label {text!r}")
    _, c, w = min(spots)
    free[w] = free[w][:c] + "#" * n + free[w][c + n:]
    return c, w

def draw_problem(p, size=DEFAULT_SIZE):
    """The three pictures of a problem and where their characters stand.
    -> ({"figure", "labelled", "question": size x size grey images}, {same keys: {(col, row): character}})"""
    base, pictures, cells = draw_strokes(p, size), {}, {}
    small = base if size == DEFAULT_SIZE else draw_strokes(p, DEFAULT_SIZE)  # labels stand alike at any size
    ink = small.resize((COLS, ROWS), Image.Resampling.BOX).tobytes()  # mean of each cell, 255: no stroke
    blank = ["".join("." if v == 255 else "#" for v in ink[w * COLS:(w + 1) * COLS]) for w in range(ROWS)]
    for kind in ("figure", "labelled"):  # each finds its own places: plain letters are shorter
        image, at, free = base.copy(), {}, list(blank)
        for words, x, y, *bare in p["labels"]:
            if words := bare[0] if bare and kind == "figure" else words:
                at |= write(ImageDraw.Draw(image), words, *place(free, words, x, y), size)
        pictures[kind], cells[kind] = image, at
    image, at = pictures["labelled"].copy(), dict(cells["labelled"])
    for row, line in enumerate(textwrap.wrap(p["question"], COLS)):
        at |= write(ImageDraw.Draw(image), line, 0, row, size)
    return pictures | {"question": image}, cells | {"question": at}

# ----------------------------------------------------------------------------------------------------------
# Files, in the released row format: image_url, instruction, output; pairs add the same with _2.  No suffix:
# strong (text-rich, teacher); _2: weak (vision-rich, student).  Other fields are ours, training ignores them.
def view(p, version, suffix=""):
    picture = LADDER[version][1]
    return {f"image_url{suffix}": f"images/{p['id']}-{picture}.png" if picture else "",
            f"instruction{suffix}": text_of(p, version), f"output{suffix}": p["output"]}

def build(job):
    """Draw and save one problem; runs in a worker. -> (digest of the pixels, [(file name, row)])"""
    split, i, seed, size, folder = job
    p, pixels = make_problem(split, i, seed), hashlib.sha256()  # not of the files: PNG bytes depend on zlib
    for kind, image in draw_problem(p, size)[0].items():
        pixels.update(image.tobytes())
        image.save(f"{folder}/images/{p['id']}-{kind}.png", compress_level=1)  # 1: fast, and still small
    digest, more = pixels.digest(), {k: p[k] for k in ("id", "family", "subject")}
    if split == "test":
        more |= {k: p[k] for k in ("answer", "kind", "choices")}  # what eval.py needs to grade
        return digest, [("test", view(p, v) | more | dict(id=f"{p['id']}/{v}", version=v)) for v in LADDER]
    picked = random.Random(f"{seed}/stage3/{i}").choices(list(LADDER), [1, 1, 1, 1, 2, 2], k=2)
    return digest, [
        ("stage1", view(p, "text_only") | more),
        *((f"stage2_{name}", view(p, strong) | view(p, weak, "_2") | more | {"levels": [strong, weak]})
          for name, arrows in PAIRS.items() for strong, weak in arrows),
        *(("stage3", view(p, v) | more | {"version": v}) for v in picked)]  # picked: ours, prefers hard

def show(i, seed, size):
    """Print the ladder of one training problem and save its pictures side by side."""
    p = make_problem("train", i, seed)  # beyond --n as well: problems do not depend on how many there are
    pictures, tile, caption = draw_problem(p, size)[0], max(size, 324), outline_font(15)
    sheet = Image.new("L", (3 * tile + 40, 2 * (tile + 90) + 10), 235)
    print(f"training problem {i} ({p['family']}, {p['subject']}); answer for all six: {p['output']}\n")
    for k, (version, (_, picture)) in enumerate(LADDER.items()):
        text, x, y = text_of(p, version), 10 + k % 3 * (tile + 10), 10 + k // 3 * (tile + 90)
        print(f"{version:17s} picture: {picture or '-':9s} text: {text}")
        if picture:
            sheet.paste(pictures[picture].resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + tile + 4), f"{version}\n{textwrap.fill(text, 46)}",
                                   font=caption, fill=0)
    sheet.save(f"data_show_{i}.png")
    print(f"\nwrote data_show_{i}.png")

def main(argv=None):
    args = parse_args(argv)
    if args.show is not None:
        return show(args.show, args.seed, args.size)
    out = Path(args.out).resolve()
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        sys.exit(f"data_gen.py: {args.out} already exists: delete it or name another folder with --out")
    part = out.with_name(out.name + ".part")  # complete or absent: it gets its name when everything is in it
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    (part / "images").mkdir(parents=True)
    jobs = [(split, i, args.seed, args.size, part)
            for split, n in (("train", args.n), ("test", args.n_test)) for i in range(n)]
    pool = multiprocessing.Pool(args.workers) if args.workers > 1 else None  # one needs no fork
    results = pool.imap(build, jobs, chunksize=32) if pool else map(build, jobs)  # in order, whoever is first
    lines, pixels = {}, hashlib.sha256()  # lines: about 3 kB a problem
    for digest, rows in tqdm(results, total=len(jobs), desc="problems", disable=not sys.stderr.isatty()):
        pixels.update(digest)
        for name, row in rows:
            lines.setdefault(name, []).append(json.dumps(row, ensure_ascii=False) + "\n")  # ° stays °
    if pool:
        pool.close()  # imap has handed out all jobs by now
    manifest = dict(seed=args.seed, n=args.n, n_test=args.n_test, size=args.size,
                    rows={k: len(v) for k, v in lines.items()}, sha256={}, pixels_sha256=pixels.hexdigest())
    for name, some in lines.items():
        (part / f"{name}.jsonl").write_bytes(data := "".join(some).encode())
        manifest["sha256"][f"{name}.jsonl"] = hashlib.sha256(data).hexdigest()
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    part.rename(out)  # atomic
    print(f"wrote {args.out}/: {3 * len(jobs)} pictures, {args.size} x {args.size}; rows {manifest['rows']}")

if __name__ == "__main__":
    main()
