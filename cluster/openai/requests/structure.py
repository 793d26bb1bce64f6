"""An answer's form, in OpenAI's words (`response_format`) and in vLLM's (`structured_outputs`)."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saqqara.cluster.openai.fields import only

_GUIDED = "it is structured_outputs now"


class JsonSchemaFormat(BaseModel):
    """The schema of `response_format`; the answer is held to it whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`: text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('type "json_schema" needs json_schema: {"name": ..., "schema": ...}')
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f'json_schema needs type "json_schema", not "{self.type}"')
        return self

    @property
    def structured_outputs(self) -> dict[str, Any] | None:
        """The same in `StructuredOutputs`' words; None for text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return {"json_object": True}
        return {"json": self.json_schema.json_schema}


class StructureFields(BaseModel):
    """The fields of a request that constrain its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None

    # What vLLM called it before.
    guided_json: Annotated[Any, only(why=f'{_GUIDED}: {{"json": SCHEMA}}')] = None
    guided_regex: Annotated[Any, only(why=f'{_GUIDED}: {{"regex": "..."}}')] = None
    guided_choice: Annotated[Any, only(why=f'{_GUIDED}: {{"choice": [...]}}')] = None
    guided_grammar: Annotated[Any, only(why=f'{_GUIDED}: {{"grammar": "..."}}')] = None
    guided_whitespace_pattern: Annotated[
        Any, only(why=f'{_GUIDED}: {{"whitespace_pattern": "..."}}')
    ] = None
    guided_decoding_backend: Annotated[Any, only(why="llguidance does all of it")] = None
    structural_tag: Annotated[Any, only(why="structured_outputs has a grammar for it")] = None

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        if self.structured_outputs and self._of_format is not None:
            raise ValueError("structured_outputs and response_format exclude each other; give one")
        return self

    @property
    def _of_format(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.structured_outputs

    @property
    def structure_field(self) -> str:
        """The field that says what the answer must look like."""
        return "structured_outputs" if self._of_format is None else "response_format"

    @property
    def structure(self) -> dict[str, Any] | None:
        """What the answer must look like, as `StructuredOutputs` reads it; None: no matter how."""
        return self._of_format or self.structured_outputs or None
