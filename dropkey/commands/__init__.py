"""The commands of `dropkey`, one module each; dropkey/invocation.py lists them."""
