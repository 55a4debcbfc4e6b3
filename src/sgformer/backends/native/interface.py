"""The kernels' C interface for ctypes: structs and signatures as interface.h, the only source of them, declares them.

Reading it takes a millisecond. Pointers are addresses or None; references and arrays of structs are passed as they are.
Structs take their fields by name or in order, and reject unknown names.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEADER = Path(__file__).with_name("interface.h")
SCALARS: dict[str, Any] = {
    "float": ctypes.c_float,
    "int": ctypes.c_int,
    "Index": ctypes.c_int64,
    "void": None,
}


def parse(text: str) -> tuple[dict[str, Any], dict[str, tuple[Any, list[Any]]]]:
    """Structs by name, and the result and argument types of every function."""
    text = re.sub(r"//.*", "", text)
    structs: dict[str, Any] = {}
    functions = {}
    for struct, body, result, name, arguments in re.findall(
        r'^struct (\w+) {(.*?)};|^extern "C" (\w+) (\w+)\((.*?)\);', text, re.MULTILINE | re.DOTALL
    ):
        if struct:
            fields = [field for line in body.split(";") if line.strip() for field in _fields(line, structs)]
            structs[struct] = type(struct, (ctypes.Structure,), {"__slots__": (), "_fields_": fields})
        else:
            declared = [_declared(argument, structs)[1] for argument in arguments.split(",") if argument.strip()]
            functions[name] = (SCALARS[result], declared)
    return structs, functions


def _fields(line: str, structs: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """The fields of a line; ``const float *weight, *bias`` declares two."""
    first, *others = line.split(",")
    kind = re.sub(r"[*&]?\s*\w+$", "", first.strip())
    return (_declared(field, structs) for field in (first, *(kind + other for other in others)))


def _declared(text: str, structs: dict[str, Any]) -> tuple[str, Any]:
    """Name and type of ``const float* x``, ``Index rows`` or ``const Grid& grid``."""
    found = re.fullmatch(r"(?:const )?(\w+)\s*([*&]?)\s*(\w+)", " ".join(text.split()))
    if found is None:
        raise ValueError(f"{HEADER.name}: cannot read the declaration {text.strip()!r}")
    kind, pointer, name = found.groups()
    if not pointer:
        return name, SCALARS[kind] if kind in SCALARS else structs[kind]
    return name, ctypes.POINTER(structs[kind]) if kind in structs else ctypes.c_void_p


STRUCTS, FUNCTIONS = parse(HEADER.read_text())


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set the argument and result types of a library's functions."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
