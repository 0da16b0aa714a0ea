"""What each backend can quantize, running a backend, and the error of every linear."""
