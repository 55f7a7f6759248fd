"""Index of documents kept by earlier runs, in one DuckDB file.

A nightly run removes what any earlier night kept, and adds what it keeps itself.

    with Index("seen.duckdb", settings_of(near, exact, full=False)) as index:
        run = index.run_of(key)                         # rows of this run and of later ones are not matched
        rows, similarities, reasons = index.find(run, columns, threshold)
        index.begin()
        index.add(run, ids, columns)                    # once per batch of documents
        index.commit(run, key, documents, kept)         # once the output is durable

One row per kept document: its id, the hash of its words, 32 bits of each band key, and its signature, 8 bits per hash
function (32 with `full`). Documents that share a band key are candidates. Because the texts are no longer available,
candidates are verified by the share of equal hash functions, corrected for those equal by chance (Li and Koenig 2010,
b-bit minwise hashing). With 112 functions the estimate has a standard error of √(0.75·0.25/112) = 0.04 at 0.75; its
effect on decisions is measured in tests/bench/dedup_scale.md.

A run is identified by its inputs and its options: a repeated run sees what it saw the first time and writes the same
output. The same content under another name is another run, all of whose documents are duplicates. A run killed before
`commit` leaves nothing in the index. Where the disk is too full to merge DuckDB's log into the file, the log stays
beside it, and the next run merges it. DuckDB locks the file: a second run at the same time raises LockedError.
"""

from __future__ import annotations

import json
import os
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from llmkit.corpus.database import Database, arrow_column, arrow_strings, is_intact
from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.corpus.dedup.normalise import LOOSE
from llmkit.errors import LlmkitError, LockedError, UsageError
from llmkit.io.names import is_utf8
from llmkit.io.record import Input
from llmkit.lineage.fields import inputs_of
from llmkit.memory import limited

VERSION = 1
S32, LOW_32 = np.uint64(32), np.uint64(0xFFFFFFFF)
MAX_RECORDS = 1 << 18  # characters of the records of earlier runs in that of a new run
FORMER_SETTINGS = {"shingle": "words", "minhash normalise": LOOSE}  # of indexes that do not record them
MATCHES_PER_KEY = 16  # earliest indexed documents with a band key that are compared
Columns = dict[str, NDArray[Any]]
# The tables of an index and their columns, besides `seen`; `records` is made with the first record.
TABLES = {"llmkit": "settings VARCHAR", "runs": "run INTEGER, inputs VARCHAR, documents BIGINT, kept BIGINT"}
RECORDS = "run INTEGER, record VARCHAR"
MAX_RUNS, MAX_BANDS = 1 << 20, 1 << 10  # more are damage


def settings_of(near: MinHash | None, exact: Exact | None, full: bool) -> dict[str, Any]:
    """The settings that all runs on one index must share."""
    settings: dict[str, Any] = {"version": VERSION, "minhash": near is not None, "exact": exact is not None}
    if near:
        settings |= {name: getattr(near, name) for name in ("ngram", "bands", "rows", "bits", "seed")}
        settings |= {"signature bits": 32 if full else 8, "shingle": near.unit, "minhash normalise": near.normalise}
    if exact:
        settings |= {"key": exact.key, "normalise": exact.normalise}
    return settings


def run_key(digests: list[str], options: dict[str, Any]) -> str:
    """Identity of a run: a hash of the digests of its inputs, in order, and of the options that decide its output."""
    return xxhash.xxh3_128_hexdigest(json.dumps([digests, options], sort_keys=True).encode())


def history_of(settings: dict[str, Any], keys: list[tuple[str]]) -> str:
    """The digest of an index by its settings and the keys of its runs."""
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps([settings, keys], sort_keys=True).encode())


