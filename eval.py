"""Accuracy by problem version, the gap between reading a problem and seeing it, and three public benchmarks.

    python eval.py out/stage1 out/stage2 out/stage3   # table, out/accuracy.png, eval.json in each folder
    python eval.py out/stage2 --show 0                # a test problem, its six versions: prompt, reply, mark
    python eval.py out/stage3 --benchmark mathvista --data testmini.json --images FOLDER
    python eval.py --benchmark wemath --data testmini.json --replies replies.jsonl   # marks only, no model

Replies are decoded greedily and marked by `score_answer`: fixed rules, no judge, the same mark every time.
In this order: the scorer, the problems, the replies, the reports.
"""
import argparse
import ast
import functools
import hashlib
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

# ------------------------------------------------------------------------------------------------------------
# The scorer.  A reply is text that is searched and compared, never run.  In the order of the code: one
# spelling for one thing (normalise); the final answer, by the first rule that finds one (extract); its value
# (number); equal as values, lists, relations, equations or text (same); the verdict (score_answer).  In doubt
# it is wrong: no nearest option, no last number of a reply, nothing for an empty one.  The cases that it was
# written against, with a reason each, are a table in tests/score_cases.py.
#
# Why was this reply marked so?  Its `rule` says where the answer was found, the first that applies:
#     same text      the reply is the right answer, character for character, and nothing else
#     first words    it begins with one of the options: "Yes, because ..."
#     answer mark    \boxed{}, <answer>, [[ ]], ####, Answer: on a line of its own (MARKS); the last one
#     answer phrase  "the answer is", "choose", and the like (PHRASES); the last one not negated or supposed
#     only line, first line    a line that is a value or a letter, and the only such line
#     last line      a letter there, perhaps with its option, and no other line begins with one
#     last sentence  what stands behind its last "is" or "=" (COPULA)
# or why there is none: two answers marked, two answers stated, hedged (HEDGE, BLIND), taken back (TAKEN_BACK,
# REJECTED), negated or supposed (NOT, DENIED, SUPPOSED), nothing found.  For a choice it goes on with: option
# text, no option, several letters, letter and text disagree.
# ------------------------------------------------------------------------------------------------------------
KINDS = ("choice", "choice_text", "integer", "float", "list", "free")
Score = namedtuple("Score", "match extracted rule")  # right or wrong; the text that was marked; why that text
SPELLING = [line.split() for line in (  # the last one of a line replaces the others
    "Â° 掳 º ˚ ^{\\circ} ^\\circ ^{°} ^° \\circ ^{\\degree} ^\\degree \\degree °", "× \\times \\cdot · ⋅ *",
    "÷ \\div /", "√ sqrt", "∞ \\infty inf", "− – — -", "\\leqslant \\leq ⩽ ≤ ≦ <=", "\\cup ∪", "\\pm ±",
    "\\geqslant \\geq ⩾ ≥ ≧ >=", "\\neq ≠ =/= =\\= !=", "\\lt <", "\\gt >", "\\approx ≈ =", "\\angle ∠",
    "\\Omega Ω", "\\{ {", "\\} }", "\\% %")]
LATEX = [(re.compile(pattern), new) for pattern, new in (  # from the inside out, a level a turn
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}", r"\1"),
    (r"\^\{([^{}]*)\}", r"^(\1)"), (r"\\[dtc]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\[dtc]?frac\s?(\d)\s?(\d)", r"(\1/\2)"), (r"\\?sqrt\s?\{([^{}]*)\}", r" sqrt(\1)"),
    (r"\\sqrt\s?\[(\d)\]\s?\{([^{}]*)\}", r"((\2)^(1/\1))"), (r"\\(sqrt|sin|cos|tan|ln|log|pi)", r" \1 "),
    (r"\\Rightarrow|\\implies|⇒|⟹|∴", ", so "), (r"π", " pi "),
    (r"\\le\b", "<="), (r"\\ge\b", ">="), (r"\\in\b|∈", " in "))]

