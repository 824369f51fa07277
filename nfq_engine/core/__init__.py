"""The pure half of the engine: no socket, no clock, no chance, no kernel in here."""
