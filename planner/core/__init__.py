"""Pure decisions of the planner: no clock, no I/O."""
