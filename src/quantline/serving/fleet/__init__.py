"""Several variants behind one endpoint: what it is, the router's documents, the processes, what is watched."""
