"""Values of Arrow columns as JSON, and back with the same type.

| Arrow | JSON |
|---|---|
| integers, booleans, strings | themselves |
| floats | themselves; "NaN", "Infinity", "-Infinity" as strings |
| decimals | strings of their digits |
| dates, times, timestamps | ISO 8601, with the digits of the unit; timestamps with a time zone in UTC ("...Z") |
| times outside of a day, which Arrow does not allow | the same, as "25:00:00" or "-00:00:05" |
| durations | ISO 8601, in seconds: "PT1.500S" |
| binary | base64; in columns that hold text (io/parquet.py), the text |
| structs, lists | objects, arrays |
| maps | arrays of [key, value] |
| dictionary | its values |

As in the JSON mapping of Protocol Buffers, so that nothing is lost: JSON has no NaN, and null is another value. Structs
with two fields of one name, and all other types, have no form in JSON.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.types as kinds

Convert = Callable[[Any], Any]

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of a second
EPOCH = datetime(1970, 1, 1)
TIME = re.compile(r"(-?)(\d\d+):([0-5]\d):([0-5]\d)(?:\.(\d+))?", re.ASCII)
AS_THEY_ARE = (
    kinds.is_null,
    kinds.is_boolean,
    kinds.is_integer,
    kinds.is_string,
    kinds.is_large_string,
    kinds.is_string_view,
)


class Codec(NamedTuple):
    """How values of a type become JSON: the Arrow type to cast to first, and functions to and from its Python values.

    None: the values stay as they are.
    """

    plain: pa.DataType
    encode: Convert | None = None
    decode: Convert | None = None


def to_json(array: pa.Array, escape: bool = False) -> list[Any]:
    """The values of an array. Raises pa.ArrowException for types that have no form in JSON.

    Strings that are not UTF-8 raise UnicodeDecodeError, unless their bytes are to be escaped as lone surrogates.
    """
    array = decoded(array)
    plain, encode, _ = codec(array.type, escape)
    values: list[Any] = (array if plain == array.type else array.cast(plain)).to_pylist()
    return [None if value is None else encode(value) for value in values] if encode else values


def decoded(array: pa.Array) -> pa.Array:
    """The array without extension types and dictionaries."""
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if kinds.is_dictionary(array.type) else array


def is_bytes(type: pa.DataType) -> bool:
    """Whether values are bytes of any number."""
    if kinds.is_dictionary(type):
        return is_bytes(type.value_type)
    return any(test(type) for test in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view))


def as_strings(array: pa.Array) -> pa.Array:
    """Bytes as strings, which are not validated."""
    array = decoded(array)
    array = array.cast(pa.large_binary()) if kinds.is_binary_view(array.type) else array
    return array.view(pa.string() if kinds.is_binary(array.type) else pa.large_string())


def from_json(values: list[Any], type: pa.DataType) -> pa.Array:
    """An array of a type.

    Raises ValueError, TypeError, ArithmeticError or pa.ArrowException for values that do not fit.
    """
    if isinstance(type, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(type, from_json(values, type.storage_type))
    _, _, decode = codec(type)
    if decode:
        values = [None if value is None else decode(value) for value in values]
    return pa.array(values, type)


def codec(type: pa.DataType, escape: bool = False) -> Codec:
    """The conversion of a type; `escape` as for `to_json`. pa.ArrowNotImplementedError for a type without one."""
    if kinds.is_dictionary(type):
        return codec(type.value_type, escape)
    if escape and (kinds.is_string(type) or kinds.is_large_string(type) or kinds.is_string_view(type)):
        return Codec(pa.large_binary(), lambda value: value.decode("utf-8", "surrogateescape"))
    if kinds.is_floating(type):
        return Codec(type, _encode_float, _decode_float)
    if kinds.is_decimal(type):
        return Codec(pa.string(), None, Decimal)
    if kinds.is_timestamp(type):
        suffix = "Z" if type.tz else ""
        return Codec(pa.int64(), *_time_point(DIGITS[type.unit], suffix))
    if kinds.is_date(type):
        return Codec(pa.int32(), *_days()) if kinds.is_date32(type) else Codec(pa.int64(), *_time_point(3, ""))
    if kinds.is_time(type):
        return Codec(pa.int32() if kinds.is_time32(type) else pa.int64(), *_time_of_day(DIGITS[type.unit]))
    if kinds.is_duration(type):
        return Codec(pa.int64(), *_duration(DIGITS[type.unit]))
    if is_bytes(type) or kinds.is_fixed_size_binary(type):
        return Codec(type, lambda value: base64.b64encode(value).decode(), _decode_binary)
    if kinds.is_struct(type):
        return _struct(type, escape)
    if kinds.is_map(type):
        key, item = codec(type.key_type, escape), codec(type.item_type, escape)
        plain = pa.map_(key.plain, item.plain)
        return Codec(plain, _pairs(key.encode, item.encode), _pairs(key.decode, item.decode))
    if kinds.is_list(type) or kinds.is_large_list(type) or kinds.is_fixed_size_list(type):
        inner = codec(type.value_type, escape)
        new = pa.large_list if kinds.is_large_list(type) else pa.list_
        size = (type.list_size,) if kinds.is_fixed_size_list(type) else ()
        plain = type if inner.plain == type.value_type else new(type.value_field.with_type(inner.plain), *size)
        return Codec(plain, _each(inner.encode), _each(inner.decode))
    if isinstance(type, pa.BaseExtensionType) or any(test(type) for test in AS_THEY_ARE):
        return Codec(type)
    if kinds.is_list_view(type) or kinds.is_large_list_view(type):
        inner = codec(type.value_type)
        if inner == Codec(type.value_type):  # pyarrow casts the others to invalid arrays
            return Codec(type)
    raise pa.ArrowNotImplementedError(f"values of type {type} have no form in JSON")


def _call(convert: Convert | None, value: Any) -> Any:
    return value if value is None or convert is None else convert(value)


def _each(convert: Convert | None) -> Convert | None:
    return convert and (lambda values: [_call(convert, value) for value in values])


def _pairs(of_key: Convert | None, of_item: Convert | None) -> Convert:
    return lambda pairs: [(_call(of_key, key), _call(of_item, item)) for key, item in pairs]


def _struct(type: pa.StructType, escape: bool) -> Codec:
    fields = [type.field(i) for i in range(type.num_fields)]
    if len({field.name for field in fields}) < len(fields):
        raise pa.ArrowNotImplementedError(f"two fields of {type} have one name")
    codecs = {field.name: codec(field.type, escape) for field in fields}
    plain = pa.struct([field.with_type(codecs[field.name].plain) for field in fields])

    def encode(value: dict[str, Any]) -> dict[str, Any]:
        return {name: _call(codecs[name].encode, item) for name, item in value.items()}

    def decode(value: dict[str, Any]) -> dict[str, Any]:
        if unknown := value.keys() - codecs.keys():
            raise ValueError(f"no field {min(unknown)!r} in the type")
        return {name: _call(codecs[name].decode, item) for name, item in value.items()}

    same = all(item.encode is None and item.decode is None for item in codecs.values())
    return Codec(plain, None if same else encode, decode)


def _encode_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode_float(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _decode_binary(value: str) -> bytes:
    return base64.b64decode(value, validate=True)


def _days() -> tuple[Convert, Convert]:
    encode, decode = _time_point(0, "")
    return lambda days: encode(days * 86_400)[:-9], lambda text: decode(text + "T00:00:00") // 86_400


def _time_point(digits: int, suffix: str) -> tuple[Convert, Convert]:
    """To and from units of 10^-digits s since 1970."""
    scale: int = 10**digits

    def encode(units: int) -> str:
        seconds, fraction = divmod(units, scale)
        return _iso_seconds(seconds) + (f".{fraction:0{digits}}" if digits else "") + suffix

    def decode(text: str) -> int:
        whole, _, fraction = text.removesuffix("Z").partition(".")
        if len(fraction) > digits or bool(suffix) != text.endswith("Z") or not (fraction.isdigit() or not fraction):
            raise ValueError(f"{text!r} has another form")
        return _seconds_of(whole) * scale + int(fraction.ljust(digits, "0") or 0)

    return encode, decode


def _time_of_day(digits: int) -> tuple[Convert, Convert]:
    """To and from units of 10^-digits s since midnight; those outside of a day have more hours, or a sign."""
    scale: int = 10**digits

    def encode(units: int) -> str:
        seconds, fraction = divmod(abs(units), scale)
        text = f"{'-' * (units < 0)}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return text + (f".{fraction:0{digits}}" if digits else "")

    def decode(text: str) -> int:
        match = TIME.fullmatch(text)
        if not match or len(match[5] or "") > digits:
            raise ValueError(f"{text!r} has another form")
        seconds = int(match[2]) * 3600 + int(match[3]) * 60 + int(match[4])
        return (-1 if match[1] else 1) * (seconds * scale + int((match[5] or "").ljust(digits, "0") or 0))

    return encode, decode


def _iso_seconds(seconds: int) -> str:
    try:
        return (EPOCH + timedelta(seconds=seconds)).isoformat()
    except OverflowError:  # years that datetime lacks
        import numpy as np

        return str(np.datetime64(seconds, "s"))


def _seconds_of(text: str) -> int:
    if len(text) == 19 and text[:4].isdigit():
        difference = datetime.fromisoformat(text) - EPOCH
        return difference.days * 86_400 + difference.seconds
    import numpy as np

    return int(np.datetime64(text, "s").astype(np.int64))


def _duration(digits: int) -> tuple[Convert, Convert]:
    scale: int = 10**digits

    def encode(units: int) -> str:
        seconds, fraction = divmod(abs(units), scale)
        return f"{'-' * (units < 0)}PT{seconds}" + (f".{fraction:0{digits}}" if digits else "") + "S"

    def decode(text: str) -> int:
        sign = -1 if text.startswith("-") else 1
        whole, _, fraction = text.removeprefix("-").removeprefix("PT").removesuffix("S").partition(".")
        return sign * (int(whole) * scale + int(fraction.ljust(digits, "0") or 0))

    return encode, decode
