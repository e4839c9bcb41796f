"""What mesh recovery needs: bodies and their samples, losses and errors."""