def normalise(text):
    """One spelling for one thing: Unicode forms, signs, LaTeX. -> str.  Linear in the length of the text."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]  # thinking is no answer
    text = re.sub(r"(?<=[\w)])\*\*(?=[\d(])", "^", text)
    text = re.sub(r"\\left|\\right|\\displaystyle|\\!|\{,\}|\*\*|__|[$`]", "", text)
    nfkc = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub("[½⅓⅔¼¾⅕⅛]", lambda m: f" {nfkc(m[0])}", text)  # NFKC alone: 3½ is 31/2, 10⁵ is 105
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^({nfkc(m[0])})", text)
    for *olds, new in SPELLING:
        for old in olds:
            text = text.replace(old, new)
    parts = (nfkc(text[k:k + 500]) for k in range(0, len(text), 500))  # as a whole: quadratic in accents
    text = "".join(parts).replace("⁄", "/")
    for _ in range(6):  # what is nested deeper stays as it is, and equals nothing
        before = text
        for pattern, new in LATEX:
            text = pattern.sub(new, text)
        if text == before:
            break
    return re.sub(r"(?:\\[(),;: \[\]]|\\quad|~|[^\S\n])+", " ", text).strip()

# Where a final answer stands, and what takes it away.  Inside a class of places the last one wins: replies
# correct themselves.  Every repetition is bounded or anchored, so 100 kB of brackets take no second.
any_of = lambda *patterns: re.compile("|".join(patterns), re.I)
MARKS = [re.compile(pattern) for pattern in (  # made for it
    r"\\f?box(?:ed)?\s?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]{0,200}\}){0,200}\}){0,400})\}",  # brackets in brackets
    r"<answer>((?:(?!</?answer>)[\s\S]){0,400})</answer>",
    r"\[\[([^\[\]]*)\]\]",
    r"####\s?([^\n]*)",  # GSM8K's
    r"†\s?Answer\s?:\s?([^\n†]*)",  # Math-PUMA's
    r"<Answer>\s?:?\s?<<([^<>]*)>>", r"<Answer>\s?:\s?([^\n<]+)",  # We-Math's
    r"(?i)(?:^|\n)[# ]*(?:the )?(?:final )?answer:? ?\n\s*([^\n]{1,200})")]  # a heading
REST, LETTER = r"(?=([^\n]{1,200}))", r"\(?((?-i:[A-J]))\)?"
PHRASES = any_of(  # said in words; the group is the answer and what follows it
    r"(?:\bans(?:wers?)?(?: (?:to|among) (?:the|this|these) (?:given )?(?:question|problem|options|choices))?"
    r"|\b(?:correct|right|best) (?:option|choice|one)|答案|正确(?:的|选项)|\b(?:option|choice) that is correct)"
    r"\"?\s?(?:】|is|are|=|:|would be|should be|must be|equals|为|是|应为|应该是|(?=不是))" rf"\s?:?\s{{0,3}}{REST}",
    rf"\b(?:it|that|this) (?:should|must) be {REST}",
    rf"(?:故选|应选|选择|选(?!项))\s?:?\s?{REST}",  # "so choose"; 选项 is "option"
    r"\b(?:choose|select|pick|go with|left with)\b(?: option| choice)?"
    rf" (?!\w (?:as|so that|to)\b|\d+ [a-z]|\w ?=|one|two|three|any){REST}",
    r"(?:\b(?:so|it is|it's)|(?:^|[.\n]\s?)(?:option(?: letter)?|choice|therefore|thus|hence|final"
    rf"|conclusion)[:,]?) {LETTER}(?=[.!]?$)", rf"(?:对应|即)选项\s?{LETTER}",  # "... = 5. Option B."
    rf"(?:\b(?:option|choice|solution|result|letter)|选项)\s?:\s?{LETTER}(?=\W|$)",
    rf"\b(?:option|choice) {LETTER} (?:fits|matches)\b",
    rf"(?:选项|\b){LETTER}\s?(?:选项)?是?正确(?!吗)",
    rf"(?:^|[.,;:!\n]|\b(?:and|so|thus|hence|therefore|only|option|choice))\s?{LETTER}"
    r"(?:[,:]? \(?[-\d][^\s,()]{0,12}\)?,?)? (?:is|would be|must be) (?:the )?(?:answer\b|correct|best|true"
    r"|right(?: answer| option| choice| one|[.,!]))")
# What takes an answer away.  A list: phrases between semicolons, as regular expressions.
phrases = lambda text: r"\b(?:" + "|".join(part.strip() for part in text.split(";")) + r")\b"
CANNOT, PICTURE = "(?:cannot|can't|unable to|not able to)", "(?:image|picture|figure|diagram)s?"
SHOWN = "(?:shown|given|provided|visible|available|attached|clear)"
BLIND = any_of("(?:看不|无法(?:看|查看|读))(?:到|见|清|取)?|没有图|信息不足|图片缺失", phrases(rf"""
    (?:{CANNOT}|don't|do not) (?:actually )?(?:see|view|(?:have )?access(?: to)?) (?:the |an?y? )?{PICTURE};
    without (?:seeing |access to )?(?:the|an?) {PICTURE}; there is no {PICTURE};
    please provide the {PICTURE}; (?:not enough|need more|without more) information;
    no {PICTURE} (?:(?:is|was|has been) )?{SHOWN}; {PICTURE} (?:(?:is|was) not|isn't|wasn't) {SHOWN};
    {PICTURE} (?:is|was) (?:too )?(?:missing|illegible|blurry)"""))  # anywhere in a reply
DOUBT = "|".join((phrases(rf"""
    might; maybe; perhaps; probably; possibly; presumably; presume; tentatively; apparently; arguably;
    supposedly; unsure; uncertain; guess(?:ing)?; suspect; hunch; intuition; plausible; chances; odds are;
    bet; unless; depends; may (?:also )?be; could (?:also )?be; don't know; no idea; hard to (?:say|tell);
    shot in the dark; in theory; (?:rough|just an) estimate; insufficient; lean(?:ing)?; low confidence;
    depending on; if i(?:'m| am); alternatively; also possible; please (?:double|verify|check);
    not (?:\w+ )?(?:sure|certain|confident); also (?:correct|right|true);
    {CANNOT} (?:see|view|read|answer|solve|verify|tell|say|determine|be sure|be certain); and so on;
    both \S+ and \S+ (?:work|are|fit)"""), r"n't have enough information|, ?\.\.|(?:^|[.;\n]) ?otherwise\b",
    r"\b(?:another|the other) (?:possible )?(?:solution|root|answer|value) ?(?:is|=|:|x)",
    r"[.!?\n] ?also (?:\S+ ?=|-?\d)", "可能|也许|大概|不确定|无法(?:确定|判断)|我?猜|随便|估计|或许|似乎|好像|看起来"))
HEDGE = any_of(DOUBT, phrases(  # in the sentence of an answer
    rf"likely; seems?; looks? like; appears?; {CANNOT} be determined?; either(?! [^.]{{0,80}}\bnor\b|[.,])"))
DOUBT = any_of(DOUBT)  # and behind it
WRONG = (  # said of what stands before it
    r"(?:'s|is|are|was|were|can|could|does|do|did) ?(?:(?:be |a |the )?(?:wrong|incorrect|mistaken?|false)"
    r"|(?:not|n't|'t) (?:be |look |seem )?(?:right|correct|true))|contradicts")
TAKEN_BACK = any_of(r"(?:^|[.!?,:;\n}>-]|\b(?:but|no|oh|hmm)) ?" + phrases(r"""
    wait; actually; correction; correcting; scratch that; strike that; sorry; hmm; oops; hold on; never mind;
    on reflection; on second thought; (?:up)?on (?:further )?(?:review|rechecking); looking closer;
    not quite; i meant?; i forgot; my mistake; (?:my )?apologies;
    (?:i|we) (?:misread|apologize|made an? (?:error|mistake)); on the contrary; or rather; better said;
    (?:edit|updated?)(?=:); (?:let me|i need to) (?:revise|correct);
    (?:let me )?(?:re-?check(?:ing)?|recalculate|recompute|reconsider|redo)"""),
    rf"(?:^|[.!?\n}}>] ?|, ?but |\bthat )(?:(?:but|however|no),? )?(?:this|that|it) ?(?:{WRONG})\b(?! that)",
    r"[.!?\n}>] ?no, (?=(?:it|that|this|the)\b|\d|\S+ =)",
    "等等|稍等|不对|更正|错了|不正确(?!的)|重新计算|抱歉|。不,")  # all that stands before is withdrawn
REJECTED = any_of(  # right behind a candidate: "B. 45° is too small", "B: no", "15, which does not fit"
    r"\W{0,9}(?:(?![A-J]\b)[^\s,]{1,40},? )?(?:(?:which|that|but it|but this) )?(?:" + WRONG +
    r"|(?:is|are|was|can)(?: be)? (?:impossible|eliminated|ruled out|rejected|excluded|discarded|extraneous"
    r"|too \w+)|(?:is|can|does|do) ?(?:not|n't) (?:be )?(?:possible|the answer|an option|fit|hold|work|match"
    r"|satisfy)|fails|lies outside)\b",
    r"\W{0,9}(?:wrong|incorrect|false|impossible|unknown|none|too \w+"
    r"|not (?:possible|correct|right|true|valid)|(?:this|that|the) \w+ is (?:rejected|not)|no(?=\W{0,9}$))\b",
    r"\W{0,9}(?:❌|✗|✘|错误|不符合|不成立|排除)")
DENIED = any_of(phrases(r"""
    none; hardly; undefined; fails? to; except; originally; possibility;
    (?:exclud|reject|discard|substitut|plug)\w*; extraneous; setting; testing; to (?:prove|show); bound;
    (?:one|a) (?:possible )?(?:solution|root|value);
    (?:wrong|incorrect|false|rough|old|first|initial|nearest) (?:answer|option|choice|value|estimate)"""),
    r"e\.g\.|^\W*where\b|\b(?:choose|pick|consider|try) \w ?$|[a-z] (?:plus|minus|times) \S+ ?$",
    r"\b(?:half|twice|double|third|quarter|square|%|\d) (?:of )?[a-z] ?$")  # before a value
SUPPOSED = any_of(  # before an answer phrase, in its sentence: then it states nothing
    r"(?:\b(?:if|suppose|supposing|assume|assuming|let(?!'s)|given|whether|say)\b|如果|若|假设)[^,]*$",
    r"\bif\b.* (?:were|was|had)\b.*$",  # "If it were 60°, the answer would be C"
    "(?:n't|" + phrases(r"""
    not(?! hard| diff); cannot; refuse; said; no(?! doubt| need); never; nothing; impossible; unlikely;
    is possible; false; wrong; mistake; otherwise; example; (?<!no )doubt;
    (?:claim|argue|suggest|disagree|deny|reject|pretend|imagine)s?;
    (?<!\bi )(?<!\bwe )(?:think|believe|say|wrote)s?; misconception; myth; you'd""") +
    r")(?:(?!\b(?:so|thus|hence|therefore|then|and)\b)[^,;:.])*$",  # "It is not true that the answer is B"
    phrases(r"""
    can; incorrect; (?:many|most|some) (?:students|people); tempting; naive; trap; intuitive; closest;
    nearest; worst; first; initial; earlier; previous; common;
    one; his; her; their; your; (?<!only )possible; (?:students|people|many) (?:often|may)""") + " ?$",
    r"[a-z](?<!\blet)(?<!\bit)'s ?$",
    r"\b(?:half|twice|double|square|root|opposite|negative|bound|estimate)(?: of| for)? the $",
    r"\b(?:wrong|incorrect) \w+ (?:is|was|would be) ?$|(?:e\.g\.|for example|in the form)[^.]*$",
    r"(?:不|别|没|无法|误|错|同学|学生|有人|多人|小\w)[^,、;:的]{0,6}(?:的)?$", r"\b(?:option|choice) [A-J] ?$")
NOT = any_of(r"(?:not|n't|neither|never)\b", r"\bno longer\b", "contradict|不|≠|!=")
IS = phrases("""
    is; are; be; was; equals; ha[sv]e?(?: an? \\w+ of| length| area)?; comes? to; amounts? to; totals;
    needs?; costs?; weighs?; measures?; contains?; takes?; leaves?; pays?; holds?; covers?; covered; spends?;
    earns?; (?:get|obtain)(?! \\w+ ?=); (?<!to )shows?; gives? an? \\w+ of; matches; corresponds? to;
    (?:[Tt]his|which) gives?(?: us)?; (?:[Ii]t|[Tt]hat)'s""") + (
    r"(?: at(?= \())?|等于|为|是|共有?|还?剩下?|需要")  # what an answer stands behind in a last sentence
COPULA = re.compile(rf"(?<![<>!])=|{IS}")
EQUATION = re.compile(  # at the end of a sentence: "is 2x + y = 5" or "x = 4, y = 0"
    rf"(?:{IS}) ?((?!.*[a-z]{{2}})[^=]+=[^=]+)$"
    r"|\b((?:[A-Za-z] ?= ?(?! )[^,;=]+(?:, (?:and )?|; | and )){1,8}[A-Za-z] ?=[^,;=]+)$")
SENTENCE = re.compile(  # its end; not the dot of a point's name or of "i.e."
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!i\.e\.)\s+|(?<=。)")
END = re.compile("|".join((  # where a candidate ends
    r"(?<=[^A-Z.])\.(?=\s|$)|。", r"(?<=\d): (?=.{0,80}=)", r" \((?=(?:or|approx\w*|about|roughly|=) )",
    r",? \(?(?:rounded|correct to|to (?:the nearest|\w+ decimal))",
    r",? (?:because|since|so that|which|where)\b|,? (?:i\.e\.|因为)",  # "5, because ..."
    r", (?:so(?![^=\n]{0,80}=)|as(?! well)|not|and (?:so|thus|hence|therefore|it|this|that|the|we|not)) ",
    " and not ",
    r"\s?\([^()]{0,80}[a-z]{2} [a-z]{2}[^()]{0,80}\)$")))  # "5 (the sum of both)"
LEAD = any_of(
    r"(?:(?:therefore|thus|so|hence|then|approximately|about|roughly|exactly|equivalently|equal to|option"
    r"|choice|letter|clearly|indeed|simply|(?:a )?total of|from|between|the),?\s+)+", r"选项\s?",
    r"[a-z]+(?: [a-z]+){0,3}: (?=[-\d(\[](?!.*:))")  # "Area: 6"
TAIL = re.compile(
    r" (?:(?:are|is) )?(?:left|old|remaining|in total|in all|altogether|remain|long|wide|high|tall|deep"
    r"|(?:in|on) (?:the|this) (?:image|picture|figure|diagram|photo|chart|graph|table))$")
GIVEN = re.compile("(?:given|since|as|because|if|when|with|for) ", re.I)
ANOTHER = re.compile(  # of several values: "AB = 5, AC = 6"; not "AB = 5, so AC = 6"
    r"(?:[,;]|\b(?:and|while)\b)(?!.*(?:\b(?:so|then|thus|hence|therefore|we|which)\b|所以|因此|故|则))[^,;]*$")
NO_LABEL = any_of(  # "half of AB = 10" is not 10
    DENIED.pattern, r"\b(?:than|not|but|at|when|if|for|to|by|half|twice|double|minus|that|from|with)\b")
RELATION = r"[a-z] ?(?:[<>]|[<>!]=) ?[-\d./]+"
JOINED = re.compile(  # to another answer: "5 cm or 6 cm"
    r"(?:\W{0,9}[a-z°]{1,3}(?<!\bor))?\W{0,9}(?:\b[oO]r\b|或)\s?(?:\\f?box(?:ed)?|<answer>)?\W{0,9}"
    r"(.{0,80})", re.S)
BOTH = re.compile(  # between two marks of one sentence; atomic, or "<a><a><a>" takes 2^n steps
    r"(?></?\w+>|[^\w\n]|\b[a-z]{1,3}\b|\n(?=\W*(?:or|and)\b))*(?:\\f?box(?:ed)?|<answer>)?[^\w\n]*")
BUT = any_of(  # "Yes, but only if", "Increasing, then decreasing", "Yes, I can help"
    r"\W*(?:but|and|or|then|if|assuming|when|sometimes|only|later|for some|\d|i (?:can|see|need|don't)|let"
    r"|sure|sort of)\b")
DENIES = any_of(r"\b(?:not|would|wrong|incorrect|false|cannot|too \w+)\b|n't\b")
OTHER_LETTER = re.compile(r"(?<![\w∠])(?<![Nn]ot )[A-J](?![\w'])")  # not that of an angle or of "not B"
LABEL = re.compile(r"[(\[]?([A-J])[)\]]?(?:[.:)]|$|,? [(-]? ?(?:because|since)\b)")  # "B", "(B)", "B. 40°"

def clean(text):
    """A candidate without the words around it."""
    text = END.split(text.strip(), maxsplit=1)[0].removesuffix('"}').strip(" ,:\"'*\n").rstrip(" .,:")
    text = re.sub("(?<=[a-z]{2})!$", "", text)  # 4! is 24
    return TAIL.sub("", text[m.end():] if (m := LEAD.match(text)) else text)

def extract(reply, equations=False, options=()):
    """The final answer in a normalised reply. -> (text or None, name of the rule that found it, what follows)

    equations  whether one or several are asked for: then "the line is 2x + y = 5" says more than 5
    options    of a choice: "cannot be determined" is no doubt if it is one of them
    """
    # What came before is withdrawn, whether another answer follows or not.
    reply = reply[max((m.end() for m in TAKEN_BACK.finditer(reply)), default=0):]
    lines = [line.strip(" #*") for line in reply.split("\n") if line.strip(" #*")]
    if doubted(reply, BLIND, options):
        return None, "hedged", ""
    if found := answer_mark(reply, options) or answer_phrase(reply, options):
        return found
    if doubted(reply[-300:], HEDGE, options):
        return None, "hedged", ""
    if PHRASES.search("".join(lines[-1:])[-2000:]):
        return None, "negated or supposed", ""
    found = lines and (short_line(reply, lines) or last_sentence(reply, lines[-1], equations))
    return found or (None, "nothing found", "")

def doubted(text, words, options):
    """Whether one of the words is in the text, apart from the options: one may be "Cannot be determined"."""
    for option in options:
        if words.search(option):
            text = re.sub(re.escape(option), "", text, flags=re.I)
    return words.search(text)

def stated(reply, text, rule, start, end=0):
    """As extract, for a text found behind start, unless what follows (from end) takes it back."""
    behind = reply[end or max(start, reply.find(text, start)) + len(text):]
    if (joined := JOINED.match(behind)) and not same(clean(joined[1]).rstrip(")"), clean(text)):
        return None, "two answers stated", ""
    if REJECTED.match(behind) or re.fullmatch(r"\W*[A-J]\W*\?", text):
        return None, "taken back", ""
    return text or None, rule, behind

# The rules by name, in this order.  Each gives what extract gives, or None when it does not apply.
def answer_mark(reply, options):
    """The last of MARKS; of a box also what it is multiplied with: "2\\boxed{5}", "\\boxed{5} million"."""
    marks = sorted((m.start(1), m.end(), m[1].strip()) for mark in MARKS for m in mark.finditer(reply))
    while marks[1:] and marks[-2][1] >= marks[-1][1]:
        del marks[-2]  # it holds the last one: "### Answer\n\n\\boxed{B}"
    if marks:
        start, end, text = marks[-1]
        _, middle, other = marks[-2] if marks[1:] else marks[-1]
        if other and other != text and BOTH.fullmatch(reply[middle:start][:100]):
            return None, "two answers marked", ""
        head = re.split(r"(?<=[.!?\n])\s", reply[max(0, start - 90):start])[-1]  # "It is not \boxed{5}"
        if SUPPOSED.search(head) or re.match(r"\W{0,3}\?", reply[end:]) or (
                doubted(head, HEDGE, options) or doubted(reply[end:], DOUBT, options)):
            return None, "hedged", ""
        later = (answer_phrase(reply[end:], options) or [None])[0]
        if later and bool(LABEL.match(later)) == bool(LABEL.match(text)) and not (
                same(later, text) or LABEL.match(text) and later[0] == text.strip("(")[0]):
            return None, "two answers stated", ""
        if inner := answer_phrase(text, options):  # <answer>The answer is B.</answer>
            return inner
        if reply[end - 1] == "}":  # "2\boxed{5}" does not say 5
            head = reply[:reply.rfind("\\", 0, start)][-40:]
            text = FACTOR.search(head)[1] + text + POWER.match(reply[end:])[0].rstrip(" .,")
        return stated(reply, text.strip(), "answer mark", start, end)

def answer_phrase(reply, options):
    """The last of PHRASES that is neither negated nor supposed."""
    found = None
    for m in [*PHRASES.finditer(reply)][-200:]:  # a hostile reply has thousands
        text = next(filter(None, m.groups()))
        begin = m.end() - len(m[0].lstrip(" .,;:!\n"))
        before = SENTENCE.split(reply[max(0, begin - 80):begin])[-1].rpartition("\n")[2]
        if found and (m[0].lower().startswith("and") or re.search(r"\bor (?:the )?(?:correct )?$", before)):
            return None, "two answers stated", ""
        if NOT.match(text):  # "not B but C" states C; "not B" takes back what was said before if that was B
            other = re.search(r"(?:\bbut\b|\bit is\b|\bit's\b|而是) ?(.+)", text)
            same_again = found and clean(text[3:]) == clean(found[1])
            found = (m, other[1]) if other else None if same_again else found
        elif not SUPPOSED.search(before) and not re.match(r"[^.!]*\?", text):
            if found and m.lastindex == found[0].lastindex == PHRASES.groups and text != found[1]:
                return None, "two answers stated", ""  # "B is true. D is true."
            found = m, text
    if found:
        start = found[0].start()
        said = reply[reply.rfind(".", 0, start) + 1:]  # and what follows: a doubt may come late
        own = re.split(r"(?<=[.!?]) |\n", said.lstrip())[0]
        own = re.split(r", so\b|\b(?:therefore|hence|thus)\b", own)[-1]
        if doubted(own, HEDGE, options) or doubted(said, DOUBT, options):
            return None, "hedged", ""
        return stated(reply, clean(found[1]), "answer phrase", start)

def short_line(reply, lines):
    """A line that is a value or a letter, the first or the only one, or a letter on the last line."""
    bare = [bare_value(line) for line in lines[:50]]  # several different ones: a list, none is stated
    first, alone = lines[0], len(lines) == 1
    rule = "only line" if alone else "first line"
    if bare[0] and len({*bare} - {None}) == len(SENTENCE.split(first)) == 1 and (alone or "=" not in first):
        other = not (alone or LABEL.match(first)) and extract(lines[-1])[0]  # "180°\nSo the angle is 60°."
        if other and re.search(r"\d", other) and number(other) and not same(other, bare[0]):
            return None, "two answers stated", ""
        return stated(reply, clean(first), rule, 0)
    label = LABEL.match(re.sub("^[Oo]ption ", "", lines[-1]))
    if label and not alone and not any(value and LABEL.match(value) for value in bare[:-1]):
        return stated(reply, lines[-1], "last line", reply.rfind(lines[-1]))
    wordy = re.search(r"[^\W\d_]{2}", re.sub("sqrt|sin|cos|tan|log|ln|pi|inf|in|and|or", "", first))
    if alone and len(first) <= 60 and len(SENTENCE.split(first)) == 1 and not (
            COPULA.search(first) and wordy or first.endswith(("?", ":"))):
        return stated(reply, clean(first), rule, 0)

def last_sentence(reply, line, equations):
    """What the last sentence says behind its last "is" or "=", if not denied, a bound or one of several."""
    *others, last = filter(None, SENTENCE.split(line))
    if COPULA.search(said := re.split(r",? \(?(?:since|because)\b|, as (?=\S+ [=+])", last)[0]):
        last = said.strip()
    stem = TAIL.sub("", last.rstrip(". "))
    *before, text = COPULA.split(stem)
    bound = r"\b(?:less|greater|more|larger|smaller|exceeds?) |\bat (?:least|most) \d"
    if not before and (stem != last.rstrip(". ") and number(clean(stem)) or re.fullmatch(RELATION, last)
                       or re.match(r"[A-Z][a-z]+(?: [a-z]+){0,3}: ?[(\[]", last)):
        return stated(reply, clean(stem), "last sentence", reply.rfind(stem))  # "Thus, 7 objects are left."
    if not before or re.search(bound, before[-1]):
        return None
    if equations and not re.match(r"\W*(?:if|when|at|for|with|suppose)\b|.*\bor\b", last, re.I) and (
            m := EQUATION.search(last.rstrip(". ")[-200:])):
        text, before = m[1] or m[2], before[:1]
    given = "=".join(before)[-300:]
    claim = re.split(r"(?i)\b(?:so|thus|hence|therefore|then|obtain|gives?|get)\b|; since [^,]*,", given)[-1]
    if re.match(r"\W*(?:since|as|because|given|\w+ing) ", claim, re.I):
        claim = claim.partition(",")[2] or claim
    several = len(before) > 1 and not GIVEN.match(last) and ANOTHER.search(before[-1][-200:])
    cut = others and re.search(r"\w$", last)  # the reply ends within a sentence
    denied = NOT.search(claim) or DENIED.search(claim) or NOT.match(text.strip()) or SUPPOSED.search(given)
    other = re.search("[<>]", claim) or stem.removesuffix(text).endswith("=") and unsolved(claim)
    if len(text) <= 60 and text.strip() != "a" and not (
            several or cut or denied or other or last.endswith("?")):
        return stated(reply, clean(text), "last sentence", reply.rfind(text))

def unsolved(claim):
    """Whether a text ends in more than a name: "So 2x", "x + 1", "AB^2"; then "= 10" does not say x."""
    side = re.split("[A-Za-z]{3,}|[,:;]", claim.partition("=")[0])[-1]
    return "lim" not in claim and re.search("[A-Za-z]", re.sub("pi|sqrt", "", side)) and (
        re.search(r"(?<![\w_(∠])\d|/\(?\d|\^|\||^\s*-[A-Za-z]", side))

def bare_value(line):
    """The letter or value of a line that is no more than that, else None."""
    if label := LABEL.match(line):
        return label[1]
    value = unlabel(clean(line))[1] if len(line) <= 60 and not (
        line.endswith(":") or SUPPOSED.search(line.partition("=")[0])) else ""
    return value if number(value) and re.search(r"\d|pi|^\w$", value) else None

# Units: what they measure (a power of a length, ...) and how many of the first of its kind they are.
UNITS = {name: (kind, Fraction(amount)) for kind, group in (
    ("length1", "m meter metre 米 1 km kilometer kilometre 千米 1000 dm decimeter 分米 1/10 cm centimeter "
     "centimetre 厘米 1/100 nm 1/1000000000 mm millimeter millimetre 毫米 1/1000 inch inche 127/5000 "
     "ft foot feet 381/1250 mile 201168/125"),
    ("length3", "L l liter litre Litre 升 1/1000 mL ml milliliter millilitre 毫升 1/1000000"),
    ("money", "dollar 美元 1 cent 1/100"), ("year", "year 年 1"), ("yuan", "元 1"),
    ("mass", "g gram 克 1 kg kilogram 千克 1000 mg milligram 1/1000 t ton tonne 吨 1000000"),
    ("time", "s sec second 秒 1 min minute 分钟 60 h hr hour 小时 3600 day 天 86400 week 604800"),
    ("angle", "° deg degree 度 1"), ("percent", "% percent 1"),
    ("radian", "rad radian 1"), ("energy", "J 1 kJ 1000"), ("small energy", "eV 1"),
    ("temperature", "K kelvin 1"), ("force", "N 1 kN 1000"),
    ("voltage", "V volt 1"), ("power", "W watt 1 kW 1000"), ("amount", "mol 1"),
    ("current", "A ampere amp 1"), ("resistance", "Ω ohm 1"), ("frequency", "Hz hertz 1"),
    ("pressure", "Pa pascal 1 kPa 1000"))
    for names, amount in re.findall(r"((?:[^\d\s]+ )+)([\d/]+)", group) for name in names.split()}
POWERS = {"square": 2, "sq": 2, "平方": 2, "squared": 2, "cubic": 3, "立方": 3, "cubed": 3}
NAME = "|".join(sorted(UNITS, key=len, reverse=True))
UNIT = re.compile(rf"(.*?[\d)i°]) ?(square |sq\.? ?|cubic |平方|立方)?({NAME})s?"
                  rf"(?:\^?\(?([23])\)?| (squared|cubed))?(?: ?(?:/|per) ?({NAME})(?:\^\(?([23])\)?)?)?")
FACTOR = re.compile(  # before a box: "2\boxed{5}", "x < \boxed{5}"
    r"([-+*/^<]|(?<!answer)>|[<>!]=|\b(?:at (?:least|most)|(?:less|more|greater) than)|\d|) ?[$(]*\Z")
POWER = re.compile(  # behind a box: "\boxed{5}\pi", "\boxed{5} mm"
    r"(?: ?(?:pi\b|sqrt ?\S+|\^ ?\S+|[*/+-] ?\S+|%|(?:hundred|thousand|million|billion|dozen)\b"
    rf"|(?:{NAME})s?(?=\W*$|[.,;\n^])))*")
WORDS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13)))
CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf}
FUNCTIONS = {"sqrt": lambda x: power(x, Fraction(1, 2)), "sin": math.sin, "cos": math.cos, "tan": math.tan,
             "ln": math.log, "log": math.log10}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: lambda a, b: power(a, b)}
