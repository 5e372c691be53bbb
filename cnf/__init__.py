"""Continuous normalizing flows, and the discrete ones beside them, in one API."""
