"""Pure decisions of the engine: no clock, no I/O, no torch."""
