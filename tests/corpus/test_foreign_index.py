"""Indexes that somebody else made: nothing in them runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copy

import duckdb
import numpy as np
import pytest

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.index import Index, holds, settings_of
from llmkit.errors import LlmkitError

SETTINGS = settings_of(None, Exact(), full=False)
ELSEWHERE = "CREATE SCHEMA other; CREATE TABLE other.{0} AS FROM {0}; DROP TABLE {0}; CREATE VIEW {0} AS {1}"
ENDLESS = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT x::VARCHAR AS settings FROM t"
FOREIGN = {
    "a view that reads a file": ELSEWHERE.format("llmkit", "SELECT content AS settings FROM read_text('{secret}')"),
    "a view that never ends": ELSEWHERE.format("llmkit", ENDLESS),
    "a view of a large text": ELSEWHERE.format("llmkit", "SELECT repeat('{{', 3000000000) AS settings"),
    "a view of the runs": ELSEWHERE.format("runs", "SELECT 1 AS run, '' AS inputs, 1 AS documents, 1 AS kept FROM range(2000000000)"),
    "a macro in the place of a function": "CREATE MACRO max(x) AS 7",
    "a macro with the name of the schema": "CREATE MACRO main(x) AS 7",
    "a macro in the place of the catalogue": "CREATE MACRO duckdb_tables() AS TABLE SELECT 1",
    "a default": "ALTER TABLE runs ALTER kept SET DEFAULT random()",
    "a check": "DROP TABLE runs; CREATE TABLE runs (run INTEGER, inputs VARCHAR, documents BIGINT, kept BIGINT CHECK (kept < 7))",
    "a generated column": "ALTER TABLE llmkit RENAME settings TO s; CREATE OR REPLACE TABLE llmkit"
    " (s VARCHAR, settings VARCHAR GENERATED ALWAYS AS (repeat(s, 9)))",
    "a column of another type": "ALTER TABLE seen ALTER exact TYPE VARCHAR",
    "a sequence": "CREATE SEQUENCE s",
    "an index": "CREATE INDEX i ON seen (exact)",
    "a type": "CREATE TYPE mood AS ENUM ('sad')",
    "another table": "CREATE TABLE other (x INTEGER)",
    "another schema": "CREATE SCHEMA other",
    "runs without numbers": "INSERT INTO runs VALUES (NULL, 'x', NULL, 1)",
    "two million runs": "INSERT INTO runs SELECT 1, 'x', 1, 1 FROM range(2000000)",
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "seen.duckdb"
    with Index(str(path), SETTINGS) as index:
        index.begin()
        index.commit(1, "key", 1, 1)
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_an_index_does_not_hold_is_refused(tmp_path: Path, honest: Path, kind: str) -> None:
    """Behaviour: a database that holds more than the tables of an index is refused at once, and nothing of it runs."""
    path = Path(copy(honest, tmp_path / "seen.duckdb"))
    (tmp_path / "secret").write_text('{"version": 1, "secret": "open sesame"}')
    with duckdb.connect(str(path)) as sql:
        sql.execute(FOREIGN[kind].format(secret=tmp_path / "secret"))
    started = time.monotonic()
    for settings in (SETTINGS, None):
        with pytest.raises(LlmkitError, match="not an index") as error, Index(str(path), settings) as index:
            index.stats()
        assert "sesame" not in str(error.value)
    assert not holds(str(path), "xxh3:0") and time.monotonic() - started < 5


def test_an_honest_index_opens(tmp_path: Path, honest: Path) -> None:
    """Behaviour: an index opens with and without records; a file can be read by nobody through it."""
    path = str(copy(honest, tmp_path / "seen.duckdb"))
    for _ in range(2):
        with Index(path, SETTINGS) as index:
            assert index.stats()["kept"] == 1 and index.run_of("key") == 1
            with pytest.raises(duckdb.Error, match="disabled"):
                index._sql.execute("SELECT * FROM read_text('/etc/hostname')")
            index.begin()
            index.add_record(1, {"command": "dedup"})
            one = {"exact": np.ones(1, np.uint64), "keyed": np.ones(1, bool)}
            index.add(1, ["a"], one)
            index.add(1, ["b"], one)
            index._sql.execute("COMMIT")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_query(number: int, code: int) -> None:
    """Behaviour: a signal during a query of DuckDB ends the command as elsewhere, not with an internal error."""
    program = (
        "import sys; from llmkit.cli import main; from llmkit.corpus.database import Database\n"
        "import llmkit.cli.text.dedup as command, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def show(run, path):\n"
        "    print('ready', flush=True)\n"
        "    Database(':memory:').execute('SELECT max(a.range + b.range) FROM range(100000000) a, range(100000) b')\n"
        "command._show_index = show\n"
        "main.main(['dedup', '--index', 'x', '--stats'])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and b"internal" not in errors, errors
