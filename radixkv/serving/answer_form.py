"""What form an answer must have: a grammar for it, and the tools whose calls are looked for in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from radixkv.engine.outputs import RequestOutput
from radixkv.serving.answer_reader import AnswerReader
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.errors import bad_request
from radixkv.serving.grammars import Grammar, of_json_object, of_json_schema, of_lark, of_regex, of_tools
from radixkv.serving.own_form import reader_of
from radixkv.serving.tool_calls import Parsed


class ToolUse(NamedTuple):
    """The tools of a request, by name with the schemas of their arguments; `forced` are those of which one must be
    called, if any."""

    schemas: dict[str, dict[str, Any]]
    forced: tuple[str, ...] = ()
    parallel: bool = True

    def reader(self, tokenizer: Any) -> AnswerReader:
        """Reads one answer of a model with `tokenizer`, and finds the calls in it that the request allows."""
        return reader_of(tokenizer, tuple(self.schemas), parallel=self.parallel)

    def parsed(self, tokenizer: Any, output: RequestOutput) -> Parsed:
        """A whole answer, taken apart into text and calls."""
        reader = self.reader(tokenizer)
        return Parsed.of(reader.push(output.text or "") + reader.finish(output.token_ids))


def grammar_of(body: GenerationBody, response_format: Any | None, tools: ToolUse) -> Grammar | None:
    """The grammar that a request asks for; None if it asks for none. Raises: ApiError if it asks for several."""
    found: list[Grammar] = []
    if tools.forced:
        found.append(of_tools([(name, tools.schemas[name]) for name in tools.forced], "tools"))
    if response_format is not None and response_format.type == "json_object":
        found.append(of_json_object("response_format"))
    if response_format is not None and response_format.type == "json_schema":
        schema = None if response_format.json_schema is None else response_format.json_schema.schema_
        if schema is None:
            raise bad_request("response_format.json_schema must have a schema", "response_format")
        found.append(of_json_schema(schema, "response_format"))
    if body.regex is not None:
        found.append(of_regex(body.regex, "regex"))
    if body.grammar is not None:
        found.append(of_lark(body.grammar, "grammar"))
    if len(found) > 1:
        asked = " and ".join(grammar.param for grammar in found)
        raise bad_request(f"{asked} each ask for a form of the answer; give one of them", found[1].param)
    return found[0] if found else None