THINGS = re.compile(  # "5 apples", "1 apple", but not "5 dozens", "5 million people", "5 more apples"
    r"(.*\d\)?) ?((?<= )(?!(?:more|fewer|less|extra|too|percentage|and|or|of|to|per|times|plus|minus) )"
    r"(?!(?:[a-z]+ )?(?:\w*(?:hundred|thousand|illion|dozen|half|third|quarter|(?<!mon)th)|pair|ten)s?\b)"
    r"(?:[A-Za-z]{3,} )?(?!(?:plus|minus|less|halves|this|does|was|wrong|squared|cubed|factorial|past)\b)"
    r"(?:[A-Za-z]{2,}s|people|men|women|children|fish|sheep|(?<=\b1 )[A-Za-z]{3,})"
    r"|(?!次[方幂])[个只条本人岁名块种次](?:(?![半以多十百千万的错左上不吗吧])[\u4e00-\u9fff]){0,4})")
Number = namedtuple("Number", "values unit scale decimals")  # decimals: (places, digits)

def power(a, b):
    """a ** b, exact where it can be. ValueError for what has no real value or would fill a page."""
    if abs(b) > 64 or (isinstance(a, Fraction) and max(abs(a.numerator), a.denominator) > 10 ** 40):
        raise ValueError("too large")
    if isinstance(a, Fraction) and b == Fraction(1, 2) and a >= 0:
        root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
        return root if root * root == a else math.sqrt(a)
    if a < 0 and b != Fraction(1, 3) and b != int(b):
        raise ValueError("no real value")
    return a ** int(b) if getattr(b, "denominator", 0) == 1 else math.copysign(float(abs(a)) ** float(b), a)

