"""Makes label maps with a teacher; --help says how. The code is in dropkey/commands/label_maps.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.commands.label_maps import start

if __name__ == "__main__":
    start()
