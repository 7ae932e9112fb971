"""Reads the rows of JSON lines and of JSON documents."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

Object = dict[str, Any]


def load_json(text: str) -> Any:
    """Return the value of a JSON text; a number of thousands of digits is infinite.

    Raises:
      ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python limits the number of digits of an int
        return json.loads(text, parse_int=float)


class TextLine(ValueError):
    """A line between JSON lines that is plain text: the file is a log."""


def read_json_lines(lines: Iterable[str]) -> Iterator[Object]:
    """Yield the object on each line; a number alone goes into the column "norm".

    A line that a stopped run cut off has only empty cells.

    Raises:
      TextLine: a line is plain text.
      ValueError: a line is neither an object nor a number.

    >>> list(read_json_lines(['{"norm": 1.5}', '2.5', '{"no']))
    [{'norm': 1.5}, {'norm': 2.5}, {}]
    """
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text:
            yield parse_line(text, number)


def parse_line(line: str, number: int) -> Object:
    """Return one JSON line as an object; `number` is for errors."""
    try:
        row = load_json(line)
    except ValueError as error:
        if number > 1 and line[0] == "{" and is_cut_off(line, error):
            return {}
        kind = ValueError if line[0] in "{[" else TextLine
        raise kind(
            f"line {number} is not JSON: {error}; if a resumed run continues a line "
            "that was cut off, delete that line"
        ) from None
    if isinstance(row, dict):
        return row
    if isinstance(row, int | float | str):
        return {"norm": row}
    raise ValueError(
        f"line {number} must be an object or a number, got {line.strip()[:40]!r}"
    )


def is_cut_off(line: str, error: ValueError) -> bool:
    """Return whether the end of an object is missing, and nothing else is wrong."""
    return line[-1] != "}" or getattr(error, "pos", 0) == len(line)


def flatten(row: Object) -> Object:
    """Return an object with dotted names for nested ones; lists are left out.

    >>> flatten({"step": 1, "train": {"grad_norm": 0.5}, "shape": [2]})
    {'step': 1, 'train.grad_norm': 0.5}
    """
    if not any(isinstance(value, dict | list) for value in row.values()):
        return row
    flat: Object = {}
    waiting = [("", row)]
    while waiting:
        prefix, inner = waiting.pop()
        for name, value in inner.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))
            elif not isinstance(value, list):
                flat[prefix + name] = value
    return flat


def read_document(document: Any) -> tuple[str, Iterator[Object]]:
    """Return the kind of a JSON document and its rows.

    It is a list of objects or numbers, TensorBoard's list of [time, step, value], an
    object of lists such as Keras's `history`, or Hugging Face's trainer state.

    Raises:
      ValueError: the document holds no series.

    >>> kind, rows = read_document({"loss": [3, 2], "grad_norm": [1.5, 1.4]})
    >>> kind, list(rows)
    ('JSON', [{'loss': 3, 'grad_norm': 1.5}, {'loss': 2, 'grad_norm': 1.4}])
    """
    if isinstance(document, list):
        return read_list(document)
    if not isinstance(document, dict):
        return "JSON", iter([{"norm": document}])
    history = document.get("log_history")
    if isinstance(history, list):
        return "Hugging Face trainer state", map(flatten, history)
    columns = dict(find_series(document))
    if columns:
        return "JSON", transpose(columns)
    for value in document.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "JSON", map(flatten, value)
    return "JSON", iter([flatten(document)])


def read_list(items: list[Any]) -> tuple[str, Iterator[Object]]:
    """Return the kind and the rows of a JSON list."""
    if items and all(isinstance(item, list) and len(item) == 3 for item in items):
        names = ("Wall time", "Step", "Value")
        rows = (dict(zip(names, item, strict=True)) for item in items)
        return "TensorBoard JSON", rows
    if all(isinstance(item, dict) for item in items):
        return "JSON", map(flatten, items)
    if all(not isinstance(item, dict | list) for item in items):
        return "JSON", ({"norm": item} for item in items)
    raise ValueError(
        "the JSON list must hold objects, numbers or [time, step, value], got "
        f"{json.dumps(items[0])[:60]}"
    )


def find_series(document: Object, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield the lists of numbers in an object with their dotted names.

    pandas writes a series as an object with the keys "0", "1", "2".
    """
    for name, value in document.items():
        if isinstance(value, list) and all(is_scalar(item) for item in value):
            yield prefix + name, value
        elif isinstance(value, dict) and value:
            if all(key.isdecimal() for key in value) and len(value) > 1:
                yield prefix + name, list(value.values())
            else:
                yield from find_series(value, f"{prefix}{name}.")


def is_scalar(item: Any) -> bool:
    """Return whether a JSON value is a number, a text or null."""
    return not isinstance(item, dict | list)


def transpose(columns: dict[str, list[Any]]) -> Iterator[Object]:
    """Yield the rows of columns; shorter columns end with missing cells."""
    for place in range(max(map(len, columns.values()))):
        yield {
            name: cells[place] for name, cells in columns.items() if place < len(cells)
        }
