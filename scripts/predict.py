"""Classifies images with a trained run; --help says how. The code is in dropkey/commands/predict.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.commands.predict import start

if __name__ == "__main__":
    start()
