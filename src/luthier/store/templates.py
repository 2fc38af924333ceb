"""Template versions in the database. Saving an equal text again gives the version that is there."""

from __future__ import annotations

import sqlalchemy as sa

from luthier.records.template import Template, TemplateVersion
from luthier.store.database import Database
from luthier.store.tables import templates
from luthier.store.versions import check_name, find_version, newest_version


class TemplateStore:
    """Templates in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, template: Template) -> TemplateVersion:
        """Save a template under a name: a new version, or the existing one with the same texts."""
        check_name(name, "template")
        same = (templates.c.name == name) & (templates.c.content_hash == template.content_hash)
        with self._database.write() as connection:
            known = connection.execute(sa.select(templates.c.record).where(same)).scalar()
            if known is not None:
                return TemplateVersion.model_validate(known)
            version = newest_version(connection, templates, name) + 1
            record = TemplateVersion(name=name, version=version, template=template)
            row = {"name": name, "version": version, "content_hash": template.content_hash}
            connection.execute(sa.insert(templates).values(**row, record=record.model_dump(mode="json")))
        return record

    def get(self, reference: str) -> TemplateVersion:
        """Return ``name`` (its newest version) or ``name@version``.

        Raises:
            NotFoundError: there is none.
        """
        with self._database.read() as connection:
            return TemplateVersion.model_validate(find_version(connection, templates, reference, "template"))

    def all(self) -> list[TemplateVersion]:
        """Return every version of every template."""
        query = sa.select(templates.c.record).order_by(templates.c.name, templates.c.version)
        with self._database.read() as connection:
            return [TemplateVersion.model_validate(record) for record in connection.execute(query).scalars()]
