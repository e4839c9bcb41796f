"""Hostile commands and damaged files, generated: what must end in one clear line, and lose nothing.

python -m hostile [family ...]     (in tests/, or `make faults`) all of them, and a table: case family, tried, survived
"""
