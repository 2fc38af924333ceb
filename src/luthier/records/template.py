"""Templates: handlebars texts that turn an example's fields into messages."""

from __future__ import annotations

from luthier.records.record import Record, content_hash


class Template(Record):
    """Handlebars texts for the three roles; ``system`` may be left out.

    ``rejected`` is the text of the worse answer, for training on preferences. ``assistant`` may be empty where no
    answer is learned: what is classified is the user's text.
    """

    system: str | None = None
    user: str
    assistant: str = ""
    rejected: str | None = None

    @property
    def content_hash(self) -> str:
        """SHA-256 of the texts: two equal templates have one version."""
        # Without a rejected text the hash is what it was before there were any.
        return content_hash(self.model_dump(exclude={"rejected"} if self.rejected is None else None))

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
