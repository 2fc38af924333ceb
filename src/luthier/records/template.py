"""Templates: handlebars texts that turn an example's fields into messages."""

from __future__ import annotations

from luthier.records.record import Record, content_hash


class Template(Record):
    """Handlebars texts for the three roles; ``system`` may be left out."""

    system: str | None = None
    user: str
    assistant: str

    @property
    def content_hash(self) -> str:
        """SHA-256 of the three texts: two equal templates have one version."""
        return content_hash(self.model_dump())

    @property
    def fixed_system(self) -> bool:
        """Whether the system prompt is the same for every example."""
        return self.system is not None and "{{" not in self.system


class TemplateVersion(Record):
    """A named, numbered, immutable template."""

    name: str
    version: int
    template: Template

    @property
    def reference(self) -> str:
        """The text that names this version, such as ``sentiment@1``."""
        return f"{self.name}@{self.version}"
