"""Make the maths problems: each one written six times, from "all in the text" to "all in the picture".

    python data_gen.py                      # 4,000 training + 400 test problems into data/, about 15 s on one core
    python data_gen.py --size 384           # the same problems drawn for a real vision encoder
    python data_gen.py --show 0             # print the ladder of problem 0 and write its pictures to data_show_0.png

What a pair is.  Math-PUMA (arXiv 2408.08640) needs the same problem in a text-rich and a vision-rich form with ONE
answer.  Problem 0 of this generator, at the two ends of its ladder:

    text_only                                            vision_only (a picture, 18 x 9 character cells)
    ABC is a triangle. D is on the extension of BC.      +--------------------+
    angle A=52°, angle B=61°. Find angle ACD.            | Find angle ACD.    |     the question is drawn,
    (no picture)                                         |       A            |     the conditions are drawn,
                                                         |      /52°\\         |     nothing is left in the text
                   both are answered by                  |     /     \\        |
    "52+61=113. †Answer: 113°"                           |  B /61°____\\C___ D |
                                                         +--------------------+

(`--show 0` prints the real one.)  The language model can solve the left one; stage 2 teaches the vision side to make the
right one look the same to it.
"""
import argparse
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# The ladder: the paper's central idea.
#
# Every condition of a problem belongs to one of three groups (the names are MathVerse's, arXiv 2403.14624):
#   descriptive   what the figure obviously is                "ABC is a triangle."
#   implicit      a property an expert sees in the figure     "D is on the extension of BC."
#   numeric       values without which nobody can solve it    "angle A=52°"
# Going down one rung takes one more group (at last the question itself) OUT of the text.  It is not lost: the figure
# always shows the first two, numeric labels are drawn from vision_dominant on, the question is drawn in vision_only.
#
#   version            text                                        picture
#   text_only          descriptive implicit numeric question       -
#   text_dominant      descriptive implicit numeric question       figure
#   text_lite                      implicit numeric question       figure
#   vision_intensive                        numeric question       figure
#   vision_dominant                                 question       figure + numeric labels
#   vision_only        (a fixed sentence)                          figure + numeric labels + question
#
# Differs from MathVerse: there vision_dominant keeps the implicit group in its text; here each rung only ever loses text.
# One answer belongs to all six, because only the place of the information moves.
# ----------------------------------------------------------------------------------------------------------------------
LADDER = {  # version: (groups left in the text, picture)
    "text_only": ("descriptive implicit numeric question", None),
    "text_dominant": ("descriptive implicit numeric question", "figure"),
    "text_lite": ("implicit numeric question", "figure"),
    "vision_intensive": ("numeric question", "figure"),
    "vision_dominant": ("question", "labelled"),
    "vision_only": ("", "question"),
}
# Stage 2 pairs use four of the six rungs: the paper's figure draws a pyramid of 4 levels with 3 upward arrows.  Which
# rungs these are is our reading.  The two left out are never trained on, so their accuracy shows what carries over.
PYRAMID = ("text_only", "text_dominant", "vision_dominant", "vision_only")
PAIRS = {
    "neighbours": list(zip(PYRAMID, PYRAMID[1:])),  # each level is pulled to the one above it, as drawn in the paper
    "top": [(PYRAMID[0], weak) for weak in PYRAMID[1:]],  # each level is pulled to the text
}
VISION_ONLY_TEXT = "Solve the problem."  # ours: some prompt is needed when all of the problem is in the picture

# Pictures are laid out on a character grid, like a terminal, whatever their size in pixels: labels then never touch each
# other, and at the default size a 12-pixel patch of the tiny encoder holds exactly two character cells.
COLS, ROWS, QUESTION_ROWS = 18, 9, 3  # the question may fill rows 0-2; the figure owns rows 3-8
DEFAULT_SIZE = 108  # pixels: one cell is 6 x 12, the size of Pillow's built-in bitmap font


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="data", help="folder to write; it appears only when complete")
    add("--n", type=int, default=4000, help="training problems (ours: one pass of stage 2 at its default length)")
    add("--n_test", type=int, default=400, help="test problems, each in six versions")
    add("--size", type=int, default=DEFAULT_SIZE, help="picture side in pixels (108 for tiny/, 384 for SigLIP-so400m)")
    add("--seed", type=int, default=0, help="same seed, same problems and pixels")
    add("--workers", type=int, default=1, help="processes; the result does not depend on it")
    add("--show", type=int, default=None, metavar="I", help="print training problem I and draw its versions, write no data")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Problem families.  Each takes a random.Random and returns a plain dict; `finish` below adds the choices.
