"""One worker module per quantizer; each runs in its own toolchain, `native` in this interpreter."""
