"""Simulation: what other tools do with the same pack, timed by the same model as our plans."""
