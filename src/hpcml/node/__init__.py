"""Inside the allocation: which rank this is, its devices and threads, and the worker that runs the work."""
