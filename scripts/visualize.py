"""Draws what a regularizer does; `python scripts/visualize.py --help` says how. The code: dropkey/commands/visualize.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.commands.visualize import start

if __name__ == "__main__":
    start()
