"""Does a run fit a TPU slice? Answered by compiling its programs for that slice, on a machine without one."""
