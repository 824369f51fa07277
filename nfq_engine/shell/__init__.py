"""The half of the engine that touches the kernel and other processes; it asks the core what to do."""
