"""Prompts of the quality tasks: exact lengths, needles where they should be, halves apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.evaluation.prompts.chat_frame import ChatFrame
from saqqara.evaluation.prompts.corpus import pydoc_text
from saqqara.evaluation.prompts.haystack import Haystack, half, read_text
from saqqara.evaluation.prompts.prompt_maker import PromptMaker
from saqqara.evaluation.prompts.words import ADJECTIVES, NOUNS, draw_key, draw_number
from saqqara.evaluation.tasks.longbench import (
    LongBenchTask,
    Record,
    Template,
    cut_middle,
    metric_score,
)
from saqqara.evaluation.tasks.needle import FACT, NeedleTask
from saqqara.evaluation.tasks.perplexity import PerplexityTask
from saqqara.evaluation.tasks.question import Question, found_share
from saqqara.evaluation.tasks.ruler import RulerTask
from saqqara.evaluation.tasks.ruler_tasks import NUM_COMMON, TASKS


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.load(demo_model)


def test_the_halves_of_a_text_have_nothing_in_common() -> None:
    text = pydoc_text()
    tune, report = half(text, "tune"), half(text, "report")
    assert tune + report == text
    assert tune.endswith("\n")
    assert abs(len(tune) - len(report)) < 1000
    with pytest.raises(ValueError, match="split: must be tune or report"):
        half(text, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too few lines"):
        half("one line", "tune")


def test_a_haystack_of_own_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "a.md").write_text("one\n")
    (tmp_path / "c.py").write_text("not this")
    assert read_text(tmp_path) == "one\n\n\ntwo\n"
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files that end in"):
        read_text(tmp_path / "empty")


def test_pieces_and_boundaries() -> None:
    hay = Haystack(tuple(range(100)), (0, 10, 30, 31, 70))
    assert hay.boundary(0.0) == 0
    assert hay.boundary(0.2) == 10  # 20 is as far from 10 as from 30: the earlier
    assert hay.boundary(0.5) == 31
    assert hay.boundary(1.0) == 100
    placed = hay.insert([(0.3, [-1, -2]), (0.0, [-3]), (0.3, [-4])])
    assert placed[:3] == [-3, 0, 1]
    assert placed[31:34] == [-1, -2, -4]
    assert [token for token in placed if token >= 0] == list(range(100))
    for seed in range(20):
        piece = hay.piece(60, np.random.default_rng(seed))
        assert len(piece.token_ids) == 60
        assert piece.token_ids[0] in (0, 10, 30, 31)
        first = piece.token_ids[0]
        assert piece.ends == tuple(e - first for e in hay.ends if first <= e <= first + 60)
    with pytest.raises(ValueError, match="100 tokens and 101 are needed"):
        hay.piece(101, np.random.default_rng(0))


def test_sentences_and_lines_end_where_they_do(tokenizer: Tokenizer) -> None:
    text = "One is here. Two is there.\nThree?\n"
    hay = Haystack.of_text(tokenizer, text)
    beginnings = [tokenizer.decode(hay.token_ids[:end]) for end in hay.ends]
    assert beginnings[0] == ""
    assert "One is here." in beginnings
    assert any(b.rstrip("\n") == "One is here. Two is there." for b in beginnings)
    assert beginnings[-1] == text


def test_the_frame_is_that_of_the_chat_template(tokenizer: Tokenizer) -> None:
    text = "What is a magic number?"
    frame = ChatFrame.of(tokenizer)
    ours = frame.wrap(tokenizer.encode(text, add_special_tokens=False))
    assert list(ours) == tokenizer.apply_chat([{"role": "user", "content": text}])
    assert len(frame.wrap([1, 2], [3])) == frame.num_tokens + 3
    assert ChatFrame.plain(tokenizer) == ChatFrame(tuple(tokenizer.encode("")), ())


def test_needle_prompts_have_the_length_and_the_needle_at_its_depth(tokenizer: Tokenizer) -> None:
    task = NeedleTask(lengths=(300, 1000), depths=(0.0, 0.3, 0.8, 1.0), num_samples=3, seed=5)
    questions = task.questions(tokenizer)
    assert len(questions) == 2 * 4 * 3
    assert len({q.references for q in questions}) == 24
    for q in questions:
        length, depth, key = (q.details[name] for name in ("length", "depth", "key"))
        assert len(q.token_ids) == length
        text = tokenizer.decode(q.token_ids)
        value = q.references[0]
        fact = FACT.format(key=key, value=value)
        assert text.count(fact) == 1
        assert text.count(value) == 1  # so the haystack does not give it away
        assert text.count(key) == 3  # fact, question, beginning of the answer
        before, after = (len(tokenizer.encode(part)) for part in text.split(fact))
        # The text lies between an introduction and a question of some 60 tokens each; lines of the
        # text have at most some 40 tokens, and the needle stands at the end of the nearest.
        room = before + after - 120
        assert abs((before - 60) - depth * room) < 60
        assert text.rstrip().endswith(f"The magic number of {key} is")
    assert [q.token_ids for q in task.questions(tokenizer)] == [q.token_ids for q in questions]


def test_values_that_stand_in_the_text_are_drawn_again(tokenizer: Tokenizer) -> None:
    hay = Haystack.of_text(tokenizer, "Call 1234567 now.\n" * 50)
    maker = PromptMaker(tokenizer, ChatFrame.of(tokenizer), hay)
    generator = np.random.default_rng(0)
    texts = ("Which?", "It is")
    facts = [(0.5, "A fact.\n")]
    assert maker.hidden(200, facts, texts, ["1234567"], generator) is None
    found = maker.hidden(200, facts, texts, ["7654321"], generator)
    assert found is not None
    assert len(found) == 200


def test_lengths_without_room_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lengths: 50 tokens leave no room"):
        NeedleTask(lengths=(50,)).questions(tokenizer)
    with pytest.raises(ValueError, match="depths: must lie in"):
        NeedleTask(depths=(1.5,)).questions(tokenizer)
    with pytest.raises(ValueError, match="too few for a list of common words"):
        RulerTask(tasks=("common_words",), lengths=(150,)).questions(tokenizer)
    with pytest.raises(ValueError, match="too few to tell"):
        RulerTask(tasks=("frequent_words",), lengths=(100,)).questions(tokenizer)
    with pytest.raises(ValueError, match="unknown 'niah'; known: niah_single"):
        RulerTask(tasks=("niah",)).questions(tokenizer)


def test_words_and_numbers() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    generator = np.random.default_rng(0)
    assert all(len(draw_number(generator)) == 7 for _ in range(100))
    assert len({draw_key(generator) for _ in range(100)}) > 90


@pytest.mark.parametrize("task", TASKS)
def test_ruler_prompts_fit_and_hold_what_is_asked_for(task: str, tokenizer: Tokenizer) -> None:
    for question in RulerTask(tasks=(task,), lengths=(512, 1024), num_samples=2).questions(
        tokenizer
    ):
        length = 512 if len(question.token_ids) <= 512 else 1024
        text = tokenizer.decode(question.token_ids)
        assert question.group == task
        assert len(set(question.references)) == len(question.references)
        assert all(reference in text for reference in question.references)
        if task.endswith("_words"):
            assert length - 25 * NUM_COMMON < len(question.token_ids) <= length
        else:
            assert len(question.token_ids) == length


def test_ruler_tasks_draw_on_their_own(tokenizer: Tokenizer) -> None:
    alone = RulerTask(("variable_tracking",), (512,), 1).questions(tokenizer)
    together = RulerTask(("niah_single", "variable_tracking"), (512,), 1).questions(tokenizer)
    assert alone[0].token_ids == together[1].token_ids


def test_variables_are_assigned_in_the_order_of_the_text(tokenizer: Tokenizer) -> None:
    question = RulerTask(("variable_tracking",), (512,), 1).questions(tokenizer)[0]
    text = tokenizer.decode(question.token_ids)
    sources = [question.details["value"], *(f"VAR {name}" for name in question.references)]
    at = [
        text.index(f"VAR {name} = {source}")
        for name, source in zip(question.references, sources, strict=False)
    ]
    assert at == sorted(at)


def test_lists_of_words_have_the_frequencies(tokenizer: Tokenizer) -> None:
    common = RulerTask(("common_words",), (2048,), 1).questions(tokenizer)[0]
    lines = tokenizer.decode(common.token_ids).split("\n")
    words = [line.split(". ")[1] for line in lines if line.split(". ")[0].isdigit()]
    times = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    assert {word for _, word in times[:NUM_COMMON]} == set(common.references)
    assert {count for count, _ in times[:NUM_COMMON]} == {30}
    assert {count for count, _ in times[NUM_COMMON:]} == {3}

    frequent = RulerTask(("frequent_words",), (1024,), 1).questions(tokenizer)[0]
    codes = tokenizer.decode(frequent.token_ids).split()
    counts = [codes.count(code) for code in ("...", *frequent.references)]
    assert counts == frequent.details["times"][:4]
    # zeta(2) = 1.645: ranks 1 to 4 have 1, 1/4, 1/9, 1/16 of what the first has.
    assert counts[1:] == pytest.approx([counts[0] / 4, counts[0] / 9, counts[0] / 16], abs=1)


def test_the_share_of_references_found() -> None:
    question = Question((), ("ABC", "def", "x"), "g", 1)
    assert found_share(question, "abc then def") == pytest.approx(2 / 3)


def test_perplexity_windows() -> None:
    hay = Haystack(tuple(range(1, 101)), (0,))
    task = PerplexityTask(context_tokens=20, continuation_tokens=5, num_samples=10)
    windows = task.windows(hay, ())
    assert [context[0] for context, _ in windows] == [1, 26, 51, 76]
    assert all(len(context) == 20 and len(rest) == 5 for context, rest in windows)
    assert all(rest[0] == context[-1] + 1 for context, rest in windows)
    assert windows[0][1] == (21, 22, 23, 24, 25)
    spread = PerplexityTask(20, 5, num_samples=2).windows(hay, ())
    assert [context[0] for context, _ in spread] == [1, 51]
    with_bos = task.windows(hay, (0,))
    assert with_bos[0] == ((0, *range(1, 20)), tuple(range(20, 25)))
    close = PerplexityTask(20, 5, stride=10, num_samples=3).windows(hay, ())
    assert [context[0] for context, _ in close] == [1, 11, 21]
    with pytest.raises(ValueError, match="does not fit this half"):
        PerplexityTask(100, 5).windows(hay, ())


# LongBench ----------------------------------------------------------------------------------------

RECORD = {
    "input": "Who {is} it?",
    "context": "It was {Ada}. " * 300,
    "answers": ["Ada", "Ada Lovelace"],
    "all_classes": None,
    "length": 600,
    "dataset": "qasper",
    "language": "en",
    "_id": "7",
}


def write_data(folder: Path, **files: list[Any]) -> None:
    for name, records in files.items():
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def test_longbench_records_become_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trec = {**RECORD, "all_classes": ["City", "Person"], "answers": ["City"], "context": "c"}
    write_data(tmp_path, qasper_e=[RECORD] * 3, trec=[trec])
    task = LongBenchTask(tmp_path, max_prompt_tokens=500, num_samples=2)
    long, again, short = task.questions(tokenizer)
    assert [q.group for q in (long, again, short)] == ["qasper_e", "qasper_e", "trec"]
    assert len(long.token_ids) == 500
    assert long.details["cut_tokens"] > 0
    text = tokenizer.decode(long.token_ids)
    assert "Who {is} it?" in text
    assert "It was {Ada}." in text
    assert long.references == ("Ada", "Ada Lovelace")
    assert metric_score(long, "ada lovelace!") == 1.0
    assert "assistant" not in tokenizer.decode(short.token_ids)  # no chat template for trec
    assert metric_score(short, "\nCity\nPerson") == 1.0
    assert metric_score(short, "City or Person") == 0.5


def test_own_templates_replace_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_data(tmp_path, qasper=[RECORD], mine=[RECORD])
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("mine: {template: 'Say {input}', max_tokens: 3, metric: count, chat: false}")
    task = LongBenchTask(tmp_path, ("mine",), prompts)
    assert tokenizer.decode(task.questions(tokenizer)[0].token_ids) == "Say Who {is} it?"
    with pytest.raises(ValueError, match="no template for the data set 'mine'"):
        LongBenchTask(tmp_path, ("mine",)).questions(tokenizer)
    prompts.write_text("mine: {template: a, max_tokens: 3, metric: bleu}")
    with pytest.raises(ValueError, match="prompts: mine: metric: "):
        task.questions(tokenizer)
    prompts.write_text("[]")
    with pytest.raises(ValueError, match="must map data sets"):
        task.questions(tokenizer)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([RECORD, "{"], "line 2: "),
        ([{**RECORD, "answers": []}], "line 1: answers: "),
        ([{k: v for k, v in RECORD.items() if k != "context"}], "line 1: context is required"),
        ([""], "has no records"),
    ],
)
def test_wrong_records_are_named(
    lines: list[Any], said: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_data(tmp_path, qasper=lines)
    with pytest.raises(ValueError, match=said):
        LongBenchTask(tmp_path).questions(tokenizer)
    with pytest.raises(ValueError, match="cannot read"):
        LongBenchTask(tmp_path, ("hotpotqa",)).questions(tokenizer)
    with pytest.raises(ValueError, match=r"no \.jsonl files"):
        LongBenchTask(tmp_path / "none").questions(tokenizer)


def test_long_prompts_lose_their_middle() -> None:
    assert cut_middle(list(range(10)), 10) == list(range(10))
    assert cut_middle(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert cut_middle(list(range(10)), 4) == [0, 1, 8, 9]
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        cut_middle([1, 2, 3], 1)


def test_templates_know_two_names() -> None:
    template = Template(template="{contex}", max_tokens=1, metric="count")
    record = Record(input="a", context="b", answers=("c",))
    with pytest.raises(ValueError, match=r"knows \{context\} and \{input\}, not \{contex\}"):
        template.fill(record)
