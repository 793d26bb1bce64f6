"""What `make demo` asks, and how it counts what is found; no engine runs here."""

import json
from pathlib import Path

import pytest


def test_at_least_a_hundred_facts_are_asked_for_in_prompts_of_1500_to_3000_tokens() -> None:
    from demo import NUM_DOCUMENTS, prompt_lengths
    from harness.demo_documents import FACTS_PER_DOCUMENT

    lengths = prompt_lengths(NUM_DOCUMENTS)
    assert (len(lengths), min(lengths), max(lengths)) == (NUM_DOCUMENTS, 1500, 3000)
    assert NUM_DOCUMENTS * FACTS_PER_DOCUMENT >= 100


def test_each_fact_stands_once_in_the_text(demo_model: Path) -> None:
    from harness.demo_documents import FACTS_PER_DOCUMENT, make_documents

    from saqqara.cluster.chat import ChatOptions
    from saqqara.cluster.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(demo_model)
    documents = make_documents(tokenizer, [700, 900])
    assert documents == make_documents(tokenizer, [700, 900])
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    for document, length in zip(documents, (700, 900), strict=True):
        tokens = tokenizer.apply_chat(document.messages, options)
        assert abs(len(tokens) - length) <= 16
        text, _, question = document.messages[0]["content"].partition("What does the parcel")
        assert len(document.facts) == FACTS_PER_DOCUMENT
        for fact in document.facts:
            assert text.count(fact) == 1
            assert fact not in question
        assert document.messages[1]["content"].removeprefix("The ") in text


def test_facts_count_where_the_answer_gives_them_in_full(tmp_path: Path) -> None:
    from harness.demo_documents import Document, facts_found

    facts = ("weighs 4711 grams", "costs 8000 crowns", "comes from Oslo", "goes to Marta")
    document = Document(({"role": "assistant", "content": "The parcel red-fox"},), facts)
    assert document.found(f" {facts[0]}, {facts[1]}, {facts[2]} and {facts[3]}.") == 4
    assert document.found(" weighs 8000 grams, costs 4711 crowns and comes from Oslo.") == 1
    assert document.found(" is from Oslo and belongs to Marta.") == 0
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"line": 2, "text": " goes to Marta"}) + "\n", "utf-8")
    with pytest.raises(ValueError, match="line 1 of the input has no answer"):
        facts_found(results, [document, document])