#   numbers      the givens as a tuple; decides whether the problem may be a training or a test problem
#   numeric      (text, label in the plain figure, label once the values are drawn, anchor x, anchor y)
#   steps        several wordings of the worked solution; one is drawn at random.  With one wording a label would say all
#                there is to say; with several, the teacher's soft distribution carries more than the label does
#   shapes       strokes: ("line", points...), ("dash", points...), ("arc", cx, cy, rx, ry, from, to in degrees)
#   names        (letter, x, y) labels that are always drawn
# Coordinates: the picture is 18 x 18 units, y down; the figure owns y 6..18; a character cell is 1 wide and 2 high.
# Figures are not to scale, as in exam papers, so no answer can be measured from the picture.
# Ranges of the numbers are ours: small enough for a 1-million-parameter language model to do the arithmetic.
# ----------------------------------------------------------------------------------------------------------------------
def letters(r, k):
    """k point names in order, from one of five alphabets' corners."""
    return r.choice(["ABCD", "PQRS", "EFGH", "KLMN", "WXYZ"])[:k]


def mix(p, q, t):
    """The point a share t of the way from p to q; t < 0 lies behind p, which is where a vertex name goes."""
    return p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])


def centre(*points):
    return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)


def named(points, name):
    """Vertex names just outside a polygon."""
    middle = centre(*points)
    return [(c, *mix(p, middle, -0.25)) for c, p in zip(name, points)]


def tick(p, q):
    """The small stroke across a side that says 'equal to the other side with this mark'."""
    m, d = centre(p, q), math.hypot(q[0] - p[0], q[1] - p[1])
    dx, dy = 0.5 * (q[1] - p[1]) / d, -0.5 * (q[0] - p[0]) / d
    return ("line", (m[0] - dx, m[1] - dy), (m[0] + dx, m[1] + dy))


def corner(p, q, s):
    """The square of a right angle at q, between q-p and q-s."""
    lp, ls = math.dist(p, q), math.dist(s, q)
    a, b = mix(q, p, 1 / lp), mix(q, s, 1 / ls)
    return ("line", a, (a[0] + b[0] - q[0], a[1] + b[1] - q[1]), b)


def exterior_angle(r):
    A, B, C, D = letters(r, 4)
    a, b = r.randint(20, 85), r.randint(20, 75)
    pa, pb, pc, pd = (r.uniform(6, 9), 8), (2, 16), (r.uniform(11, 12), 16), (16, 16)
    return dict(
        subject="plane", numbers=(a, b), descriptive=f"{A}{B}{C} is a triangle.",
        implicit=f"{D} is on the extension of {B}{C}.", question=f"Find angle {A}{C}{D}.", answer=f"{a + b}°",
        numeric=[(f"angle {A}={a}°", "", f"{a}°", *mix(pa, centre(pb, pc), .4)),
                 (f"angle {B}={b}°", "", f"{b}°", *mix(pb, centre(pa, pc), .45))],
        steps=[f"{A}{C}{D} is an exterior angle, so it is {a}+{b}={a + b}.", f"{a}+{b}={a + b}.",
               f"angle {A}={a} and angle {B}={b}. The far angles add: {a}+{b}={a + b}."],
        shapes=[("line", pa, pb, pd), ("line", pa, pc)],
        names=[(A, pa[0], 6.5), (B, 1, 17), (C, pc[0], 17.5), (D, 17, 16)])


