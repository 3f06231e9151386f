"""The training loop and everything that keeps it exact and alive."""
