"""The catalog's tables, in SQL that SQLite and PostgreSQL both understand, and how they move forward.

The catalog is a view of the journal and the manifests (see `registry.journal`): every table can be rebuilt.
"""

from __future__ import annotations

import sqlite3

VERSION = 3

TABLES = """
CREATE TABLE state (
    key TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);
CREATE TABLE models (
    name TEXT PRIMARY KEY,
    next_version INTEGER NOT NULL
);
CREATE TABLE runs (
    name TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    started TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE TABLE manifests (
    id TEXT PRIMARY KEY,
    size BIGINT NOT NULL,
    tensors INTEGER NOT NULL
);
CREATE TABLE versions (
    id TEXT PRIMARY KEY REFERENCES manifests (id),
    model TEXT NOT NULL REFERENCES models (name),
    version INTEGER NOT NULL,
    created TEXT NOT NULL,
    epoch INTEGER,
    step INTEGER,
    loss DOUBLE PRECISION,
    run TEXT,
    record TEXT NOT NULL,
    UNIQUE (model, version)
);
CREATE INDEX versions_by_loss ON versions (model, loss);
CREATE TABLE metrics (
    id TEXT NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    value DOUBLE PRECISION,
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
    record TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX artifacts_by_id ON artifacts (id);
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    size BIGINT NOT NULL,
    condemned DOUBLE PRECISION
);
CREATE TABLE tensors (
    digest TEXT PRIMARY KEY,
    pack INTEGER NOT NULL REFERENCES packs (number) ON DELETE CASCADE,
    start BIGINT NOT NULL,
    base TEXT,
    coded BIGINT
);
CREATE INDEX tensors_by_pack ON tensors (pack);
CREATE INDEX tensors_by_base ON tensors (base);
CREATE TABLE uses (
    id TEXT NOT NULL REFERENCES manifests (id) ON DELETE CASCADE,
    pack INTEGER NOT NULL REFERENCES packs (number),
    PRIMARY KEY (id, pack)
);
CREATE INDEX uses_by_pack ON uses (pack);
CREATE TABLE doomed (
    digest TEXT PRIMARY KEY
)
"""

MIGRATIONS: dict[int, str] = {
    2: "ALTER TABLE artifacts ADD COLUMN record TEXT NOT NULL DEFAULT '{}'",
    3: "ALTER TABLE tensors ADD COLUMN base TEXT; ALTER TABLE tensors ADD COLUMN coded BIGINT; "
    "CREATE INDEX tensors_by_base ON tensors (base)",
}
"""SQL that takes the schema from the version before the key to the key."""

UNUSED = "NOT EXISTS (SELECT 1 FROM uses u WHERE u.pack = packs.number)"
"""Condition over the table `packs`: no manifest relies on it."""


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty database; the caller holds a transaction."""
    _run(connection, TABLES)
    connection.execute("INSERT INTO state (key, value) VALUES ('schema', ?)", (VERSION,))
    connection.execute("INSERT INTO state (key, value) VALUES ('journal', 0)")


def drop(connection: sqlite3.Connection) -> None:
    """Remove all tables, those that refer to others first."""
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid DESC"
    )
    for (name,) in tables.fetchall():
        quoted = name.replace('"', '""')
        connection.execute(f'DROP TABLE "{quoted}"')


def version(connection: sqlite3.Connection) -> int | None:
    """Which version of the schema a database has; None if it does not say."""
    try:
        row = connection.execute("SELECT value FROM state WHERE key = 'schema'").fetchone()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):
            raise
        return None
    return row[0] if row and isinstance(row[0], int) else None


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables forward, unless another process just has; the caller holds a transaction."""
    for target in range((version(connection) or 0) + 1, VERSION + 1):
        _run(connection, MIGRATIONS[target])
    connection.execute("UPDATE state SET value = ? WHERE key = 'schema'", (VERSION,))


def _run(connection: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        connection.execute(statement)
