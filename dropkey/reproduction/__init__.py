"""Tables of the paper: their YAML, the runs they need, a launcher, and the report. Imports no torch."""