def value(node, k):
    """The value of a syntax tree at point k of its letters. What is not listed has none: nothing runs."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left, k), value(node.right, k))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return value(node.operand, k) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return FUNCTIONS[node.func.id](value(node.args[0], k))
    if isinstance(node, ast.Name):
        c = CONSTANTS.get(node.id)  # letters: far from linear in ord, or 3b would be a + b + c
        return c or Fraction((ord(node.id) ** 2 * (k + 2) + 37 * ord(node.id)) % 1009 + 3, 211 + 10 * k)
    return Fraction(repr(node.value))  # of a number as it was typed: .1 is 1/10

def expression(text):
    """Numbers, letters, + - * / ^, brackets, roots, named functions -> values at three points, or None."""
    source, last = "", ""
    text = re.sub(r"(sin|cos|tan|ln|log) ?(\d*\.?\d*[a-z]|\d[\d.]*)(?![\w(])", r"\1(\2)", text)  # sin 2x
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
        values = tuple(value(tree, k) for k in range(3))
        return values if all(abs(v) < 1e100 or math.isinf(v) for v in values) else None  # for float
    except (SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError,
            MemoryError):
        return None

@functools.lru_cache(maxsize=256)
def number(text):
    """A text as Number, or None: "12 cm^2", "3 1/2", "1,200", "2sqrt(3)", "x+1", "50%", "seven"."""
    text = text.replace("per cent", "percent").strip().rstrip(".").strip()[:121]
    text = re.sub(rf"\(({NAME})\)$", r"\1", text)  # 15.7(厘米)
    text = re.sub(r"(sin|cos|tan) ?(?:(\d[\d.]*)°|\((\d[\d.]*)°\))", r"\1(\2\3*pi/180)", text)
    text = re.sub(r"^(?:approximately|about|roughly|=) ?", "", text)
    text = re.sub(r"(?<![\d.])(\d{1,3}(?:[, ]\d{3})+)(?!\d)", lambda m: re.sub("[, ]", "", m[1]), text)
    text = re.sub(r"^(-?)(\d+) ?(?:\(\((\d+)\)/\((\d+)\)\)|(?<= )(\d+)/(\d+))", r"\1(\2+\3\5/\4\6)", text)
    text = re.sub(r"(\d)[eE]([+-]?\d+)", r"\1*10^(\2)", text)
    text = re.sub(r"^[A-Za-z]+\b", lambda m: str(WORDS.get(m[0].lower(), m[0])), text)
    text, unit, scale = re.sub(r" ?\b(?:square |sq\.? |cubic )?units?$", "", text), None, 1
    if (m := UNIT.fullmatch(text)) and expression(m[1]):
        raised = int(m[4] or POWERS.get((m[2] or m[5] or "").strip(" ."), 1))
        text, (kind, scale) = m[1], UNITS[m[3]]
        unit, scale = kind if raised == 1 else f"{kind.rstrip('1')}{raised}", scale ** raised
        if m[6]:
            unit, scale = f"{unit}/{UNITS[m[6]][0]}{m[7] or ''}", scale / UNITS[m[6]][1] ** int(m[7] or 1)
        if unit == "radian":
            unit, scale = "angle", 180 / math.pi
    elif m := THINGS.fullmatch(text):
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
    """"(4, 0]" -> ("(", ["4", "0"], "]"); "4, 0" -> ("", [...], ""); "x = 4, y = 0" -> (None, [...], None)"""
    text = re.sub(r"^(?:(?:[\w ]*|\([\w ,]+\) ?)= ?(?=[(\[{])|\w in |[A-Z] ?(?=\())", "", text.strip())
    whole, depth, cuts = re.fullmatch(r"([(\[{])(.*)([)\]}])", text, re.S), 0, []
    inner = whole[2] if whole else text
    for i, c in enumerate(inner[:400]):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:  # "(1, 2) and (3, 4)"
            return "", [text], ""
        if depth == 0 and c in ",;、":
            cuts.append(i)
    parts = [inner[i + 1:j].strip() for i, j in zip([-1, *cuts], [*cuts, len(inner)])]
    if not whole:  # "3, 5 and 7"
        parts = [one for part in parts for one in re.split(" and | to |和", part.removeprefix("and "))]
    named = [unlabel(part) for part in parts]
    if len(named) > 1 and all(name for name, _ in named):
        return None, [value for _, value in sorted(named)], None
    return (whole[1], parts, whole[3]) if whole else ("", parts, "")

def unlabel(text):
    """"slope = -4" -> ("slope", "-4"); "2 + 2 = 4" -> ("", "4"); an equation proper stays whole."""
    name = r"(?:(?:[^\W\d]\.?|[∠△' ])\d?){0,40}(?:\(\w\))?"
    if m := re.fullmatch(rf" ?({name}) ?=(?:(?:(?! and )[^=,])*=)* ?((?:(?! and )[^=])+)", text[-400:]):
        if not NO_LABEL.search(m[1]):
            return m[1].strip(), m[2].strip()
    left, _, right = text.rpartition("=")
    if re.fullmatch(r" ?[A-Za-z]", right) and number(left):
        return right.strip(), left.strip()  # 5 = s
    return "", right.strip() if re.fullmatch(r"[-\d +*/^()=.,]+", left) else text

def proportional(a, b):
    """Two equations say the same: the differences of their sides are equal up to a factor that is not 0."""
    sides = [[expression(side) for side in text.split("=", 2)] for text in (a, b)]
    if any(len(two) != 2 or None in two for two in sides):
        return False
    p, q = ([left - right for left, right in zip(*two)] for two in sides)
    return any(p) and any(q) and all(near(p[0] * q[k], p[k] * q[0]) for k in (1, 2))

def same(found, gold):
    """Whether two normalised answers are equal: as sets, lists, equations, values, relations or text."""
    if found == gold or len(found) > 2000:  # not worth the time
        return found == gold != ""  # an option that is a picture has no text
    if m := re.fullmatch("([^=]*(?:pi|sqrt)[^=]*)=([^=]*)", found):  # "9 pi = 28.27"
        found = m[1] if number(m[1]) and number(m[2]) and same(m[1], m[2]) else found
    found, gold = (re.sub("^([^±]*)±([^±]*)$", r"\1+\2 or \1-\2", text) for text in (found, gold))
    for joint in ",? or |或", "∪":
        some, others = re.split(joint, found), re.split(joint, gold)
        if len(others) > 1:  # both roots, in any order
            return len(some) == len(others) and all(any(same(a, b) for a in some) for b in others)
        if len(some) > 1:
            return len(some) < 10 and all(same(part, gold) for part in some)  # "1/2 or 0.5"
    some, others = elements(found), elements(gold)
    if len(others[1]) > 1 or others[0] and not number(gold):
        return (None in (some[0], others[0]) or some[::2] == others[::2]) and same_list(some[1], others[1])
    (name, f), (gold_name, g) = unlabel(found), unlabel(gold)
    letters = {m[0] for text in (name, gold_name) if (m := re.search(r"(?:^| )(\w(?:\(\w\))?)$", text))}
    if len(letters) > 1 and len({*map(len, letters)}) == 1 or "=" in re.sub("[<>!]=", "", f + g):
        return proportional(found, gold)  # "x = 4" is not "y = 4"
    if (x := number(f)) and (y := number(g)):
        return same_number(x, y) or f.isalpha() and f.lower() == g.lower()
    relations = [re.split("(<=|>=|!=|<|>)", text) for text in (f, g)]
    if min(map(len, relations)) > 1:  # 3 > x is x < 3
        left, right = ([part.replace(">", "<") for part in r[::-1 if ">" in r[1] else 1]] for r in relations)
        return len(left) == len(right) and all(p == q if k % 2 else same(p.strip(), q.strip())
                                               for k, (p, q) in enumerate(zip(left, right)))
    bare = lambda text: re.sub(  # without signs, but 1:15 is not 1:1.5 and A' not A
        r"(?<!\d)[.:]|[.:](?!\d)|[,;!?\"()]+|(?<![A-Za-z])'|'(?=[a-z])", "",
        re.sub(r"\s+", "", re.sub("^(?:the|a|an) ", "", text.lower())))
    return bare(f) == bare(g) != "" and not x and not number(g)

def same_list(some, others):
    return len(some) == len(others) and all(map(same, some, others))

def letter_of(found, n):
    """-> (index of the option letter that an answer starts with, or None; what follows it). No article A."""
    m = re.match(r"[(\[]?([A-Z])(?:[)\].:]+|选项|项)?(?=$|\s|[^\w(=+*/^'-])(?!\.[a-z])", found) or re.fullmatch(
        r"[(\[]?([a-j])[)\]]?\.?", found)
    rest = found[m.end():] if m else ""
    if not m or len(m[0]) == 1 and re.match(
            " (?!is |because |since |as |for |by |due |in this |from |using )[a-z]", rest):
        return None, ""
    index = ascii_uppercase.index(m[1].upper())
    return index if index < n else None, rest

def option_of(found, options, kind):
    """-> (index of the option that an answer names, or None; what the rule's name goes on with; the rest)"""
    beside = re.fullmatch(  # "45° (B)", "45°, which is option B"
        r"(.{1,99}?),? (?:\(?(?:\w+ (?:is )?)?(?:option|choice) \(?([A-J])\)*|\(([A-J])\))", found)
    if beside and any(same(clean(beside[1]), option) for option in options):
        found = f"{beside[2] or beside[3]}. {beside[1]}"
    found = re.sub(r"^([A-J])\((.+)\)$", r"\1. \2", found)
    lead = re.match("(?:option|choice|the) ", found, re.I) and LEAD.match(found)
    name = found[lead.end():] if lead else found
    index, rest = letter_of(name, len(options) or 10)
    rest = re.sub(r"^ ?[-;,] ?(?:i\.e\.,? |that is,? |namely )?", " ", rest)
    equal, also = ([k for k, option in enumerate(options) if option == text != ""] or
                   [k for k, option in enumerate(options) if same(text, option)]
                   for text in (clean(found), clean(rest).strip("()")))
    others = "".join(part for part in re.split(r"(?<=[.!?\n]) ", rest) if not DENIES.search(part))
    value = re.match(r"[ (]*\d", rest) and number(clean(rest).strip("()")) and all(map(number, options))
    if index is not None and index not in also and (also or value and options):  # "C. 16", but there is no 16
        return None, ", letter and text disagree", ""
    if index is not None and not also and REJECTED.match(rest):
        return None, ", taken back", ""
    if index is not None and not also and (OTHER_LETTER.search(others) or re.match(r"\W*\S+ or ", rest)):
        return None, ", several letters", ""
    if index is not None and not (kind == "choice_text" and equal):
        return index, "", rest
    if len({options[k] for k in equal}) == 1:  # one option, or several that read alike
        return equal[0], ", option text", ""
    return None, ", option text" if equal else ", no option", ""

def first_words(reply, options, kind):
    """As extract, for a reply that begins with the words of an option, "Yes, because ...", else None."""
    clauses = [c.strip() for c in re.split(r"[,;:!\n]|\.(?=\s|$)", reply.lower())]
    said = [o for o in options if o.lower() in (clauses if kind == "choice_text" else [reply.lower()])]
    if len(said) == 1 and reply.lower().startswith(said[0].lower()):
        rest = reply[len(said[0]):]
        later, why, _ = extract(rest.lstrip(" .,:;!"))  # nothing else may be said
        another = later and any(same(later, option) for option in options if option != said[0])
        if not (another or TAKEN_BACK.search(reply) or HEDGE.search(rest) or BUT.match(rest)
                or re.match("answer|two|taken", why)):
            return said[0], "first words", ""

def last_words(reply, options):
    """-> the option that is the last sentence, "Therefore, a = b.", or None."""
    last = clean(SENTENCE.split(reply.rpartition("\n")[2].strip("* "))[-1])
    lead, _, tail = reply.rpartition(last or "\n")
    items = (re.sub(r"^\W*(?:\d\d?|[A-J])[.)] ", "", item) for item in re.split("[\n,]", lead[-2000:]))
    if last in options and not {clean(item.strip("#* ")) for item in items} & {*options} - {last}:  # no list
        denied = phrases("not; wrong; incorrect; mistake; excluded; eliminated; fail; given; if; or; too;"
                         "assume; suppose") + r"[^.!\n]{0,80}$|n't\b[^.!\n]{0,80}$"  # "It is not\n15"
        lead = lead.strip("\n *") or "."
        if lead[-1] in ".!:,。0123456789" and not (re.search(denied, lead, re.I) or REJECTED.match(tail)):
            return last

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
    gold = gold.split("\n")[0] if len({*gold.split("\n")}) == 1 else gold  # one shipped value is there twice
    if reply == gold != "":
        return Score(True, reply, "same text")
    equations = "=" in gold and re.search("[a-z]", unlabel(gold)[1]) or len(elements(gold)[1]) > 1
    found, rule, behind = first_words(reply, options, kind) or extract(reply, equations, options)
    if rule in ("last sentence", "only line", "nothing found") and (option := last_words(reply, options)):
        found, rule = option, "last sentence"
    if found is None:
        return Score(False, None, rule)
    letters = re.findall(r"(?:^|\n)\W{0,2}([A-J])(?!\w)", gold) if kind == "choice" else []  # "False": none
    if len(letters) > 1:  # two shipped golds: both have to be said, and no other
        return Score(OTHER_LETTER.findall(found) == letters, found, rule)
    if letters or kind == "choice_text":
        index, why, rest = option_of(found, options, kind)
        rest = re.sub(r"^[ .,:;!)}(]*(?:i\.e\.,? )?", "", rest + behind)
        later = extract(rest, options=options)[0] if index is not None else None
        named = not DENIES.search(rest[:80]) and re.match(  # "15 (option C)"
            r"(?:[^.\n]{0,60}[(,] ?)?(?:option|choice) \(?([A-J])\b", rest)
        value = re.search(  # "so x = 60°, choose C"
            r"(?:=|\bis) ?([-\d][^=,;。\n]{0,20}?)(?:,|\. (?=So|Thus|Hence|Therefore))[^=.。\n]{0,30}$",
            reply.removesuffix(behind)[-60:])
        later = later or value and not why and value[1]
        if later and option_of(later, options, kind)[0] not in (None, index) or (
                named and named[1] != ascii_uppercase[index or 0]):  # "B ... so the angle is 60°"
            index, why = None, ", letter and text disagree"
        if index is None or (not letters and index >= len(options)):
            return Score(False, found, rule + why)
        match = index == ascii_uppercase.index(letters[0]) if letters else options[index] == gold or (
            gold not in options and same(options[index], gold))
        return Score(match, found, rule + why)
    last = SENTENCE.split(behind.strip())[-1]  # "The answer is 5. However, it is 6."
    if re.match(r"\W*(?:so|therefore|thus|hence|however|but|no|in total)\b", last, re.I):
        later = number(unlabel(extract(last)[0] or "")[1])
        if later and number(unlabel(found)[1]) and not same_number(later, number(unlabel(found)[1])):
            return Score(False, None, "two answers stated")
    if kind == "list":
        return Score(same_list(elements(unlabel(found)[1])[1], elements(gold)[1]), found, rule)
    one, *more = re.split(",? or ", found)  # "20 pupils, or 20 in total"
    one = one if all(same(clean(other), one) for other in more[:9]) else found
    x, y = number(unlabel(one)[1]), number(unlabel(gold)[1])
    if kind in ("free", "choice") or not y:
        return Score(same(found, gold), found, rule)
    if not x or (x.unit and y.unit and x.unit != y.unit) or len(set(x.values)) > 1:
        return Score(False, found, rule)
    half = Fraction(1, 2 * 10 ** len(gold.partition(".")[2])) if kind == "float" else 0  # of the last place
    mine = x.values[0] * x.scale / y.scale if x.unit and y.unit else x.values[0]
    return Score(bool(abs(mine - y.values[0]) <= half), found, rule)

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

if __name__ == "__main__":
    main()
