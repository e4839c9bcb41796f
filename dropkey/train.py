"""python -m dropkey.train, as in `torchrun --nproc-per-node=8 -m dropkey.train`: the same as `dropkey train`."""

if __name__ == "dropkey.train":  # the name is a function's, and an imported module would take its place
    raise ImportError("dropkey.train is no module to import: its code is in dropkey.commands.train")
if __name__ == "__main__":
    import sys

    from dropkey.commands.train import start

    sys.argv[0] = "python -m dropkey.train"
    start()
