"""Handlebars texts render as handlebars.js 4.7 does, without HTML escaping; what cannot be rendered is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.templates.handlebars import HandlebarsText

FIELDS: dict[str, Any] = {
    "text": "Great <b>film</b> & 'cast'",
    "label": "positive",
    "first name": "Ann",
    "a.b": "dotted",
    "empty": "",
    "none": None,
    "yes": True,
    "no": False,
    "zero": 0,
    "count": 3,
    "half": 0.5,
    "whole": 2.0,
    "tags": ["x", "y", "z"],
    "nothing": [],
    "address": {"city": "Cremona", "zip code": "26100", "geo": {"lat": 45.1}},
    "people": [{"name": "Ada", "tools": ["plane", "saw"]}, {"name": "Bo", "tools": []}],
}


def render(source: str, **fields: Any) -> str:
    return HandlebarsText(source).render(FIELDS | fields)


VALUES = [
    ("no tags at all", "no tags at all"),
    ("", ""),
    ("{{label}}", "positive"),
    ("{{ label }}", "positive"),
    ("{{text}}", "Great <b>film</b> & 'cast'"),
    ("{{{text}}}", "Great <b>film</b> & 'cast'"),
    ("{{&text}}", "Great <b>film</b> & 'cast'"),
    ("{{& text}}", "Great <b>film</b> & 'cast'"),
    ("{{missing}}", ""),
    ("{{missing.deeper}}", ""),
    ("{{label.deeper}}", ""),
    ("{{none}}", ""),
    ("{{empty}}", ""),
    ("{{yes}} {{no}}", "true false"),
    ("{{zero}} {{count}} {{half}} {{whole}}", "0 3 0.5 2"),
    ("{{tags}}", "x,y,z"),
    ("{{nothing}}", ""),
    ("{{address}}", "[object Object]"),
    ("{{address.city}}", "Cremona"),
    ("{{address/city}}", "Cremona"),
    ("{{address.geo.lat}}", "45.1"),
    ("{{this.label}}", "positive"),
    ("{{./label}}", "positive"),
    ("{{@root.label}}", "positive"),
    ("{{[first name]}}", "Ann"),
    ("{{[a.b]}}", "dotted"),
    ("{{address.[zip code]}}", "26100"),
    ("{{tags.[1]}}", "y"),
    ("{{people.[0].name}}", "Ada"),
    ("{{people.[7].name}}", ""),
    ('{"answer": {{json label}}}', '{"answer": "positive"}'),
    ("{ {{label}} }", "{ positive }"),
]

BLOCKS = [
    ("{{#if yes}}A{{else}}B{{/if}}", "A"),
    ("{{#if no}}A{{else}}B{{/if}}", "B"),
    ("{{#if none}}A{{else}}B{{/if}}", "B"),
    ("{{#if empty}}A{{else}}B{{/if}}", "B"),
    ("{{#if zero}}A{{else}}B{{/if}}", "B"),
    ("{{#if zero includeZero=true}}A{{else}}B{{/if}}", "A"),
    ("{{#if nothing}}A{{else}}B{{/if}}", "B"),
    ("{{#if address}}A{{else}}B{{/if}}", "A"),
    ("{{#if missing}}A{{/if}}", ""),
    ("{{#if no}}A{{else if yes}}B{{else}}C{{/if}}", "B"),
    ("{{#if no}}A{{else if zero}}B{{else}}C{{/if}}", "C"),
    ("{{#if no}}A{{else if zero}}B{{else if yes}}C{{else}}D{{/if}}", "C"),
    ("{{#if no}}A{{else  if yes}}B{{/if}}", "B"),
    ("{{#if no}}A{{~else if yes~}}B{{/if}}", "B"),
    ("{{#if no}}A{{else if(eq count 3)}}B{{/if}}", "B"),
    ("{{#if no}}A{{else unless no}}B{{/if}}", "B"),
    ("{{#unless no}}A{{else}}B{{/unless}}", "A"),
    ("{{#unless yes}}A{{else}}B{{/unless}}", "B"),
    ("{{^if no}}A{{/if}}", "A"),
    ("{{^nothing}}none{{/nothing}}", "none"),
    ("{{#each tags}}{{this}}{{/each}}", "xyz"),
    ("{{#each tags}}{{.}}{{/each}}", "xyz"),
    ("{{#each tags}}{{@index}}{{this}} {{/each}}", "0x 1y 2z "),
    ("{{#each tags}}{{this}}{{#unless @last}}, {{/unless}}{{/each}}", "x, y, z"),
    ("{{#each tags}}{{#if @first}}[{{/if}}{{this}}{{#if @last}}]{{/if}}{{/each}}", "[xyz]"),
    ("{{#each nothing}}A{{else}}none{{/each}}", "none"),
    ("{{#each missing}}A{{else}}none{{/each}}", "none"),
    ("{{#each label}}A{{else}}none{{/each}}", "none"),
    ("{{#each people}}{{name}}:{{label}};{{/each}}", "Ada:;Bo:;"),
    ("{{#each people}}{{name}}:{{../label}};{{/each}}", "Ada:positive;Bo:positive;"),
    ("{{#each people}}{{#if name}}{{../label}};{{/if}}{{/each}}", "positive;positive;"),
    ("{{#each people}}{{this.name}}/{{this/name}} {{/each}}", "Ada/Ada Bo/Bo "),
    ("{{#each people}}{{#each tools}}{{../name}}'s {{this}}, {{/each}}{{/each}}", "Ada's plane, Ada's saw, "),
    ("{{#each people}}{{#each tools}}{{../../label}} {{/each}}{{/each}}", "positive positive "),
    ("{{#each people}}{{#each tools}}{{@../index}}.{{@index}} {{/each}}{{/each}}", "0.0 0.1 "),
    ("{{#each people}}{{@root.label}} {{/each}}", "positive positive "),
    ("{{#each people as |person|}}{{person.name}} {{/each}}", "Ada Bo "),
    ("{{#each people as |person number|}}{{number}}{{person.name}} {{/each}}", "0Ada 1Bo "),
    ("{{#each people as |p|}}{{#each p.tools as |t|}}{{p.name}}-{{t}} {{/each}}{{/each}}", "Ada-plane Ada-saw "),
    ("{{#each address}}{{@key}} {{/each}}", "city zip code geo "),
    ("{{#each address.geo as |value key|}}{{key}}={{value}}{{/each}}", "lat=45.1"),
    ("{{#with address}}{{city}}, {{../label}}{{/with}}", "Cremona, positive"),
    ("{{#with address as |a|}}{{a.city}}{{/with}}", "Cremona"),
    ("{{#with address}}{{#with geo}}{{lat}} {{../city}}{{/with}}{{/with}}", "45.1 Cremona"),
    ("{{#with missing}}A{{else}}none{{/with}}", "none"),
    ("{{#tags}}{{this}}{{/tags}}", "xyz"),
    ("{{#address}}{{city}}{{/address}}", "Cremona"),
    ("{{#yes}}{{label}}{{/yes}}", "positive"),
    ("{{#no}}{{label}}{{/no}}", ""),
]

HELPERS = [
    ("{{json tags}}", '["x", "y", "z"]'),
    ("{{json none}} {{json yes}} {{json half}}", "null true 0.5"),
    ("{{json address.geo}}", '{"lat": 45.1}'),
    ('{{json "é"}}', '"é"'),
    ('{{#if (eq label "positive")}}A{{else}}B{{/if}}', "A"),
    ("{{#if (eq label 'negative')}}A{{else}}B{{/if}}", "B"),
    ("{{#if (eq count 3)}}A{{/if}}", "A"),
    ("{{#if (eq (lookup tags 0) 'x')}}A{{/if}}", "A"),
    ('{{#eq label "positive"}}A{{else}}B{{/eq}}', "A"),
    ('{{#eq label "negative"}}A{{else}}{{label}}{{/eq}}', "positive"),
    ('{{eq label "positive"}}', "true"),
    ("{{lookup tags 2}}", "z"),
    ("{{lookup tags 9}}", ""),
    ('{{lookup address "zip code"}}', "26100"),
    ("{{#each tags}}{{lookup ../tags @index}}{{/each}}", "xyz"),
    ("{{#with (lookup people 1)}}{{name}}{{/with}}", "Bo"),
]

TEXT_AROUND_TAGS = [
    ("a{{! a comment }}b", "ab"),
    ("a{{!-- a {{commented}} tag --}}b", "ab"),
    ("a {{~label~}} b", "apositiveb"),
    ("a {{~label}} b", "apositive b"),
    ("a \n\n {{~#if yes~}} \n A \n {{~/if~}} \n b", "aAb"),
    ("a {{~! comment ~}} b", "ab"),
    ("a {{~{text}~}} b", "aGreat <b>film</b> & 'cast'b"),
    ("one\n{{! alone }}\ntwo", "one\ntwo"),
    ("one\n  {{!-- alone --}}  \ntwo", "one\ntwo"),
    ("one\n{{#if yes}}\nin\n{{/if}}\ntwo", "one\nin\ntwo"),
    ("one\r\n{{#if yes}}\r\nin\r\n{{/if}}\r\ntwo", "one\r\nin\r\ntwo"),
    ("one\n  {{#if no}}\n  A\n  {{else}}\n  B\n  {{/if}}\ntwo", "one\n  B\ntwo"),
    ("{{#each tags}}\n- {{this}}\n{{/each}}\nend", "- x\n- y\n- z\nend"),
    ("one\n{{label}}\ntwo", "one\npositive\ntwo"),
    ("one {{#if yes}}\nin{{/if}}", "one \nin"),
    ("{{#if yes}} {{label}}{{/if}}", " positive"),
    ("one\n  {{! comment }} {{label}}", "one\n   positive"),
    ("{{#if yes~}} {{label}}{{/if}}", "positive"),
    ("{{#if yes}} {{/if}}{{label}}", " positive"),
    (r"\{{label}} {{label}}", "{{label}} positive"),
    (r"C:\\{{label}}", r"C:\positive"),
    (r"C:\dir {{label}}", r"C:\dir positive"),
    ("{{{{raw}}}}{{label}}{{{{/raw}}}}", "{{label}}"),
    ("a } b }} c", "a } b }} c"),
]

MALFORMED = """\
{{label
{{label}
{{{label}}
{{}}
{{#}}
{{/}}
{{@}}
{{[open}}
{{! open
{{!-- open
{{eq (}}
{{#if yes}}
{{/if}}
{{#if yes}}A{{/unless}}
{{else}}
{{#if yes}}A{{else}}B{{else}}C{{/if}}
{{#if no}}A{{else each tags}}B{{/if}}
{{#if}}A{{/if}}
{{#if yes no}}A{{/if}}
{{#each}}A{{/each}}
{{if yes}}
{{#if (if yes)}}A{{/if}}
{{json}}
{{#json tags}}A{{/json}}
{{eq label}}
{{lookup tags}}
{{../label}}
{{#if yes}}{{../label}}{{/if}}
{{*decorator}}
{{#*inline}}{{/inline}}
{{> partial}}
{{#> layout}}A{{/layout}}
{{{{label}}}}"""

ATTRIBUTES = """\
{{label.__class__}}
{{label.upper}}
{{label.[__len__]}}
{{tags.append}}
{{address.items}}
{{this.__class__}}
{{@root.__class__}}
{{[__class__]}}
{{lookup label '__class__'}}
{{secret.key}}
{{lookup secret 'key'}}
{{#with secret}}{{key}}{{/with}}
{{#each secret}}{{this}}{{/each}}"""


@pytest.mark.parametrize(("source", "expected"), VALUES)
def test_value_renders_as_in_handlebars_js(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(("source", "expected"), BLOCKS)
def test_block_renders_as_in_handlebars_js(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(("source", "expected"), HELPERS)
def test_helper_gives_its_value(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(("source", "expected"), TEXT_AROUND_TAGS)
def test_text_around_tags_stays_as_in_handlebars_js(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize("source", MALFORMED.splitlines())
def test_malformed_text_is_refused_and_quoted(source: str) -> None:
    with pytest.raises(InputError, match="user template") as caught:
        HandlebarsText(source, "user template")
    assert repr(source) in str(caught.value)


def test_field_with_a_space_is_refused_with_the_way_to_write_it() -> None:
    with pytest.raises(InputError, match=r"there is no helper 'first'.*\{\{\[first name\]\}\}"):
        HandlebarsText("{{first name}}")


def test_unknown_helper_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'lookup'"):
        HandlebarsText("{{lokup tags 0}}")
    with pytest.raises(InputError, match="there is no helper 'gt'"):
        HandlebarsText("{{#if (gt count 2)}}many{{/if}}")


def test_number_or_text_in_place_of_a_field_is_refused_with_the_way_to_write_it() -> None:
    with pytest.raises(InputError, match=r"\{\{\[0\]\}\}"):
        HandlebarsText("{{0}}")
    with pytest.raises(InputError, match=r"\{\{\[label\]\}\}"):
        HandlebarsText('{{"label"}}')
    assert HandlebarsText("{{[0]}}").render({"0": "zeroth column"}) == "zeroth column"


def test_length_of_a_list_is_refused_instead_of_rendering_as_nothing() -> None:
    with pytest.raises(InputError, match=r"tags\.length is not known.*\{\{#if tags\}\}"):
        HandlebarsText("{{#if tags.length}}A{{/if}}")


def test_log_is_a_field_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    text = HandlebarsText("{{log}}")
    assert (text.render({"log": "entry"}), text.fields, capsys.readouterr().out) == ("entry", {"log"}, "")


def test_value_that_json_cannot_write_is_an_input_error() -> None:
    with pytest.raises(InputError, match="fails on this example"):
        render("{{json strange}}", strange=object())


@pytest.mark.parametrize("source", ATTRIBUTES.splitlines())
def test_template_cannot_reach_python_attributes(source: str) -> None:
    class Secret:
        key = "k-123"

    assert render(source, secret=Secret()) == ""


LIST = ["x"] * 1500
LONG = "x" * 2**20
BOUNDLESS = [
    ("{{#each list}}{{#each @root.list}}{{#each @root.list}}x{{/each}}{{/each}}{{/each}}", "pieces"),
    ("{{#each list}}{{#each @root.list}}{{/each}}{{/each}}", "pieces"),
    ("{{#list}}{{#@root.list}}{{this}}{{/@root.list}}{{/list}}", "pieces"),
    ("{{#each list}}{{#if (eq @root.deep @root.equal)}}x{{/if}}{{/each}}", "pieces"),
    ("{{#each list}}{{json @root.deep}}{{/each}}", "pieces"),
    ("{{#each list}}{{@root.deep}}{{/each}}", "pieces"),
    ("{{#each numbers}}{{/each}}", "pieces"),
    ("{{#each list}}{{@root.long}}{{/each}}", "letters"),
    ("{{#each list}}{{json @root.long}}{{/each}}", "letters"),
    ('{{#each list}}{{lookup @root "long"}}{{/each}}', "letters"),
    ("{{json (json (json (json (json (json (json quotes))))))}}", "letters"),
    ("{{#each list}}" + LONG + "{{/each}}", "letters"),
]


@pytest.mark.parametrize(("source", "what"), BOUNDLESS)
def test_a_text_that_would_go_on_and_on_is_an_input_error(source: str, what: str) -> None:
    many = [[1]] * 10_000
    fields = {"list": LIST, "long": LONG, "deep": many, "equal": list(many), "numbers": [1] * 10**6}
    with pytest.raises(InputError, match=rf"fails on this example: it .* more than [\d,]+ {what}"):
        HandlebarsText(source).render(fields | {"quotes": '"' * 2**18})


def test_bounds_are_of_one_rendering_and_far_above_what_examples_have() -> None:
    text = HandlebarsText("{{#each lists}}{{#each this}}{{this}},{{/each}}{{/each}}{{long}}")
    fields = {"lists": [["x"] * 100] * 100, "long": "x" * 16_000_000}
    for _ in range(10):
        assert len(text.render(fields)) == 20_000 + 16_000_000


def test_comments_without_an_end_are_refused() -> None:
    with pytest.raises(InputError, match="unclosed tag"):
        HandlebarsText("{{!--" * 100_000)


def test_function_among_the_values_is_never_called() -> None:
    called: list[bool] = []
    with pytest.raises(InputError, match="function"):
        render("{{action}}", action=lambda: called.append(True))
    assert called == []


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("plain", set()),
        ("{{text}} {{{label}}} {{&count}}", {"text", "label", "count"}),
        ("{{address.city}} {{address/zip}}", {"address"}),
        ("{{[first name]}} {{[a.b]}} {{address.[zip code]}}", {"first name", "a.b", "address"}),
        ("{{this.text}} {{./label}} {{this}} {{.}}", {"text", "label"}),
        ("{{#if text}}{{label}}{{else}}{{count}}{{/if}}", {"text", "label", "count"}),
        ("{{#if a}}1{{else if b}}{{c}}{{else}}{{d}}{{/if}}", {"a", "b", "c", "d"}),
        ("{{#unless a}}{{b}}{{/unless}}", {"a", "b"}),
        ("{{#each people}}{{name}} {{this.age}} {{@index}}{{/each}}", {"people"}),
        ("{{#each people}}{{../label}}{{/each}}", {"people", "label"}),
        ("{{#each people}}{{#each tools}}{{../name}}{{../../label}}{{/each}}{{/each}}", {"people", "label"}),
        ("{{#each people}}{{#if name}}{{../label}}{{/if}}{{/each}}", {"people", "label"}),
        ("{{#each people}}A{{else}}{{label}}{{/each}}", {"people", "label"}),
        ("{{#each people as |p|}}{{p.name}}{{/each}}", {"people"}),
        (
            "{{#each people}}{{@root.label}}{{@root/text}}{{@root.[first name]}}{{/each}}",
            {"people", "label", "text", "first name"},
        ),
        ("{{#with address}}{{city}}{{../label}}{{/with}}", {"address", "label"}),
        ("{{#people}}{{name}}{{/people}}{{^nothing}}{{label}}{{/nothing}}", {"people", "nothing", "label"}),
        ('{{#if (eq label "text")}}{{text}}{{/if}}', {"label", "text"}),
        ("{{#if (eq (lookup tags count) label)}}A{{/if}}", {"tags", "count", "label"}),
        ("{{#each tags}}{{lookup ../people @index}}{{/each}}", {"tags", "people"}),
        ('{{#eq label "a"}}{{text}}{{/eq}}', {"label", "text"}),
        ("{{json address}} {{lookup tags 0}} {{json 'text'}}", {"address", "tags"}),
        ("{{#if zero includeZero=true}}A{{/if}}", {"zero"}),
        (r"\{{text}} {{! label }}{{!-- {{count}} --}}", set()),
    ],
)
def test_fields_are_the_root_fields_that_the_text_uses(source: str, fields: set[str]) -> None:
    assert HandlebarsText(source).fields == fields


def test_all_unknown_fields_are_refused_at_once_each_with_the_closest_known_one() -> None:
    text = HandlebarsText("{{txet}} {{#if labl}}{{text}}{{/if}}", "user template")
    with pytest.raises(InputError, match="The user template uses fields that the dataset does not have") as caught:
        text.check_fields(["text", "label"])
    assert caught.value.problems == (
        "{{labl}} is unknown. Did you mean 'label'?",
        "{{txet}} is unknown. Did you mean 'text'?",
    )


def test_known_fields_pass_the_check() -> None:
    text = HandlebarsText("{{text}}{{#each people}}{{unknown.inside}}{{/each}}")
    text.check_fields(["text", "people", "unused"])
    with pytest.raises(InputError, match="people"):
        text.check_fields(["text"])


@settings(deadline=None)
@given(st.text())
def test_values_are_never_read_as_templates_nor_escaped(value: str) -> None:
    assert HandlebarsText("[{{value}}]").render({"value": value}) == f"[{value}]"
    assert HandlebarsText("[{{value}}]").render({"value": "{{other}}", "other": value}) == "[{{other}}]"


PIECES = [
    "{{",
    "}}",
    "{{{",
    "}}}",
    "#",
    "/",
    "if",
    "each",
    "eq",
    "else",
    " ",
    "(",
    ")",
    "[",
    "]",
    '"',
    "a",
    "b",
    ".",
    "../",
]
PIECES += [
    "@",
    "1",
    "~",
    "!",
    "--",
    "\n",
    "\\",
    "=",
    "|",
    " as |x|",
    "{{#if a}}",
    "{{/if}}",
    "{{else}}",
    ">",
    "&",
    "^",
    "*",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_text_renders_or_is_an_input_error(source: str) -> None:
    try:
        rendered = HandlebarsText(source).render({"a": "A", "b": ["B", {"c": 1}], "if": True})
    except InputError:
        return
    assert isinstance(rendered, str)
