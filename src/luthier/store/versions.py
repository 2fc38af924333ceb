"""Named things with numbered, immutable versions: ``tweets`` is the newest, ``tweets@2`` the second."""

from __future__ import annotations

import re

import sqlalchemy as sa

from luthier.errors import InputError, NotFoundError, did_you_mean

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str, noun: str) -> str:
    """Return a name that may be given to a dataset or template.

    Raises:
        InputError: it is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``, beginning with a letter or digit.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"The {noun} name {name!r} is not 1 to 64 of the letters A-Z a-z 0-9 . _ -")
    return name


def parse_reference(reference: str, noun: str) -> tuple[str, int | None]:
    """Split ``name@version``; the version is None where only a name is given.

    Raises:
        InputError: the version is not a whole number above 0.
    """
    name, at, version = reference.partition("@")
    if not at:
        return name, None
    if not version.isdecimal() or int(version) < 1:
        raise InputError(f"The {noun} version in {reference!r} is not a whole number above 0.")
    return name, int(version)


def newest_version(connection: sa.Connection, table: sa.Table, name: str) -> int:
    """Return the highest version of a name, 0 where there is none."""
    query = sa.select(sa.func.max(table.c.version)).where(table.c.name == name)
    return int(connection.execute(query).scalar() or 0)


def find_version(connection: sa.Connection, table: sa.Table, reference: str, noun: str) -> dict[str, object]:
    """Return the record of ``name`` (its newest version) or ``name@version``.

    Raises:
        NotFoundError: there is none; the message names the closest known one.
    """
    name, version = parse_reference(reference, noun)
    query = sa.select(table.c.record).where(table.c.name == name).order_by(table.c.version.desc()).limit(1)
    if version:
        query = query.where(table.c.version == version)
    record = connection.execute(query).scalar()
    if record is None:
        names = connection.execute(sa.select(table.c.name).distinct()).scalars().all()
        raise NotFoundError(
            f"There is no {noun} {reference!r}.{did_you_mean(name, names)}", hint=f"luthier {noun} list"
        )
    return dict(record)
