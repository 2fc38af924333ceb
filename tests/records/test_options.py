"""Records as options: what is said of each, and that the page of the documentation says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from luthier.records.options import Option, options_of
from luthier.records.record import Record
from luthier.records.training import TrainingConfig

PAGE = Path(__file__).parents[2] / "docs" / "training_options.md"


class Strings(Record):
    gauge: Annotated[float, Field(gt=0)] | Literal["auto"] = Field("auto", description="thickness in mm")
    names: tuple[str, ...] = ()


class Violin(Record):
    strings: Strings = Strings()
    count: int = Field(4, ge=1, le=2**31)
    owner: str | None = Field(None, description="who plays it")
    wood: dict[str, float] | Literal["spruce"] = "spruce"


def test_an_option_says_what_it_may_be_and_nested_ones_have_dotted_names() -> None:
    assert options_of(Violin) == [
        Option("strings.gauge", "number > 0 | auto", "auto", "thickness in mm"),
        Option("strings.names", "list of text", "[]", ""),
        Option("count", "whole number ≥ 1, ≤ 2147483648", "4", ""),
        Option("owner", "text", "", "who plays it"),
        Option("wood", "{name: number, …} | spruce", "spruce", ""),
    ]


def test_every_option_of_training_has_a_meaning() -> None:
    assert [option.name for option in options_of(TrainingConfig) if not option.meaning] == []


def test_the_page_of_training_options_is_what_the_code_says() -> None:
    cells = [
        ("`" + option.name + "`", *(cell.replace("|", "\\|") for cell in option[1:]))
        for option in options_of(TrainingConfig)
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (Option._fields, ("---",) * 4, *cells))
    assert table in PAGE.read_text("utf-8"), f"the table of {PAGE.name} is to be:\n\n{table}"
