"""The page of chat completions says for every field of OpenAI's packages what is done with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from openai.types.chat import completion_create_params

ROOT = Path(__file__).parents[2]
SDKS = Path(sys.prefix) / "sdk"  # the older majors
PARAMS = "openai/types/chat/completion_create_params.py"


def fields_of(source: str) -> set[str]:
    """Return the fields of the base class of the parameters, as the source has them."""
    body = re.search(r"class CompletionCreateParamsBase\(.*?\n(?=class )", source, re.DOTALL)
    assert body
    return set(re.findall(r"^    (\w+): ", body[0], re.MULTILINE)) | {"stream"}


@pytest.mark.parametrize("source", [Path(completion_create_params.__file__), *SDKS.glob(f"*/{PARAMS}")], ids=str)
def test_every_field_of_openais_package_is_on_the_page(source: Path) -> None:
    page = (ROOT / "docs/service/chat.md").read_text("utf-8")
    table = page.partition("## Fields")[2].partition("## JSON")[0]
    fields = fields_of(source.read_text("utf-8"))
    assert len(fields) > 30
    assert [name for name in sorted(fields) if f"`{name}`" not in table] == []