def isosceles_triangle(r):
    A, B, C = letters(r, 3)
    base = r.randint(20, 80)
    apex = 180 - 2 * base
    pa, pb, pc = (r.uniform(8.5, 9.5), 7.5), (r.uniform(2, 3.5), 16), (r.uniform(14.5, 16), 16)
    if r.random() < .5:
        given, find, value = (A, (pa[0], 13), apex), B, base
        work = f"180-{apex}={2 * base}. {2 * base}/2={base}."
    else:
        given, find, value = (B, mix(pb, centre(pa, pc), .38), base), A, apex
        work = f"{base}*2={2 * base}. 180-{2 * base}={apex}."
    name, at, known = given
    return dict(
        subject="plane", numbers=(known, find == A), descriptive=f"{A}{B}{C} is a triangle.", implicit=f"{A}{B}={A}{C}.",
        question=f"Find angle {find}.", answer=f"{value}°",
        numeric=[(f"angle {name}={known}°", "", f"{known}°", *at)],
        steps=[work, f"The base angles are equal. {work}", f"angle {name}={known}. {work}"],
        shapes=[("line", pa, pb, pc, pa), tick(pa, pb), tick(pa, pc)], names=named((pa, pb, pc), (A, B, C)))


def rectangle(r):
    A, B, C, D = letters(r, 4)
    a, b = r.randint(3, 12), r.randint(3, 12)
    x, y, w, h = r.uniform(3, 4), r.uniform(8, 9), r.uniform(9, 11), r.uniform(5.5, 6.5)
    pa, pb, pc, pd = (x, y), (x + w, y), (x + w, y + h), (x, y + h)
    if r.random() < .5:
        kind, value, work = "area", a * b, f"{a}*{b}={a * b}."
    else:
        kind, value, work = "perimeter", 2 * (a + b), f"{a}+{b}={a + b}. {a + b}*2={2 * (a + b)}."
    return dict(
        subject="plane", numbers=(a, b, kind), descriptive=f"{A}{B}{C}{D} is a quadrilateral.",
        implicit="All its angles are right angles.", question=f"Find the {kind}.", answer=f"{value}",
        numeric=[(f"{A}{B}={a}", "", f"{a}", x + w / 2, y - 1), (f"{B}{C}={b}", "", f"{b}", x + w + 1.5, y + h / 2)],
        steps=[work, f"{A}{B}={a} and {B}{C}={b}. {work}", f"It is a rectangle. {work}"],
        shapes=[("line", pa, pb, pc, pd, pa), corner(pa, pb, pc), corner(pc, pd, pa)],
        names=named((pa, pb, pc, pd), (A, B, C, D)))


def circle_diameter(r):
    A, B, C, O = *letters(r, 3), "O"
    a = r.randint(15, 75)
    t, R = math.radians(r.uniform(246, 262)), 5.7
    pa, pb, pc = (9 - R, 12), (9 + R, 12), (9 + R * math.cos(t), 12 + R * math.sin(t))
    return dict(
        subject="plane", numbers=(a,), descriptive=f"{A}, {B} and {C} are on circle {O}.", implicit=f"{A}{B} is a diameter.",
        question=f"Find angle {B}.", answer=f"{90 - a}°",
        numeric=[(f"angle {A}={a}°", "", f"{a}°", 6.5, 11)],
        steps=[f"90-{a}={90 - a}.", f"Angle {C} is a right angle, so 90-{a}={90 - a}.", f"angle {A}={a}. 90-{a}={90 - a}."],
        shapes=[("arc", 9, 12, R, R, 0, 360), ("line", pa, pb, pc, pa), ("line", (9, 11.7), (9, 12.3))],
        names=[(A, 2.3, 13), (B, 15.7, 13), (C, 4, 7), (O, 9, 15)])


def box_volume(r):
    a, b, h = r.randint(2, 9), r.randint(2, 9), r.randint(2, 6)
    x, y, w, t, d = r.uniform(3, 4), r.uniform(10, 11), r.uniform(7, 8), 5, r.uniform(2.5, 3.2)
    if r.random() < .6:
        kind, value, work = "volume", a * b * h, f"{a}*{b}={a * b}. {a * b}*{h}={a * b * h}."
    else:
        kind, value, work = "base area", a * b, f"{a}*{b}={a * b}."
    back = (x + d, y + t - d), (x + d + w, y + t - d), (x + d, y - d)
    return dict(
        subject="solid", numbers=(a, b, h, kind), descriptive="The solid is a box.", implicit="All its faces are rectangles.",
        question=f"Find the {kind}.", answer=f"{value}",
        numeric=[(f"a={a}", "a", f"a={a}", x + w / 2, y + t + 1), (f"b={b}", "b", f"b={b}", x + w + d, y + t),
                 (f"h={h}", "h", f"h={h}", x - 2, y + t / 2)],
        steps=[work, f"a={a}, b={b}. {work}", f"The base is {a} by {b}. {work}"],
        shapes=[("line", (x, y), (x + w, y), (x + w, y + t), (x, y + t), (x, y), (x + d, y - d), (x + d + w, y - d), (x + w, y)),
                ("line", (x + d + w, y - d), (x + d + w, y + t - d), (x + w, y + t)),
                ("dash", (x, y + t), back[0]), ("dash", back[0], back[1]), ("dash", back[0], back[2])], names=[])


