"""The tools of a request: which the model is shown, which it may call, and what its answer is bound to.

A chat template has to know tools for a model to use them; how its calls are read is in
:mod:`luthier.templates.tool_formats`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from luthier.llm.grammar.constraints import ANY_OBJECT, json_constraint
from luthier.llm.grammar.schema import SchemaError
from luthier.llm.grammar.tool_calls import may_call, must_call
from luthier.llm.tool_reader import ToolReader
from luthier.records.completion import Constraint
from luthier.records.example import Tool
from luthier.serve.api_error import ApiError
from luthier.serve.chat_request import AllowedChoice, ChatRequest, FunctionParam, NamedTool
from luthier.templates.chat_format import ChatFormat
from luthier.templates.tool_formats import ToolFormat

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMA_PARAM = "response_format.json_schema.schema"


@dataclass(frozen=True)
class ToolUse:
    """What a model may do with the tools of a request.

    ``shown`` are in its prompt, ``functions`` may be called: their names with the schemas of their arguments.
    ``required`` says that it must call one, ``several`` that it may call more than one.
    """

    tool_format: ToolFormat
    shown: tuple[Tool, ...]
    functions: tuple[tuple[str, Any], ...]
    required: bool
    several: bool
    strict: bool

    def reader(self) -> ToolReader:
        """Return what reads an answer."""
        return ToolReader(self.tool_format, [name for name, _ in self.functions], several=self.several)


def tool_use(request: ChatRequest, chat_format: ChatFormat) -> ToolUse | None:
    """Return what a model may do with the tools of a request; None where it has none to call.

    Raises:
        ApiError: 400, where the model cannot use tools, a choice names none, or a strict schema cannot be decoded by.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            _refuse("tool_choice", "there are no tools to choose from")
        return None
    if choice == "none":
        return None
    if chat_format.tool_template is None:
        _refuse("tools", "the chat template of this model knows no tools", code="unsupported_parameter")
    if chat_format.tool_format is None:
        _refuse("tools", "how this model writes calls is not known here", code="unsupported_parameter")
    functions = {tool.function.name: (index, tool.function) for index, tool in enumerate(request.tools)}
    allowed = _allowed(choice, list(functions))
    some = {name: functions[name] for name in allowed}
    return ToolUse(
        tool_format=chat_format.tool_format,
        shown=tuple(tool.as_tool() for tool in request.tools),
        functions=tuple((name, _schema(index, function)) for name, (index, function) in some.items()),
        required=_is_required(choice),
        several=request.parallel_tool_calls is not False and chat_format.tool_format.layout != "alone",
        strict=len(some) < len(functions) or any(function.strict for _, function in some.values()),
    )


def constraint_of(request: ChatRequest, tools: ToolUse | None) -> Constraint | None:
    """Return what a request binds its answer to; None where any text will do.

    Raises:
        ApiError: 400, naming the schema that cannot be decoded by.
    """
    schema = _response_schema(request)
    try:
        if tools is None:
            return None if schema is None else json_constraint(schema)
        if tools.required:
            return must_call(tools.tool_format, tools.functions, several=tools.several)
        if schema is None and not tools.strict:
            return None
        return may_call(tools.tool_format, tools.functions, several=tools.several, schema=schema)
    except SchemaError as error:
        param = "tools" if schema is None else SCHEMA_PARAM
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_json_schema") from error


def _response_schema(request: ChatRequest) -> Any:
    """Return the schema that ``response_format`` asks for; None where it asks for text."""
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return ANY_OBJECT
    given = asked.json_schema or {}
    param = "response_format.json_schema" if asked.json_schema is None else "response_format.json_schema.name"
    if not isinstance(given.get("name"), str):
        raise ApiError(400, f"{param}: Field required", param=param, code="missing_required_parameter")
    return True if given.get("schema") is None else given["schema"]


def _allowed(choice: Any, names: list[str]) -> list[str]:
    """Return the names of the functions that a choice allows, in the order of the tools."""
    if isinstance(choice, NamedTool):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedChoice):
        chosen = [tool.function.name for tool in choice.allowed_tools.tools]
    else:
        return names
    if unknown := [name for name in chosen if name not in names]:
        _refuse("tool_choice", f"{unknown[0]!r} is not among the tools")
    if not chosen:
        _refuse("tool_choice", "it allows no tool")
    return [name for name in names if name in chosen]


def _is_required(choice: Any) -> bool:
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool)


def _schema(index: int, function: FunctionParam) -> Any:
    """Return the schema of a function's arguments; that of any object, where it is lax and cannot be decoded by."""
    schema = NO_ARGUMENTS if function.parameters is None else function.parameters
    param = f"tools[{index}].function.parameters"
    if schema.get("type", "object") != "object":
        _refuse(param, "the arguments of a function are an object")
    try:
        json_constraint({"type": "object"} | schema)
    except SchemaError as error:
        if function.strict:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_json_schema") from error
        return ANY_OBJECT
    return {"type": "object"} | schema


def _refuse(param: str, why: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, f"{param}: {why}.", param=param, code=code)
