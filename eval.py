"""Evaluates a run: python eval.py run=runs/<directory> [eval.split=val] [eval.monte_carlo=16] [data=...].

The code with @hydra.main, which Hydra's completion in the shell looks for here, is in dropkey/commands/eval.py.
"""

from dropkey.commands.eval import start

if __name__ == "__main__":
    start()