def cylinder(r):
    a, h = r.randint(2, 9), r.randint(2, 9)
    x, y, R, t = r.uniform(8, 10), 8, r.uniform(3.5, 4.5), r.uniform(7, 8)
    if r.random() < .5:
        kind, value, work = "volume", a * a * h, f"{a}*{a}={a * a}. {a * a}*{h}={a * a * h}."
    else:
        kind, value, work = "lateral area", 2 * a * h, f"2*{a}={2 * a}. {2 * a}*{h}={2 * a * h}."
    return dict(
        subject="solid", numbers=(a, h, kind), descriptive="The solid is a cylinder.", implicit="h is perpendicular to r.",
        question=f"Find the {kind}.", answer=f"{value}pi",
        numeric=[(f"r={a}", "r", f"r={a}", x + R + 3, y), (f"h={h}", "h", f"h={h}", x - R - 2, y + t / 2)],
        steps=[work, f"r={a} and h={h}. {work}", f"Leave pi to the end. {work}"],
        shapes=[("arc", x, y, R, 1, 0, 360), ("arc", x, y + t, R, 1, 0, 180), ("line", (x - R, y), (x - R, y + t)),
                ("line", (x + R, y), (x + R, y + t)), ("line", (x, y), (x + R, y)), ("dash", (x, y), (x, y + t))], names=[])


def cone(r):
    a, k = r.randint(2, 9), r.randint(1, 9)
    x, R = r.uniform(8, 10), r.uniform(4, 5)
    work = f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}."
    return dict(
        subject="solid", numbers=(a, k), descriptive="The solid is a cone.", implicit="h is perpendicular to r.",
        question="Find the volume.", answer=f"{a * a * k}pi",
        numeric=[(f"r={a}", "r", f"r={a}", x + R / 2, 17), (f"h={3 * k}", "h", f"h={3 * k}", x - R - 2, 11)],
        steps=[work, f"r={a} and h={3 * k}. {work}", f"A cone is a third of a cylinder. {work}"],
        shapes=[("line", (x - R, 15), (x, 7), (x + R, 15)), ("arc", x, 15, R, 1, 0, 180), ("line", (x, 15), (x + R, 15)),
                ("dash", (x, 7), (x, 15)), corner((x, 7), (x, 15), (x + R, 15))], names=[])


def square_pyramid(r):
    a, k = r.randint(2, 9), r.randint(1, 9)
    x, w, d = r.uniform(2.5, 4), r.uniform(8, 9), r.uniform(2.5, 3.5)
    p, q, s, t = (x, 16), (x + w, 16), (x + w + d, 13), (x + d, 13)
    top, foot = (x + (w + d) / 2, 7), (x + (w + d) / 2, 14.5)
    work = f"{3 * k}/3={k}. {a}*{a}={a * a}. {a * a}*{k}={a * a * k}."
    return dict(
        subject="solid", numbers=(a, k), descriptive="The solid is a pyramid.", implicit="Its base is a square.",
        question="Find the volume.", answer=f"{a * a * k}",
        numeric=[(f"a={a}", "a", f"a={a}", x + w / 2, 17), (f"h={3 * k}", "h", f"h={3 * k}", x - .5, 10)],
        steps=[work, f"a={a} and h={3 * k}. {work}", f"A pyramid is a third of a box. {work}"],
        shapes=[("line", p, q, s, top, p), ("line", q, top), ("dash", p, t), ("dash", t, s), ("dash", t, top),
                ("dash", top, foot)], names=[])


