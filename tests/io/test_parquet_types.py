"""Parquet in, Parquet out: the types of columns stay; JSON has a form for every value."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.io.arrow_values import from_json, to_json
from llmkit.io.document_writer import DocumentWriter
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.io.record import Lineage

TYPES = [
    *(pa.timestamp(unit, tz) for unit in ("s", "ms", "us", "ns") for tz in (None, "Europe/Berlin")),
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
    *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.date32(), pa.int64()),
]
SHARED = Path(__file__).parents[2].parent / "shared/cases/documents/column_types.parquet"


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(TYPES), st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31), st.integers(-(2**62), 2**62)))
)
def test_points_in_time_come_back(type: pa.DataType, units: list[int | None]) -> None:
    """Property: every value of a temporal type has a form in JSON that gives the same value."""
    narrow = type.bit_width == 32
    if narrow:
        units = [unit and unit % 10**7 - 10**6 for unit in units]
    array = pa.array(units, type)
    back = from_json(orjson.loads(orjson.dumps(to_json(array))), type)
    assert back.cast(pa.int32() if narrow else pa.int64()).to_pylist() == units


def table() -> pa.Table:
    nested = pa.struct([("at", pa.timestamp("ns")), ("raw", pa.list_(pa.binary()))])
    columns = {
        "id": pa.array([1 << 53, (1 << 53) + 1, 3]),
        "text": pa.array(["one", "two", "three"], pa.large_string()),
        "day": pa.array([-5, 20_000, None], pa.date32()),
        "time": pa.array([1, 2, 86_399_999_999_999], pa.time64("ns")),
        "price": pa.array([Decimal("1.10"), None, Decimal("-0.05")], pa.decimal128(30, 2)),
        "score": pa.array([math.nan, math.inf, None], pa.float32()),
        "raw": pa.array([b"\0\xff", b"", None]),
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "nested": pa.array([{"at": 1, "raw": [b"\x80", None]}, None, {"at": None, "raw": []}], nested),
        "pairs": pa.array([[("k", 1.5)], None, []], pa.map_(pa.string(), pa.float64())),
        "big": pa.array([(1 << 64) - 1, 0, None], pa.uint64()),
    }
    fields = [pa.field(name, array.type, metadata={"unit": name}) for name, array in columns.items()]
    return pa.table(list(columns.values()), pa.schema(fields, {"owner": "me"}))


def copy(paths: list[Path], output: Path, edit: bool = False) -> None:
    """All documents of some files to a file."""
    with DocumentReader([str(path) for path in paths]) as reader, DocumentWriter(str(output), Lineage("t")) as writer:
        for document in reader.documents():
            if edit:
                document.change(text=document.text.upper(), added=1)
            writer.write(document.encode())
        writer.finish({}, reader.inputs)


def test_types_values_and_groups_stay(tmp_path: Path) -> None:
    """Property: schema, metadata and values of untouched columns are equal, and row groups have the same size."""
    original = table()
    pq.write_table(original, tmp_path / "a.parquet", row_group_size=2)
    copy([tmp_path / "a.parquet"], tmp_path / "b.parquet", edit=True)
    result = pq.ParquetFile(tmp_path / "b.parquet")
    assert [result.metadata.row_group(i).num_rows for i in range(result.num_row_groups)] == [2, 1]
    schema = result.schema_arrow
    assert schema.names == [*original.schema.names, "added"] and schema.metadata[b"owner"] == b"me"
    data = result.read()
    for field in original.schema:
        assert schema.field(field.name).type == field.type and schema.field(field.name).metadata[b"unit"]
        if field.name != "text":
            assert str(data[field.name].to_pylist()) == str(original[field.name].to_pylist())
    assert data["text"].to_pylist() == ["ONE", "TWO", "THREE"]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data is not beside this checkout")
def test_the_shared_case(tmp_path: Path) -> None:
    """Behaviour: timestamp, NaN and binary keep type and value."""
    copy([SHARED], tmp_path / "b.parquet")
    before, after = pq.read_table(SHARED), pq.read_table(tmp_path / "b.parquet")
    assert before.schema.equals(after.schema) and str(before.to_pylist()) == str(after.to_pylist())


def test_several_inputs_and_through_json(tmp_path: Path) -> None:
    """Behaviour: columns of several schemas are united; types that exclude each other are an error with the field."""
    pq.write_table(pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"n": pa.array([1 << 40, 2]), "text": ["b", "c"], "x": [math.nan, 1.5]}), tmp_path / "b.parquet"
    )
    copy([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "c.parquet")
    schema = pq.read_schema(tmp_path / "c.parquet")
    assert (schema.names, schema.field("n").type) == (["text", "n", "x"], pa.int64())
    copy([tmp_path / "c.parquet"], tmp_path / "c.jsonl")
    copy([tmp_path / "c.jsonl"], tmp_path / "d.parquet")
    assert str(pq.read_table(tmp_path / "d.parquet")["x"].to_pylist()) == "[None, nan, 1.5]"
    pq.write_table(pa.table({"text": ["b"], "n": ["one"]}), tmp_path / "e.parquet")
    with pytest.raises(LlmkitError, match="field 'n' is int32 in one input, string in another"):
        copy([tmp_path / "a.parquet", tmp_path / "e.parquet"], tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text":"a","x":1}\n{"text":"b","x":"s"}\n', "field 'x', row 2: 's' follows values of type int64"),
        (
            b'{"text":"a","n":18446744073709551616}\n',
            "field 'n', row 1: 18446744073709551616: .* integers beyond 64 bits",
        ),
        (b'{"text":"a","n":5}\n{"text":"a","n":[18446744073709551616]}\n', "row 2: .* integers beyond 64 bits"),
        (b'{"text":"a","n":%s}\n' % (b"9" * 5000), "field 'n', row 1: a number beyond the range of floats"),
        (b'{"text":"a","n":1e400}\n', "field 'n', row 1: a number beyond the range of floats"),
        (b'{"text":"a","n":-5}\n{"text":"a","n":9223372036854775808}\n', "field 'n', row 2: 9223372036854775808"),
        (b'{"text":"a","n":9007199254740993}\n{"text":"a","n":0.5}\n', "field 'n', row"),
    ],
)
def test_values_that_a_column_cannot_hold(tmp_path: Path, lines: bytes, message: str) -> None:
    """Behaviour: what Parquet would change is an error that names field and row, and leaves no file."""
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(LlmkitError, match=message):
        copy([tmp_path / "a.jsonl"], tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()


def test_a_value_of_another_type_changes_its_column_only(tmp_path: Path) -> None:
    """Behaviour: where an edit leaves the type of its column, the column takes the type of the new values."""
    pq.write_table(
        pa.table({"text": ["a", "b"], "reason": [1, 2], "d": pa.array([1, 2], pa.date32())}), tmp_path / "a.parquet"
    )
    reader = DocumentReader([str(tmp_path / "a.parquet")])
    with DocumentWriter(str(tmp_path / "r.parquet"), Lineage("t")) as writer:
        for document in reader.documents():
            writer.write(document.with_fields({"reason": "short"}))
        writer.finish({}, reader.inputs)
    assert pq.read_schema(tmp_path / "r.parquet").types == [pa.string(), pa.string(), pa.date32()]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """Behaviour: a row as JSON could hold only one of them."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "n", "n"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(LlmkitError, match="two columns are called 'n'"):
        list(DocumentReader([str(tmp_path / "d.parquet")]).documents())


