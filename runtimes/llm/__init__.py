"""Language models: engines behind one step protocol, paged key-value caches, schedules that change no token."""
