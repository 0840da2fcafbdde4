"""The parts of the C exporter: they describe a network as kernel calls, write the calls as C text, and compile and load
it."""
