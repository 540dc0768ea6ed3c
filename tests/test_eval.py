"""The scorer's verdicts, the statistics, the files of every benchmark, killed runs and bad input."""
import json
import os
import re
import shutil
import time

import pytest
from PIL import Image

import data_gen
import eval as evaluation
import model
import score_cases
from data_gen import LADDER
from eval import interval, score_answer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "tiny")
BENCHMARKS = os.environ.get("BENCHMARKS", os.path.join(ROOT, "..", "shared", "benchmarks"))  # not in the repo

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


def test_unseen_cases():
    """The six sets of score_unseen.jsonl: what was reached on them, and no wrong reply marked right.

    Written from the rules alone, without a look at the code. At first sight 1,192 of the 1,230 marks were as
    they should be and two wrong replies were marked right; what could be mended was.
    """
    with open(os.path.join(ROOT, "tests", "score_unseen.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    marks = [(score_answer(r["reply"], r["gold"], r["kind"], r["choices"]).match, r["right"]) for r in rows]
    assert len(rows) == 1230 and (True, False) not in marks
    assert marks.count((False, True)) <= 12
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        page = f.read()
    right = len(rows) - marks.count((False, True))
    assert f"1,192 of {len(rows):,} marks were right at first sight" in page and f"now {right:,} and none" in page
    assert f"mark {len(rows) + len(score_cases.CASES):,} replies" in page


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


def test_numbers_of_the_table(tmp_path):
    """Replies are given, so every figure is known beforehand."""
    right = {"text_only": 4, "text_dominant": 4, "text_lite": 3, "vision_intensive": 2,
             "vision_dominant": 1, "vision_only": 1}
    rows = [{"image_url": "", "instruction": "", "answer": "7", "kind": "free", "choices": None, "version": v,
             "id": f"t{i}/{v}"} for i in range(4) for v in LADDER]
    replies = [{"id": r["id"], "reply": "†Answer: 7" if int(r["id"][1]) < right[r["version"]] else
                "" if r["version"] == "vision_only" else "†Answer: 8"} for r in rows]
    write(tmp_path / "data" / "test.jsonl", rows)
    evaluation.main(["--data", str(tmp_path / "data"), "--replies", write(tmp_path / "r.jsonl", replies),
                     "--chart", str(tmp_path / "c.png")])
    result = json.load(open(tmp_path / "r_marked" / "eval.json"))
    assert result["versions"]["vision_only"] == {"correct": 1, "n": 4, "unparsed": 3}
    assert result["all"] == pytest.approx((4 + 3 + 2 + 1 + 1) / 20)
    assert result["gap"] == .75 and result["relative_gap"] == .75
    assert len(open(tmp_path / "r_marked" / "replies.jsonl").readlines()) == 1 + 24
    text = evaluation.table({"a": result, "b": result})
    assert "text_lite" in text and "75.0" in text and "3" in text.splitlines()[-1]
    evaluation.draw_chart({"a": result, "b": result}, str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").stat().st_size > 1000


# ---- the public benchmarks: rows in the real formats, written for the test
def mathverse_rows(text_only=False):
    """2 problems in the five image versions, or as text only: one with options, one free."""
    names = ["Text Only"] if text_only else [
        "Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"]
    rows = []
    for version in names:
        for p, (question, answer, kind, field) in enumerate((
                ("How large is x?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°", "C", "multi-choice", "Angle"),
                ("Find the area.", "$9 \\pi \\mathrm{cm}^{2}$", "free-form", "Area"))):
            rows.append({"sample_index": str(len(rows) + 1), "problem_index": str(p),
                         "problem_version": version, "question_for_eval": question,
                         "question": "" if version == "Vision Only" else question,
                         "image": "" if text_only else f"images/{p}.png", "answer": answer,
                         "question_type": kind,
                         "metadata": {"subject": "Plane Geometry", "subfield": field},
                         "query_cot": f"Please reason.\nQuestion: {question}"})
    return rows


def mathvista_rows():
    row = lambda pid, question, **more: {
        "pid": pid, "question": question, "image": f"images/{pid}.jpg", "choices": None, "unit": None,
        "precision": None, "question_type": "free_form", "answer_type": "text",
        "metadata": {"task": "figure question answering", "skills": ["arithmetic reasoning"]}} | more
    return {r["pid"]: r for r in (
        row("1", "Is it odd?", choices=["Yes", "No"], answer="No", question_type="multi_choice"),
        row("2", "How long?", unit="cm", precision=1, answer="1.2", answer_type="float"),
        row("10", "How many?", answer="4", answer_type="integer",
            metadata={"task": "math word problem", "skills": ["arithmetic reasoning", "logical reasoning"]}),
        row("3", "Which three?", answer="[1, 2, 3]", answer_type="list"))}


def wemath_rows():
    """Groups 2steps_1, 2steps_2, 2steps_3, 3stpes_1 (spelled as shipped); the answer is always B."""
    rows = []
    for ID, steps in (("2steps_1", 2), ("2steps_2", 2), ("2steps_3", 2), ("3stpes_1", 3)):
        for key in [*map(str, range(1, steps + 1)), "multi"]:
            rows.append({"ID": ID, "key": f"{steps}steps_{key}", "question": "a = ( ) m", "answer": "B",
                         "option": "A. 3, 5;B. 0.5, 50; C. 300, 50.;D. 30, 50; E. No correct answer",
                         "image_path": f"{steps}steps/image/{ID[-1]}-{key}.png"})
    return rows


# Right in the groups: all | composite and one step | steps but not the composite | only the composite
WEMATH_RIGHT = {"2steps_1": "12m", "2steps_2": "1m", "2steps_3": "12", "3stpes_1": "m"}


def wemath_replies():
    return [{"id": f"{r['ID']}/{r['key']}", "reply": "0.5 m and 50 m, so the answer is B."
             if r["key"][7] in WEMATH_RIGHT[r["ID"]] else "The answer is (C)."} for r in wemath_rows()]


def write(path, content):
    """JSON for .json, a line each for .jsonl. -> the path as a string"""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(content if isinstance(content, str) else text)
    return str(path)


def marked(tmp_path, benchmark, rows, replies, *flags):
    """eval.py --replies -> (eval.json, the rows of replies.jsonl without the header)"""
    data = [write(tmp_path / f"{k}.json", r) for k, r in enumerate(rows)]
    evaluation.main(["--benchmark", benchmark, "--data", *data, "--out", str(tmp_path / "out"), *flags,
                     "--replies", write(tmp_path / "r.jsonl", replies), "--chart", str(tmp_path / "c.png")])
    lines = [json.loads(line) for line in open(tmp_path / "out" / "replies.jsonl")]
    assert "rule-based: not comparable" in lines[0]["note"] and lines[0]["scorer"] and lines[0]["data_sha256"]
    return json.load(open(tmp_path / "out" / "eval.json")), lines[1:]


def test_wemath_outcomes_by_hand(tmp_path, capsys):
    """Of 4 groups: one mastered; one right with one step (strict RM, loose CM); one IG; one right by rote."""
    result, lines = marked(tmp_path, "wemath", [wemath_rows()], wemath_replies())
    assert result["strict"] == {"score": (1 + .5) / 4, "IK": 0, "IG": .25, "CM": .25, "RM": 2 / 3}
    assert result["loose"] == {"score": (2 + .5) / 4, "IK": 0, "IG": .25, "CM": .5, "RM": 1 / 3}
    assert result["groups"]["S1"] == {"correct": 5, "n": 9, "unparsed": 0}
    assert result["groups"]["S2"]["correct"] == 2 and result["groups"]["S3"]["n"] == 1
    assert lines[0] == {"id": "2steps_1/2steps_1", "reply": "0.5 m and 50 m, so the answer is B.",
                        "match": True,
                        "prompt": wemath_rows()[0]["question"] + "\n" + wemath_rows()[0]["option"],
                        "extracted": "B", "rule": "answer phrase"}
    assert "rule-based: not comparable" in capsys.readouterr().out


def test_wemath_counts_only_complete_groups(tmp_path, capsys):
    """--limit 4 ends within the second group; IK: composite and a step wrong."""
    wrong = [r | {"reply": "The answer is A."} for r in wemath_replies()]
    result, _ = marked(tmp_path, "wemath", [wemath_rows()], wrong, "--limit", "4")
    assert result["complete_groups"] == 1 and result["groups"] == {
        "S1": {"correct": 0, "n": 2, "unparsed": 0}, "S2": {"correct": 0, "n": 1, "unparsed": 0}}
    assert result["strict"]["IK"] == result["loose"]["IK"] == 1 and result["strict"]["RM"] == 0
    assert "complete groups" in capsys.readouterr().out


def test_mathverse_by_version_and_subject(tmp_path):
    """Both files at once; the option's text counts; the mean is over the five image versions."""
    rows, text = mathverse_rows(), mathverse_rows(text_only=True)
    replies = [{"id": r["sample_index"], "reply": "120 degrees" if r["answer"] == "C" else
                ("†Answer: 9π" if r["problem_version"] == "Text Lite" else "9")} for r in rows]
    replies += [{"id": "text_only/1", "reply": "C"}, {"id": "text_only/2", "reply": "900π mm^2"}]
    result, _ = marked(tmp_path, "mathverse", [rows, text], replies)
    assert result["versions"]["text_only"] == {"correct": 2, "n": 2, "unparsed": 0}
    assert result["all"] == pytest.approx((4 * .5 + 1) / 5) and result["gap"] == 0
    assert result["groups"]["subfield: Plane Geometry, Angle"] == {"correct": 5, "n": 5, "unparsed": 0}
    assert result["groups"]["subject: Plane Geometry"] == {"correct": 6, "n": 10, "unparsed": 0}
    assert result["groups"]["text only, subject: Plane Geometry"]["n"] == 2
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_mathvista_by_task_and_skill(tmp_path, capsys):
    """Missing replies are wrong, and said so; ids are in order; prompts show choices, unit and precision."""
    replies = [{"id": "1", "reply": "(B)"}, {"id": "2", "reply": "It is 1.24 cm."},
               {"id": "10", "reply": "5"}]
    result, lines = marked(tmp_path, "mathvista", [mathvista_rows()], replies)
    out = capsys.readouterr().out
    assert "1 of 4 ids have no reply, '3' first: counted as wrong" in out and "shows the choices" not in out
    assert "the prompts show the choices, the released Math-PUMA code withholds them" in out
    assert result["groups"]["ALL"] == {"correct": 2, "n": 4, "unparsed": 1} and result["unparsed"] == 1
    assert result["groups"]["skill: logical reasoning"] == {"correct": 0, "n": 1, "unparsed": 0}
    assert result["groups"]["task: figure question answering"]["correct"] == 2
    assert [r["id"] for r in lines] == ["1", "2", "10"]
    args = evaluation.parse_args(["m", "--benchmark", "mathvista", "--data", str(tmp_path / "0.json")])
    assert [item["id"] for item in evaluation.load_items(args)[0]] == ["1", "2", "3", "10"]  # there: 1 2 10 3
    assert "(A) Yes\n(B) No" in lines[0]["prompt"]
    assert "(Unit: cm)" in lines[1]["prompt"] and "1 decimal place" in lines[1]["prompt"]


def test_marks_can_be_marked_again(tmp_path):
    """Our own replies.jsonl, with its header, is a file of replies too, and gives the same file again."""
    marked(tmp_path, "wemath", [wemath_rows()], wemath_replies())
    first = (tmp_path / "out" / "replies.jsonl").read_bytes()
    evaluation.main(["--benchmark", "wemath", "--data", str(tmp_path / "0.json"),
                     "--replies", str(tmp_path / "out" / "replies.jsonl"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "replies.jsonl").read_bytes() == first
    with pytest.raises(SystemExit, match="would overwrite"):
        evaluation.main(["--benchmark", "wemath", "--data", str(tmp_path / "0.json"), "--out",
                         str(tmp_path / "out"), "--replies", str(tmp_path / "out" / "replies.jsonl")])


@pytest.mark.parametrize("option,options", [
    ("A. 300, 400;B. 400, 300; C. 3.5; E. none", None), ("A. 0.7; B. .5", ["0.7", ".5"]),
    ("A. 300, 400;B. 400, 300;C. D. 4; E. none", None), ("", None), ("B. 1; A. 2", None),
    ("A:40°\nB:60°", ["40°", "60°"]), ("A. 30, 50.; B. No correct answer", ["30, 50", "No correct answer"])])
def test_options_in(option, options):
    assert evaluation.options_in(option) == options


WE = wemath_rows()
BAD = {  # file name: (content of the data file, of the replies file, words of the message)
    "unknown id": (WE, [{"id": "9steps_1/x", "reply": ""}], "no id '9steps_1/x' in .*0.json"),
    "duplicate reply": (WE, [wemath_replies()[0]] * 2, r"r.jsonl:2: .*no id may come twice"),
    "reply no string": (WE, [{"id": "1", "reply": 5}], r"r.jsonl:1: .*have to be strings"),
    "reply missing": (WE, [{"id": "1"}], r"r.jsonl:1: KeyError\('reply'\)"),
    "reply no object": (WE, "[1]\n", r"r.jsonl:1: "),
    "torn line": (WE, '{"id": "1", "re', r"r.jsonl:1: JSON"),
    "deep line": (WE, "[" * 100_000 + "\n", r"r.jsonl:1: Recursion"),
    "empty replies": (WE, "", "holds no replies"),
    "not JSON": ("{", wemath_replies(), r"0.json: .*: name the testmini.json of wemath with --data"),
    "empty data": ([], wemath_replies(), "0.json has no rows"),
    "number": (5, [], "0.json: .*not iterable: name"),
    "other benchmark": (mathvista_rows(), wemath_replies(), r"0.json: row 1 is malformed \(KeyError\('ID'\)"),
    "no answer": ([WE[0] | {"answer": None}], wemath_replies(), "row 1 is malformed .*no answer"),
    "no step": ([WE[0] | {"key": "2steps_3"}], wemath_replies(), "row 1 is malformed .*no step"),
    "duplicate row": ([WE[0]] * 2, wemath_replies(), "row 2: id '2steps_1/2steps_1' is there twice"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_clear_line(fault, tmp_path):
    data, replies, words = BAD[fault]
    with pytest.raises(SystemExit, match=words) as stopped:
        marked(tmp_path, "wemath", [data], replies)
    assert "\n" not in str(stopped.value) and not (tmp_path / "out").exists()


def test_absent_files_and_models():
    with pytest.raises(SystemExit, match="no.json"):
        evaluation.main(["--benchmark", "wemath", "--data", "no.json", "--replies", "x.jsonl"])
    for flags in ([], ["m", "--replies", "x"]):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(flags)
        assert stopped.value.code == 2


# ---- a model at work
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """6 test problems in their versions, as data and as a We-Math file."""
    folder = tmp_path_factory.mktemp("small")
    data_gen.main(["--out", str(folder / "data"), "--n", "1", "--n_test", "6"])
    shutil.copytree(TINY, folder / "model",
                    ignore=shutil.ignore_patterns("*.py", "*.md", "eval*", "replies*"))
    return folder


def run_on(small, folder, *flags):
    if not folder.exists():
        shutil.copytree(small / "model", folder)
    evaluation.main([str(folder), "--data", str(small / "data"), "--chart", str(folder / "c.png"), *flags])
    return (folder / "replies.jsonl").read_bytes()


def test_batches_do_not_change_replies(small, tmp_path):
    """float32: left padding and company change nothing; one by one, in fives and all at once are the same."""
    flags = "--limit", "2", "--max_new_tokens", "16", "--batch_size"
    one, five, all_ = (run_on(small, tmp_path / size, *flags, size) for size in ("1", "5", "100"))
    assert one == five == all_
    ids = [json.loads(line)["id"] for line in one.decode().splitlines()[1:]]
    assert ids == [f"test-{i:06d}/{v}" for i in range(2) for v in LADDER]


def test_a_killed_run_continues(small, tmp_path, monkeypatch, capsys):
    """Finished items are not decoded again, a torn line is dropped, the final file is the same bytes."""
    flags = ("--max_new_tokens", "8", "--batch_size", "10")
    whole, done, generate = run_on(small, tmp_path / "whole", *flags), [], model.VLM.generate

    def counted(self, batch, *rest):
        if len(done) == 2:
            done.append(0)
            assert len(path.read_bytes().splitlines()) == 1 + 20  # flushed: kill -9 closes no file
            raise KeyboardInterrupt
        done.append(len(batch.input_ids))
        return generate(self, batch, *rest)
    monkeypatch.setattr(model.VLM, "generate", counted)
    path = tmp_path / "killed" / "replies.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_on(small, tmp_path / "killed", *flags)
    with open(path, "a") as f:
        f.write('{"id": "test-000005/text_on')
    assert run_on(small, tmp_path / "killed", *flags) == whole and sum(done) == 36
    done.clear()
    assert run_on(small, tmp_path / "killed", *flags) == whole and not done  # nothing left to decode
    assert run_on(small, tmp_path / "killed", *flags, "--limit", "1") == whole and not done  # nothing is lost
    assert json.load(open(tmp_path / "killed" / "eval.json"))["versions"]["text_only"]["n"] == 1
    capsys.readouterr()
    run_on(small, tmp_path / "killed", "--max_new_tokens", "4", "--batch_size", "100")
    assert "has another max_new_tokens: decoding anew" in capsys.readouterr().out and sum(done) == 36
    assert (tmp_path / "killed" / "replies.jsonl.old").read_bytes() == whole


def test_eval_json_of_the_builtin_benchmark(small, tmp_path):
    run_on(small, tmp_path / "m", "--max_new_tokens", "2")
    assert list(json.load(open(tmp_path / "m" / "eval.json"))) == [
        "benchmark", "versions", "all", "gap", "relative_gap", "seconds"]


def test_a_public_benchmark_with_a_model(small, tmp_path):
    """Pictures are all looked for before anything is decoded, and only inside of their folder."""
    folder, data = tmp_path / "m", write(tmp_path / "set" / "testmini.json", wemath_rows())
    shutil.copytree(small / "model", folder)
    command = [str(folder), "--benchmark", "wemath", "--data", data, "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match="2steps_1/2steps_1: picture .*1-1.png does not exist: .* --images"):
        evaluation.main(command)
    for row in wemath_rows():
        path = tmp_path / "pictures" / row["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 255).save(path)
    evaluation.main([*command, "--images", str(tmp_path / "pictures")])
    assert json.load(open(folder / "wemath" / "eval.json"))["complete_groups"] == 4
    assert len(open(folder / "wemath" / "replies.jsonl").readlines()) == 14
    for name in ("../pictures/x.png", str(tmp_path / "pictures" / "x.png"), "a\\..\\x.png"):
        write(tmp_path / "set" / "testmini.json", [wemath_rows()[0] | {"image_path": name}])
        with pytest.raises(SystemExit, match="lies outside"):
            evaluation.main([*command, "--images", str(tmp_path / "pictures")])


def test_show(small, capsys):
    evaluation.main([str(small / "model"), "--data", str(small / "data"), "--show", "0",
                     "--max_new_tokens", "8"])
    out = capsys.readouterr().out
    assert all(f"\n{version}: " in out for version in LADDER) and "found by the rule" in out


def test_readme_shows_the_wemath_table(tmp_path, monkeypatch, capsys):
    """The pasted table is what the command above it prints for the rows and replies of this file."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "testmini.json", wemath_rows())
    write(tmp_path / "replies.jsonl", wemath_replies())
    evaluation.main("--benchmark wemath --data testmini.json --replies replies.jsonl".split())
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        pasted = re.search(r"<!-- wemath -->\n```\n(.*?)\n```\n<!-- /wemath -->", f.read(), re.S)
    assert pasted and pasted[1] == capsys.readouterr().out.strip()


def test_gold_answers_of_the_real_files_score_100(tmp_path):
    """Through the command: every row of the shipped samples, its gold answer as the reply."""
    if not os.path.isdir(BENCHMARKS):
        pytest.skip("no benchmark files here; name their folder in BENCHMARKS")
    for name, file in (("mathverse", "mathverse_testmini_text_only"), ("mathvista", "mathvista_testmini"),
                       ("wemath", "wemath_testmini")):
        path = os.path.join(BENCHMARKS, f"{file}.sample.json")
        items, _ = evaluation.load_items(evaluation.parse_args(["m", "--benchmark", name, "--data", path]))
        replies = write(tmp_path / f"{name}.jsonl", [{"id": i["id"], "reply": i["answer"]} for i in items])
        evaluation.main(["--benchmark", name, "--data", path, "--replies", replies,
                         "--chart", str(tmp_path / "c.png")])
        rows = [json.loads(line) for line in open(tmp_path / f"{name}_marked" / "replies.jsonl")][1:]
        assert len(rows) == {"mathverse": 40, "mathvista": 40, "wemath": 38}[name]
        assert [r["id"] for r in rows if not r["match"]] == []
        # Options of the rows: each text names its own letter, unless two options are alike.
        for item in items:
            for k, option in enumerate(item["choices"] or ()):
                reply = f"The answer is {option}."
                score = score_answer(reply, item["answer"], item["kind"], item["choices"])
                letter = item["answer"]
                if item["kind"] != "choice":
                    letter = "ABCDEFGH"[item["choices"].index(item["answer"])]
                assert not score.match or "ABCDEFGH"[k] == letter, (item["id"], option)
