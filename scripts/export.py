"""Writes a trained model for other programs; --help says how. The code is in dropkey/commands/export.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.commands.export import start

if __name__ == "__main__":
    start()
