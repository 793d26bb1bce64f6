"""What tiny models need for tools: a template that knows them, and answers that are given."""

from typing import Any

Json = dict[str, Any]

# Hermes' way, cut down; its markers make the parsers be chosen. What has nothing to do with tools
# or thoughts is written as by `byte_llama.CHAT_TEMPLATE`.
TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments.city }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}<think>{{ '\n' }}{% endif %}"
    "{% endif %}"
)

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "clock", "parameters": {
    "type": "object", "properties": {}, "additionalProperties": False}}}  # fmt: skip
NAMED: Json = {"type": "function", "function": {"name": "weather"}}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'


def answering(text: str) -> Json:
    """Fields of a request that make any model answer so."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 400}
