"""Read the tools of a chat row: what could be called, what was called, and what came of it.

OpenAI's form is read (``tools``, ``tool_calls``, messages of the role "tool"), and its older one (``functions``,
``function_call``, messages of the role "function"), which becomes the newer.
"""

from __future__ import annotations

import json
from typing import Any

from luthier.ingest.json_types import json_type
from luthier.records.example import Role, Tool, ToolCall

TOOL_ROLES: dict[str, Role] = {"tool": "tool", "function": "tool"}
TOOL_KEYS = ("tools", "functions")
MESSAGE_TOOL_KEYS = {
    "assistant": {"tool_calls", "function_call"},
    "tool": {"tool_call_id", "name"},
    "function": {"name"},
}


def read_tools(fields: dict[str, Any], problems: list[str]) -> tuple[Tool, ...]:
    """Return the tools of a row's ``tools`` and ``functions``; what is wrong with them is added to ``problems``."""
    tools: list[Tool] = []
    for key in TOOL_KEYS:
        given = fields.get(key)
        if given and not isinstance(given, list):
            problems.append(f"{key} is {json_type(given)}, not an array")
        for number, item in enumerate(given if isinstance(given, list) else ()):
            tool = {"type": "function", "function": item} if key == "functions" else item
            if problem := _tool_problem(tool):
                problems.append(f"{key}[{number}] {problem}")
            else:
                tools.append(tool)
    return tuple(tools)


def _tool_problem(tool: Any) -> str | None:
    if not isinstance(tool, dict):
        return f"is {json_type(tool)}, not an object"
    if tool.get("type") != "function":
        return f"has the type {tool.get('type')!r}; only functions are known"
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return "has no function with a name"
    if not isinstance(function.get("parameters", {}), dict):
        return "has parameters that are no JSON schema"
    return None


def read_calls(message: dict[str, Any], asked: set[str], problems: list[str]) -> tuple[ToolCall, ...]:
    """Return the calls that an assistant's turn asks for; their ids are added to ``asked``."""
    given = message.get("tool_calls") or []
    if message.get("function_call"):
        given = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(given, list):
        problems.append(f"has {json_type(given)} for tool_calls, not an array")
        return ()
    calls = []
    for number, item in enumerate(given):
        call = _read_call(item, f"call_{len(asked)}")
        if isinstance(call, str):
            problems.append(f"has tool_calls[{number}], which {call}")
        else:
            asked.add(call.id)
            calls.append(call)
    return tuple(calls)


def _read_call(item: Any, id: str) -> ToolCall | str:
    if not isinstance(item, dict) or item.get("type", "function") != "function":
        return "is no call of a function"
    function = item.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return "has no function with a name"
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return "has arguments that are no JSON"
    if not isinstance(arguments, dict):
        return f"has {json_type(arguments)} for arguments, not an object"
    given = function.get("arguments")
    text = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=str(item.get("id") or id), name=function["name"], arguments=text)


def read_result(message: dict[str, Any], asked: set[str], problems: list[str]) -> dict[str, str | None]:
    """Return which call a message of the role "tool" answers, as far as it says so."""
    id, name = message.get("tool_call_id"), message.get("name")
    if id is not None and (not isinstance(id, str) or id not in asked):
        problems.append(f"has the tool_call_id {id!r}, which no tool call before it has")
    if name is not None and not isinstance(name, str):
        problems.append(f"has {json_type(name)} for name")
    return {} if problems else {"tool_call_id": id, "name": name}