@pytest.mark.parametrize(
    "array",
    [
        pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]),
        pa.array([[1]], pa.list_view(pa.timestamp("ns"))),
    ],
)
def test_types_without_a_form_in_json_are_refused(tmp_path: Path, array: pa.Array) -> None:
    """Behaviour: a struct with two fields of one name, also inside a list, and lists that pyarrow cannot cast, are an error
    that names the column."""
    for number, column in enumerate((array, pa.ListArray.from_arrays([0, 1], array))):
        try:
            pq.write_table(pa.table({"text": ["a"], "s": column}), tmp_path / f"{number}.parquet")
        except pa.ArrowNotImplementedError:
            pytest.skip("this version of pyarrow writes no Parquet file of this type")
        with pytest.raises(LlmkitError, match="column 's': values of type .* have no form in JSON"):
            list(DocumentReader([str(tmp_path / f"{number}.parquet")]).documents())


OBJECTS = st.recursive(
    st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@example([{}, {"a": 1}])
@example([[{"a": 1}, {"a": 1, "b": [{}]}, {"b": [{"a": 2}]}]])
@given(st.lists(OBJECTS, max_size=3))
def test_objects_change_only_with_a_warning(tmp_path_factory: pytest.TempPathFactory, values: list[object]) -> None:
    """Property: objects, also nested ones, are equal after JSON, Parquet, JSON; or there is a warning that names the field;
    or an error."""
    place, warnings = tmp_path_factory.mktemp("objects"), list[str]()
    rows = [{"text": "a", "m": value} for value in values]
    try:
        with DocumentWriter(str(place / "a.parquet"), Lineage("t"), warn=warnings.append) as writer:
            writer.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))
            writer.finish({}, [])
    except LlmkitError:
        return
    back = [document.fields for document in DocumentReader([str(place / "a.parquet")]).documents()]
    assert (back == rows) == (not warnings)
    assert all("field 'm': keys that an object lacks are null (first in row " in text for text in warnings)


