"""Read Avro data into Arrow columns: a schema is compiled to a table of operations, and one compiled loop runs them
over the bytes."""