def axes(*strokes):
    """Coordinate axes with arrow heads, then the graph."""
    return [("line", (1, 15.5), (17, 15.5), (16.5, 15.1)), ("line", (3, 17.5), (3, 8.2), (2.6, 8.7)), *strokes]


def line_value(r):
    m, b, x = r.randint(2, 9), r.randint(1, 12), r.randint(2, 9)
    y0, y1, t = r.uniform(13.5, 14.5), r.uniform(8.3, 9.5), r.uniform(.5, .7)
    P = r.choice("PQRS")
    px, py = mix((1.5, y0 + .8), (15, y1), t)
    work = f"{m}*{x}={m * x}. {m * x}+{b}={m * x + b}."
    return dict(
        subject="functions", numbers=(m, b, x), descriptive="The graph is a line.", implicit=f"{P} is on the line.",
        question=f"Find y at {P}.", answer=f"{m * x + b}",
        numeric=[(f"y={m}x+{b}", "", f"y={m}x+{b}", 7, 7), (f"x={x} at {P}", "", f"x={x}", px, 17)],
        steps=[work, f"Put x={x} in y={m}x+{b}. {work}", f"x={x}. {work}"],
        shapes=axes(("line", (1.5, y0 + .8), (15, y1)), ("dash", (px, py), (px, 15.5))), names=[(P, px + 1.8, py + 1.5)])


def slope(r):
    x1, y1, dx, k = r.randint(0, 5), r.randint(0, 9), r.randint(1, 4), r.randint(1, 9)
    x2, y2 = x1 + dx, y1 + dx * k
    P, Q = letters(r, 2)
    p, q = (r.uniform(5, 6), r.uniform(13, 14)), (r.uniform(12, 13), r.uniform(8.5, 9.5))
    work = f"{y2}-{y1}={y2 - y1}. {x2}-{x1}={dx}. {y2 - y1}/{dx}={k}."
    return dict(
        subject="functions", numbers=(x1, y1, x2, y2), descriptive="The graph is a line.", implicit=f"{P} and {Q} are on the line.",
        question="Find the slope.", answer=f"{k}",
        numeric=[(f"{P}({x1},{y1})", P, f"{P}({x1},{y1})", p[0] + 5, p[1] + .5), (f"{Q}({x2},{y2})", Q, f"{Q}({x2},{y2})", q[0] - 6, q[1] - 1)],
        steps=[work, f"Divide the rise by the run. {work}", f"{P}({x1},{y1}), {Q}({x2},{y2}). {work}"],
        shapes=axes(("line", mix(p, q, -.25), mix(p, q, 1.25)), tick(mix(p, q, -.05), mix(p, q, .05)),
                    tick(mix(p, q, .95), mix(p, q, 1.05))), names=[])


def parabola_value(r):
    h, k, d = r.randint(1, 9), r.randint(1, 9), r.randint(1, 9)
    x, P = h + d, r.choice("PQRS")
    cx, bottom, wide = r.uniform(7, 9), r.uniform(13, 14.5), r.uniform(3.5, 4.5)
    curve = [(cx + wide * u / 6, bottom - 5 * (u / 6) ** 2) for u in range(-6, 7)]
    px, py = curve[10]
    work = f"{x}-{h}={d}. {d}*{d}={d * d}. {d * d}+{k}={d * d + k}."
    return dict(
        subject="functions", numbers=(h, k, x), descriptive="The graph is a parabola.", implicit=f"{P} is on the curve.",
        question=f"Find y at {P}.", answer=f"{d * d + k}",
        numeric=[(f"y=(x-{h})^2+{k}", "", f"y=(x-{h})^2+{k}", 9, 7), (f"x={x} at {P}", "", f"x={x}", px, 17)],
        steps=[work, f"Put x={x} in y=(x-{h})^2+{k}. {work}", f"x={x}. {work}"],
        shapes=axes(("line", *curve), ("dash", (px, py), (px, 15.5))), names=[(P, px + 1.5, py + .5)])


