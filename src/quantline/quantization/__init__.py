"""Which backend can quantize what, running it, and the error of every linear."""
