"""llama.cpp's C interface, in a library that others have built: PyPI's xllamacpp, or a folder with libllama.so.

The structs that C functions take by value have other fields in other releases of llama.cpp, and a library does not say
which. So their layout is probed: the functions that return default parameters show at which byte each default lies, and
a library whose defaults lie elsewhere is refused. After a context is made, it is asked for the sizes that were set.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError

VARIABLE = "EDGEKIT_LLAMACPP"
INSTALL = (
    f"pip install 'edgekit[llamacpp]', or set {VARIABLE} to the folder of another build of llama.cpp (libllama.so)"
)
STRUCT = 512  # bytes, more than any of llama.cpp's structs has
# int32 fields of llama_context_params: byte and default; fields that edgekit sets have names
CONTEXT = {
    "context": (0, 512), "batch": (4, 2048), "microbatch": (8, 512), "sequences": (12, 1), "threads": (28, 4),
    "batch_threads": (32, 4), "flash_attention": (52, -1), "keys": (104, 1), "values": (108, 1),
}  # fmt: skip
# booleans of llama_context_params, from one of these bytes on: embeddings, offload_kqv, no_perf, op_offload, swa_full,
# kv_unified
FLAGS_AT, FLAGS, OFFLOAD, UNIFIED = (128, 136), b"\0\1\1\1\1\0", 1, 5
MODEL = {"gpu_layers": (16, -1), "split_mode": (20, 1)}  # the same of llama_model_params
# both calling conventions pass structs of this size in memory, so that a callee reads of a longer one what it knows
MACHINES = ("x86_64", "aarch64")
MOST_SEQUENCES = 256  # of one context
ERROR = 4  # number of llama.cpp's level of log lines


class Struct(ctypes.Structure):
    """A struct of llama.cpp, whatever it holds."""

    _fields_ = (("content", ctypes.c_uint8 * STRUCT),)

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<i", self.content, at, value)


POINTERS = ("tokens", "embeddings", "positions", "counts", "sequences", "logits")  # of llama_batch


class Batch(ctypes.Structure):
    """llama_batch: the rows of one call."""

    _fields_ = (
        ("number", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """flags: the byte of llama_context_params at which its booleans begin."""

    flags: int


def layout_of(context: bytes, model: bytes) -> Layout | None:
    """Return the layout in which these default parameters are; None if it is unknown."""
    for content, known in ((context, CONTEXT), (model, MODEL)):
        if any(struct.unpack_from("<i", content, at)[0] != default for at, default in known.values()):
            return None
    found = [at for at in FLAGS_AT if content_at(context, at) == FLAGS]
    return Layout(found[0]) if len(found) == 1 else None


def content_at(content: bytes, at: int) -> bytes:
    return content[at : at + len(FLAGS)]


POINTER, NUMBER, SIZE, TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.c_char_p
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
FUNCTIONS: dict[str, tuple[type | None, Sequence[type]]] = {
    "llama_context_default_params": (Struct, []),
    "llama_model_default_params": (Struct, []),
    "llama_batch_init": (Batch, [NUMBER, NUMBER, NUMBER]),
    "llama_batch_free": (None, [Batch]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, POINTER]),
    "llama_print_system_info": (TEXT, []),
    "llama_supports_gpu_offload": (ctypes.c_bool, []),
    "llama_model_load_from_file": (POINTER, [TEXT, Struct]),
    "llama_model_free": (None, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (NUMBER, [POINTER]),
    "llama_init_from_model": (POINTER, [POINTER, Struct]),
    "llama_free": (None, [POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [POINTER]),
    "llama_n_ubatch": (ctypes.c_uint32, [POINTER]),
    "llama_n_seq_max": (ctypes.c_uint32, [POINTER]),
    "llama_n_threads": (NUMBER, [POINTER]),
    "llama_n_threads_batch": (NUMBER, [POINTER]),
    "llama_decode": (NUMBER, [POINTER, Batch]),
    "llama_synchronize": (None, [POINTER]),
    "llama_get_logits": (POINTER, [POINTER]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_seq_rm": (ctypes.c_bool, [POINTER, NUMBER, NUMBER, NUMBER]),
    "llama_memory_seq_cp": (None, [POINTER, NUMBER, NUMBER, NUMBER, NUMBER]),
    "llama_state_seq_get_size": (SIZE, [POINTER, NUMBER]),
    "llama_state_seq_get_data": (SIZE, [POINTER, POINTER, SIZE, NUMBER]),
    "llama_state_seq_set_data": (SIZE, [POINTER, POINTER, SIZE, NUMBER]),
}


class Library:
    """A library that is loaded, and whose layout is known. path: of libllama.so or of a library that contains it."""

    def __init__(self, path: Path) -> None:
        if platform.machine() not in MACHINES:
            raise EdgekitError(f"llama.cpp's engine runs on {' and '.join(MACHINES)}, not on {platform.machine()}")
        self.path = path
        self._errors: list[str] = []
        self._log = LOG(self._note)  # llama.cpp calls it as long as the process lives
        before = [_load(file) for pattern in ("libggml-base.so*", "libggml[.]*so*") if (file := _first(path, pattern))]
        self.c = _load(path)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.c, name, None)
            if function is None:
                raise EdgekitError(f"{path}: has no function {name}, so it is another or an older library; {INSTALL}")
            function.restype, function.argtypes = result, arguments
        self.layout = self._probed()
        self.c.llama_log_set(self._log, None)
        for library in (*before, self.c):
            if hasattr(library, "ggml_backend_load_all_from_path"):  # the code of each CPU is in a file of its own
                library.ggml_backend_load_all_from_path(os.fsencode(path.parent))
                break
        self.c.llama_backend_init()

    @property
    def instructions(self) -> str:
        """The instruction sets that the library uses on this machine."""
        parts = self.c.llama_print_system_info().decode("utf-8", "replace").split("|")
        return " ".join(part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1"))

    def failure(self, what: str) -> EdgekitError:
        """Return an error with the lines that llama.cpp has logged as such since the last one."""
        reason = " ".join(" ".join(self._errors).split()) or "it says nothing of the reason"
        self._errors = []
        return EdgekitError(f"llama.cpp ({self.path.name}) {what}: {reason}")

    def _probed(self) -> Layout:
        context, model = self.c.llama_context_default_params(), self.c.llama_model_default_params()
        layout = layout_of(bytes(context.content), bytes(model.content))
        batch = self.c.llama_batch_init(1, 0, 1)
        filled = {name for name in POINTERS if getattr(batch, name)}
        if layout is None or batch.number or filled != set(POINTERS) - {"embeddings"}:
            raise EdgekitError(
                f"{self.path}: the parameters of this release of llama.cpp have a layout that edgekit does not know; "
                f"{INSTALL}"
            )
        self.c.llama_batch_free(batch)
        return layout

    def _note(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            self._errors = [*self._errors[-3:], text.decode("utf-8", "replace")]


def find(given: str | Path | None = None) -> Path:
    """Return the library's file. given: a file or a folder; by default $EDGEKIT_LLAMACPP, then xllamacpp's."""
    if chosen := given or os.environ.get(VARIABLE):
        path = Path(chosen)
        found = path if path.is_file() else _first(path / "libllama.so", "libllama[.]*so*")
        if found is None:
            raise EdgekitError(f"{path}: no file, and no folder with a libllama.so; {INSTALL}")
        return found.resolve()
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if files := sorted(Path(folder).glob("xllamacpp*.so")):
            return files[0].resolve()
    raise EdgekitError(f"no llama.cpp library is installed; {INSTALL}")


@functools.cache
def opened(path: Path) -> Library:
    """Return the library of a file; a process loads it once."""
    return Library(path)


def _first(path: Path, pattern: str) -> Path | None:
    """Return the file of this pattern beside `path`."""
    return next(iter(sorted(path.parent.glob(pattern))), None)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be loaded ({error}); {INSTALL}") from None
