"""The catalog's tables.

The catalog is a view of the log, the manifests and the packs: a program that finds other tables than these makes them
anew from the log, so there are no migrations.
"""

from __future__ import annotations

import re
import sqlite3

VERSION = 11
"""Raised with every change of the tables."""

TABLES = """
CREATE TABLE state (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE log (
    seq INTEGER PRIMARY KEY,
    entry BLOB NOT NULL
);
CREATE TABLE models (
    name TEXT PRIMARY KEY,
    next_version INTEGER NOT NULL,
    next_again INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE runs (
    name TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    started TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE TABLE manifests (
    id TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    tensors INTEGER NOT NULL,
    entry INTEGER
);
CREATE TABLE versions (
    id TEXT PRIMARY KEY REFERENCES manifests (id),
    model TEXT NOT NULL REFERENCES models (name),
    version INTEGER NOT NULL,
    created TEXT NOT NULL,
    epoch INTEGER,
    step INTEGER,
    loss REAL,
    run TEXT,
    record TEXT NOT NULL,
    UNIQUE (model, version)
);
CREATE INDEX versions_by_loss ON versions (model, loss);
CREATE TABLE metrics (
    id TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (id, name)
);
CREATE INDEX metrics_by_value ON metrics (model, name, value);
CREATE TABLE aliases (
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    id TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    PRIMARY KEY (model, name)
);
CREATE INDEX aliases_by_id ON aliases (id);
CREATE TABLE tags (
    id TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    PRIMARY KEY (id, name)
);
CREATE TABLE notes (
    id TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    written TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX notes_by_id ON notes (id);
CREATE TABLE lineage (
    child TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    parent TEXT NOT NULL,
    PRIMARY KEY (child, kind, parent)
);
CREATE INDEX lineage_by_parent ON lineage (parent);
CREATE TABLE artifacts (
    key TEXT PRIMARY KEY,
    id TEXT NOT NULL REFERENCES manifests (id),
    created TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX artifacts_by_id ON artifacts (id);
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    differences INTEGER NOT NULL,
    damaged INTEGER NOT NULL
);
CREATE TABLE tensors (
    digest TEXT NOT NULL,
    pack INTEGER NOT NULL REFERENCES packs (number) ON DELETE CASCADE,
    start INTEGER NOT NULL,
    base TEXT,
    coded INTEGER,
    PRIMARY KEY (digest, pack)
) WITHOUT ROWID;
CREATE INDEX tensors_by_pack ON tensors (pack);
CREATE INDEX tensors_by_base ON tensors (base) WHERE base IS NOT NULL;
CREATE TABLE uses (
    id TEXT NOT NULL REFERENCES manifests (id) ON DELETE CASCADE,
    pack INTEGER NOT NULL REFERENCES packs (number) ON DELETE CASCADE,
    PRIMARY KEY (id, pack)
) WITHOUT ROWID;
CREATE INDEX uses_by_pack ON uses (pack);
CREATE TABLE lacks (
    digest TEXT NOT NULL,
    id TEXT NOT NULL REFERENCES manifests (id) ON DELETE CASCADE,
    PRIMARY KEY (digest, id)
) WITHOUT ROWID;
CREATE INDEX lacks_by_id ON lacks (id);
CREATE TABLE released (
    id TEXT PRIMARY KEY
) WITHOUT ROWID;
CREATE TABLE doomed (
    digest TEXT PRIMARY KEY,
    at TEXT NOT NULL
) WITHOUT ROWID
"""
"""The statements that make the tables. `next_again` repeats `next_version`, so that damage to a number is noticed. `lacks` has
the tensors that manifests need and no pack is known to have, as where its header cannot be read."""

_ODD = re.compile(r"\bVIRTUAL\b|\bGENERATED\b|\bAS\s*\(|\bCHECK\b|\bCOLLATE\b", re.IGNORECASE)
"""Words in the SQL of a table that make SQLite evaluate expressions. Our tables have none of them."""

DERIVED = (
    "models",
    "runs",
    "manifests",
    "versions",
    "metrics",
    "aliases",
    "tags",
    "notes",
    "lineage",
    "artifacts",
    "packs",
    "tensors",
    "uses",
    "lacks",
    "released",
    "doomed",
)
"""Tables that follow from the log: all but the copy of the log itself and the state."""

UNUSED = "NOT EXISTS (SELECT 1 FROM uses u WHERE u.pack = packs.number)"
"""Condition over the table `packs`: no manifest relies on it."""


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty database; the caller holds a transaction."""
    for statement in TABLES.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO state (key, value) VALUES ('schema', ?)", (str(VERSION),))


def is_ours(connection: sqlite3.Connection) -> bool:
    """Whether a database has exactly the tables and indexes that `create` makes, and no view or trigger."""
    wanted = {_plain(statement) for statement in TABLES.split(";")}
    rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100").fetchall()
    found = [_plain(sql) for (sql,) in rows if isinstance(sql, str)]
    return len(found) == len(rows) == len(wanted) and set(found) == wanted


def is_plain(connection: sqlite3.Connection) -> bool:
    """Whether a database has nothing but plain tables and indexes, which can be dropped without running anything."""
    rows = connection.execute("SELECT type, sql FROM sqlite_master LIMIT 200").fetchall()
    return len(rows) < 200 and all(
        kind in ("table", "index") and (sql is None or (isinstance(sql, str) and not _ODD.search(sql)))
        for kind, sql in rows
    )


def version(connection: sqlite3.Connection) -> int | None:
    """Which version of the schema a database has; None if it does not say."""
    tables = "SELECT 1 FROM sqlite_master WHERE name = 'state' AND type = 'table'"
    if not connection.execute(tables).fetchone():
        return None
    try:
        row = connection.execute("SELECT value FROM state WHERE key = 'schema'").fetchone()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):
            raise
        return None
    try:
        return int(row[0]) if row else None
    except (TypeError, ValueError):
        return None


def drop(connection: sqlite3.Connection) -> None:
    """Remove everything, of whatever kind, those that refer to others first; the caller holds a transaction."""
    found = connection.execute(
        "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' "
        "ORDER BY CASE type WHEN 'trigger' THEN 0 WHEN 'view' THEN 1 WHEN 'index' THEN 2 ELSE 3 END, rowid DESC"
    )
    for kind, name in found.fetchall():
        if kind != "index":
            quoted = name.replace('"', '""')
            connection.execute(f'DROP {kind.upper()} IF EXISTS "{quoted}"')


def _plain(sql: str) -> str:
    return " ".join(sql.split())