class Index:
    """The index file, locked; a context manager. With `settings`, a missing file is created.

    Raises LlmkitError if the file cannot be read or was made with other settings, LockedError if it is in use.
    """

    def __init__(self, path: str, settings: dict[str, Any] | None, temporary: str | None = None) -> None:
        self.path, self.name = path, os.path.basename(path)
        self._empty = False  # created by this call, nothing committed yet
        self.log = ""  # a file beside the index that holds a part of it, once the index is closed
        if settings is None and not os.path.exists(path):
            raise LlmkitError(f"{path} does not exist", "a run with --index creates it")
        if not Path(os.path.realpath(path)).parent.is_dir():
            raise LlmkitError(f"{Path(path).parent} is not a directory", "create it first")
        if not is_utf8(str(path)):
            raise UsageError(f"{path}: DuckDB opens only names in UTF-8", "give the index another name")
        is_new = not os.path.lexists(path)
        try:
            self._sql = Database(path, temporary)
        except duckdb.Error as error:
            self._refuse(error, is_new)
        try:
            self.settings = self._open(settings)
        except duckdb.Error as error:
            self._sql.close()
            self._refuse(error, is_new)
        except LlmkitError:
            self._sql.close()
            raise

    def _refuse(self, error: duckdb.Error, is_new: bool) -> None:
        """Raise a LlmkitError for an error on opening the file; a new one that could not be written is removed."""
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "could not set lock" in message.lower():
            raise LockedError(f"{self.path} is in use by another run", "wait for it to finish") from None
        if is_new:
            self._remove()
            raise LlmkitError(f"{self.path} cannot be made ({message:.150})", "check the disk") from None
        raise LlmkitError(
            f"{self.path} cannot be read as an index ({message:.150})",
            "restore a backup, or start a new index under another name",
        ) from None

    def _open(self, expected: dict[str, Any] | None) -> dict[str, Any]:
        """The settings in the file; the expected ones if it is new. LlmkitError if they differ."""
        try:
            if not (tables := self._sql.tables()) and expected is not None:
                self._empty = True  # certain only now, under DuckDB's lock
                self._create(expected)
                return expected
            with limited(self.path):
                stored = self._parsed(_stored_settings(self._sql, tables))
        except json.JSONDecodeError:
            stored = self._parsed("")
        except ValueError as error:
            raise LlmkitError(f"{self.path} is not an index of llmkit dedup: {error}", "name another file") from None
        for name, value in (expected or {"version": VERSION}).items():
            made_with = stored.get(name, FORMER_SETTINGS.get(name))
            if made_with != value:
                option = f"--normalise {made_with}" if name == "minhash normalise" else "the same options"
                raise LlmkitError(
                    f"{self.path} was made with {name} {made_with}, this call has {value}",
                    f"use {option}, or start a new index under another name",
                )
        return stored

    def _parsed(self, text: Any) -> dict[str, Any]:
        """The settings or a record in the file. LlmkitError where they are not JSON."""
        try:
            content = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise LlmkitError(
                f"{self.path} cannot be read as an index (settings or a record in it are damaged)",
                "restore a backup, or start a new index under another name",
            )
        return content

    def _create(self, settings: dict[str, Any]) -> None:
        self._sql.execute("BEGIN")
        for name, columns in (TABLES | {"seen": _seen_columns(settings)}).items():
            self._sql.execute(f"CREATE TABLE {name} ({columns})")
        self._sql.execute("INSERT INTO llmkit VALUES (?)", [json.dumps(settings)])
        self._sql.execute("COMMIT")

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sql.close()
        if self._empty:
            self._remove()
        self._merge_log()
        if isinstance(error, duckdb.Error):
            message = str(error).splitlines()[0]
            raise LlmkitError(f"{self.path}: {message:.200}", "nothing of this run is in the index") from error

    def _merge_log(self) -> None:
        """Let DuckDB merge its log into the file again, or remove one that is empty.

        On a full disk it closes the file without either, and reports nothing.
        """
        log = os.path.realpath(self.path) + ".wal"
        if os.path.exists(log):
            with suppress(duckdb.Error):
                Database(self.path).close()
            self.log = log if os.path.exists(log) else ""

    def _remove(self) -> None:
        Path(self.path).unlink(missing_ok=True)
        Path(self.path + ".wal").unlink(missing_ok=True)

    def key_of(self, inputs: list[Input], options: dict[str, Any]) -> str:
        """The key of a run on these inputs. Their names are part of it only where a run in the index read the same
        content under others, so that keys of earlier versions remain valid.
        """
        digests, names = [item.digest for item in inputs], [item.name for item in inputs]
        key = run_key(digests, options)
        return key if self.names_of(key) in ([], names) else run_key(digests + names, options)

    def names_of(self, key: str) -> list[str]:
        """Names of the inputs of the run with this key; empty where no run has it, or where they are not known."""
        row = (
            self._has_records()
            and self._sql.execute("SELECT record FROM runs JOIN records USING (run) WHERE inputs = ?", [key]).fetchone()
        )
        return [item["name"] for item in inputs_of(self._parsed(row[0])) if item["role"] == "input"] if row else []

    def run_of(self, key: str) -> int:
        """Number of the run with this key; the next number for a new run."""
        row = self._sql.execute("SELECT run FROM runs WHERE inputs = ?", [key]).fetchone()
        if row:
            return int(row[0])
        (last,) = self._sql.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone() or (0,)
        return int(last) + 1

    def has(self, key: str) -> bool:
        """Whether the run with this key is in the index."""
        return self._sql.execute("SELECT 1 FROM runs WHERE inputs = ?", [key]).fetchone() is not None

    def history(self, run: int) -> str:
        """A digest of the runs before this one: equal histories are equal indexes, whatever the bytes of the files."""
        keys = self._sql.execute("SELECT inputs FROM runs WHERE run < ? ORDER BY run", [run]).fetchall()
        return history_of(self.settings, keys)

    def find(
        self, run: int, columns: Columns, threshold: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]:
        """For each document the row that it duplicates (-1: none), the similarity, the reason (1: exact, 2: minhash).

        `columns`: exact uint64 [n] and keyed bool [n]; same uint64 [n], shingle_counts int64 [n], band0... uint64 [n],
        signature [n, functions].
        """
        n = len(next(iter(columns.values())))
        rows, similarities, reasons = np.full(n, -1, np.int64), np.zeros(n), np.zeros(n, np.uint8)
        numbers = arrow_column(np.arange(n))
        if self.settings["minhash"]:
            _, firsts, inverse = np.unique(columns["same"], return_index=True, return_inverse=True)
            queries = firsts[columns["shingle_counts"][firsts] > 0]  # one document for each set of equal words
            pairs = np.empty(0, np.uint64)
            for name in (f"band{band}" for band in range(self.settings["bands"])):
                matches = self._rows_with_keys(
                    run, name, arrow_column(queries), _low(columns[name])[queries], MATCHES_PER_KEY
                ).astype(np.uint64)
                pairs = np.unique(np.concatenate([pairs, matches[:, 0] << S32 | matches[:, 1]]))
            documents, candidates = (pairs >> S32).astype(np.int64), (pairs & LOW_32).astype(np.int64)
            estimates = self._estimates(columns["signature"], documents, candidates)
            similar = estimates >= threshold
            documents, candidates, estimates = documents[similar], candidates[similar], estimates[similar]
            first = np.unique(documents, return_index=True)[1]
            documents, candidates, estimates = documents[first], candidates[first], estimates[first]
            rows[documents], similarities[documents], reasons[documents] = candidates, estimates, 2
            spread = firsts[inverse]
            rows, similarities, reasons = rows[spread], similarities[spread], reasons[spread]
            self._enter_equal(run, "same", numbers, columns["same"], rows, similarities, reasons, 2)
        if self.settings["exact"]:
            keyed = columns["keyed"]
            self._enter_equal(
                run,
                "exact",
                arrow_column(np.flatnonzero(keyed)),
                columns["exact"][keyed],
                rows,
                similarities,
                reasons,
                1,
            )
        return rows, similarities, reasons

    def _enter_equal(
        self,
        run: int,
        name: str,
        numbers: pa.Array,
        keys: NDArray[Any],
        rows: Any,
        similarities: Any,
        reasons: Any,
        reason: int,
    ) -> None:
        """Enter rows with equal keys into `rows`, `similarities` and `reasons`."""
        matches = self._rows_with_keys(run, name, numbers, keys, 1)
        rows[matches[:, 0]], similarities[matches[:, 0]], reasons[matches[:, 0]] = matches[:, 1], 1.0, reason

    def _rows_with_keys(
        self, run: int, name: str, numbers: pa.Array, keys: NDArray[Any], limit: int
    ) -> NDArray[np.int64]:
        """(document, row) pairs with equal keys, int64 [pairs, 2]: the `limit` earliest rows of each key."""
        new = pa.table({"n": numbers, "key": arrow_column(keys)})
        condition = "AND s.keyed" if name == "exact" else ""
        pairs = self._sql.execute(
            f"""WITH few AS (
                SELECT s.rowid AS number, s.{name} AS key FROM seen s
                WHERE s.run < ? {condition} AND s.{name} IN (SELECT key FROM new)
                QUALIFY row_number() OVER (PARTITION BY s.{name} ORDER BY s.rowid) <= {limit}
            ) SELECT n, number FROM new JOIN few USING (key)""",
            [run],
            new=new,
        ).fetchnumpy()
        return np.stack([pairs["n"].astype(np.int64), pairs["number"].astype(np.int64)], axis=1)

    def _estimates(
        self, signatures: NDArray[Any], documents: NDArray[np.int64], candidates: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Estimated similarity of pairs of documents and rows, by the share of equal hash functions."""
        bits = self.settings["signature bits"]
        stored_rows = self._sql.execute(
            "SELECT s.rowid, s.signature FROM seen s JOIN wanted ON s.rowid = wanted.number ORDER BY s.rowid",
            wanted=pa.table({"number": arrow_column(np.unique(candidates))}),
        ).fetchall()
        dtype = np.uint8 if bits == 8 else np.uint32
        try:
            stored = np.frombuffer(b"".join(signature for _, signature in stored_rows), dtype).reshape(
                len(stored_rows), signatures.shape[1]
            )
        except (ValueError, TypeError):
            raise LlmkitError(f"{self.path}: signatures in it are damaged", "restore a backup") from None
        positions = np.searchsorted(np.array([number for number, _ in stored_rows], np.int64), candidates)
        equal = np.zeros(len(documents))
        for start in range(0, len(documents), 1 << 16):
            batch = slice(start, start + (1 << 16))
            equal[batch] = (signatures[documents[batch]] == stored[positions[batch]]).mean(axis=1)
        chance = 2.0**-bits
        corrected: NDArray[np.float64] = (equal - chance) / (1 - chance)
        return corrected

    def runs_before(self, run: int) -> list[dict[str, Any]] | None:
        """The records of the runs before this one, oldest first, without the runs that each of them saw.

        Earlier versions stored none: those of the runs since then. None where there is none, or they are over
        MAX_RECORDS: the index as it was is then an original for the script that repeats this run.
        """
        table = "(SELECT NULL AS run, NULL AS record)" if not self._has_records() else "records"
        query = f"FROM runs LEFT JOIN {table} AS r ON r.run = runs.run WHERE runs.run < ?"
        rows = self._sql.execute(f"SELECT length(record) {query} ORDER BY runs.run", [run]).fetchall()
        sizes = [size for (size,) in rows]
        first = max((i + 1 for i, size in enumerate(sizes) if size is None), default=0)
        if (sizes and not sizes[first:]) or sum(sizes[first:]) > MAX_RECORDS:
            return None
        texts = self._sql.execute(f"SELECT record {query} ORDER BY runs.run OFFSET {first}", [run]).fetchall()
        return [self._parsed(text) for (text,) in texts]

    def _has_records(self) -> bool:
        tables = self._sql.execute("SELECT table_name FROM system.main.duckdb_tables()").fetchall()
        return ("records",) in tables

    def add_record(self, run: int, record: dict[str, Any]) -> None:
        """Store the record of a run, in its transaction."""
        self._sql.execute(f"CREATE TABLE IF NOT EXISTS records ({RECORDS})")
        self._sql.execute("INSERT INTO records VALUES (?, ?)", [run, json.dumps(record, sort_keys=True)])

    def begin(self) -> None:
        """Start a transaction: what is added from here on becomes visible at `commit`, all of it or nothing."""
        self._sql.execute("BEGIN")

    def add(self, run: int, ids: list[str], columns: Columns) -> None:
        """Add kept documents of a run; `columns` as for `find`."""
        table = {"run": arrow_column(np.full(len(ids), run, np.int32)), "id": arrow_strings(ids)}
        if self.settings["exact"]:
            table |= {"exact": arrow_column(columns["exact"]), "keyed": arrow_column(columns["keyed"])}
        if self.settings["minhash"]:
            table["same"] = arrow_column(columns["same"])
            table |= {f"band{i}": arrow_column(_low(columns[f"band{i}"])) for i in range(self.settings["bands"])}
            table["signature"] = arrow_column(columns["signature"])
        self._sql.execute("INSERT INTO seen BY NAME SELECT * FROM new", new=pa.table(table))

    def commit(self, run: int, key: str, documents: int, kept: int) -> None:
        """Make the added documents and the run durable."""
        self._sql.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", [run, key, documents, kept])
        self._sql.execute("COMMIT")
        self._empty = False

    def ids(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Row number -> document id."""
        wanted = pa.table({"number": arrow_column(np.unique(rows))})
        pairs = self._sql.execute(
            "SELECT s.rowid, s.id FROM seen s JOIN wanted ON s.rowid = wanted.number", wanted=wanted
        ).fetchall()
        return dict(pairs)

    def stats(self) -> dict[str, Any]:
        """Settings, runs, numbers of documents, and size in bytes."""
        runs = self._sql.execute("SELECT run, documents, kept FROM runs ORDER BY run").fetchall()
        kept = sum(row[2] for row in runs)
        size = os.path.getsize(self.path)
        return {
            "settings": self.settings,
            "runs": [{"run": run, "documents": documents, "kept": kept} for run, documents, kept in runs],
            "documents": sum(row[1] for row in runs),
            "kept": kept,
            "bytes": size,
            "bytes_per_document": round(size / max(1, kept), 1),
        }


def _seen_columns(settings: dict[str, Any]) -> str:
    """The columns of the kept documents. ValueError where the settings are damaged."""
    if not isinstance(settings, dict):
        raise TypeError("settings are a table")
    columns = ["run INTEGER", "id VARCHAR"]
    columns += ["exact UBIGINT", "keyed BOOLEAN"] if settings.get("exact") else []
    if settings.get("minhash"):
        if type(bands := settings.get("bands")) is not int or not 0 < bands <= MAX_BANDS:
            raise ValueError("its settings are damaged")
        columns += ["same UBIGINT", *(f"band{i} UINTEGER" for i in range(bands)), "signature BLOB"]
    return ", ".join(columns)


def _stored_settings(sql: Database, tables: dict[str, str]) -> str:
    """The settings of an index, as text. ValueError where its tables are not those of an index, or damaged."""
    if "seen" not in tables or any(tables.get(name) != columns for name, columns in TABLES.items()):
        raise ValueError("it has other tables")
    (text,) = sql.execute("SELECT settings FROM llmkit LIMIT 1").fetchone() or ("{}",)
    with suppress(TypeError, RecursionError):  # reported where the settings are used
        expected = {**TABLES, "records": RECORDS, "seen": _seen_columns(json.loads(text))}
        if any(expected.get(name) != columns for name, columns in tables.items()):
            raise ValueError("its tables have other columns")
    damaged = sql.execute(
        "SELECT 1 FROM (SELECT count(*) AS n FROM runs) WHERE n > ? UNION ALL SELECT 1 FROM runs WHERE run IS NULL OR"
        " run < 1 OR run > ? OR documents IS NULL OR kept IS NULL OR inputs IS NULL OR length(inputs) > 64 LIMIT 1",
        [MAX_RUNS, 1 << 30],
    ).fetchone()
    if damaged:
        raise ValueError("its table of runs is damaged")
    return text if isinstance(text, str) else ""


def holds(path: str, history: str) -> bool:
    """Whether an index is undamaged and has the history that a run recorded, and perhaps later runs."""
    try:
        if not is_intact(path):
            return False
        with limited(path), closing(Database(path, read_only=True)) as sql:
            settings = _stored_settings(sql, sql.tables())
            keys = sql.execute("SELECT inputs FROM runs ORDER BY run").fetchall()
        return any(history_of(json.loads(settings), keys[:runs]) == history for runs in range(len(keys) + 1))
    except (duckdb.Error, LlmkitError, OSError, ValueError, TypeError, RecursionError):
        return False


def _low(keys: NDArray[Any]) -> NDArray[np.uint32]:
    """The lower 32 bits of band keys."""
    return (keys & LOW_32).astype(np.uint32)