def x_intercept(r):
    a, x = r.randint(2, 9), r.randint(2, 12)
    P = r.choice("PQRS")
    px, top = r.uniform(7, 10), (r.uniform(14, 16), r.uniform(8.5, 9.5))
    work = f"{a}x={a * x}. {a * x}/{a}={x}."
    return dict(
        subject="functions", numbers=(a, x), descriptive="The graph is a line.", implicit=f"{P} is on the x-axis.",
        question=f"Find x at {P}.", answer=f"{x}", numeric=[(f"y={a}x-{a * x}", "", f"y={a}x-{a * x}", 8, 7)],
        steps=[work, f"Set y=0. {work}", f"y={a}x-{a * x}. {work}"],
        shapes=axes(("line", mix((px, 15.5), top, -.15), top)), names=[(P, px + 1, 17)])


FAMILIES = (exterior_angle, isosceles_triangle, rectangle, circle_diameter, box_volume, cylinder, cone, square_pyramid,
            line_value, slope, parabola_value, x_intercept)


def is_test(family, numbers):
    """Train or test is decided by the givens alone, so no version, naming or wording of a test problem is trained on."""
    return hashlib.sha256(f"{family}{numbers}".encode()).digest()[0] < 51  # 1 in 5


def finish(p, r):
    """Turn a quarter of the problems into multiple choice (ours) and close the solution with the released answer mark."""
    value, unit = int(p["answer"].rstrip("°pi")), p["answer"].lstrip("0123456789")
    p["steps"], p["kind"], p["choices"] = r.choice(p["steps"]), "free", None
    wrong = [v for v in (value - 10, value - 2, value - 1, value + 1, value + 2, value + 10, 2 * value) if v > 0]
    options = [f"{v}{unit}" for v in r.sample(sorted(set(wrong)), 3)] + [p["answer"]]
    r.shuffle(options)
    question = p["question"] + " " + " ".join(f"{c}.{o}" for c, o in zip("ABCD", options))
    if r.random() < .25 and len(wrap(question)) <= QUESTION_ROWS:  # every choice must fit into the vision_only picture
        p["question"], p["choices"], p["kind"] = question, options, "choice"
        p["answer"] = "ABCD"[options.index(p["answer"])]
        p["steps"] += f" That is {p['answer']}."
    p["output"] = f"{p['steps']} †Answer: {p['answer']}"
    return p


def make_problem(split, i, seed=0):
    """Problem i of a split ("train" or "test") as a dict; depends on nothing but its arguments."""
    r = random.Random(f"{seed}/{split}/{i}")
    family = FAMILIES[i % len(FAMILIES)]  # all families equally often
    while True:  # draw until the givens belong to the wanted split
        p = family(r)
        if is_test(family.__name__, p["numbers"]) == (split == "test"):
            return finish(p, r) | {"family": family.__name__, "id": f"{split}-{i:06d}"}


