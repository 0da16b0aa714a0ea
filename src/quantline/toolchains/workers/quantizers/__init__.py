"""One worker module per quantizer; each runs in its own toolchain, except `native`, which runs in this interpreter."""