INTEGERS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1)) | st.lists(st.integers(0, (1 << 64) - 1))


@settings(max_examples=30, deadline=None)
@example([5, (1 << 64) - 1], "[%s]")
@given(INTEGERS, st.sampled_from(["%s", "[%s]", '{"a":[{"b":%s}]}']))
def test_integers_of_64_bits_come_back(tmp_path_factory: pytest.TempPathFactory, values: list[int], form: str) -> None:
    """Property: signed or unsigned integers, also inside lists and objects, have the same digits after JSON, Parquet, JSON."""
    place = tmp_path_factory.mktemp("integers")
    lines = b"".join(b'{"text":"a","n":%s}\n' % (form % value).encode() for value in values)
    (place / "a.jsonl").write_bytes(lines)
    copy([place / "a.jsonl"], place / "b.parquet")
    copy([place / "b.parquet"], place / "c.jsonl")
    assert (place / "c.jsonl").read_bytes() == lines


def test_signed_and_unsigned_inputs_are_united(tmp_path: Path) -> None:
    """Behaviour: a column that is int64 in one file and uint64 in another holds the values of both."""
    for name, type, value in (("a", pa.int64(), 5), ("b", pa.uint64(), (1 << 64) - 1)):
        pq.write_table(pa.table({"text": ["t"], "n": pa.array([value], type)}), tmp_path / f"{name}.parquet")
    copy([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "c.parquet")
    assert pq.read_table(tmp_path / "c.parquet")["n"].to_pylist() == [5, (1 << 64) - 1]


def undeclared(path: Path, kind: pa.DataType, raw: bytes = b"\xff", url: bytes = b"http://a/") -> None:
    """A file whose writer did not declare its strings."""
    columns = {"id": [b"1"], "text": ["caf\u00e9".encode()], "url": [url], "raw": [raw]}
    pq.write_table(pa.table({name: pa.array(values, kind) for name, values in columns.items()}), path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_binary_columns_of_text_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    """Behaviour: text, id, source, url and language are text without a declaration, other BINARY columns base64; Parquet
    to Parquet keeps types and bytes."""
    undeclared(tmp_path / "a.parquet", kind)
    copy([tmp_path / "a.parquet"], tmp_path / "b.jsonl")
    assert orjson.loads((tmp_path / "b.jsonl").read_bytes()) == {
        "id": "1", "text": "café", "url": "http://a/", "raw": "/w==",
    }  # fmt: skip
    copy([tmp_path / "a.parquet"], tmp_path / "b.parquet")
    before, after = pq.read_table(tmp_path / "a.parquet"), pq.read_table(tmp_path / "b.parquet")
    assert before.schema.equals(after.schema) and before.to_pylist() == after.to_pylist()
    pq.write_table(
        pa.table({"prompt": pa.array([b"why"], kind), "raw": pa.array([b"\xff"], kind)}), tmp_path / "r.parquet"
    )
    rows = DocumentReader([str(tmp_path / "r.parquet")], ReadOptions(text_key=None)).documents()
    assert [row.fields for row in rows] == [{"prompt": "why", "raw": "/w=="}]


def test_binary_and_declared_text_together(tmp_path: Path) -> None:
    """Behaviour: with strings of another file, text becomes a column of strings; bytes that are not text stay base64, and
    are never mixed with text."""
    undeclared(tmp_path / "a.parquet", pa.binary())
    pq.write_table(pa.table({"text": ["b"], "url": ["http://b/"]}), tmp_path / "b.parquet")
    copy([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "c.parquet")
    assert pq.read_table(tmp_path / "c.parquet")["url"].to_pylist() == ["http://a/", "http://b/"]
    undeclared(tmp_path / "d.parquet", pa.binary(), url=b"\xff\xfe")
    copy([tmp_path / "d.parquet"], tmp_path / "d.jsonl")
    assert orjson.loads((tmp_path / "d.jsonl").read_bytes())["url"] == "//4="
    with pytest.raises(LlmkitError, match="field 'url' is"):
        copy([tmp_path / "a.parquet", tmp_path / "d.parquet"], tmp_path / "e.parquet")
    pq.write_table(pa.table({"text": ["b"], "raw": ["abcd"]}), tmp_path / "f.parquet")
    with pytest.raises(LlmkitError, match="field 'raw' is binary in one input, string in another"):
        copy([tmp_path / "a.parquet", tmp_path / "f.parquet"], tmp_path / "g.parquet")


@pytest.mark.parametrize("column", ["text", "binary", "nested", "dictionary"])
def test_a_string_that_is_not_utf8_is_a_bad_row(tmp_path: Path, column: str) -> None:
    """Property: of 2,000 rows exactly those with invalid strings are bad, with their number and their bytes in the quarantine."""
    texts, bad = [f"text {i}".encode() for i in range(2000)], (5, 1500, 1501)
    for row in bad:
        texts[row] = b"b\xe9d"
    strings = pa.array(texts, pa.binary()).view(pa.string())
    values = {
        "text": strings,
        "binary": pa.array(texts, pa.binary()),
        "nested": pa.ListArray.from_arrays(pa.array(range(2001), pa.int32()), strings),
        "dictionary": strings.dictionary_encode(),
    }[column]
    columns = {"id": pa.array(range(2000)), "text": pa.array(["t"] * 2000)}
    columns["tags" if column == "nested" else "text"] = values
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=700)
    policy = ReadOptions(on_bad_line=f"quarantine={tmp_path / 'bad.jsonl'}")
    with DocumentReader([str(tmp_path / "a.parquet")], policy) as reader:
        assert [d.fields["id"] for d in reader.documents()] == [i for i in range(2000) if i not in bad]
    rows = [orjson.loads(line) for line in (tmp_path / "bad.jsonl").read_bytes().splitlines()]
    assert [row["line"] for row in rows] == [row + 1 for row in bad]
    assert "invalid UTF-8" in rows[0]["reason"] and '"id":5' in rows[0]["raw"] and "b\\xe9d" in rows[0]["raw"]


def test_checksums_of_pages_are_verified(tmp_path: Path) -> None:
    """Behaviour: a page that does not match its checksum is damage of the file, also where its values can be decoded."""
    texts = pa.table({"text": [f"birds {i}" for i in range(100)]})
    pq.write_table(texts, tmp_path / "a.parquet", compression="none", write_page_checksum=True, use_dictionary=False)
    stored = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(stored.replace(b"birds 50", b"words 50"))
    with pytest.raises(LlmkitError, match="CRC"):
        list(DocumentReader([str(tmp_path / "a.parquet")]).documents())


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        ("9007199254740993.0", True), ("12345678901234567.25", True), ("0.1234567890123456789012345", True),
        ("1e-400", True), ("1.0000000000000000000000000000000000001e2", True), ("0.1", False), ("1.10", False),
        ("0.10000000000000001", False), ("1.5e300", False), ("5e-324", False), ("0e-400", False),
        ("9007199254740992.0", False), ("18446744073709551615", False),
    ],
)  # fmt: skip
def test_numbers_that_are_rounded_are_named(tmp_path: Path, llmkit_here: Any, number: str, rounded: bool) -> None:
    """Behaviour: a number that no float holds gives a warning with its field and row; the digits of a float do not."""
    rows = '{"id":"12345678901234567890.5","text":"a","v":[{"n":0.5}]}\n{"id":"b","text":"b","v":[{"n":NUMBER}]}\n'
    rows = rows.replace("NUMBER", number)
    (tmp_path / "a.jsonl").write_text(rows)
    if "." not in number and "e" not in number:
        (tmp_path / "a.jsonl").write_text(rows.replace("0.5", "1"))
    done = llmkit_here("dedup", "a.jsonl", "--method", "exact", "--no-counts", "-o", "a.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning = b"field 'v': numbers are rounded to floats (first in row 2)"
    assert (warning in done.stderr) == rounded and b"field 'id'" not in done.stderr
