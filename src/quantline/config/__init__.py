"""Every option as a type, one module for each group of conf/."""
