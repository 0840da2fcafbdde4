"""Sessions: named arrays in, named arrays out."""
