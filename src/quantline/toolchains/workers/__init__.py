"""Code that runs in the toolchains' environments. It is started by module name and never imported."""
