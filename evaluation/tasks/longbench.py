"""LongBench (arXiv 2308.14508) from its official JSONL files, with prompts in our own words.

A record has `input`, `context`, `answers`, `all_classes`, `length`, `dataset`, `language`, `_id`.
The templates are in `longbench.yaml`, so scores compare retention settings with each other, and not
with published tables. A prompt that is too long loses its middle, as in the paper.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.settings import validation_message
from saqqara.evaluation.prompts.chat_frame import ChatFrame
from saqqara.evaluation.prompts.prompt_maker import settings_of
from saqqara.evaluation.result import Result
from saqqara.evaluation.session import Session

from . import text_metrics
from .question import Question, ask

Model = TypeVar("Model", bound=BaseModel)
PROMPTS_FILE = Path(__file__).with_name("longbench.yaml")

Metric = Literal[
    "qa_f1",
    "qa_f1_zh",
    "rouge_l",
    "rouge_l_zh",
    "classification",
    "retrieval",
    "count",
    "code_similarity",
]


class Template(BaseModel):
    """How one data set is asked and scored; see `longbench.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str
    max_tokens: int = Field(ge=1)
    metric: Metric
    chat: bool = True
    first_line: bool = False

    def fill(self, record: "Record") -> str:
        """The message; braces in a record stay as they are."""
        message = ""
        rest = self.template
        while "{" in rest:
            before, _, rest = rest.partition("{")
            name, _, rest = rest.partition("}")
            if name not in ("context", "input"):
                raise ValueError(
                    f"template: knows {{context}} and {{input}}, not {'{' + name + '}'}"
                )
            message += before + (record.context if name == "context" else record.input)
        return message + rest


class Record(BaseModel):
    """One line of a data file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: str
    context: str
    answers: tuple[str, ...] = Field(min_length=1)
    all_classes: tuple[str, ...] | None = None
    id: str | None = Field(None, alias="_id")


@dataclass(frozen=True, slots=True)
class LongBenchTask:
    """The first records of each data set.

    Attributes:
        data: folder of `<data set>.jsonl` files; `<data set>_e.jsonl` is asked like `<data set>`.
        datasets: names of files, without `.jsonl`; None means all that are there.
        prompts: YAML file of templates that replace ours, data set by data set.
        max_prompt_tokens: longer prompts lose their middle.
        num_samples: records of each data set at most.
    """

    data: Path
    datasets: tuple[str, ...] | None = None
    prompts: Path | None = None
    max_prompt_tokens: int = 3500
    num_samples: int = 10

    name = "longbench"

    def questions(self, tokenizer: Tokenizer) -> list[Question]:
        """The prompts, data set by data set.

        Raises:
            ValueError: no such data set, a bad record (with file and line), or a bad template.
        """
        templates = read_templates(self.prompts)
        chat, plain = ChatFrame.of(tokenizer), ChatFrame.plain(tokenizer)
        found = []
        for dataset in self.datasets or _datasets(self.data):
            template = templates.get(dataset) or templates.get(dataset.removesuffix("_e"))
            if template is None:
                raise ValueError(f"prompts: no template for the data set {dataset!r}")
            frame = chat if template.chat else plain
            for record in read_records(self.data / f"{dataset}.jsonl", self.num_samples):
                ids = tokenizer.encode(template.fill(record), add_special_tokens=False)
                message = cut_middle(ids, self.max_prompt_tokens - frame.num_tokens)
                details = {
                    "metric": template.metric,
                    "classes": list(record.all_classes or ()),
                    "first_line": template.first_line,
                    "id": record.id,
                    "cut_tokens": len(ids) - len(message),
                }
                token_ids = frame.wrap(message)
                found.append(
                    Question(token_ids, record.answers, dataset, template.max_tokens, details)
                )
        return found

    def run(self, session: Session) -> Result:
        """Ask all; the score is the data set's metric against the best of the references."""
        questions = self.questions(session.tokenizer)
        return ask(session, self.name, settings_of(self), questions, metric_score)


def metric_score(question: Question, answer: str) -> float:
    """The best score that an answer has with one of the references."""
    details = question.details
    if details["first_line"]:
        answer = answer.lstrip("\n").split("\n")[0]
    if details["metric"] == "classification":
        metric = partial(text_metrics.classification, classes=details["classes"])
    else:
        metric = getattr(text_metrics, details["metric"])
    return max(metric(answer, reference) for reference in question.references)


def cut_middle(ids: list[int], num_tokens: int) -> list[int]:
    """The first and the last tokens, half and half, of a prompt that is too long.

    Raises:
        ValueError: nothing would be left.
    """
    if num_tokens < 2:
        raise ValueError("max_prompt_tokens: is all taken by the chat template; give more")
    if len(ids) <= num_tokens:
        return ids
    first = num_tokens - num_tokens // 2
    return [*ids[:first], *ids[len(ids) - num_tokens // 2 :]]


def read_templates(own: Path | None) -> dict[str, Template]:
    """Our templates, with those of an own file in their place.

    Raises:
        ValueError: a file cannot be read, or a template is wrong; names data set and field.
    """
    found = {}
    for file in (PROMPTS_FILE, *([own] if own else [])):
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"prompts: cannot read {file}: {error}") from None
        if not isinstance(data, Mapping):
            raise ValueError(f"prompts: {file} must map data sets to templates")
        for dataset, fields in data.items():
            found[str(dataset)] = _checked(Template, fields, f"prompts: {dataset}")
    return found


def read_records(file: Path, limit: int) -> list[Record]:
    """The first records of a file.

    Raises:
        ValueError: the file cannot be read, or a line is no record; names the line.
    """
    found: list[Record] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(found) == limit:
                    break
                if line.strip():
                    found.append(_checked(Record, _json(line), f"{file}: line {number}"))
    except OSError as error:
        raise ValueError(f"data: cannot read {file}: {error.strerror}") from None
    if not found:
        raise ValueError(f"data: {file} has no records")
    return found


def _datasets(folder: Path) -> list[str]:
    found = sorted(file.stem for file in folder.glob("*.jsonl"))
    if not found:
        raise ValueError(f"data: there are no .jsonl files in {folder}")
    return found


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line  # the record's own check says what is wrong


def _checked(model: type[Model], data: Any, where: str) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {validation_message(error)}") from None
