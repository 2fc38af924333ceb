"""JSON Schema → rules: whatever the rules match is JSON that the schema accepts.

What is matched may be less than what the schema accepts: properties come in the order of the schema, objects with
named properties get no others, and numbers have no exponents where they have bounds. A keyword that would need more
than that is refused by name. (https://json-schema.org/draft/2020-12/json-schema-validation)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from luthier.errors import InputError
from luthier.llm.grammar.expressions import (
    EMPTY,
    IMPOSSIBLE,
    Expression,
    Grammar,
    Reference,
    concat,
    either,
    repeat,
)
from luthier.llm.grammar.json_text import DIGITS, JsonRules, json_literal
from luthier.llm.grammar.numbers import Bound, integer_between, number_between
from luthier.llm.grammar.patterns import PatternError, read_format, read_pattern

MAX_DEPTH = 60
MAX_PARTS = 10_000  # schemas and enumerated values in all
MAX_LENGTH = 10_000
MAX_EXACT = 10**15
ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "discriminator", "contentMediaType"),
    }
)
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
OF_TYPE["integer"] = OF_TYPE["number"]
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
CHOICES = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")
KNOWN = ANNOTATIONS.union({"type"}, CHOICES, *OF_TYPE.values())
JSON_TYPES: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}


class SchemaError(InputError):
    """A schema that is none, or that cannot be decoded by."""


def schema_rules(grammar: Grammar, schema: Any) -> Expression:
    """Write the rules of a schema into a grammar, and return what matches a value of it.

    Raises:
        SchemaError: saying where the schema is wrong, or has what cannot be decoded by.
    """
    return _Compiler(grammar, schema).value(schema, "$")


class _Compiler:
    def __init__(self, grammar: Grammar, root: Any) -> None:
        self._grammar = grammar
        self._root = root
        self._json = JsonRules(grammar)
        self._references: dict[str, Expression] = {}
        self._open: list[str] = []
        self._depth = 0
        self._parts = 0
        self._of_type: dict[str, Callable[[dict[str, Any], str], Expression]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda *_: either("true", "false"),
            "null": lambda *_: concat("null"),
        }

    def value(self, schema: Any, place: str) -> Expression:
        """Return what matches a value of the schema at a place."""
        self._count(1, place)
        if schema is True or schema == {}:
            return self._json.value
        if schema is False:
            return IMPOSSIBLE
        if not isinstance(schema, dict):
            raise SchemaError(f"{place}: a schema must be an object or a boolean.")
        if unknown := [key for key in schema if key not in KNOWN and not key.startswith("x-")]:
            raise SchemaError(f"{place}: {', '.join(map(repr, unknown))} cannot be decoded by.")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SchemaError(f"{place}: the schema is nested deeper than {MAX_DEPTH} levels.")
        try:
            return self._grammar.rule(place.rpartition("/")[2], self._constrained(schema, place))
        finally:
            self._depth -= 1

    def _constrained(self, schema: dict[str, Any], place: str) -> Expression:
        used = [key for key in CHOICES if key in schema]
        if not used:
            return either(*(self._of_type[name](schema, place) for name in self._types(schema, place)))
        if len(used) > 1:
            raise SchemaError(f"{place}: {' and '.join(used)} cannot be decoded by together.")
        others = [key for key in schema if key not in ANNOTATIONS and key not in used and key != "type"]
        if others:
            raise SchemaError(f"{place}: {', '.join(others)} beside {used[0]} cannot be decoded by.")
        if used[0] in ("enum", "const"):
            return self._enumerated(schema, place)
        if "type" in schema and used[0] != "$ref":
            options = schema[used[0]] if isinstance(schema[used[0]], list) else []
            typed = [{"type": schema["type"], **one} if isinstance(one, dict) else one for one in options]
            schema = {**schema, used[0]: typed}
        elif "type" in schema:
            raise SchemaError(f"{place}: type beside $ref cannot be decoded by.")
        return self._reference(schema["$ref"], place) if used[0] == "$ref" else self._combined(schema, used[0], place)

    def _types(self, schema: dict[str, Any], place: str) -> Sequence[str]:
        given = schema.get("type")
        types = [given] if isinstance(given, str) else given
        if types is None:
            types = [name for name in ("object", "array", "string", "number") if OF_TYPE[name] & schema.keys()]
            types = types or list(TYPES)
        if not isinstance(types, list) or not types or not set(map(str, types)) <= set(TYPES):
            raise SchemaError(f"{place}/type: {given!r} is not one of {', '.join(TYPES)}, or several of them.")
        return ["number" if name == "integer" and "number" in types else name for name in types]

    # Choices

    def _enumerated(self, schema: dict[str, Any], place: str) -> Expression:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{place}/enum: must be an array of values.")
        self._count(len(values), place)
        types = self._types(schema, place) if "type" in schema else TYPES
        try:
            return either(*(json_literal(value) for value in values if _is_of(value, types)))
        except ValueError as error:
            raise SchemaError(f"{place}: {error}") from error

    def _combined(self, schema: dict[str, Any], keyword: str, place: str) -> Expression:
        options = schema[keyword]
        if not isinstance(options, list) or not options:
            raise SchemaError(f"{place}/{keyword}: must be an array of schemas.")
        if keyword == "allOf" and len(options) > 1:
            raise SchemaError(f"{place}/allOf: several schemas at once cannot be decoded by.")
        found = [self.value(one, f"{place}/{keyword}[{index}]") for index, one in enumerate(options)]
        if keyword == "oneOf" and not self._exclude_each_other(options):
            raise SchemaError(
                f"{place}/oneOf: a value could be of several of these; use anyOf, or give each a constant of its own."
            )
        return either(*found)

    def _exclude_each_other(self, options: list[Any]) -> bool:
        """Tell whether no value can be of two schemas: their types differ, or a constant that they all require."""
        schemas = [self._resolved(option) for option in options]
        kinds = [_kinds(schema) for schema in schemas]
        if all(not first & second for index, first in enumerate(kinds) for second in kinds[:index]):
            return True
        if not all(kind == {"object"} for kind in kinds):
            return False
        tags = [_tags(schema) for schema in schemas]
        shared = set(tags[0]).intersection(*tags[1:])
        return any(
            len(set().union(*(tag[key] for tag in tags))) == sum(len(tag[key]) for tag in tags) for key in shared
        )

    def _resolved(self, schema: Any) -> dict[str, Any]:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._pointed(schema["$ref"], "$ref")
        return schema if isinstance(schema, dict) else {}

    def _reference(self, pointer: Any, place: str) -> Expression:
        if pointer in self._open:
            raise SchemaError(f"{place}/$ref: {pointer!r} leads back to itself.")
        if pointer not in self._references:
            target = self._pointed(pointer, place)
            name = self._grammar.name(str(pointer).rpartition("/")[2] or "root")
            self._references[pointer] = Reference(name)
            is_alias = isinstance(target, dict) and "$ref" in target
            self._open += [pointer] if is_alias else []
            self._grammar.rules[name] = self.value(target, pointer)
            self._open = self._open[:-1] if is_alias else self._open
        return self._references[pointer]

    def _pointed(self, pointer: Any, place: str) -> Any:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise SchemaError(f"{place}/$ref: {pointer!r} does not point into this schema (#/…).")
        target = self._root
        for step in pointer.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~").replace("%25", "%")
            if isinstance(target, dict) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            else:
                raise SchemaError(f"{place}/$ref: there is no {pointer!r}.")
        return target

    # Types

    def _object(self, schema: dict[str, Any], place: str) -> Expression:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list) or not _are_texts(required):
            raise SchemaError(f"{place}: properties must be an object, and required an array of names.")
        if not properties and not required:
            value = self.value(more, f"{place}/additionalProperties")
            return concat("{", self._json.space, "}") if value == IMPOSSIBLE else self._json.map_of(value)
        missing = [name for name in required if name not in properties]
        if missing and more is False:
            raise SchemaError(f"{place}/required: {missing[0]!r} is required, and is no property.")
        properties = properties | dict.fromkeys(missing, more)
        pairs = []
        for name, value in properties.items():
            found = self.value(value, f"{place}/properties/{name}")
            pairs.append((self._json.pair(json_literal(name), found), name in required))
        return self._members(pairs)

    def _members(self, pairs: list[tuple[Expression, bool]]) -> Expression:
        """Return an object of these pairs in their order, some of which may be left out."""
        space = self._json.space
        behind: Expression = EMPTY  # what may follow once a pair was written
        start: Expression = EMPTY  # what may follow while none was
        for pair, is_required in reversed(pairs):
            with_it = self._grammar.rule("members", concat(",", space, pair, behind))
            first = concat(pair, behind)
            start = first if is_required else self._grammar.rule("members", either(first, start))
            behind = with_it if is_required else self._grammar.rule("members", either(with_it, behind))
        filled = concat("{", space, start, space, "}")
        return filled if any(is_required for _, is_required in pairs) else either(filled, "{}")

    def _array(self, schema: dict[str, Any], place: str) -> Expression:
        least, most = self._lengths(schema, "minItems", "maxItems", place)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise SchemaError(f"{place}/prefixItems: must be an array of schemas.")
        if not first:
            return self._json.array_of(self.value(schema.get("items", True), f"{place}/items"), least, most)
        if least < len(first) or (most not in (None, len(first)) and schema.get("items", True) is not False):
            raise SchemaError(
                f"{place}/prefixItems: needs minItems of at least {len(first)}, and no maxItems beyond it."
            )
        items = [self.value(one, f"{place}/prefixItems[{index}]") for index, one in enumerate(first)]
        comma = concat(",", self._json.space)
        row = concat(items[0], *(part for item in items[1:] for part in (comma, item)))
        rest = self.value(schema.get("items", True), f"{place}/items") if most != len(first) else IMPOSSIBLE
        more = repeat(concat(comma, rest), least - len(first), None if most is None else most - len(first))
        return concat("[", self._json.space, row, more, self._json.space, "]")

    def _string(self, schema: dict[str, Any], place: str) -> Expression:
        least, most = self._lengths(schema, "minLength", "maxLength", place)
        given = [key for key in ("pattern", "format") if key in schema]
        if not given:
            return self._json.string if (least, most) == (0, None) else self._json.string_of(least, most)
        if len(given) > 1:
            raise SchemaError(f"{place}: pattern and format cannot be decoded by together.")
        text = schema[given[0]]
        if not isinstance(text, str):
            raise SchemaError(f"{place}/{given[0]}: must be a text.")
        try:
            found = read_pattern(text) if given[0] == "pattern" else read_format(text)
        except PatternError as error:
            raise SchemaError(f"{place}: {error}.") from error
        if found.least < least or (most is not None and (found.most is None or found.most > most)):
            raise SchemaError(
                f"{place}: minLength and maxLength beside a {given[0]} cannot be decoded by; bound it itself."
            )
        return concat('"', found.expression, '"')

    def _integer(self, schema: dict[str, Any], place: str) -> Expression:
        if schema.get("multipleOf", 1) != 1:
            raise SchemaError(f"{place}/multipleOf: cannot be decoded by for integers.")
        low, high = self._bounds(schema, place)
        if low is None and high is None:
            return self._json.integer
        least = most = None
        if low is not None:
            least = int(low.value.to_integral_value(ROUND_CEILING)) + (low.open and low.value == int(low.value))
        if high is not None:
            most = int(high.value.to_integral_value(ROUND_FLOOR)) - (high.open and high.value == int(high.value))
        return integer_between(least, most)

    def _number(self, schema: dict[str, Any], place: str) -> Expression:
        low, high = self._bounds(schema, place)
        if low is None and high is None and "multipleOf" not in schema:
            return self._json.number
        return number_between(low, high, self._places(schema.get("multipleOf"), place))

    def _places(self, step: Any, place: str) -> int:
        """Return how many places behind the point the multiples of a step have."""
        if step is None:
            return DIGITS
        for places in range(DIGITS):
            if _is_number(step) and Decimal(str(step)) == Decimal(10) ** -places:
                return places
        raise SchemaError(f"{place}/multipleOf: {step!r} cannot be decoded by; 1, 0.1, 0.01 and so on can.")

    def _bounds(self, schema: dict[str, Any], place: str) -> tuple[Bound | None, Bound | None]:
        found: dict[str, Bound] = {}
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            value = schema.get(key)
            if value is None:
                continue
            if not _is_number(value) or abs(value) > MAX_EXACT:
                raise SchemaError(f"{place}/{key}: {value!r} is no number between -10^15 and 10^15.")
            found[key] = Bound(Decimal(str(value)), open=key.startswith("exclusive"))
        lows = [found[key] for key in ("minimum", "exclusiveMinimum") if key in found]
        highs = [found[key] for key in ("maximum", "exclusiveMaximum") if key in found]
        low = max(lows, key=lambda bound: (bound.value, bound.open), default=None)
        return low, min(highs, key=lambda bound: (bound.value, not bound.open), default=None)

    def _lengths(self, schema: dict[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
        for key in (least, most):
            value = schema.get(key)
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_LENGTH):
                raise SchemaError(f"{place}/{key}: {value!r} is not a whole number from 0 to {MAX_LENGTH:,}.")
        return schema.get(least) or 0, schema.get(most)

    def _count(self, parts: int, place: str) -> None:
        self._parts += parts
        if self._parts > MAX_PARTS:
            raise SchemaError(f"{place}: the schema has more than {MAX_PARTS:,} parts.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_of(value: Any, types: Sequence[str]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" in types or ("integer" in types and _is_number(value) and value == int(value))
    return JSON_TYPES.get(type(value)) in types


def _kinds(schema: dict[str, Any]) -> set[str]:
    """Return the types of a schema's values, with "number" for integers too."""
    values = (
        schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    )
    if values is not None:
        return {JSON_TYPES.get(type(value), "number") for value in values}
    given = schema.get("type", [*TYPES])
    return {"number" if name == "integer" else name for name in ([given] if isinstance(given, str) else given)}


def _tags(schema: dict[str, Any]) -> dict[str, set[str]]:
    """Return the required properties of an object that are constants, with their values."""
    found = {}
    for name in schema.get("required", []):
        value = schema.get("properties", {}).get(name)
        values = (
            (value.get("enum") or ([value["const"]] if "const" in value else [])) if isinstance(value, dict) else []
        )
        if values and all(isinstance(one, str) for one in values):
            found[name] = set(values)
    return found
