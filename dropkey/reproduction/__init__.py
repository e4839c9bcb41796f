"""Tables of the paper: what they ask, the runs they need, and what came of them. Imports no torch."""
