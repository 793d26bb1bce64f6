"""What `make demo` asks, and how it counts what is found; no engine runs here.

The scripts in `benchmarks/` find each other by their folder, so it joins the path for this file.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_at_least_a_hundred_facts_are_asked_for_in_prompts_of_1500_to_3000_tokens() -> None:
    from demo import NUM_DOCUMENTS, prompt_lengths
    from demo_documents import FACTS_PER_DOCUMENT

    lengths = prompt_lengths(NUM_DOCUMENTS)
    assert (len(lengths), min(lengths), max(lengths)) == (NUM_DOCUMENTS, 1500, 3000)
    assert NUM_DOCUMENTS * FACTS_PER_DOCUMENT >= 100


def test_each_fact_stands_once_in_the_text_and_is_asked_for(demo_model: Path) -> None:
    from demo_documents import make_documents

    from saqqara.cluster.chat_template import ChatOptions
    from saqqara.cluster.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(demo_model)
    documents = make_documents(tokenizer, [700, 900])
    assert documents == make_documents(tokenizer, [700, 900])
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    for document, length in zip(documents, (700, 900), strict=True):
        tokens = tokenizer.apply_chat(document.messages, options)
        assert abs(len(tokens) - length) <= 16
        text, _, question = document.messages[0]["content"].partition("Complete these sentences")
        for sentence, number in zip(document.sentences, document.numbers, strict=True):
            assert text.count(f"{sentence} {number}.") == 1
            assert len(re.findall(number, text)) == 1
            assert f"{sentence} ..." in question
            assert number not in question
        assert document.messages[1] == {"role": "assistant", "content": document.sentences[0]}


def test_a_fact_counts_where_its_own_number_follows_its_sentence(tmp_path: Path) -> None:
    from demo_documents import Document, facts_found

    sentences = ("The train to Oslo has the number", "The phone number of Marta is")
    answer = {"role": "assistant", "content": sentences[0]}
    document = Document((answer,), sentences, ("12345", "67890"))
    assert document.found(" 12345.\nThe phone number of Marta is 67890.") == 2
    assert document.found(" 67890.\nThe phone number of Marta is 12345.") == 0
    assert document.found(" 12345.\nThe phone number of Marta is unknown: 67890.") == 1
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"line": 2, "text": " 12345."}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 of the input has no answer"):
        facts_found(results, [document, document])
