"""Equal templates have equal hashes, also those that were saved before there were rejected answers."""

from __future__ import annotations

from luthier.records.template import Template


def test_hash_without_a_rejected_text_is_what_it_was_before_there_were_any() -> None:
    template = Template(system="s", user="{{a}}", assistant="{{b}}")
    assert template.content_hash == "4e2116a2e3eb445a14a594d38cfc3b8d6e8a8668a68ea0e428052fe279f1dbdf"
    assert template.model_copy(update={"rejected": "{{c}}"}).content_hash != template.content_hash
    assert template.model_copy(update={"rejected": ""}).content_hash != template.content_hash
