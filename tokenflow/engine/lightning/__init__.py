"""Lightning around the engine: the module, its jobs, and the callbacks of a predict run."""
