"""Schema, checks, identity and the edge to Hydra. Imports neither torch nor timm."""
