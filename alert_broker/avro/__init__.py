"""Avro data to Arrow columns: a schema becomes a table of operations, which one compiled loop walks over bytes."""
