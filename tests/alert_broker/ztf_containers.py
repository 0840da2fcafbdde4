"""Small ZTF alerts, with only the fields that are read, in Avro containers that fastavro writes."""

import io

import fastavro

SYNC = b"0123456789abcdef"
ROW = {"jd": "double", "fid": "int", "magpsf": "float", "sigmapsf": "float", "isdiffpos": "string"}


def schema(name="ztf.alert", note="", **extra):
    """Return the schema of an alert. extra: the types of more fields, by name."""
    row = {"type": "record", "name": "row", "fields": [{"name": key, "type": dtype} for key, dtype in ROW.items()]}
    fields = {"objectId": "string", "candid": "long", "candidate": row} | extra
    fields["prv_candidates"] = {"type": "array", "items": "row"}
    listed = [{"name": key, "type": dtype} for key, dtype in fields.items()]
    return {"type": "record", "name": name, "doc": note, "fields": listed}


def alert(candid=1, name="ZTF24aaaaaaa"):
    row = {"jd": 2_460_000.5 + candid, "fid": 1, "magpsf": 20.0, "sigmapsf": 0.1, "isdiffpos": "t"}
    return {"objectId": name, "candid": candid, "candidate": row, "prv_candidates": []}


def container(alerts, *, avro_schema=None, **options) -> bytes:
    stream = io.BytesIO()
    fastavro.writer(stream, avro_schema or schema(), alerts, sync_marker=SYNC, **options)
    return stream.getvalue()
