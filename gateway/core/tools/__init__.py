"""Tools: what clients define, how models are made to call them, and how calls are read out of their text."""
