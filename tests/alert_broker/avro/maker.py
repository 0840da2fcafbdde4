"""Random Avro schemas and bytes that fit them, with every form of blocks, for the tests of the compiled reader."""

import numpy as np

SCALARS = ("null", "boolean", "int", "long", "float", "double", "string", "bytes", "fixed", "enum")


class Maker:
    """Draws schemas, and bytes that fit them."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.names = 0
        self.defined = {}  # types that later types can refer to by name

    def one_of(self, *values):
        return values[self.rng.integers(len(values))]

    def name(self):
        self.names += 1
        return f"n{self.names}"

    def record(self, depth):
        fields = [{"name": self.name(), "type": self.type(depth - 1)} for _ in range(self.rng.integers(1, 7))]
        fields.append({"name": self.name(), "type": "boolean"})  # so that no record takes no bytes
        return self.define({"type": "record", "name": self.name(), "fields": fields})

    def define(self, schema):
        self.defined[schema["name"]] = schema
        return schema

    def scalar(self):
        kind = self.one_of(*SCALARS)
        if kind == "fixed":
            return self.define({"type": "fixed", "name": self.name(), "size": int(self.rng.integers(1, 5))})
        if kind == "enum":
            return self.define({"type": "enum", "name": self.name(), "symbols": ["RED", "GREEN", "BLUE"]})
        return {"type": kind} if self.rng.random() < 0.1 else kind

    def type(self, depth):
        kinds = ["scalar", "optional", "named"] * 2
        if depth > 0:
            kinds += ["numbers", "record", "array", "map", "union", "records"]
        match self.one_of(*kinds):
            case "named" if self.defined:
                return self.one_of(*self.defined)
            case "record":
                return self.record(depth)
            case "array":
                return {"type": "array", "items": self.counted(depth)}
            case "map":
                return {"type": "map", "values": self.type(depth - 1)}
            case "numbers":
                # without both, doubles would round longs
                kinds = self.one_of(["int", "double", "null", "float"], ["long", "null", "int"])
                return [str(kind) for kind in self.rng.permutation(kinds)]
            case "union":
                return ["string", self.record(depth), {"type": "array", "items": self.counted(depth)}, "null"]
            case "records":
                rows = {"type": "array", "items": self.record(depth)}
                return self.one_of(["null", rows], [rows, "null"], ["null", rows["items"]])
            case "optional":
                inner = self.one_of(*self.defined) if self.defined and self.rng.random() < 0.2 else self.scalar()
                if inner not in ("null", {"type": "null"}):
                    return list(self.one_of(("null", inner), (inner, "null")))
        return self.scalar()

    def counted(self, depth):
        """Return a type for array items: any type that takes bytes."""
        inner = self.type(depth - 1)
        return "double" if inner in ("null", {"type": "null"}) else inner

    def encode(self, schema):
        rng = self.rng
        if isinstance(schema, list):
            branch = int(rng.integers(len(schema)))
            return zigzag(branch) + self.encode(schema[branch])
        schema = self.defined.get(schema, schema) if isinstance(schema, str) else schema
        kind = schema["type"] if isinstance(schema, dict) else schema
        if kind == "record":
            return b"".join(self.encode(item["type"]) for item in schema["fields"])
        if kind in ("array", "map"):
            return self.blocks(schema["items"] if kind == "array" else schema["values"], kind == "map")
        if kind == "fixed":
            return rng.bytes(schema["size"])
        if kind in ("int", "long", "enum"):
            bits = {"int": 31, "long": 63, "enum": 1}[kind]
            value = int(rng.integers(0, 2 ** int(rng.integers(1, bits + 1)), dtype=np.uint64))
            return zigzag(value if kind == "enum" or rng.random() < 0.5 else -value - 1)
        if kind in ("float", "double"):
            return np.array(rng.normal() * 10.0 ** rng.integers(-20, 20), "<f4" if kind == "float" else "<f8").tobytes()
        if kind in ("string", "bytes"):
            text = "".join(self.one_of(*"abcé☃𝄞") for _ in range(rng.integers(0, 9)))
            data = text.encode() if kind == "string" else rng.bytes(int(rng.integers(0, 200)))
            return zigzag(len(data)) + data
        return {"null": b"", "boolean": bytes([rng.integers(2)])}[kind]

    def blocks(self, items, keys):
        data = b""
        for _ in range(self.rng.integers(0, 3)):
            count = int(self.rng.integers(1, 4))
            body = b"".join((self.encode("string") if keys else b"") + self.encode(items) for _ in range(count))
            sized = self.rng.random() < 0.5
            data += (zigzag(-count) + zigzag(len(body)) if sized else zigzag(count)) + body
        return data + b"\0"


def zigzag(value):
    value = (value << 1) ^ (value >> 63)
    data = b""
    while value > 0x7F:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])
