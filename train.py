"""Trains one run: python train.py [group=option] [key=value]; `python train.py --help` lists them.

The code with @hydra.main, which Hydra's completion in the shell looks for here, is in dropkey/commands/train.py.
"""

from dropkey.commands.train import start

if __name__ == "__main__":
    start()
