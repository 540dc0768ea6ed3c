"""The scorer's verdicts, the statistics and the files of the built-in benchmark."""
import json
import os
import time

import pytest

import eval as evaluation
import score_cases
from data_gen import LADDER
from eval import interval, score_answer

CASES = [  # reply, gold, kind, choices, verdict
    ("90-30=60. †Answer: 60°", "60°", "free", None, True),
    ("90-30=60. †Answer: 60", "60°", "free", None, True),
    ("†Answer: 6", "60°", "free", None, False),
    ("†Answer: 45pi", "45pi", "free", None, True),
    ("†Answer: 45", "45pi", "free", None, False),
    ("†Answer: 45π", "45pi", "free", None, True),
    ("†Answer: 3. No. †Answer: 4", "4", "integer", None, True),
    ("†Answer: 3. No. †Answer: 4", "3", "integer", None, False),
    (r"so \boxed{12}", "12", "integer", None, True),
    (r"\boxed{\frac{1}{2}}", "0.5", "free", None, True),
    ("The answer is 1,200.", "1200", "integer", None, True),
    ("3.9", "3", "integer", None, False),
    ("†Answer: 1.24", "1.3", "float", None, False),
    ("†Answer: 1.333", "1.33", "float", None, True),
    ("†Answer: [1, 2]", "[1,2]", "list", None, True),
    ("†Answer: [2, 1]", "[1,2]", "list", None, False),
    ("That is B. †Answer: B", "B", "choice", ["1", "2", "3", "4"], True),
    ("†Answer: (B)", "B", "choice", ["1", "2", "3", "4"], True),
    ("†Answer: 2", "B", "choice", ["1", "2", "3", "4"], True),
    ("†Answer: 22", "B", "choice", ["1", "2", "3", "4"], False),
    ("†Answer: E", "B", "choice", ["1", "2", "3", "4"], False),
    ("†Answer: B", "2", "choice_text", ["1", "2", "3", "4"], True),
    ("答案是 7", "7", "integer", None, True),
    ("", "7", "integer", None, False),
    ("I cannot tell what the picture shows, sorry about that", "7", "integer", None, False),
    ("†Answer:", "7", "integer", None, False),
    ("†Answer: __import__('os').abort()", "7", "integer", None, False),
    ("†Answer: 5/0", "5", "free", None, False),
]


@pytest.mark.parametrize("reply,gold,kind,choices,verdict", CASES)
def test_verdicts(reply, gold, kind, choices, verdict):
    assert score_answer(reply, gold, kind, choices).match is verdict


def test_tricky_cases():
    """Each verdict of the table in score_cases.py, within a second."""
    wrong = []
    for reply, gold, kind, choices, verdict, why in score_cases.CASES:
        begun = time.process_time()
        score = score_answer(reply, gold, kind, choices)
        if score.match is not verdict or time.process_time() - begun > 1:
            wrong.append((why, reply[:60], gold, score))
    assert not wrong, wrong


def test_real_gold_answers_are_right(tmp_path):
    """Gold answers fed back as replies score 100 %: letters, option texts, numbers with units."""
    shared = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "benchmarks")
    folder = os.environ.get("BENCHMARKS", shared)
    if not os.path.isdir(folder):
        pytest.skip("no benchmark files here; name their folder in BENCHMARKS")
    read = lambda name: json.load(open(os.path.join(folder, name), encoding="utf-8"))
    rows = [(r["answer"], "choice" if r["question_type"] == "multi-choice" else "free", None)
            for r in read("mathverse_testmini_text_only.sample.json")]
    rows += [(r["answer"], "choice_text" if r["choices"] else r["answer_type"], r["choices"])
             for r in read("mathvista_testmini.sample.json").values()]
    rows += [(r["answer"], "choice", None) for r in read("wemath_testmini.sample.json")]
    assert len(rows) == 118 and all(score_answer(gold, gold, kind, some).match for gold, kind, some in rows)


def test_unparsed_is_told_from_wrong():
    assert score_answer("", "7", "integer").extracted is None
    assert score_answer("†Answer: 8", "7", "integer").extracted == "8"
    with pytest.raises(ValueError, match="kind 'letters'"):
        score_answer("", "7", "letters")


def test_a_long_hostile_reply_is_quick():
    for text in ("(" * 100_000, "†Answer: " + "9" * 100_000, "answer is " * 10_000, "\\boxed{" * 14_000,
                 "<think>" * 14_000, "\\frac{" * 16_000):
        start = time.process_time()
        assert not score_answer(text, "7", "free").match
        assert time.process_time() - start < 1


def test_every_generated_answer_scores_itself():
    from data_gen import make_problem
    for i in range(120):
        p = make_problem("test", i)
        assert score_answer(p["output"], p["answer"], p["kind"], p["choices"]).match, p["output"]
        assert not score_answer(p["output"] + "9", p["answer"], p["kind"], p["choices"]).match


def test_wilson_interval():
    """Textbook value: 9 of 10 gives 59.6 % .. 98.2 %."""
    assert interval({"correct": 9, "n": 10}) == pytest.approx((.596, .982), abs=5e-4)
    assert interval({"correct": 0, "n": 10})[0] == 0 and interval({"correct": 10, "n": 10})[1] == 1


def test_numbers_of_the_table(tmp_path, monkeypatch):
    """Replies are given, so every figure is known beforehand."""
    rows = [{"image_url": "", "instruction": "", "answer": "7", "kind": "free", "choices": None,
             "version": v, "id": f"t{i}/{v}"}
            for i in range(4) for v in LADDER]
    right = {"text_only": 4, "text_dominant": 4, "text_lite": 3, "vision_intensive": 2,
             "vision_dominant": 1, "vision_only": 1}
    replies = ["†Answer: 7" if int(r["id"][1]) < right[r["version"]] else
               ("" if r["version"] == "vision_only" else "†Answer: 8") for r in rows]
    monkeypatch.setattr(evaluation, "load_vlm", lambda *a: (None, None))
    monkeypatch.setattr(evaluation, "generate_replies", lambda *a: replies)
    result = evaluation.evaluate(str(tmp_path), rows, evaluation.parse_args(["m"]))
    assert result["versions"]["vision_only"] == {"correct": 1, "n": 4, "unparsed": 3}
    assert result["all"] == pytest.approx((4 + 3 + 2 + 1 + 1) / 20)
    assert result["gap"] == .75 and result["relative_gap"] == .75
    assert json.load(open(tmp_path / "eval.json")) == result
    assert len(open(tmp_path / "replies.jsonl").readlines()) == 24
    text = evaluation.table({"a": result, "b": result})
    assert "text_lite" in text and "75.0" in text and "3" in text.splitlines()[-1]
    evaluation.draw_chart({"a": result, "b": result}, str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").stat().st_size > 1000