def text_of(p, version):
    """The words of one version: the groups that its rung leaves in the text."""
    parts = {**p, "numeric": ", ".join(n[0] for n in p["numeric"]) + "."}
    return " ".join(parts[group] for group in LADDER[version][0].split()) or VISION_ONLY_TEXT


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------
def wrap(text, width=COLS):
    """Greedy line breaking at spaces."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


SINK = 0.15  # strokes sit a little below their y, so a thick base line does not reach into the row of cells above it


def stroke(draw, shape, u, width):
    kind, *points = shape
    if kind == "arc":
        cx, cy, rx, ry, start, end = points
        draw.arc([(cx - rx) * u, (cy - ry + SINK) * u, (cx + rx) * u, (cy + ry + SINK) * u], start, end, fill=0, width=width)
    elif kind == "line":
        draw.line([(x * u, (y + SINK) * u) for x, y in points], fill=0, width=width, joint="curve" if width > 1 else None)
    else:
        (p, q), n = points, max(2, round(math.dist(*points) * 1.2))
        for k in range(n):  # hidden edges: n dashes with gaps of the same length
            draw.line([(x * u, (y + SINK) * u) for x, y in (mix(p, q, k / n), mix(p, q, (k + .5) / n))], fill=0, width=width)


bitmap_font = functools.cache(ImageFont.load_default_imagefont)  # not loaded at import


def write(draw, text, col, row, size):
    """One run of characters, in the cells (col .. col + len(text), row)."""
    u = size / COLS
    if size == DEFAULT_SIZE:  # the bitmap font fills its 6 x 12 cell exactly: crisp, and one cell per character
        font = bitmap_font()
        if any(ord(c) > 255 for c in text):
            raise ValueError(f"the built-in font has no glyph for one of {text!r}: use Latin-1 characters")
        draw.text((round(col * u), round(row * 2 * u)), text.encode("latin-1"), font=font, fill=0)
    else:
        font = ImageFont.load_default(1.6 * u)
        font = ImageFont.load_default(1.6 * u * min(1, len(text) * u / font.getlength(text)))
        x, anchor = (col, "lm") if row < QUESTION_ROWS else (col + len(text) / 2, "mm")
        draw.text((x * u, (2 * row + 1) * u), text, font=font, fill=0, anchor=anchor)


def place(free, text, x, y):
    """The free run of cells nearest to the anchor (x, y), as (col, row). `free` has one string of cells a row, "." = blank,
    and is updated, so that no stroke and no other label ever lies under a label."""
    n = len(text)
    spots = [((c + n / 2 - x) ** 2 + (2 * w + 1 - y) ** 2, c, w)
             for w in range(QUESTION_ROWS, ROWS) for c in range(COLS - n + 1) if free[w][c:c + n] == "." * n]
    if not spots:
        raise ValueError(f"no room for the label {text!r}")
    _, c, w = min(spots)
    free[w] = free[w][:c] + "#" * n + free[w][c + n:]
    return c, w


def draw_problem(p, size=DEFAULT_SIZE):
    """The three pictures of a problem and where their characters stand.

    Returns ({"figure", "labelled", "question": size x size grey PIL images}, {same keys: {(col, row): character}}).
    """
    big = 1 if size <= 2 * DEFAULT_SIZE else 2  # strokes of large pictures are drawn twice as large, then averaged
    base = Image.new("L", (size * big, size * big), 255)
    for shape in p["shapes"]:
        stroke(ImageDraw.Draw(base), shape, size * big / COLS, max(1, size * big // 150))
    base = base.resize((size, size), Image.Resampling.BOX) if big > 1 else base
    ink = base.resize((COLS, ROWS), Image.Resampling.BOX).tobytes()  # mean of each cell: 255 only where no stroke passes
    blank = ["".join("." if v == 255 else "#" for v in ink[w * COLS:(w + 1) * COLS]) for w in range(ROWS)]
    pictures, cells = {}, {}
    for kind in ("figure", "labelled"):
        image, at, free = base.copy(), {}, list(blank)
        labels = p["names"] + [(n[1] if kind == "figure" else n[2], n[3], n[4]) for n in p["numeric"]]
        for text, x, y in labels:
            if text:
                col, row = place(free, text, x, y)
                write(ImageDraw.Draw(image), text, col, row, size)
                at |= {(col + k, row): c for k, c in enumerate(text)}
        pictures[kind], cells[kind] = image, at
    image, at = pictures["labelled"].copy(), dict(cells["labelled"])
    for row, line in enumerate(wrap(p["question"])):
        write(ImageDraw.Draw(image), line, 0, row, size)
        at |= {(k, row): c for k, c in enumerate(line) if c != " "}
    pictures["question"], cells["question"] = image, at
    return pictures, cells


# ----------------------------------------------------------------------------------------------------------------------
# Files, in the released row format: image_url, instruction, output; pairs add the same with _2.  Unsuffixed = strong
# (text-rich, teacher), _2 = weak (vision-rich, student).  The fields after `output` are ours and ignored by training.
# ----------------------------------------------------------------------------------------------------------------------
def view(p, version, suffix=""):
    picture = LADDER[version][1]
    return {f"image_url{suffix}": f"images/{p['id']}-{picture}.png" if picture else "",
            f"instruction{suffix}": text_of(p, version), f"output{suffix}": p["output"]}


def build(job):
    """Draw, save and write down one problem; runs in a worker. Returns {file name: rows} and a digest of the pixels."""
    split, i, seed, size, out = job
    p = make_problem(split, i, seed)
    pictures, _ = draw_problem(p, size)
    digest = hashlib.sha256()
    for kind, image in pictures.items():
        digest.update(image.tobytes())
        buffer = io.BytesIO()  # not image.save(path): encoding in memory and one write are 1.5 times faster (measured)
        image.save(buffer, "png", compress_level=1)
        with open(os.path.join(out, "images", f"{p['id']}-{kind}.png"), "wb") as f:
            f.write(buffer.getvalue())
    extra = {"id": p["id"], "family": p["family"], "subject": p["subject"]}
    if split == "test":
        graded = extra | {"answer": p["answer"], "kind": p["kind"], "choices": p["choices"]}
        rows = {"test": [view(p, v) | graded | {"id": f"{p['id']}/{v}", "version": v} for v in LADDER]}
    else:
        picked = random.Random(f"{seed}/stage3/{i}").choices(list(LADDER), [1, 1, 1, 1, 2, 2], k=2)  # ours: harder rungs more often
        rows = {"stage1": [view(p, "text_only") | extra], "stage3": [view(p, v) | extra | {"version": v} for v in picked]}
        for name, arrows in PAIRS.items():
            rows[f"stage2_{name}"] = [view(p, s) | view(p, w, "_2") | extra | {"levels": [s, w]} for s, w in arrows]
    return rows, digest.digest()


def show(i, args):
    p = make_problem("train", i, args.seed)
    pictures, _ = draw_problem(p, args.size)
    tile, caption = max(args.size, 324), ImageFont.load_default(15)
    sheet = Image.new("L", (3 * tile + 40, 2 * (tile + 90) + 10), 235)
    print(f"training problem {i} ({p['family']}, {p['subject']}); answer for all six: {p['output']}\n")
    for k, (version, (_, picture)) in enumerate(LADDER.items()):
        text = text_of(p, version)
        print(f"{version:17s} picture: {picture or '-':9s} text: {text}")
        x, y = 10 + k % 3 * (tile + 10), 10 + k // 3 * (tile + 90)
        if picture:
            sheet.paste(pictures[picture].resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + tile + 4), "\n".join([version, *wrap(text, 46)]), font=caption, fill=0)
    sheet.save(f"data_show_{i}.png")
    print(f"\nwrote data_show_{i}.png")


def main(argv=None):
    args = parse_args(argv)
    if args.show is not None:
        return show(args.show, args)
    if os.path.exists(os.path.join(args.out, "manifest.json")):
        sys.exit(f"{args.out}/ already holds a data set: delete it or name another folder with --out")
    part = args.out.rstrip("/") + ".part"  # complete or absent: the folder gets its name when everything is in it
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(os.path.join(part, "images"))
    jobs = [(split, i, args.seed, args.size, part)
            for split, n in (("train", args.n), ("test", args.n_test)) for i in range(n)]
    names = ["stage1", *(f"stage2_{name}" for name in PAIRS), "stage3", "test"]
    files = {name: open(os.path.join(part, f"{name}.jsonl"), "w", encoding="utf-8", newline="\n") for name in names}
    counts, pixels = dict.fromkeys(names, 0), hashlib.sha256()
    pool = multiprocessing.Pool(args.workers) if args.workers > 1 else None
    results = pool.imap(build, jobs, chunksize=32) if pool else map(build, jobs)  # in order, whoever is first
    for rows, digest in tqdm(results, total=len(jobs), desc="problems", disable=not sys.stderr.isatty()):
        pixels.update(digest)
        for name, some in rows.items():
            counts[name] += len(some)
            files[name].writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
    if pool:
        pool.close()
    for f in files.values():
        f.close()
    sha = {f"{n}.jsonl": hashlib.sha256(open(os.path.join(part, f"{n}.jsonl"), "rb").read()).hexdigest() for n in names}
    manifest = {"seed": args.seed, "n": args.n, "n_test": args.n_test, "size": args.size, "rows": counts,
                "sha256": sha, "pixels_sha256": pixels.hexdigest()}
    with open(os.path.join(part, "manifest.json"), "w") as f:
        json.dump(manifest, f, indent=1)
    os.rename(part, args.out)
    print(f"wrote {args.out}/: {args.n} training and {args.n_test} test problems, pictures {args.size} x {args.size}; rows {counts}")


if __name__ == "__main__":
    main()
