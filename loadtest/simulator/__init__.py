"""The simulator: the services' own decisions, in virtual time, on capacity traces and arrivals."""
